"""Progress of a run: where the time goes, and steps whose numbers are still on the device."""

import collections
import contextlib
import itertools
import math
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from support import checkpoint, hardware, metrics
from support.cli import UserError
from support.runtime import Runtime

if TYPE_CHECKING:
    from settings import Settings
    from support.run_folder import RunFolder
    from train_gpt2 import StepResult

ACTIVITIES = ("data", "training", "evaluation", "checkpoints")


class Clock:
    """Seconds spent on each activity. Each moment counts for one activity at most.

    with clock("training"):
        ...
        with clock("evaluation"):    # pauses training
            ...
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._current: str | None = None
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside the `with` block as `activity`."""
        before = self._switch(activity)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, activity: str | None) -> str | None:
        before, now = self._current, time.perf_counter()
        if before:
            self._seconds[before] += now - self._since
        self._current, self._since = activity, now
        return before

    def seconds(self) -> dict[str, float]:
        """Return the seconds per activity so far."""
        self._switch(self._current)
        return dict(self._seconds)

    def add(self, earlier: dict[str, float]) -> None:
        """Add the seconds of the run before it was resumed."""
        for activity, duration in earlier.items():
            self._seconds[activity] += duration


class Mark:
    """A device timestamp. Recording one never blocks."""

    def __init__(self, device: torch.device) -> None:
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        self.time = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device reaches this mark."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the seconds between two marks that the device has reached."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.time - earlier.time


