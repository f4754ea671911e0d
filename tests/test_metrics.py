"""metrics.jsonl: written, read back, cut at a resume."""

import math
import os
from pathlib import Path

import pytest
from helpers import posix

from support import metrics
from support.cli import UserError
from support.metrics import Metrics


def test_records_round_trip_and_nan_becomes_null(tmp_path: Path) -> None:
    log = Metrics(tmp_path / "m.jsonl")
    log.log(1, "train", loss=0.1 + 0.2, lr=3e-4)
    log.log(1, "val", loss=math.inf)
    assert metrics.read(tmp_path / "m.jsonl") == [
        {"step": 1, "kind": "train", "loss": 0.1 + 0.2, "lr": 3e-4},
        {"step": 1, "kind": "val", "loss": None},
    ]


def test_reopening_drops_records_beyond_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = Metrics(path)
    for step in range(1, 6):
        log.log(step, "train", loss=1.0)
    with open(path, "a") as file:
        file.write('{"step": 6, "ki')
    again = Metrics(path, keep_until=3)
    again.log(4, "train", loss=2.0)
    assert [(r["step"], r["loss"]) for r in metrics.read(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    Metrics(path)
    assert metrics.read(path) == []


@posix
def test_reading_does_not_wait_for_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        metrics.read(tmp_path / "metrics.jsonl")
