"""NVIDIA GPUs that torch cannot use, on machines that are not there."""

import os
from pathlib import Path

import pytest
import torch

from support import driver, runtime
from support.cli import UserError

CU126 = "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"
CU130 = "pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with torch 2.13.0 for CUDA 13, whose GPU does not start."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "nvidia_driver", lambda: "535.183.01")
    return monkeypatch


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_an_old_driver_comes_with_a_matching_install_command(
    machine: pytest.MonkeyPatch, device: str
) -> None:
    with pytest.raises(UserError) as error:
        runtime.start(device, "auto")
    text = str(error.value)
    assert text.startswith(f"--device {device}: ") and "\n" not in text
    for part in ("535.183.01", "580", "2.13.0+cu130", "CUDA 13.0", CU126, "--device cpu"):
        assert part in text
    assert runtime.start("cpu", "float32").device.type == "cpu"


@pytest.mark.parametrize(
    ("cuda", "found", "says", "not_said"),
    [
        ("12.6", "470.57.02", ["470.57.02", "525", "update the driver"], "pip"),
        ("13.0", "470.57.02", ["580", "update the driver"], "pip"),
        ("13.2", "580.65.06", ["580.65.06", "nvidia-smi"], "needs"),
        ("12.6", "535.183.01", ["nvidia-smi"], "needs"),
        (None, "535.183.01", ["without CUDA", CU126], CU130),
        (None, "580.65.06", ["without CUDA", CU130], CU126),
        (None, "470.57.02", ["without CUDA", "update the driver"], "pip"),
    ],
)
def test_other_failures_of_cuda_name_their_reason(
    machine: pytest.MonkeyPatch, cuda: str | None, found: str, says: list[str], not_said: str
) -> None:
    machine.setattr(torch.version, "cuda", cuda)
    machine.setattr(driver, "nvidia_driver", lambda: found)
    with pytest.raises(UserError) as error:
        runtime.start("auto", "auto")
    assert all(part in str(error.value) for part in says)
    assert not_said not in str(error.value)


def test_a_cpu_is_chosen_where_there_is_no_gpu_or_it_is_hidden(machine: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        machine.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert runtime.start("auto", "float32").device.type == "cpu"
    machine.delenv("CUDA_VISIBLE_DEVICES")
    machine.setattr(driver, "nvidia_driver", lambda: None)
    assert runtime.start("auto", "float32").device.type == "cpu"


def test_nvidia_driver_reads_the_version_in_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    assert driver.nvidia_driver(tmp_path) is None  # a container without a GPU on a host with one
    (tmp_path / "dev/nvidiactl").touch()
    assert driver.nvidia_driver(tmp_path) is None
    (tmp_path / "dev/nvidia1").touch()
    assert driver.nvidia_driver(tmp_path) == "535.183.01"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert driver.nvidia_driver(tmp_path) == "580.65.06"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell script")
def test_nvidia_driver_asks_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    smi = tmp_path / "nvidia-smi"
    for script, found in (
        ("echo 552.22\necho 552.22", "552.22"),
        ("echo NVIDIA-SMI 535.183 has failed because it could not communicate; exit 9", None),
        ("echo No devices were found", None),
    ):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert driver.nvidia_driver(tmp_path) == found


@pytest.mark.parametrize(
    ("capability", "built_for", "advice"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"], CU126),  # V100, CUDA 13
        ((6, 0), ["sm_75", "sm_80"], CU126),  # P100
        ((12, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], CU130),  # 5090, CUDA 12.6
        ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], None),  # 4090
        ((7, 5), ["sm_75", "sm_80"], None),  # T4
        ((9, 0), ["sm_80", "sm_90a"], None),  # H100
        ((12, 1), ["sm_100", "sm_120"], None),
        ((13, 0), ["sm_100", "sm_120", "compute_120"], None),  # a later one: compiled when it starts
    ],
)
def test_gpus_without_code_in_this_torch_are_refused(
    machine: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str], advice: str | None
) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    machine.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if advice is None:
        assert runtime._pick_device("auto", 0, 1) == torch.device("cuda", 0)
        return
    with pytest.raises(UserError) as error:
        runtime._pick_device("auto", 0, 1)
    assert "Tesla V100-SXM2-16GB" in str(error.value) and advice in str(error.value)
