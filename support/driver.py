"""Explain why torch cannot use an NVIDIA GPU that is there: its driver, or the CUDA of this torch."""

import contextlib
import os
import re
import subprocess
from pathlib import Path

import torch

from support.cli import UserError

# The oldest driver for each major version of CUDA (NVIDIA, "CUDA Compatibility", minor versions).
NEEDED_DRIVER = {12: 525, 13: 580}
# Wheels that torch 2.9 to 2.13 all have (PyTorch's RELEASE.md, "CUDA support matrix"): CUDA 12.6 for GPUs
# from Maxwell to Hopper, CUDA 13.0 for Turing (compute capability 7.5) and newer.
WHEELS = {12: "cu126", 13: "cu130"}
TURING = (7, 5)


def check_found(device: str) -> None:
    """Raise UserError if torch finds no CUDA device but there is an NVIDIA GPU. device: as in --device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return  # hidden on purpose
    driver = nvidia_driver()
    if driver is None:
        return
    build, cuda = torch.__version__, torch.version.cuda
    release = int(driver.split(".")[0])
    wheels = [install(major) for major, needed in NEEDED_DRIVER.items() if release >= needed]
    newest = f"{wheels[-1]}, " if wheels else "update the driver, "
    if cuda is None:
        raise UserError(
            f"--device {device}: there is an NVIDIA GPU (driver {driver}), but torch {build} is built "
            f"without CUDA: {newest}or --device cpu to do without the GPU"
        )
    needed = NEEDED_DRIVER.get(int(cuda.split(".")[0]), 0)
    if release < needed:
        older = f"or, unless the GPU is a Blackwell, {newest}" if wheels else ""
        raise UserError(
            f"--device {device}: NVIDIA's driver is {driver}, and torch {build} (CUDA {cuda}) needs {needed} "
            f"or newer: update the driver, {older}or --device cpu to do without the GPU"
        )
    raise UserError(
        f"--device {device}: there is an NVIDIA GPU, and its driver {driver} suits torch {build} "
        f"(CUDA {cuda}), but CUDA does not start: see what nvidia-smi says, or --device cpu to do without it"
    )


def check_architecture(device: torch.device) -> None:
    """Raise UserError if torch has no code for the architecture of this CUDA device."""
    if torch.version.cuda is None:  # ROCm has names of its own
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    if not any(runs(arch, capability) for arch in built_for):
        raise UserError(
            f"--device {device}: {name} is an sm_{capability[0]}{capability[1]}, torch {torch.__version__} "
            f"is built for {', '.join(built_for)}: {install(12 if capability < TURING else 13)}, "
            "or --device cpu"
        )


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """True if code for `arch` runs on a GPU: "sm_86" on 8.6 to 8.9, "compute_86" on 8.6 and all later."""
    match = re.match(r"(sm|compute)_(\d+)(\d)", arch)
    if not match:
        return False
    built = (int(match[2]), int(match[3]))
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def install(cuda_major: int) -> str:
    """Return the pip command for the same torch built for another CUDA.

    With the suffix, pip replaces the installed one.
    """
    wheel = WHEELS[cuda_major]
    version = torch.__version__.split("+")[0]
    return f"pip install torch=={version}+{wheel} --index-url https://download.pytorch.org/whl/{wheel}"


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Return the version of NVIDIA's driver ("535.183.01"), or None on a machine without a GPU of theirs."""
    text = ""
    # Not only /proc, because a container sees the host's even without a GPU.
    if any((root / "dev").glob("nvidia[0-9]*")):
        with contextlib.suppress(OSError):
            text = (root / "proc/driver/nvidia/version").read_text()
    else:  # Windows, WSL
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"\d{3}\.[\d.]*\d", text)
    return found[0] if found else None
