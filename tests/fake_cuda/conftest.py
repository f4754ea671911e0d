"""Runs on the fake CUDA device: each in a process of its own, once per test session, whoever asks first."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_library
import pytest
from filelock import FileLock
from helpers import environment

SCRIPT = Path(__file__).with_name("fake_training.py")
Report = dict[str, object]


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[dict]], list[Report]]:
    """run_cases(name, cases): reports of fake_training.py; a name stands for the same cases throughout."""
    if sys.platform != "linux":
        pytest.skip("the fake CUDA device is made for Linux")
    if fake_library.compiler() is None:
        pytest.skip("the fake CUDA device needs a C++ compiler: install g++")
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # shared by the workers
    env = {**environment(), fake_library.FOLDER: str(folder)}

    def run(name: str, cases: list[dict]) -> list[Report]:
        file = folder / f"fake_cuda {name}.json"
        output = file.with_suffix(".out")
        with FileLock(folder / "fake_cuda.lock"):
            os.environ[fake_library.FOLDER] = str(folder)
            fake_library.build()
        with FileLock(file.with_suffix(".lock")):
            if not output.exists():
                file.write_text(json.dumps(cases))
                command = [sys.executable, str(SCRIPT), "--cases", str(file)]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())

    return run
