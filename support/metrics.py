"""metrics.jsonl, the metrics of a run: one record per line.

    {"step": 12, "kind": "train", "loss": 4.1, "lr": 6e-4, …}

`step` counts completed optimizer steps. Kinds: train, val, hellaswag, event.
"""

import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from support import trackers
from support.cli import UserError
from support.files import check_regular, fsync, write_atomically
from support.trackers import Tracker

Record = dict[str, object]
MEASUREMENTS = {"train": "loss", "val": "loss", "hellaswag": "acc"}  # kind -> the key that each must have


class Metrics:
    """Appends records to a file. Each is complete and on its way to the disk when `log` returns."""

    def __init__(self, path: Path, keep_until: int | None = None, silent: bool = False) -> None:
        """Open `path` for appending, and drop the records of steps beyond `keep_until` (None: keep all).

        A killed run may have recorded steps after its last checkpoint, and will repeat them.
        silent: write nothing, as every process but the first.
        """
        self.path = path
        self.trackers: dict[str, Tracker] = {}
        self.last_step = keep_until or 0
        self.file = None
        if not silent:
            kept = [] if keep_until is None else [r for r in read(path) if r["step"] <= keep_until]
            write_atomically(path, "".join(_line(record) for record in kept))
            self.file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 - as long as the run

    def log(self, step: int, kind: str, **values: object) -> None:
        """Append one record. Numbers that are not finite become null."""
        if self.file is None:
            return
        record = {"step": step, "kind": kind, **values}
        with self._space_needed():
            self.file.write(_line(record))
            self.file.flush()
        self.last_step = step
        for name, tracker in list(self.trackers.items()):
            with self._or_drop(name):
                tracker.log(step, trackers.numbers(record))

    def track(self, name: str, out_dir: Path, run_name: str, config: dict[str, object]) -> None:
        """Also send records to the tracker `name` from now on. A tracker that fails is dropped."""
        with self._or_drop(name):
            self.trackers[name] = trackers.KINDS[name](out_dir, run_name, config, self.last_step)

    @contextlib.contextmanager
    def _or_drop(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails inside, with a warning and an event. It must never end the run."""
        try:
            yield
        except Exception as error:  # trackers may raise anything
            self.trackers.pop(name, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"warning: --track {name}: {reason}: training continues without it", file=sys.stderr)
            self.log(self.last_step, "event", name="tracker failed", tracker=name, reason=reason)

    def sync(self) -> None:
        """Wait until all records are on the disk itself."""
        if self.file is not None:
            with self._space_needed():
                fsync(self.file.fileno())

    def close(self) -> None:
        """Let the trackers send what is left, and close the file."""
        for name, tracker in list(self.trackers.items()):
            with self._or_drop(name):
                tracker.finish()
        if self.file is not None:
            self.file.close()

    @contextlib.contextmanager
    def _space_needed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}: free some space, then --resume") from error


def read(path: Path) -> list[Record]:
    """Read the records of a metrics file, oldest first. No file means no records.

    Ignores blank lines, and a last line without a newline, because a kill can truncate it. Raises UserError
    on any other line that is not a record.
    """
    check_regular(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not _is_record(record):
                raise ValueError("another kind of record")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not a record of a run: remove the line") from error
        records.append(record)
    return records


def has_records(path: Path) -> bool:
    """True if the file is empty or has at least one record, so that it belongs to a run, even if damaged."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if _is_record(json.loads(line)):
                    return True
        return file.tell() == 0


def _is_record(record: Record) -> bool:
    """True if `log` could have written this: an integer step, measured values finite or null."""
    if not (type(record["step"]) is int and 0 <= record["step"] < 2**53 and isinstance(record["kind"], str)):
        return False
    if record["kind"] not in MEASUREMENTS:
        return True
    values = [value for key, value in record.items() if key not in ("step", "kind")]
    numbers = all(value is None or (type(value) in (int, float) and abs(value) < 1e300) for value in values)
    return numbers and MEASUREMENTS[record["kind"]] in record


def _line(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def is_spike(loss: float, recent: Sequence[float], sigmas: float = 6.0) -> bool:
    """True if a loss is more than `sigmas` standard deviations above the mean of the recent ones."""
    if len(recent) < 100:
        return False
    return loss > statistics.fmean(recent) + sigmas * statistics.pstdev(recent)
