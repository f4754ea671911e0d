"""The choice of device, precision and batch, from descriptions of machines that are not there."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, command, environment, posix, torchruns_variables

import hellaswag
import optim
import train_gpt2
from model import GPT, GPTConfig
from settings import PRESETS
from support import checkpoint, driver, hardware, run_folder, runtime, stop_signal
from support.cli import UserError
from support.runtime import Runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu sse2 avx2", torch.float32),
        ("fpu avx512f avx512_bf16", torch.bfloat16),
        ("amx_tile amx_bf16", torch.bfloat16),
        ("fpu avx512f", torch.float32),
    ],
)
def test_a_cpu_gets_bf16_only_with_units_for_it(
    flags: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    found = runtime.cpu_flags(str(tmp_path / "cpuinfo"))
    assert found == set(flags.split())
    assert runtime.cpu_flags(str(tmp_path / "missing")) == set()
    monkeypatch.setattr(runtime, "cpu_flags", lambda: found)
    assert runtime.pick_dtype(CPU, "auto") == dtype
    assert runtime.pick_dtype(CPU, "float16") == torch.float16


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_gets_bf16_where_it_is_native(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert runtime.pick_dtype(torch.device("cuda"), "auto") == dtype
    assert runtime.pick_dtype(torch.device("mps"), "auto") == torch.float32


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an A100 and a T4; torch answers for the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device.index))
    properties = (SimpleNamespace(major=8, minor=0), SimpleNamespace(major=7, minor=5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(driver, "check_architecture", lambda device: None)
    return monkeypatch


@pytest.mark.parametrize(("device", "dtype"), [("cuda:0", torch.bfloat16), ("cuda:1", torch.float16)])
def test_the_precision_depends_on_this_process_s_gpu(
    device: str, dtype: torch.dtype, two_gpus: pytest.MonkeyPatch
) -> None:
    rt = runtime.start(device, "auto")
    assert (rt.device, rt.dtype) == (torch.device(device), dtype)
    assert runtime.start(device, "bfloat16").dtype == torch.bfloat16


def test_a_process_on_a_second_machine_uses_its_local_gpu(two_gpus: pytest.MonkeyPatch) -> None:
    """Its GPU is that of its rank on the machine; and with an A100 it trains as the T4 beside it does."""
    joined: list[dict[str, object]] = []
    two_gpus.setattr(dist, "is_nccl_available", lambda: True)
    two_gpus.setattr(dist, "init_process_group", lambda backend, **options: joined.append(options))
    two_gpus.setattr(Runtime, "max_over_ranks", lambda rt, *numbers: list(numbers))  # all others are A100s
    for name, value in {**torchruns_variables(4), "RANK": "2"}.items():
        two_gpus.setenv(name, value)
    assert runtime.start("auto", "auto").dtype == torch.bfloat16
    two_gpus.setattr(Runtime, "max_over_ranks", lambda rt, *numbers: [max(number, 1) for number in numbers])
    for local_rank in (0, 1):
        for name, value in {
            **torchruns_variables(4),
            "RANK": 2 + local_rank,
            "LOCAL_RANK": local_rank,
        }.items():
            two_gpus.setenv(name, str(value))
        rt = runtime.start("auto", "auto")
        assert (rt.device.index, rt.rank, rt.local_rank, rt.world_size) == (
            local_rank,
            2 + local_rank,
            local_rank,
            4,
        )
        assert rt.dtype == torch.float16
        assert joined[-1]["rank"] == 2 + local_rank and joined[-1]["device_id"] == rt.device
        assert runtime.start("auto", "bfloat16").dtype == torch.bfloat16


def test_a_group_is_destroyed_after_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an all-reduce is under way when the call returns, and its end is what reading waits for."""
    events = []

    class Pending:
        def item(self) -> int:
            events.append("read")
            return 2  # nobody has failed

    monkeypatch.setattr(dist, "new_group", lambda timeout: "group")
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: events.append(f"left {group}"))
    monkeypatch.setattr(Runtime, "all_reduce", lambda rt, flag, op, group: Pending())
    assert Runtime(CPU, torch.float32, world_size=2).run_on(True, lambda: 5, fetches=True) == 5
    assert events == ["read", "left group"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "xpu", "nonsense"])
