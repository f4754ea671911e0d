"""The choice of device, precision and batch, from descriptions of machines that are not there."""

import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, command, environment

from model import GPT, GPTConfig
from support import hardware, runtime
from support.cli import UserError

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "xpu", "nonsense"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device}"):
        runtime.start(device, "auto")


def test_largest_power_of_two() -> None:
    tried = []
    assert hardware.largest_power_of_two(lambda B: tried.append(B) or B <= 9, 100) == 8
    assert tried == [64, 32, 16, 8]
    assert hardware.largest_power_of_two(lambda B: False, 4) == 0


def test_micro_batch_divides_the_share_of_a_process() -> None:
    model = GPT(GPTConfig(64, 50257, 1, 1, 4))
    here = runtime.Runtime(CPU, torch.float32)
    assert hardware.largest_micro_batch(model, 64, 24, here) == 8
    assert hardware.largest_micro_batch(model, 64, 7, here) == 1
    assert hardware.largest_micro_batch(model, 64, 1024, here) == 32


def test_measured_peak_is_a_rate_of_this_machine() -> None:
    assert 1e9 < hardware.peak_flops(CPU, torch.float32) < 1e14


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
rt.run_on_some(rt.is_main, lambda: time.sleep(5), fetches=True)
rt.say("fetched")
# ... and gives up on a rank that hangs later.
if rt.is_main:
    time.sleep(20)
rt.barrier()
print("never")
"""


def test_processes_are_patient_only_while_data_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PATIENCE)
    begin = time.monotonic()
    done = subprocess.run(
        command(str(tmp_path / "script.py"), nproc=2),
        env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode != 0 and "fetched" in done.stdout and "never" not in done.stdout
    assert time.monotonic() - begin < 60
    assert "timed out" in done.stderr.lower() or "timeout" in done.stderr.lower(), done.stderr[-2000:]
