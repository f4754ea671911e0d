"""Compiles fake_cuda.cpp and loads it: before torch is imported, which looks up its hooks.

Imports nothing of torch, so that a test file can use `build` and a script can call `load` first of all.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
FOLDER = "FAKE_CUDA_FOLDER"  # environment variable: where the library is, or will be
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / ".pytest_cache" / "fake_cuda"


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is installed."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build() -> Path:
    """The library, compiled (10 s) unless it is there already. Raises RuntimeError if that fails."""
    folder = Path(os.environ.get(FOLDER, DEFAULT_FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    key = SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + sys.executable.encode()
    library = folder / f"fake_cuda_{hashlib.sha256(key).hexdigest()[:12]}.so"
    if library.exists():
        return library
    torch = _torch_folder()
    include = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new = Path(scratch) / "new.so"
        command = [compiler() or "c++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(new)]
        command += [f"-I{path}" for path in include]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        if done.returncode:
            raise RuntimeError(f"{SOURCE}: does not compile:\n{done.stderr[-4000:]}")
        new.rename(library)
    return library


def load(library: Path) -> None:
    """Give the coming `import torch` a CUDA device."""
    if "torch" in sys.modules:
        raise RuntimeError("the fake CUDA device must be loaded before torch is imported")
    for dependency in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / dependency), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent
