"""Fixtures of the fault tests, and the table at their end."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_runs import TABLE, Run
from helpers import T, history
from loopback_hub import LoopbackHub


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{'fault':48} {'injected':>8} {'survived':>8} {'steps lost: median, most':>25}")
    for fault, row in TABLE.items():
        lost = f"{int(np.median(row.lost))}, {max(row.lost)}" if row.lost else "-"
        write(f"{fault:48} {row.injected:8} {row.survived:8} {lost:>25}")
    injected, survived = (
        sum(getattr(row, name) for row in TABLE.values()) for name in ("injected", "survived")
    )
    write(f"{'all':48} {injected:8} {survived:8}")


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fault_data")
    rng = np.random.default_rng(0)
    for name in ("x_val_000000.npy", "x_train_000001.npy", "x_train_000002.npy"):
        np.save(folder / name, (rng.integers(0, 40, 2000 * T).cumsum() % 300).astype(np.uint16))
    return folder


@pytest.fixture(scope="session")
def expected(fault_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The metrics of a run that nothing happens to."""
    run = Run(fault_data, tmp_path_factory.mktemp("undisturbed") / "run")
    done = run.finish()
    assert done.returncode == 0, done.stderr
    return history(run.out)


@pytest.fixture(scope="session")
def expected_of_two(fault_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The metrics of a run on two processes that nothing happens to."""
    run = Run(fault_data, tmp_path_factory.mktemp("undisturbed_two") / "run")
    done = run.finish(nproc=2)
    assert done.returncode == 0, done.stderr
    return history(run.out)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def run(fault_data: Path, tmp_path: Path) -> Iterator[Run]:
    made = Run(fault_data, tmp_path / "run")
    yield made
    made.kill_all()  # of a test that has failed


@pytest.fixture
def pushing(fault_data: Path, tmp_path: Path, hub: LoopbackHub) -> Iterator[Run]:
    """A run that sends its checkpoints to the hub."""
    made = Run(fault_data, tmp_path / "run", hub)
    yield made
    made.kill_all()
