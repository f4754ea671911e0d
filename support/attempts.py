"""Evaluations, samples and figures, which may fail without ending the run.

What raises an error is recorded, and training continues. What ends the process instead (the host out of
memory, a crash inside a library) would end it again after every restart. So a file in the run folder lists
the work that has begun and not ended. Work that is listed MAX_DEATHS times is skipped.
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
UNDER_WAY = ".evaluating.json"
MAX_DEATHS = 5  # kills that have nothing to do with the evaluation may fall into it as well
# What a resumed run does not repeat -> the kind of its record, or the name of its event.
RECORDS = {"validation": "val", "HellaSwag": "hellaswag", "samples": "sample"}


class Attempts:
    """Calls work that may fail; every process of the run makes the same calls in the same order."""

    def __init__(self, rt: Runtime, run_metrics: Metrics, steps_done: int) -> None:
        """steps_done: the step to resume at, whose record may lack an evaluation."""
        self.rt, self.metrics = rt, run_metrics
        self.file = run_metrics.path.parent / UNDER_WAY
        self.settled: set[tuple[int, str]] = set()
        self.seconds: dict[str, float] = {}  # what -> how long it took the last time
        self.stopped_by = 0  # the signal that has cut one of them off, on any process
        if rt.is_main:
            records = [r for r in metrics.read(run_metrics.path) if r["step"] == steps_done]
            found = {r["kind"] for r in records} | {r.get("name") for r in records}
            under_way = [what for _, what in self._under_way()]
            failed = {
                r["what"]
                for r in records
                if r.get("name") == "evaluation failed"
                # Once the file is gone, what was left out for its deaths is tried again.
                and ("deaths" not in r or under_way.count(r["what"]) >= MAX_DEATHS)
            }
            names = [what for what, kind in RECORDS.items() if kind in found or what in failed]
            self.settled = {(steps_done, what) for what in names}

    def __call__(self, step: int, what: str, work: Callable[[], T], here: bool = True) -> T | None:
        """The result of `work`; None if it failed on any process, was done before, or keeps killing the run.

        work: must not communicate with other processes, which would wait for one that has failed. It runs in
        the run's precision. here: whether this process runs it; the others get None.
        If a signal cuts it off on any process, this call and all later ones return None, and the work stays
        listed.
        """
        if self.stopped_by or self.rt.on_any(self.rt.is_main and not self._begin(step, what)):
            return None
        result, reason, trace, stopped_by = None, "", None, 0
        begin = time.perf_counter()
        try:
            with self.rt.autocast():
                result = work() if here else None
            self.rt.synchronize()  # an error of the device belongs to this work, not to the next step
            self.seconds[what] = time.perf_counter() - begin
        except Stopped:
            stopped_by = self.rt.stop.number
        except Exception as error:  # whatever it is, it must not end training
            reason = str(error).partition("\n")[0] or type(error).__name__
            if not isinstance(error, UserError | torch.OutOfMemoryError):
                reason, trace = f"{type(error).__name__}: {reason}", traceback.format_exc()
        if reason:  # only here: the exception's frames kept their tensors alive until now
            if self.rt.is_main:
                self._record(step, what, reason, trace)
            else:
                print(f"warning: step {step}, process {self.rt.rank}: {what}: {reason}", file=sys.stderr)
            gc.collect()
            if self.rt.device.type == "cuda":
                torch.cuda.empty_cache()
        failed, self.stopped_by = self.rt.highest(reason != "", stopped_by)
        if self.rt.is_main and not self.stopped_by:
            if failed and not reason:
                self._record(step, what, "on another process", None)
            self._write([pair for pair in self._under_way() if pair != [step, what]])
            if what in RECORDS:
                self.settled.add((step, what))
        return None if failed or self.stopped_by else result

    def _begin(self, step: int, what: str) -> bool:
        """True if the work should be done; lists it as under way in that case."""
        if (step, what) in self.settled:
            return False
        under_way = self._under_way()
        steps = [at for at, name in under_way if name == what]
        deaths = len(steps)
        # At a later step it may do no harm; if it does, it is left out from then on.
        if deaths >= MAX_DEATHS and (step in steps or len(set(steps)) > 1):
            reason = f"the process has ended in it {deaths} times: delete {self.file} to try it again"
            self._record(step, what, reason, None, deaths=deaths)
            self.settled.add((step, what))
            return False
        self._write([*under_way, [step, what]])
        return True

    def _record(self, step: int, what: str, reason: str, trace: str | None, **more: int) -> None:
        print(f"warning: step {step}: {what} failed, training continues: {reason}", file=sys.stderr)
        more |= {"traceback": trace} if trace else {}
        self.metrics.log(step, "event", name="evaluation failed", what=what, reason=reason, **more)

    def _under_way(self) -> list[list[object]]:
        """[step, what] of all that has begun and not ended; empty if the file is missing or damaged."""
        try:
            return [[step, what] for step, what in json.loads(self.file.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []

    def _write(self, under_way: list[list[object]]) -> None:
        with contextlib.suppress(OSError):  # a full disk: the record of the run is what reports that
            if under_way:
                files.write_atomically(self.file, json.dumps(under_way) + "\n")
            else:
                self.file.unlink(missing_ok=True)
