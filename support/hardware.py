"""What the machine is and can do: names, peak rates, attention kernels, the largest micro-batch."""

import contextlib
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from support.cli import UserError
from support.runtime import Runtime

# Peak rate of dense 16-bit matrix products in TFLOP/s, from NVIDIA's data sheets (without sparsity).
# The first name that is part of the device's own name applies.
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


def describe(rt: Runtime) -> dict[str, object]:
    """What the run's record says about the machine."""
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


def attention_backend(rt: Runtime, n_head: int, head_size: int, sequence_length: int) -> str:
    """The kernel that scaled_dot_product_attention picks for these shapes: flash, cudnn, efficient, math.

    torch decides by device, precision and its own version: cuDNN on Hopper, flash on other GPUs and on CPUs.
    """
    if rt.device.type not in ("cpu", "cuda"):
        return "default"
    shape = (1, n_head, sequence_length, head_size)
    q = torch.empty(shape, device=rt.device, dtype=rt.dtype, requires_grad=True)
    choice = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return choice.name.removesuffix("_ATTENTION").lower()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's peak rate of matrix products in FLOP/s: what an MFU of 100 % would be.

    For a CUDA device in the table, running in 16 bits, the data sheet's figure; for any other the best of a
    few large matrix products, which takes a fraction of a second.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            if key in name:
                return tflops * 1e12
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


def largest_power_of_two(fits: Callable[[int], bool], limit: int) -> int:
    """The largest power of two, at most `limit`, that `fits`; 0 if not even 1 does. Tries downwards."""
    size = 1 << (limit.bit_length() - 1)
    while size and not fits(size):
        size //= 2
    return size


def largest_micro_batch(model: nn.Module, sequence_length: int, sequences: int, rt: Runtime) -> int:
    """The largest power of two of sequences that fits into memory and divides `sequences`.

    On CUDA by trying a forward and a backward pass, not compiled, which needs more memory than compiled.
    Elsewhere at most 2048 tokens, beyond which larger batches are no faster.
    Raises UserError if not even one sequence fits.
    """
    limit = sequences & -sequences  # the largest power of two that divides it
    if rt.device.type != "cuda":
        return largest_power_of_two(lambda B: B == 1 or B * sequence_length <= 2048, limit)

    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    best = largest_power_of_two(
        lambda B: _fits(model, B, sequence_length, 3 * n_parameters, rt), min(limit, 128)
    )
    torch.cuda.empty_cache()
    best = int(rt.all_reduce(torch.tensor(best, device=rt.device), "MIN"))
    if best == 0:
        raise UserError(
            f"--sequence-length {sequence_length}: not one sequence fits into GPU memory: lower it"
        )
    return best


def _fits(model: nn.Module, B: int, sequence_length: int, reserve: int, rt: Runtime) -> bool:
    """Whether forward and backward of B sequences fit beside `reserve` floats.

    The reserve stands in for AdamW's two moments and DDP's buckets, which do not exist yet.
    """
    try:
        idx = torch.zeros(B, sequence_length, dtype=torch.int64, device=rt.device)
        reserved = torch.empty(reserve, device=rt.device)
        with rt.autocast():
            loss = model(idx, idx)[1]
        loss.backward()
        del reserved
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
