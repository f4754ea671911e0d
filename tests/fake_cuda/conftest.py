"""Runs on the fake CUDA device: each group in a process of its own, once in a test session."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_library
import pytest
import torch
from filelock import FileLock, Timeout
from groups import GROUPS, SLOW_GROUPS
from helpers import environment

SCRIPT = Path(__file__).with_name("fake_training.py")
Report = dict[str, object]


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Report]]:
    """reports(name): what fake_training.py saw of a group's runs, in their order."""
    if sys.platform != "linux":
        pytest.skip("the fake CUDA device is made for Linux")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("the fake CUDA device needs torch's CPU build: https://download.pytorch.org/whl/cpu")
    if fake_library.compiler() is None:
        pytest.skip("the fake CUDA device needs a C++ compiler: install g++")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers share what they have run
    os.environ[fake_library.FOLDER] = str(folder)
    with FileLock(folder / "fake_cuda.lock"):
        fake_library.build()

    def read(name: str) -> list[Report]:
        # While another worker runs this group, run one that nobody has begun.
        for other in [name, *GROUPS]:
            if output(folder, name).exists():
                break
            run_group(other, folder, wait=False)
        run_group(name, folder, wait=True)
        return json.loads(output(folder, name).read_text())

    return read


def output(folder: Path, name: str) -> Path:
    """Where a group's reports are."""
    return folder / f"fake_cuda_{name}.out"


def run_group(name: str, folder: Path, wait: bool) -> None:
    """Run a group unless that is done; without `wait` not if another worker is at it."""
    file = output(folder, name).with_suffix(".json")
    try:
        with FileLock(file.with_suffix(".lock"), timeout=-1 if wait else 0):
            if not output(folder, name).exists():
                file.write_text(json.dumps({**GROUPS, **SLOW_GROUPS}[name]))
                command = [sys.executable, str(SCRIPT), "--cases", str(file)]
                done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
                assert done.returncode == 0, done.stderr
    except Timeout:
        pass
