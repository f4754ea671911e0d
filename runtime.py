"""Device, precision and process group: what differs between a laptop and eight GPUs."""

import contextlib
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend

from cli import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
# Rank 0 may fetch data or write samples while the others wait, which takes longer than most steps.
PATIENCE = timedelta(hours=2)
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# Peak rate of dense 16-bit matrix products, in TFLOP/s, from NVIDIA's data sheets (without sparsity).
# The first name that is part of the device's own name counts.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 3090": 71,
    "RTX 3080": 60,
}


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: one of `world_size` alike, on a device of its own."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters and the optimizer stay fp32
    rank: int = 0
    local_rank: int = 0  # number on this machine
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model runs: 16-bit matrix products, or nothing for fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def all_reduce(self, tensor: torch.Tensor, op: str = "SUM") -> torch.Tensor:
        """Sum (or "MIN", "MAX") over all processes, in place; the tensor itself where there is only one."""
        if self.world_size > 1:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce(torch.zeros((), device=self.device))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device to finish what was given to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def lead(self, leads: bool, work: Callable[[], T]) -> T | None:
        """Do `work` on the processes that lead, while the others wait; returns its result, None on others.

        Where it raises UserError on one process, it does on all: none is left waiting for a dead one.
        """
        result, failure = None, None
        if leads:
            try:
                result = work()
            except UserError as error:
                failure = error
        failed = self.all_reduce(torch.tensor(int(failure is not None), device=self.device), "MAX")
        if failed:
            raise failure or UserError("another process has said what is wrong")
        return result

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start(device: str, dtype: Dtype) -> Runtime:
    """Choose device and precision, and join the other processes if torchrun started this one.

    device: "auto" (CUDA, else Apple's MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".
    Raises UserError for a device or precision that this machine does not have.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _pick_device(device, local_rank, world_size)
    runtime = Runtime(chosen, pick_dtype(chosen, dtype), rank, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # What autocast leaves in fp32 goes through TF32 units; on a CPU this setting is left alone.
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=_store_of_this_start(),
            rank=rank,
            world_size=world_size,
            timeout=PATIENCE,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return runtime


def _store_of_this_start() -> dist.Store | None:
    """Where the processes find each other's addresses; None: where MASTER_ADDR and MASTER_PORT say.

    On one machine torchrun keeps one store through all its restarts, and in it the addresses of processes
    that have died (pytorch/pytorch#135712): every start takes keys of its own. Machines count restarts
    each for themselves, so with several of them torchrun must be told to make new stores: see workflow.md.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    return dist.PrefixStore(f"restart_{env['TORCHELASTIC_RESTART_COUNT']}", store)


def _pick_device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and world_size == 1:
            device = "mps"
        else:
            device = "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: not a device: use auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {device}: torch {torch.__version__} finds no CUDA device: use --device cpu"
            )
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, no number {index}: "
                "lower --nproc_per_node"
            )
        return torch.device("cuda", index)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available on this machine: use --device cpu")
    if chosen.type not in ("cpu", "mps"):
        raise UserError(f"--device {device}: not supported: use auto, cpu, cuda, cuda:N or mps")
    if chosen.type == "mps" and world_size > 1:
        raise UserError("--device mps: one process only: leave torchrun out, or use --device cpu")
    return chosen


