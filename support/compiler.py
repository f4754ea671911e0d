"""Checks that torch.compile works on this machine, and says how to mend it if it does not."""

import importlib.util
import os
import re
import textwrap

import torch

from support.cli import UserError
from support.runtime import Runtime

TRITON_NEEDS = (7, 0)  # the lowest compute capability that it compiles for


def on_by_default(device: str) -> bool:
    """True if --compile is on by default for this --device: on a CUDA GPU that it supports."""
    return _is_on_cuda(device) and _why_not(device) == ""


def check(compiled: bool, device: str) -> None:
    """Raise UserError if --compile cannot work on this --device. Takes no time: see `try_out`."""
    if compiled and _is_on_cuda(device) and (reason := _why_not(device)):
        raise UserError(f"--compile: {reason}")


def try_out(rt: Runtime) -> None:
    """Compile something trivial on every process's device.

    Raises UserError if that fails on any. Without this the first thing to fail would be a validation, which
    may fail without ending the run.
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
    """What stands in the way of torch.compile on this --device, and what to do; empty if nothing does."""
    if not _has_triton():
        return (
            "needs Triton, which comes with torch on Linux only: --no-compile, or on Windows use WSL, or "
            "pip install triton-windows"
        )
    index = device.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        return ""  # no such device: an error of its own, later
    capability = torch.cuda.get_device_capability(int(index))
    if torch.version.hip is None and capability < TRITON_NEEDS:  # ROCm has other numbers
        have = f"sm_{capability[0]}{capability[1]}"
        return f"needs a GPU of sm_70 (V100) or newer, and this one is {have}: --no-compile"
    return ""


def _reason(error: Exception) -> str:
    """What an error of torch.compile says, in one line, without torch's hints for its own developers."""
    text = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]
    # From torch's worker processes comes the text of a traceback, whose frames are indented; from a compiler
    # its whole command.
    lines = [line for line in text.splitlines() if not line.startswith((" ", "Traceback"))]
    lines = [line for line in lines if re.search("error|fatal", line, re.IGNORECASE)] or lines
    return textwrap.shorten(" ".join(lines), 300, placeholder=" …") or type(error).__name__


def _fix(error: Exception) -> str:
    """What to do where compiling fails with this error."""
    if "[Errno" in str(error):
        return "see that TORCHINDUCTOR_CACHE_DIR (or the temporary folder) has space and can be written"
    if re.search(r"compiler|compile error|Python\.h|exit status|gcc|clang|g\+\+", str(error), re.IGNORECASE):
        return "install a C++ compiler and Python's headers (sudo apt install build-essential python3-dev)"
    return f"install another torch (this is {torch.__version__})"


def _is_on_cuda(device: str) -> bool:
    return device.startswith(("auto", "cuda")) and torch.cuda.is_available()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
