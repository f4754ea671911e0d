"""Evaluations, samples and figures may fail without ending the run.

An error is recorded, and training continues. But some failures end the process, such as running out of host
memory or a crash inside a library, and would end it again after every restart. So a file in the run folder
counts how often the process has died in each kind of work. After MAX_DEATHS deaths in a row that kind is
skipped.
"""

import contextlib
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from support import files, metrics
from support.cli import UserError
from support.metrics import Metrics
from support.runtime import Runtime
from support.stop_signal import Stopped

T = TypeVar("T")
UNDER_WAY = ".evaluating.json"  # kind of work -> how often it has begun without ending
MAX_DEATHS = 5  # unrelated kills can land in an evaluation too
# Work that a resumed run does not repeat -> the kind of its record, or the name of its event.
RECORDS = {"validation": "val", "HellaSwag": "hellaswag", "samples": "sample"}


class Attempts:
    """Runs a task and tolerates its failure. Every rank makes the same calls in the same order."""

    def __init__(self, rt: Runtime, opened: Metrics, steps_done: int) -> None:
        """steps_done: the step to resume at, which may already have recorded some of its evaluations."""
        self.rt, self.metrics = rt, opened
        self.file = opened.path.parent / UNDER_WAY
        self.settled: set[tuple[int, str]] = set()
        self.seconds: dict[str, float] = {}  # kind of work -> duration of the last one
        self.stopped_by = 0  # a signal that has interrupted one, on any rank
        if rt.is_main:
            records = [r for r in metrics.read(opened.path) if r["step"] == steps_done]
            found = {r["kind"] for r in records} | {r.get("name") for r in records}
            # Skipped work is not settled, so that it is tried again once the user has deleted the file.
            found |= {
                r["what"] for r in records if r.get("name") == "evaluation failed" and "deaths" not in r
            }
            self.settled = {(steps_done, name) for name, kind in RECORDS.items() if {name, kind} & found}

    def __call__(self, step: int, name: str, work: Callable[[], T], on_this_rank: bool = True) -> T | None:
        """Return the result of `work`, or None if it failed on any rank, was done before, or is skipped.

        work: runs in the precision of training. It must not communicate with other ranks, which would wait
        for one that has failed.
        on_this_rank: True if this rank runs it; the others get None. If a signal interrupts it on any rank,
        this call and all later ones return None, and the work counts as begun.
        """
        if self.stopped_by or self.rt.on_any(self.rt.is_main and not self._begin(step, name)):
            return None
        result, reason, trace, stopped_by = None, "", None, 0
        begin = time.perf_counter()
        try:
            with self.rt.autocast():
                result = work() if on_this_rank else None
            self.rt.synchronize()  # so that an error of the device belongs to this work, not to the next step
            self.seconds[name] = time.perf_counter() - begin
        except Stopped:
            stopped_by = self.rt.stop.number
        except Exception as error:  # no error may end training
            reason = str(error).partition("\n")[0] or type(error).__name__
            if not isinstance(error, UserError | torch.OutOfMemoryError):
                reason, trace = f"{type(error).__name__}: {reason}", traceback.format_exc()
        if reason:  # only here, because the exception's frames kept their tensors alive until now
            if self.rt.is_main:
                self._record(step, name, reason, trace)
            else:
                print(f"warning: step {step}, process {self.rt.rank}: {name}: {reason}", file=sys.stderr)
            gc.collect()
            if self.rt.device.type == "cuda":
                torch.cuda.empty_cache()
        failed, self.stopped_by = self.rt.max_over_ranks(reason != "", stopped_by)
        if self.rt.is_main and not self.stopped_by:
            if failed and not reason:
                self._record(step, name, "on another process", None)
            self._write({other: deaths for other, deaths in self._deaths().items() if other != name})
            if name in RECORDS:
                self.settled.add((step, name))
        return None if failed or self.stopped_by else result

    def _begin(self, step: int, name: str) -> bool:
        """True if the work should be done. Then counts it as begun."""
        if (step, name) in self.settled:
            return False
        deaths = self._deaths()
        if deaths.get(name, 0) >= MAX_DEATHS:
            reason = f"the process has ended in it {MAX_DEATHS} times: delete {self.file} to try it again"
            self._record(step, name, reason, None, deaths=deaths[name])
            self.settled.add((step, name))
            return False
        self._write({**deaths, name: deaths.get(name, 0) + 1})
        return True

    def _record(self, step: int, name: str, reason: str, trace: str | None, **more: int) -> None:
        print(f"warning: step {step}: {name} failed, training continues: {reason}", file=sys.stderr)
        more |= {"traceback": trace} if trace else {}
        self.metrics.log(step, "event", name="evaluation failed", what=name, reason=reason, **more)

    def _deaths(self) -> dict[str, int]:
        """How often each kind of work has begun without ending. Empty if the file is missing or damaged."""
        try:
            return {str(name): int(deaths) for name, deaths in json.loads(self.file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, deaths: dict[str, int]) -> None:
        with contextlib.suppress(OSError):  # a full disk: the metrics report that
            if deaths:
                files.write_atomically(self.file, json.dumps(deaths) + "\n")
            else:
                self.file.unlink(missing_ok=True)