def test_missing_devices_are_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device}"):
        runtime.start(device, "auto")


def test_only_the_death_of_torchrun_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from a shell that is closed (nohup, tmux) has lost its parent too, and continues."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert runtime.start("cpu", "float32").agent == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert runtime.start("cpu", "float32").agent == os.getppid()


@posix
@pytest.mark.parametrize(("is_there", "number"), [(True, 0), (False, signal.SIGTERM)])
def test_the_death_of_torchrun_stops_a_run_like_sigterm(
    monkeypatch: pytest.MonkeyPatch, is_there: bool, number: int
) -> None:
    """With a real one in tests/faults."""
    monkeypatch.setattr(stop_signal, "AGENT_INTERVAL", 0.01)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        stop = stop_signal.StopSignal()
        stop.listen(announce=False, agent=os.getppid() if is_there else os.getpid())
        deadline = time.monotonic() + (0.5 if is_there else 10)
        while not stop.number and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.number == number
    finally:
        signal.set_wakeup_fd(wakeup)
        for each, handler in before.items():
            signal.signal(each, handler)


def test_largest_power_of_two_stops_at_the_limit() -> None:
    tried = []
    assert hardware.largest_power_of_two(lambda B: tried.append(B) or B <= 9, 100) == 8
    assert tried == [1, 2, 4, 8, 16]  # from small to large: nothing twice as large as need be is tried
    assert hardware.largest_power_of_two(lambda B: True, 4) == 4
    assert hardware.largest_power_of_two(lambda B: True, 7) == 4
    assert hardware.largest_power_of_two(lambda B: False, 4) == 0


def test_micro_batch_divides_the_share_of_a_process() -> None:
    model = GPT(GPTConfig(64, 50257, 1, 1, 4))
    here = runtime.Runtime(CPU, torch.float32)
    for sequences, B in ((24, 8), (7, 1), (1024, 32)):
        assert hardware.largest_micro_batch(model, 64, sequences, 0, "adamw", here) == B


class Machine:
    """A CUDA device's memory, in the books only, and a model that takes 100 bytes a sequence of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, fails: Exception | None = None) -> None:
        self.total, self.fails = total, fails
        self.reserved = 0.0
        self.trials: list[tuple[int, int, bool]] = []  # sequences, chunks, gradients from an earlier round
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "reserved", 0.0))
        self.peak_forgotten = False
        forget = lambda device: setattr(self, "peak_forgotten", True)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch, "empty", lambda n, device: self.take(4 * n) or empty(0))
        for name in ("zeros", "tensor"):
            real = getattr(torch, name)
            monkeypatch.setattr(
                torch, name, lambda *a, real=real, **k: real(*a, **{**k, "device": "cpu"} if k else k)
            )

    def take(self, n_bytes: float) -> None:
        self.reserved += n_bytes
        if self.reserved > self.total and self.fails:
            raise self.fails

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        shapes = {"wte.weight": (10, 4), "h.0.mlp.c_fc.weight": (16, 4), "h.0.mlp.c_fc.bias": (16,)}
        return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]

    def zero_grad(self, set_to_none: bool) -> None:
        self.weight.grad = None

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor, chunks: int) -> tuple[None, torch.Tensor]:
        self.trials.append((len(idx), chunks, self.weight.grad is not None))
        if self.weight.grad is None:  # a second round reuses the memory of the first
            self.take(100 * len(idx))
        return None, self.weight.sum()


CUDA = runtime.Runtime(torch.device("cuda", 0), torch.float32)


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        None,  # as on Windows, where memory spills to the host and nothing fails
    ],
    ids=["torch", "cublas", "cublas handle", "cudnn", "spills"],
)
def test_the_search_finds_the_largest_micro_batch(
    failure: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, 4000, failure)
    # 120 parameters with 8 bytes of moments each; 16 sequences take 1600 bytes, 32 take 3200.
    assert hardware.largest_micro_batch(machine, 8, 64, 3, "adamw", CUDA) == 16
    tried = [B for B, _, _ in machine.trials]
    assert tried[0] == 1 and tried == sorted(tried) and max(tried) == 32
    assert {chunks for _, chunks, _ in machine.trials} == {3}
    assert (16, 3, True) in machine.trials, "an accumulating step has gradients in its second round"
    assert machine.weight.grad is None
    assert machine.peak_forgotten, "or the run would report the search's peak as its own"


@pytest.mark.parametrize(("total", "B"), [(1760, 4), (1860, 8)])
def test_the_search_leaves_headroom_and_accumulates_like_a_step(
    total: float, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 8 sequences, one round: 960 bytes of moments, 800 of activations, and one part in twenty to spare.
    machine = Machine(monkeypatch, total)
    assert hardware.largest_micro_batch(machine, 8, 8, 0, "adamw", CUDA) == B
    assert [trial for trial in machine.trials if trial[0] == 8] == [(8, 1, False)]


def test_the_search_raises_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        hardware.largest_micro_batch(machine, 8, 8, 0, "adamw", CUDA)


def test_the_search_reports_that_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="--sequence-length 8: not one sequence"):
        hardware.largest_micro_batch(machine, 8, 8, 0, "adamw", CUDA)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_reserved_states_match_those_of_a_step(optimizer: str) -> None:
    model = GPT(GPTConfig(8, 50, 2, 2, 8))
    optimizers = optim.build_optimizers(model, optimizer, 1e-3, 1.0, 0.1)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()
    for each in optimizers:
        each.step()
    states = [t for each in optimizers for state in each.state.values() for t in state.values()]
    states += [t for each in optimizers for t in getattr(each, "momentum", {}).values()]
    made = sum(t.numel() for t in states if t.dim())  # without the counts of steps
    assert hardware._state_floats(model, optimizer, 1) == made
    assert hardware._state_floats(model, optimizer, 8) == made + sum(p.numel() for p in model.parameters())


def group_of_one() -> Runtime:
    """A process that believes it is one of two, in a real process group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Runtime(CPU, torch.float32, world_size=2)


