"""Facts about the machine: name, memory, peak rate, attention kernel, largest micro-batch."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from support import gpus, runtime
from support.cli import UserError
from support.loss import default_chunks
from support.pretrained import is_block_matrix
from support.runtime import Runtime

# Fraction of free memory that the search for the micro-batch leaves for fragments, kernels and compiled code.
SPARE = 0.05
# RuntimeErrors of cuBLAS and cuDNN that mean missing memory.
OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def describe(rt: Runtime) -> dict[str, object]:
    """Describe the machine for config.json."""
    if rt.device.type == "cuda":
        properties = torch.cuda.get_device_properties(rt.device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = _cpu_name(), _ram_bytes()
    return {
        "device": rt.device.type,
        "name": name,
        "memory_gb": round(memory / 1e9, 1) if memory else None,
        "processes": rt.world_size,
        "cpu_threads": torch.get_num_threads(),
        "dtype": str(rt.dtype).removeprefix("torch."),
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


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes: GPU memory, or resident memory on a CPU. None: unknown.

    On MPS: the memory that the driver has allocated so far, most of which torch keeps for reuse.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # On Linux not ru_maxrss, because a new process inherits the peak of its parent.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gigabytes(memory: float | None) -> str:
    """Format a measured number of gigabytes as text."""
    return "not measured" if memory is None else f"{memory:.2f} GB"


def attention_backend(
    rt: Runtime, n_head: int, head_size: int, sequence_length: int, dropout: float = 0.0
) -> str:
    """Return scaled_dot_product_attention's kernel for these shapes: flash, cudnn, efficient, math.

    torch decides by device, precision and versions. On H100 and B200: cuDNN with torch 2.9, flash with 2.10,
    and cuDNN again from 2.11 if it is newer than 9.15, as in the wheels for CUDA 13. On other GPUs: flash
    from Ampere on, efficient before. On CPUs: flash, or with dropout math, which stores the probabilities.
    """
    if rt.device.type not in ("cpu", "cuda"):
        return "default"
    shape = (1, n_head, sequence_length, head_size)
    q = torch.empty(shape, device=rt.device, dtype=rt.dtype, requires_grad=True)
    choice = SDPBackend(torch._fused_sdp_choice(q, q, q, dropout_p=dropout, is_causal=True))
    return choice.name.removesuffix("_ATTENTION").lower()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak rate of matrix products in FLOP/s by the data sheet of the device: an MFU of 100 %.

    None for a device that our table of GPUs lacks, and for fp32, which has no matrix units.
    """
    gpu = gpus.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops * 1e12 if gpu and dtype != torch.float32 else None


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best rate of a few large matrix products, in FLOP/s. Takes a fraction of a second.

    On a machine with other work, a later moment may be faster.
    """
    n = 1024 if device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    rt = Runtime(device, dtype)
    best = float("inf")
    for _ in range(6):
        rt.synchronize()
        begin = time.perf_counter()
        a @ a
        rt.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def refuse_long_runs_on_cpu(device: str, flops: float, rt: Runtime) -> None:
    """Raise UserError if --device auto chose the CPU for more than 6 hours of work, `flops` at its peak rate.

    This prevents starting a run for a GPU on a CPU by accident.
    """
    if device != "auto" or rt.device.type != "cpu":
        return

    def check() -> None:
        # Processes on a machine share its cores: eight of them on two cores do the work of two.
        threads = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = min(1.0, (os.cpu_count() or 1) / threads)
        days = flops / (measured_flops(rt.device, rt.dtype) * rt.world_size * share) / 86_400
        if days > 0.25:
            time_needed = f"{days:,.0f} days" if days >= 2 else f"{24 * days:.0f} hours"
            raise UserError(
                f"--device auto: no GPU found, and this run would take at least {time_needed} on this CPU: "
                "--device cpu if you mean it, --preset demo for a model that a CPU can train"
            )

    rt.run_on(rt.is_main, check)  # only one process measures, so that all get the same answer


def attention_for_many_shapes(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context for attention whose shapes keep changing, as in sampling and HellaSwag.

    On Hopper and Blackwell torch prefers cuDNN's attention, which prepares a plan for every new shape. That
    pays for the one shape of training, but costs tens to hundreds of milliseconds for each of these.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def avoid_faulty_attention(sequence_length: int, dropout: float) -> None:
    """Disable cuDNN's attention for this process if it is wrong or may crash.

    Before torch 2.10 its backward may read beyond its memory on Hopper and Blackwell, unless the length is a
    multiple of 128 (pytorch/pytorch#169849). Before 2.12 it rounds the dropout rate to sixteenths
    (pytorch/pytorch#174245).
    """
    version = runtime.torch_version()
    if (version < (2, 10) and sequence_length % 128) or (version < (2, 12) and dropout):
        torch.backends.cuda.enable_cudnn_sdp(False)


def without_cudnn(device: torch.device) -> str:
    """Return the variable that keeps torch away from cuDNN's attention; empty if torch does not prefer it."""
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device)[0] not in (9, 10)
    ):
        return ""
    old = runtime.torch_version() < (2, 10)
    return "TORCH_CUDNN_SDPA_PREFERRED=0" if old else "TORCH_CUDNN_SDPA_DEPRIORITIZED=1"


