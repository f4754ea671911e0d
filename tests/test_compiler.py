"""torch.compile where it cannot work: said at the start, in one line with a way out."""

import subprocess
from pathlib import Path

import pytest
import torch
from helpers import TINY, as_flags, command, environment, posix

import bench
import settings
from support import compiler
from support.cli import UserError
from support.runtime import Runtime

COMPILER = "build-essential python3-dev"
# What torch's InductorError says, with what to install.
FAILURES = {
    """SubprocException: An exception occurred in a subprocess:

Traceback (most recent call last):
  File "torch/_inductor/compile_worker/subproc_pool.py", line 400, in do_job
    result = job()
RuntimeError: Failed to find C compiler. Please specify via CC environment variable.
""": ("Failed to find C compiler", COMPILER),
    "CalledProcessError: Command '['/usr/bin/gcc', 'cuda_utils.c']' returned non-zero exit status 1.": (
        "non-zero exit status 1",
        COMPILER,
    ),
    """PTXASError: PTXAS error: Internal Triton PTX codegen error
`ptxas` stderr:
ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'
""": ("Value 'sm_121a' is not defined", "another torch"),
    "CppCompileError: C++ compile error\n\nCommand:\ncc a.cpp\n\nOutput:\nfatal error: omp.h: No such file": (
        "omp.h",
        COMPILER,
    ),
    "OSError: [Errno 28] No space left on device": ("No space left", "TORCHINDUCTOR_CACHE_DIR"),
    "": ("RuntimeError", "another torch"),
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_compile_failure_names_the_cause_and_the_fix(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: torch.Tensor) -> None:
        raise RuntimeError(message + "\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(UserError) as error:
        compiler.try_out(Runtime(torch.device("cpu"), torch.float32))
    text = str(error.value)
    assert text.startswith("--compile: ") and text.endswith(", or --no-compile")
    assert all(part in text for part in FAILURES[message])
    assert not any(part in text for part in ("\n", "VERBOSE", "File", "Traceback"))


@posix
def test_a_run_without_a_compiler_ends_before_it_writes(tmp_path: Path, data_dir: Path) -> None:
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run", "compile": True})
    hidden = {"PATH": str(tmp_path), "CXX": "g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command("train_gpt2.py", "--preset", "demo", *flags),
        env={**environment(), **hidden}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: --compile: fails here")
    assert "No working C++ compiler" in line and COMPILER in line and "--no-compile" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("triton", "capability", "problem"),
    [
        (True, (7, 0), ""),
        (False, (8, 0), "needs Triton.*--no-compile"),
        (True, (6, 0), "needs a GPU of sm_70 .V100. or newer, and this one is sm_60: --no-compile"),  # P100
    ],
)
def test_gpus_that_triton_does_not_support_are_not_compiled_for(
    triton: bool, capability: tuple[int, int], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (capability, (8, 9))[index])
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: object() if triton else None)
    s = settings.read_settings(["--preset", "gpt2-124m"])
    assert s.compile == (not problem) and not settings.read_settings(["--device", "cpu"]).compile
    assert settings.read_settings(["--device", "cuda:1"]).compile == triton
    settings.check_settings(s, 1)
    asked = settings.read_settings(["--compile"])
    settings.check_settings(settings.read_settings(["--compile", "--device", "cpu"]), 1)
    if not problem:
        settings.check_settings(asked, 1)
        return
    for check in (
        lambda: settings.check_settings(asked, 1),
        lambda: bench.check_settings(bench.Settings(compile=True)),
    ):
        with pytest.raises(UserError, match=f"--compile: {problem}"):
            check()


def test_cpu_presets_are_not_compiled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "on_by_default", lambda device: device != "cpu")
    assert not settings.read_settings(["--preset", "demo"]).compile
    assert settings.read_settings(["--preset", "demo", "--device", "cuda"]).compile
    assert settings.read_settings(["--preset", "rehearsal"]).compile