WAYS_OUT = {
    "an error in set-up after wrapping": (run_folder, "open_metrics", UserError),
    "a step that ends the run": (train_gpt2.Progress, "report", UserError),
    "a failed checkpoint": (checkpoint, "save", UserError),
    "Ctrl-C": (optim, "step", KeyboardInterrupt),
    "a bug": (optim, "set_learning_rates", ZeroDivisionError),
}


@pytest.mark.parametrize("way", [*WAYS_OUT, "the end"])
def test_no_ddp_model_outlives_its_group(
    way: str, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a run ends, and although the frames of its exception still hold the model."""
    rt = group_of_one()
    monkeypatch.setattr(runtime, "start", lambda device, dtype: rt)
    error: BaseException | None = None
    if way in WAYS_OUT:
        room, name, kind = WAYS_OUT[way]
        monkeypatch.setattr(room, name, lambda *args, **kwargs: (_ for _ in ()).throw(kind(way)))
    try:
        train(max_steps=2)
    except (UserError, KeyboardInterrupt, ZeroDivisionError) as caught:
        error = caught
    assert (error is not None) == (way in WAYS_OUT)
    [model] = rt.ddp_models
    assert model.reducer is None and model.logger is None
    assert not dist.is_initialized()


LEAVES = """
import os
from pathlib import Path
import torch
from support import runtime

rt = runtime.start("cpu", "float32")
try:
    with rt:
        model, _ = rt.wrap(torch.nn.Linear(4, 4), compiled=False)
        model(torch.ones(1, 4)).sum().backward()
        if FAILS:
            raise ValueError
except ValueError:
    pass
names = [(thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir()]
rt.say(f"left: {[name for name in names if 'gloo' in name]}")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_of_the_process_group_is_left(fails: bool, tmp_path: Path) -> None:
    """One that is left when the interpreter ends aborts the process now and then."""
    (tmp_path / "script.py").write_text(LEAVES.replace("FAILS", str(fails)))
    done = subprocess.run(
        command(str(tmp_path / "script.py"), nproc=2),
        env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "left: []\n"), done.stderr[-2000:]


def test_accumulating_gradients_are_outside_ddps_buckets() -> None:
    """Why several processes need memory for buckets beside gradients: DDP moves them in the last round."""
    with group_of_one() as rt:
        module = torch.nn.Linear(4, 4)
        model, _ = rt.wrap(module, compiled=False)
        with model.no_sync():
            model(torch.ones(1, 4)).sum().backward()
        assert module.weight.grad.untyped_storage().nbytes() == 4 * 4 * 4
        model(torch.ones(1, 4)).sum().backward()
        assert module.weight.grad.untyped_storage().nbytes() == 4 * (4 * 4 + 4)  # the bucket: with the bias


def test_a_run_of_days_on_a_cpu_needs_device_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is fetched or written, and not for what a CPU can do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(driver, "nvidia_driver", lambda: None)
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(train_gpt2, "fetch_shards", lambda s: pytest.fail("data was prepared"))
    s = dataclasses.replace(PRESETS["gpt2-124m"], out_dir=tmp_path / "log", data_dir=tmp_path / "data")
    # 10.0B tokens at 855 MFLOP each, at 100 GFLOP/s.
    days = 19_073 * 524_288 * 855.166464e6 / 1e11 / 86_400
    with pytest.raises(UserError, match=f"--device auto: .* {days:,.0f} days .*--device cpu"):
        train_gpt2.train(s)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(train_gpt2, "fetch_shards", lambda s: (_ for _ in ()).throw(UserError("got there")))
    for fine in (
        dataclasses.replace(s, device="cpu"),
        dataclasses.replace(s, max_steps=0),
        dataclasses.replace(PRESETS["demo"], out_dir=tmp_path / "log"),
    ):
        with pytest.raises(UserError, match="got there"):
            train_gpt2.train(fine)
    # Fine-tuning GPT-2 takes less than 6 hours there, the medium one more: the model's own size decides.
    finetune = dataclasses.replace(PRESETS["finetune"], out_dir=tmp_path / "log", data_dir=tmp_path / "data")
    for shape, told in (((12, 12, 768), "got there"), ((24, 16, 1024), "--device auto: .* hours")):
        model = SimpleNamespace(config=GPTConfig(1024, 50257, *shape))
        monkeypatch.setattr(train_gpt2, "build_model", lambda s, device, model=model: model)
        with pytest.raises(UserError, match=told):
            train_gpt2.train(finetune)


def test_eight_processes_on_two_cores_are_as_fast_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 1e11)  # with one thread
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    rt = dataclasses.replace(runtime.start("cpu", "float32"), world_size=8)
    monkeypatch.setattr(runtime.Runtime, "run_on", lambda rt, here, work: work())
    for days, told in ((3, "at least 3 days"), (0.5, "at least 12 hours on")):
        with pytest.raises(UserError, match=told):
            hardware.refuse_long_runs_on_cpu("auto", days * 86_400 * 2e11, rt)


def test_measured_peak_is_a_rate_of_this_machine() -> None:
    assert hardware.peak_flops(CPU, torch.float32) is None
    assert 1e9 < hardware.measured_flops(CPU, torch.float32) < 1e14


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere a process has its own peak anyway"
)
def test_peak_memory_excludes_that_of_the_parent() -> None:
    """Linux lets a new process begin with the largest peak of the one that started it (ru_maxrss)."""
    np.ones(125_000_000)  # of this process: a gigabyte
    assert hardware.peak_memory(CPU) > 1e9
    code = "import torch; from support import hardware; print(hardware.peak_memory(torch.device('cpu')))"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    assert 1e7 < int(child.stdout) < 9e8


