"""Windows, Macs and others, of which there is none here: what they lack is hidden, what they refuse fails."""

import builtins
import errno
import io
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, TINY, as_flags, command, environment, posix, torchruns_variables
from packaging.requirements import Requirement
from torch import nn

import bench
import dataloader
import optim
import settings
from model import GPT, GPTConfig
from support import checkpoint, driver, files, hardware, metrics, pretrained, run_folder, runtime, tokenizer
from support.cli import UserError
from support.stop_signal import StopSignal

# What a Python on Windows has none of, in a file that every process reads as it starts.
WINDOWS = """
import builtins, os, sys
for name in ("fcntl", "resource", "triton", "readline", "termios", "pwd"):
    sys.modules[name] = None
real_open = os.open
def open_no_folder(path, flags, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_open(path, flags, *args, **kwargs)
os.open = open_no_folder
del os.sysconf
real_builtin = builtins.open
def open_no_proc(path, *args, **kwargs):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return real_builtin(path, *args, **kwargs)
builtins.open = open_no_proc
"""


def as_on_windows(tmp_path: Path, script: str, *args: str) -> subprocess.CompletedProcess:
    """Run a script without what Windows lacks, with a console in cp1252."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(WINDOWS)
    return subprocess.run(
        command(script, *args),
        env={**environment(), "PYTHONPATH": str(tmp_path / "site"), "PYTHONIOENCODING": "cp1252"},
        capture_output=True, encoding="cp1252", timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_training_and_bench_work_like_on_windows(tmp_path: Path, data_dir: Path) -> None:
    run = as_flags({**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run", "keep_checkpoints": 1})
    done = as_on_windows(tmp_path, "train_gpt2.py", "--preset", "demo", *run)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000006"]
    toy = {"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": 16, "steps": 1, "device": "cpu"}
    done = as_on_windows(tmp_path, "bench.py", "--preset", "demo", *as_flags(toy))
    assert done.returncode == 0, done.stderr
    assert "memory     not measured" in done.stdout and "12·L·d·T" in done.stdout
    assert as_on_windows(tmp_path, "bench.py", "--plan", "8xA100-80GB").returncode == 0
    done = as_on_windows(tmp_path, "generate.py", "--model", str(tmp_path / "run"), "--prompt", "Ω 日本")
    assert done.returncode == 0 and done.stdout.startswith("? ??"), done.stderr


def test_unmeasured_memory_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"tokens_per_sec": 1.0, "mfu": 0.1, "memory_gb": None}
    monkeypatch.setattr(bench, "measure_apart", lambda s: result)
    s = bench.Settings(compare=("steps=1", "steps=2"), rounds=2, json=True)
    assert [side["memory_gb"] for side in bench.compare(s)["sides"]] == [None, None]


# ---------------------------------------------------------------- files


def test_a_file_that_cannot_be_flushed_is_an_error_and_a_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: no folder opens, and a file that is open for reading alone cannot be flushed."""
    (tmp_path / "file").write_text("x")
    modes: dict[int, int] = {}
    flushed = []
    real_open, real_fsync = os.open, os.fsync

    def open_file(path: Path, flags: int) -> int:
        if path.is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = real_open(path, flags)
        modes[handle] = flags
        return handle

    def fsync(handle: int) -> None:
        if not modes[handle] & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)
        real_fsync(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    files.flush_to_disk(tmp_path)
    assert not flushed
    files.flush_to_disk(tmp_path / "file")
    assert len(flushed) == 1
    monkeypatch.setattr(os, "open", lambda path, flags: (_ for _ in ()).throw(PermissionError("denied")))
    with pytest.raises(PermissionError):
        files.flush_to_disk(tmp_path / "file")


def test_replace_waits_for_a_briefly_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virus scanner holds a new file open; os.replace fails until it is done."""
    busy, waits, real = [3], [], os.replace

    def replace(source: Path, target: Path) -> None:
        if busy[0]:
            busy[0] -= 1
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", waits.append)
    files.write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and len(waits) == 3
    busy[0] = 100
    with pytest.raises(PermissionError):
        files.write_atomically(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text() == "new" and sum(waits) < 3


def test_a_checkpoint_that_someone_reads_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(GPTConfig(8, 50257, 1, 1, 4))
    state = checkpoint.snapshot(model, {"step": 0})
    real, read = os.replace, {"step_000001"}

    def replace(source: Path, target: Path) -> None:
        if Path(source).name in read:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state, keep=1)
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [2, 1]
    read.clear()
    checkpoint.save(tmp_path, 3, state, keep=1)
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_leaves_no_mapped_weights(tmp_path: Path) -> None:
    """Windows neither renames nor removes a folder with a mapped file in it."""
    GPT(GPTConfig(8, 50257, 1, 1, 4)).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    pretrained.load_weights(model, tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_text_files_have_the_same_bytes_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There text that is written without a `newline` gets a carriage return in every line."""
    real = io.open

    def as_windows(
        file: object, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, **options: object,
    ) -> object:  # fmt: skip
        if newline is None and "b" not in mode and set(mode) & set("wax+"):
            newline = "\r\n"
        return real(file, mode, buffering, encoding, errors, newline, **options)

    monkeypatch.setattr(io, "open", as_windows)
    monkeypatch.setattr(builtins, "open", as_windows)
    files.write_atomically(tmp_path / "a.json", "one\ntwo\n")
    record = metrics.Metrics(tmp_path / "metrics.jsonl")
    record.log(1, "event", name="start")
    model = GPT(GPTConfig(8, 50257, 1, 1, 4))
    folder = checkpoint.save(tmp_path, 1, checkpoint.snapshot(model, {"step": 1}), keep=1)
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".txt")]
    assert len(written) > 6
    for path in [*written, folder / checkpoint.CHECKSUMS]:
        assert b"\r" not in path.read_bytes(), path