class Stopwatch:
    """Times the parts of laps, such as training steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: list[list[tuple[str, Mark]]] = []

    def start_lap(self) -> None:
        """Begin a lap."""
        self.laps.append([("start", Mark(self.device))])

    def mark(self, part: str) -> None:
        """Assign the time since the last mark to `part` of this lap."""
        self.laps[-1].append((part, Mark(self.device)))

    def seconds(self) -> list[dict[str, float]]:
        """Return the seconds per part, for each lap."""
        self.laps[-1][-1][1].wait()
        laps = []
        for marks in self.laps:
            parts: dict[str, float] = {}
            for (_, begin), (part, end) in itertools.pairwise(marks):
                parts[part] = parts.get(part, 0.0) + end.seconds_since(begin)
            laps.append(parts)
        return laps


@dataclass
class EnqueuedStep:
    """A step that the device may not have finished."""

    step: int
    lr: float
    begin: Mark
    end: Mark
    numbers: Tensor  # of its StepResult, in the host's memory; valid once `end` is reached


class Progress:
    """Prints and records steps once their numbers arrive, which is one step late on CUDA.

    Waiting for the newest step would leave the GPU idle between steps. So its numbers are copied in the
    background, and reported after the next step has been enqueued.
    """

    def __init__(self, s: "Settings", rt: Runtime, folder: "RunFolder", flops_per_token: float) -> None:
        self.settings, self.rt, self.folder, self.metrics = s, rt, folder, folder.metrics
        self.flops_per_token = flops_per_token
        self.peak_flops = hardware.peak_flops(rt.device, rt.dtype)  # of one device; None: unknown
        self.durations: collections.deque[float] = collections.deque(maxlen=100)
        self.lag = 1 if rt.device.type == "cuda" else 0
        self.pending: collections.deque[EnqueuedStep] = collections.deque()
        self.overdue = False  # a checkpoint was overdue at the last reported step
        self.bad_steps = 0  # in a row
        earlier = [r["loss"] for r in metrics.read(folder.metrics.path) if r["kind"] == "train"]
        self.recent_losses = collections.deque((loss for loss in earlier if loss is not None), maxlen=100)

    @property
    def healthy(self) -> bool:
        """True unless the last step was bad. Weights that give no finite loss are not worth keeping."""
        return self.bad_steps == 0

    def begin(self) -> None:
        """Mark the beginning of a step."""
        self.begun = Mark(self.rt.device)

    def add(self, step: int, lr: float, result: "StepResult") -> None:
        """Add a step that has been enqueued, with its learning rate and result."""
        numbers = torch.stack([result.loss, result.grad_norm, result.scale, *result.votes])
        if self.rt.device.type == "cuda":
            host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            host.copy_(numbers, non_blocking=True)
        else:
            host = numbers.cpu()
        self.pending.append(EnqueuedStep(step, lr, self.begun, Mark(self.rt.device), host))

    def report(self, catch_up: bool) -> int:
        """Report all steps but the newest `lag` (with `catch_up`, all), waiting for their numbers.

        Returns the number of a signal that any rank received, or 0. Catches up if there was one, or if a
        checkpoint is overdue.
        Raises UserError after --max-bad-steps steps in a row whose loss or gradient was not finite.
        """
        stopped_by, self.overdue = 0, False
        while len(self.pending) > (0 if catch_up or stopped_by or self.overdue else self.lag):
            enqueued = self.pending.popleft()
            enqueued.end.wait()
            loss, grad_norm, scale, terminated, interrupted, late = enqueued.numbers.tolist()
            self._report(enqueued, loss, grad_norm)
            self._watch(enqueued.step, loss, grad_norm, scale)
            received = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
            stopped_by, self.overdue = received or stopped_by, self.overdue or late > 0
        return stopped_by

    def _report(self, enqueued: EnqueuedStep, loss: float, grad_norm: float) -> None:
        s, step, lr = self.settings, enqueued.step, enqueued.lr
        duration = enqueued.end.seconds_since(enqueued.begin)
        tokens_per_sec = s.total_batch_size / duration
        peak = self.peak_flops and self.peak_flops * self.rt.world_size
        mfu = self.flops_per_token * tokens_per_sec / peak if peak else None
        self.durations.append(duration)
        left = int(self.seconds_left(step))
        self.rt.say(
            f"step {step}/{s.max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
            f"{1000 * duration:.0f} ms | {tokens_per_sec:,.0f} tokens/s | "
            + (f"MFU {100 * mfu:.1f} % | " if mfu else "")
            + f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        self.metrics.log(
            step,
            "train",
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            step_ms=1000 * duration,
            tokens_per_sec=tokens_per_sec,
            mfu=mfu,
            tokens=step * s.total_batch_size,
        )

    def seconds_left(self, step: int) -> float:
        """Estimate the seconds from the end of `step` to the end of the run, at the recent pace."""
        s, last = self.settings, self.settings.max_steps
        seconds = (last - step) * statistics.fmean(self.durations)
        intervals = {
            "validation": s.val_interval, "HellaSwag": s.hellaswag_interval, "samples": s.sample_interval
        }  # fmt: skip
        for name, interval in intervals.items():
            if interval:  # also after the last step, whatever the interval
                evaluations = -(-last // interval) - step // interval
                seconds += evaluations * self.folder.attempt.seconds.get(name, 0.0)
        return seconds

    def _watch(self, step: int, loss: float, grad_norm: float, scale: float) -> None:
        """Record skipped steps and loss spikes. Raises UserError after too many bad steps."""
        if math.isfinite(loss + grad_norm):
            self.bad_steps = 0
            if metrics.is_spike(loss, self.recent_losses):
                self.metrics.log(step, "event", name="loss spike", loss=loss)
            self.recent_losses.append(loss)
            return
        # An overflow in fp16 is normal: the step is skipped, and the next one has half the scale. That does
        # not help if the loss itself is not finite, or if the scale is down to 1.
        if math.isfinite(loss) and scale > 1:
            self.metrics.log(step, "event", name="overflow", scale=scale)
            return
        self.bad_steps += 1
        self.metrics.log(step, "event", name="bad step")
        if self.bad_steps == self.settings.max_bad_steps:
            self.folder.writer.wait()  # a checkpoint may be about to exist
            self.rt.barrier()  # otherwise other ranks could end the run before it is written
            last_good = next(iter(checkpoint.folders(self.settings.out_dir)), "the start")
            raise UserError(
                f"step {step}: loss or gradient not finite for --max-bad-steps {self.bad_steps} steps in a "
                f"row, all skipped: --resume continues from {last_good}; lower --learning-rate"
                + (f", or set {variable}" if (variable := hardware.without_cudnn(self.rt.device)) else "")
            )