def test_attention_on_a_cpu_is_flash() -> None:
    """The choice that torch reports, against the kernel that it really runs."""
    here = runtime.Runtime(CPU, torch.float32)
    assert hardware.attention_backend(here, 2, 8, 16) == "flash"
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert any("flash_attention" in event.key for event in profile.key_averages())


PATIENCE = """
import sys, time
from datetime import timedelta
import torch
from support import runtime

runtime.STEP_TIMEOUT, runtime.FETCH_TIMEOUT = timedelta(seconds=2), timedelta(seconds=60)
rt = runtime.start("cpu", "float32")
# Rank 1 waits longer than a step may take while rank 0 fetches ...
rt.run_on(rt.is_main, lambda: time.sleep(5), fetches=True)
rt.say("fetched")
# ... and gives up on a rank that hangs later.
if rt.is_main:
    time.sleep(20)
rt.barrier()
print("never")
"""


@pytest.mark.slow
def test_processes_wait_long_only_for_downloads(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PATIENCE)
    begin = time.monotonic()
    done = subprocess.run(
        command(str(tmp_path / "script.py"), nproc=2),
        env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode != 0 and "fetched" in done.stdout and "never" not in done.stdout
    assert time.monotonic() - begin < 60
    assert "timed out" in done.stderr.lower() or "timeout" in done.stderr.lower(), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("version", "T", "dropout", "enabled"),
    [
        ("2.9.1+cu128", 192, 0.0, False),  # its backward may read beyond its memory
        ("2.9.1+cu128", 1024, 0.0, True),
        ("2.10.0", 192, 0.0, True),
        ("2.11.0+cu130", 1024, 0.1, False),  # its dropout has a rate of 1/16
        ("2.12.0", 1024, 0.1, True),
        ("2.13.0", 192, 0.0, True),
    ],
)
def test_training_avoids_faulty_attention(
    version: str, T: int, dropout: float, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the search for the micro-batch."""
    seen = []
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(
        hardware, "largest_micro_batch", lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or 1
    )
    shape = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 8,
        "block_size": T,
        "sequence_length": T,
        "dropout": dropout,
    }
    s = dataclasses.replace(PRESETS["demo"], **shape, total_batch_size=T, device="cpu", dtype="float32")
    monkeypatch.setattr(run_folder, "check", lambda s: None)
    monkeypatch.setattr(train_gpt2, "fetch_shards", lambda s: None)
    monkeypatch.setattr(train_gpt2.shards, "find_shards", lambda *_: {"train": [], "val": []})
    monkeypatch.setattr(train_gpt2, "TokenStream", lambda *_: SimpleNamespace(fingerprint=lambda: "0"))
    monkeypatch.setattr(optim, "build_optimizers", lambda *_: (_ for _ in ()).throw(UserError("got there")))
    try:
        with pytest.raises(UserError, match="got there"):
            train_gpt2.train(s)
        assert seen == [enabled]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_sampling_and_hellaswag_do_not_use_cudnn_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN prepares a plan for every shape: only training, with its one shape, may choose it."""
    kernels = torch.backends.cuda
    seen: list[tuple[bool, ...]] = []

    def enabled() -> tuple[bool, ...]:
        return (
            kernels.cudnn_sdp_enabled(),
            kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(),
            kernels.math_sdp_enabled(),
        )

    def spy(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: seen.append(enabled()) or attention(*args, **kwargs)

    name = "scaled_dot_product_attention"
    monkeypatch.setattr(torch.nn.functional, name, spy(getattr(torch.nn.functional, name)))
    model = GPT(GPTConfig(32, 300, 1, 1, 8))
    model.generate([[1, 2, 3], [4]], 2)
    assert seen.pop() == enabled() == (True, True, True, True), "a CPU's choice is left alone"
    as_on_cuda = hardware.attention_for_many_shapes
    monkeypatch.setattr(hardware, "attention_for_many_shapes", lambda _: as_on_cuda(torch.device("cuda")))
    example = hellaswag.Example([1, 2], [[3, 4], [5], [6], [7]], [2, 1, 1, 1], 0)
    tokens = model.stream([[1, 2, 3], [4]], 3)
    for work in (
        lambda: next(tokens),
        lambda: next(tokens),
        lambda: hellaswag.ending_losses(model, [example]),
    ):
        seen.clear()
        work()
        assert set(seen) == {(False, True, True, True)}
        assert enabled() == (True, True, True, True), "what comes between is not affected"
    model(torch.tensor([[1, 2]]))
    assert seen[-1] == (True, True, True, True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_told_otherwise(given: dict[str, str], expected: str | None) -> None:
    """Set before torch is imported, which reads it only then; what the user has set stays."""
    code = (
        "import os, sys; from support import launch; launch.prepare(); "
        "assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **given},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.strip() == str(expected), done.stderr