def pick_dtype(device: torch.device, dtype: Dtype) -> torch.dtype:
    """The precision of matrix products: what was asked for, or for "auto" the best the device is fast at.

    CUDA: bf16 from Ampere on, fp16 before. MPS: fp32. CPU: fp32, unless it has bf16 units; without them
    bf16 works, but hundreds of times slower, so the decision is taken from the CPU's feature flags.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and cpu_flags() & {"amx_bf16", "avx512_bf16"}:
        return torch.bfloat16
    return torch.float32


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> set[str]:
    """The CPU's feature flags as Linux lists them; empty where there is no such list."""
    try:
        with open(cpuinfo) as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def hardware(runtime: Runtime) -> dict[str, object]:
    """What the run's record says of the machine."""
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = _cpu_name(), _ram_bytes()
    return {
        "device": runtime.device.type,
        "name": name,
        "memory_gb": round(memory / 1e9, 1) if memory else None,
        "processes": runtime.world_size,
        "cpu_threads": torch.get_num_threads(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def attention_backend(runtime: Runtime, n_head: int, head_size: int, sequence_length: int) -> str:
    """The kernel that scaled_dot_product_attention picks for these shapes: flash, cudnn, efficient, math.

    torch decides by device, precision and its own versions: cuDNN on Hopper, flash on other GPUs and CPUs.
    """
    if runtime.device.type not in ("cpu", "cuda"):
        return "default"
    shape = (1, n_head, sequence_length, head_size)
    q = torch.empty(shape, device=runtime.device, dtype=runtime.dtype, requires_grad=True)
    choice = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return choice.name.removesuffix("_ATTENTION").lower()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's peak rate of matrix products in FLOP/s: what 100 % MFU would be.

    A CUDA device of the table running in 16 bits has its data sheet's figure; for any other the best of a
    few large matrix products is taken, which needs a fraction of a second.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            if key in name:
                return tflops * 1e12
    n = 1024 if device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    runtime = Runtime(device, dtype)
    best = float("inf")
    for _ in range(6):
        runtime.synchronize()
        begin = time.perf_counter()
        a @ a
        runtime.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def largest_power_of_two(fits: Callable[[int], bool], limit: int) -> int:
    """The largest power of two, at most `limit`, that `fits`; 0 where not even 1 does. Tries downwards."""
    size = 1 << (limit.bit_length() - 1)
    while size and not fits(size):
        size //= 2
    return size


def largest_micro_batch(model: nn.Module, sequence_length: int, sequences: int, runtime: Runtime) -> int:
    """The largest power of two of sequences that fits into memory and divides `sequences`.

    On CUDA by trying forward and backward, uncompiled, which needs more memory than compiled. Elsewhere at
    most 2048 tokens, beyond which larger batches are not faster.
    Raises UserError where not one sequence fits.
    """
    limit = sequences & -sequences  # the largest power of two that divides it
    if runtime.device.type != "cuda":
        return largest_power_of_two(lambda B: B == 1 or B * sequence_length <= 2048, limit)

    def fits(B: int) -> bool:
        try:
            idx = torch.zeros(B, sequence_length, dtype=torch.int64, device=runtime.device)
            # Stands in for AdamW's two moments and DDP's buckets, which are not there yet.
            reserve = torch.empty(3 * model.num_parameters(), device=runtime.device)
            with runtime.autocast():
                loss = model(idx, idx)[1]
            loss.backward()
            del reserve
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)

    best = largest_power_of_two(fits, min(limit, 128))
    torch.cuda.empty_cache()
    best = int(runtime.all_reduce(torch.tensor(best, device=runtime.device), "MIN"))
    if best == 0:
        raise UserError(
            f"--sequence-length {sequence_length}: not one sequence fits into GPU memory: lower it"
        )
    return best


def lock_folder(folder: Path) -> IO[str]:
    """Hold a folder for this process until it ends, however it ends; returns the open lock file.

    Raises UserError where another process holds it.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115 - the lock lasts as long as the file is open
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process is training into it: wait, or use another --out-dir"
            ) from error
    return file


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can stop after the current step.

    torchrun passes on a signal that the terminal has already sent, so a second one means the same; the third
    ends the process at once. Python runs its signal handlers between bytecodes, which a backward pass can
    delay by seconds: a thread that the interpreter wakes from within the signal answers immediately.
    """

    def __init__(self, announce: bool = True) -> None:
        """announce: say on stderr what the signal does; one process of a run is enough."""
        self.number = 0
        self.times = 0
        self.announce = announce
        self.wake_up, waker = socket.socketpair()
        waker.setblocking(False)
        self.waker = waker  # kept open as long as the signals may come
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)  # the thread does the work
        threading.Thread(target=self._listen, name="stop signal", daemon=True).start()

    def _listen(self) -> None:
        while received := self.wake_up.recv(1):
            number = received[0]
            self.number = self.number or number
            self.times += 1
            if self.times > 2:
                os._exit(128 + number)
            if self.announce:
                name = signal.Signals(number).name
                left = "once" if self.times == 2 else "twice"
                print(f"\n{name}: finishing this step; {left} more to quit now", file=sys.stderr, flush=True)