def largest_power_of_two(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest power of two, at most `limit`, that `fits`; 0 if 1 does not. Tries from 1 up."""
    size = 1
    while size <= limit and fits(size):
        size *= 2
    return size // 2


def largest_micro_batch(
    model: nn.Module, sequence_length: int, sequences: int, loss_chunks: int, optimizer: str, rt: Runtime
) -> int:
    """The largest power of two of sequences that fits into memory and divides `sequences`.

    sequences: those of a step on this process. loss_chunks: as in training, 0 for the default.
    On CUDA by trying the passes of a step, not compiled, which needs more memory than compiled.
    Elsewhere at most 2048 tokens, beyond which larger batches are no faster.
    Raises UserError if not even one sequence fits.
    """
    limit = sequences & -sequences  # the largest power of two that divides it
    if rt.device.type != "cuda":
        return largest_power_of_two(lambda B: B == 1 or B * sequence_length <= 2048, limit)

    reserve = _state_floats(model, optimizer, rt.world_size)
    # Windows spills into host memory instead of failing, so we stay within the driver's free memory.
    usable = (1 - SPARE) * (torch.cuda.mem_get_info(rt.device)[0] + torch.cuda.memory_reserved(rt.device))

    def fits(B: int) -> bool:
        micro_steps = min(2, sequences // B)
        return _fits(model, B, sequence_length, micro_steps, loss_chunks, reserve, usable, rt)

    best = largest_power_of_two(fits, min(limit, 128))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(rt.device)  # the run's own peak is what is reported
    best = int(rt.all_reduce(torch.tensor(best, device=rt.device), "MIN"))
    if best == 0:
        raise UserError(
            f"--sequence-length {sequence_length}: not one sequence fits into GPU memory: lower it, or "
            "--recompute"
        )
    return best


def _state_floats(model: nn.Module, optimizer: str, world_size: int) -> int:
    """Count the floats that a step needs besides weights, gradients and activations.

    AdamW has two moments per parameter, Muon one per parameter of the blocks' matrices. Muon shares them
    among processes, but its step uses what that saves. DDP has buckets for all gradients besides those that
    accumulate before the last micro-batch.
    """
    floats = 0
    for name, parameter in model.named_parameters():
        moments = 1 if optimizer == "muon" and is_block_matrix(name, parameter) else 2
        floats += parameter.numel() * (moments + (world_size > 1))
    return floats


def _fits(
    model: nn.Module,
    B: int,
    sequence_length: int,
    micro_steps: int,
    loss_chunks: int,
    reserve: int,
    usable: float,
    rt: Runtime,
) -> bool:
    """True if forward and backward of `micro_steps` micro-batches of B sequences fit into `usable` bytes.

    As in training, `reserve` floats are held, and the second micro-batch holds the gradients of the first.
    """
    torch.cuda.empty_cache()  # so that the reserved memory is that of this trial
    chunks = loss_chunks or default_chunks(B * sequence_length, rt.device)
    try:
        reserved = torch.empty(reserve, device=rt.device)
        idx = torch.zeros(B, sequence_length, dtype=torch.int64, device=rt.device)
        for _ in range(micro_steps):
            with rt.autocast():
                loss = model(idx, idx, chunks)[1]
            loss.backward()
        del reserved
        return torch.cuda.memory_reserved(rt.device) <= usable
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
