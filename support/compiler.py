"""Check that torch.compile works on this machine, and explain how to fix it if not."""

import importlib.util
import os
import re
import textwrap

import torch

from support.cli import UserError
from support.runtime import Runtime

TRITON_NEEDS = (7, 0)  # the lowest compute capability that it compiles for


def on_by_default(device: str) -> bool:
    """True if --compile is on by default for this --device: a CUDA GPU that it supports."""
    return _is_on_cuda(device) and _why_not(device) == ""


def check(compiled: bool, device: str) -> None:
    """Raise UserError if --compile cannot work on this --device. Takes no time, unlike `try_out`."""
    if compiled and _is_on_cuda(device) and (reason := _why_not(device)):
        raise UserError(f"--compile: {reason}")


def try_out(rt: Runtime) -> None:
    """Compile a trivial function on the device of every process. Raises UserError if that fails on any.

    Without this the first failure would be in a validation, which may fail without ending the run.
    """

    def attempt() -> None:
        x = torch.ones(4, device=rt.device)
        try:
            torch.compile(lambda x: x.sin() + 1)(x)
        except Exception as error:  # of Dynamo, Triton, ptxas, a compiler, a linker
            raise UserError(
                f"--compile: fails here ({_reason(error)}): {_fix(error)}, or --no-compile"
            ) from error

    rt.run_on(True, attempt)


def _why_not(device: str) -> str:
    """Return why torch.compile cannot work on this --device, and the fix; empty if it can."""
    if not _has_triton():
        return (
            "needs Triton, which comes with torch on Linux only: --no-compile, or on Windows use WSL, or "
            "pip install triton-windows"
        )
    index = device.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        return ""  # no such device: reported elsewhere
    capability = torch.cuda.get_device_capability(int(index))
    if torch.version.hip is None and capability < TRITON_NEEDS:  # ROCm has other numbers
        have = f"sm_{capability[0]}{capability[1]}"
        return f"needs a GPU of sm_70 (V100) or newer, and this one is {have}: --no-compile"
    return ""


def _reason(error: Exception) -> str:
    """Shorten an error of torch.compile to one line, without hints for torch's developers."""
    text = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]
    # torch's worker processes send a traceback, whose frames are indented; compilers, their whole command.
    lines = [line for line in text.splitlines() if not line.startswith((" ", "Traceback"))]
    lines = [line for line in lines if re.search("error|fatal", line, re.IGNORECASE)] or lines
    return textwrap.shorten(" ".join(lines), 300, placeholder=" …") or type(error).__name__


def _fix(error: Exception) -> str:
    """Suggest a fix for an error of torch.compile."""
    if "[Errno" in str(error):
        return "see that TORCHINDUCTOR_CACHE_DIR (or the temporary folder) has space and can be written"
    if re.search(r"compiler|compile error|Python\.h|exit status|gcc|clang|g\+\+", str(error), re.IGNORECASE):
        return "install a C++ compiler and Python's headers (sudo apt install build-essential python3-dev)"
    return f"install another torch (this is {torch.__version__})"


def _is_on_cuda(device: str) -> bool:
    return device.startswith(("auto", "cuda")) and torch.cuda.is_available()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