def test_git_keeps_the_bytes_of_the_ranks(tmp_path: Path) -> None:
    """With core.autocrlf, the default of Git for Windows, it would rewrite every text file's line ends."""
    for name in (".gitattributes", "assets/gpt2.tiktoken"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git = ["git", "-C", str(tmp_path), "-c", "core.autocrlf=true", "-c", "user.name=x", "-c", "user.email=x"]
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *args], check=True, capture_output=True, timeout=60)
    ranks = tmp_path / "assets" / "gpt2.tiktoken"
    ranks.unlink()
    subprocess.run([*git, "checkout", "-q", "."], check=True, capture_output=True, timeout=60)
    assert files.sha256_of(ranks) == tokenizer.RANKS_SHA256


def test_windows_paths_are_recorded_portably() -> None:

    recorded = run_folder.describe(settings.Settings(data_dir=PureWindowsPath(r"data\mine")), {})
    assert recorded["settings"]["data_dir"] == "data/mine"


# ---------------------------------------------------------------- processes and signals


@posix
def test_ctrl_break_stops_a_run_like_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        stop = StopSignal()
        stop.listen(announce=False, agent=0)
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not stop.number and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.number == signal.SIGTERM
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_several_gpus_without_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchruns_variables(2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "_pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"--device auto: several GPUs need NCCL.*WSL"):
        runtime.start("auto", "float16")


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(driver, "check_architecture", lambda device: None)
    assert runtime._pick_device("cuda:1", 0, 1) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert runtime._pick_device("cuda", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"--device cuda:1: all processes.*--device cuda.*CUDA_VISIBLE"):
        runtime._pick_device("cuda:1", 0, 2)


# ---------------------------------------------------------------- GPUs of others


@pytest.fixture
def no_nvidia(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(driver, "nvidia_driver", lambda: None)
    return monkeypatch


def test_intels_gpus_are_refused(no_nvidia: pytest.MonkeyPatch) -> None:
    no_nvidia.setattr(torch.xpu, "is_available", lambda: True)
    for device in ("xpu", "xpu:0", "auto"):
        with pytest.raises(UserError, match=f"--device {device}: .*Intel.* not supported"):
            runtime.start(device, "auto")
    assert runtime.start("cpu", "float32").device.type == "cpu"


@pytest.mark.parametrize(("version", "fine"), [("2.13.0", True), ("2.14.0a0+git1", True), ("2.12.1", False)])
def test_apples_gpus_need_a_torch_without_known_errors(
    version: str, fine: bool, no_nvidia: pytest.MonkeyPatch
) -> None:
    no_nvidia.setattr(torch.backends.mps, "is_available", lambda: True)
    no_nvidia.setattr(torch, "__version__", version)
    for device in ("auto", "mps"):
        if fine:
            assert runtime.start(device, "auto").device.type == "mps"
        else:
            with pytest.raises(UserError, match=rf"--device mps: torch {version} has errors.*torch==2.13.0"):
                runtime.start(device, "auto")
    assert runtime.start("cpu", "float32").device.type == "cpu"


@pytest.mark.parametrize(("macos", "fine"), [("13.6.1", False), ("14.0", True), ("26.1", True)])
def test_bf16_on_apples_gpus_needs_macos_14(macos: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    assert runtime.pick_dtype(mps, "auto") == torch.float32
    if fine:
        assert runtime.pick_dtype(mps, "bfloat16") == torch.bfloat16
    else:
        with pytest.raises(UserError, match="--dtype bfloat16: needs macOS 14"):
            runtime.pick_dtype(mps, "bfloat16")


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_batches_are_copied_in_the_background_on_cuda_only(device: str, waits: bool) -> None:
    calls = []
    tensor = SimpleNamespace(to=lambda device, non_blocking: calls.append(non_blocking))
    dataloader._move(tensor, torch.device(device))
    assert calls == [not waits]


def test_a_bad_step_is_skipped_where_adamw_ignores_found_inf() -> None:
    """As on MPS: the optimizer never hears of the bad gradients."""

    class OnMPS:
        device = torch.device("mps")

        def __init__(self, value: float) -> None:
            self.value = value

        def __rsub__(self, other: int) -> torch.Tensor:
            return torch.zeros(())  # found_inf, as if it were ignored

        def item(self) -> float:
            return self.value

    parameter = nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for finite, gradient in ((0.0, torch.nan), (1.0, 1.0)):
        parameter.grad = torch.full((3,), gradient)
        optim.step([adamw], scaler, OnMPS(finite))
        assert parameter.grad is None
        assert torch.equal(parameter.detach(), torch.ones(3)) == (finite == 0)
    assert parameter.isfinite().all()


def test_memory_on_a_mac_comes_from_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3_000_000_000)
    assert hardware.peak_memory(torch.device("mps")) == 3_000_000_000
    assert hardware.gigabytes(None) == "not measured" and hardware.gigabytes(3.0) == "3.00 GB"


# ---------------------------------------------------------------- packages


def test_there_is_one_list_of_packages() -> None:
    """pip reads it, and uv by way of setuptools; what else names a torch names the ends of its range."""
    from setuptools.config.pyprojecttoml import read_configuration

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    read = read_configuration(ROOT / "pyproject.toml")["project"]["dependencies"]
    assert [Requirement(text) for text in read] == [Requirement(text) for text in listed]
    torch_range = next(r for r in map(Requirement, listed) if r.name == "torch").specifier
    lowest, highest = (next(s.version for s in torch_range if s.operator == sign) for sign in (">=", "<="))
    assert torch_range.contains("2.13.0+cu126") and torch_range.contains(torch.__version__)
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert re.findall(r'torch: "([\d.]+)"', workflow) == [f"{lowest}.0", highest]
    assert f"FROM pytorch/pytorch:{highest}-" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
