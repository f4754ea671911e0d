"""A run's progress: where the time goes, and the steps whose numbers are still on the device."""

import collections
import contextlib
import itertools
import math
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from support import checkpoint, hardware, metrics
from support.cli import UserError
from support.runtime import Runtime

if TYPE_CHECKING:
    from train_gpt2 import StepResult

ACTIVITIES = ("data", "training", "evaluation", "checkpoints")


class Clock:
    """Seconds spent on each activity. Every moment belongs to one activity, or to none.

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
        """Seconds per activity up to now."""
        self._switch(self._current)
        return dict(self._seconds)

    def add(self, earlier: dict[str, float]) -> None:
        """Add the seconds of the run's part before it was resumed."""
        for activity, duration in earlier.items():
            self._seconds[activity] += duration


class Mark:
    """A moment, as the device sees it: on CUDA between two pieces of enqueued work, so it never waits."""

    def __init__(self, device: torch.device) -> None:
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        self.time = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device has got there, and no further."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Seconds between two marks that have both been reached."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.time - earlier.time


class Stopwatch:
    """Times the parts of laps, such as those of a training step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: list[list[tuple[str, Mark]]] = []

    def start_lap(self) -> None:
        """Begin a lap."""
        self.laps.append([("start", Mark(self.device))])

    def mark(self, part: str) -> None:
        """Note that the time since the last mark belongs to `part` of this lap."""
        self.laps[-1].append((part, Mark(self.device)))

    def seconds(self) -> list[dict[str, float]]:
        """The seconds per part, for each lap."""
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
    """A step whose work may still be under way on the device."""

    step: int
    lr: float
    begin: Mark
    end: Mark
    numbers: Tensor  # of its StepResult, in the host's memory; valid once `end` is reached


class Settings(Protocol):
    """The training script's settings, of which these are used here."""

    max_steps: int
    total_batch_size: int
    max_bad_steps: int
    val_interval: int
    hellaswag_interval: int
    sample_interval: int


class Progress:
    """Prints and records steps once their numbers have arrived, on CUDA one step late.

    There the numbers are copied in the background, and a step is reported when the next has been enqueued: to
    wait for the newest step would leave the GPU idle between steps.
    """

    def __init__(
        self,
        s: Settings,
        rt: Runtime,
        run_metrics: metrics.Metrics,
        writer: checkpoint.Writer,
        flops_per_token: float,
        peak_flops: float | None,
        pauses: Mapping[str, float],
    ) -> None:
        """peak_flops: of one device, if it is known. pauses: seconds that each kind of evaluation takes."""
        self.rt, self.metrics, self.writer = rt, run_metrics, writer
        self.say, self.device = rt.say, rt.device
        self.max_steps = s.max_steps
        self.tokens_per_step, self.flops_per_token = s.total_batch_size, flops_per_token
        self.peak_flops = peak_flops * rt.world_size if peak_flops else None
        self.pauses = pauses
        self.intervals = {
            "validation": s.val_interval,
            "HellaSwag": s.hellaswag_interval,
            "samples": s.sample_interval,
        }
        self.durations: collections.deque[float] = collections.deque(maxlen=100)
        self.max_bad_steps = s.max_bad_steps
        self.lag = 1 if rt.device.type == "cuda" else 0
        self.pending: collections.deque[EnqueuedStep] = collections.deque()
        self.bad_steps = 0  # in a row
        earlier = [r["loss"] for r in metrics.read(run_metrics.path) if r["kind"] == "train"]
        self.recent_losses = collections.deque((loss for loss in earlier if loss is not None), maxlen=100)

    def begin(self) -> None:
        """Note that a step begins."""
        self.begun = Mark(self.device)

    def add(self, step: int, lr: float, result: "StepResult") -> None:
        """Note a step that has been enqueued, with its learning rate and result."""
        numbers = torch.stack([result.loss, result.grad_norm, result.scale, *result.votes])
        if self.device.type == "cuda":
            host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            host.copy_(numbers, non_blocking=True)
        else:
            host = numbers.cpu()
        self.pending.append(EnqueuedStep(step, lr, self.begun, Mark(self.device), host))

    def report(self, catch_up: bool) -> tuple[int, bool]:
        """Report all steps but the newest `lag` (with `catch_up`, all), waiting for their numbers.

        Returns the number of the signal that any process has received, or 0, and whether a checkpoint is
        overdue. Either means that all steps have been reported.
        Raises UserError after max_bad_steps steps in a row whose loss or gradient was not finite.
        """
        stop_signal, overdue = 0, False
        while len(self.pending) > (0 if catch_up or stop_signal or overdue else self.lag):
            enqueued = self.pending.popleft()
            enqueued.end.wait()
            loss, grad_norm, scale, terminated, interrupted, late = enqueued.numbers.tolist()
            self._report(enqueued, loss, grad_norm)
            self._watch(enqueued.step, loss, grad_norm, scale)
            received = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
            stop_signal, overdue = received or stop_signal, overdue or late > 0
        return stop_signal, overdue

    def _report(self, enqueued: EnqueuedStep, loss: float, grad_norm: float) -> None:
        step, lr = enqueued.step, enqueued.lr
        duration = enqueued.end.seconds_since(enqueued.begin)
        tokens_per_sec = self.tokens_per_step / duration
        mfu = self.flops_per_token * tokens_per_sec / self.peak_flops if self.peak_flops else None
        self.durations.append(duration)
        left = int(self.seconds_left(step))
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
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
            tokens=step * self.tokens_per_step,
        )

    def seconds_left(self, step: int) -> float:
        """Seconds from the end of `step` to the end of the run, evaluations included, as fast as lately."""
        last = self.max_steps
        seconds = (last - step) * statistics.fmean(self.durations)
        for what, interval in self.intervals.items():
            if interval:  # also after the last step, whatever the interval
                seconds += self.pauses.get(what, 0.0) * (-(-last // interval) - step // interval)
        return seconds

    def _watch(self, step: int, loss: float, grad_norm: float, scale: float) -> None:
        """Record steps that were skipped and losses that jump; give up after too many bad steps."""
        if math.isfinite(loss + grad_norm):
            self.bad_steps = 0
            if metrics.is_spike(loss, self.recent_losses):
                self.metrics.log(step, "event", name="loss spike", loss=loss)
            self.recent_losses.append(loss)
            return
        # In fp16 gradients that overflow are left out and the next step has half the scale. Where the scale
        # no longer enlarges them, or the loss itself is not finite, a smaller one will not help.
        if math.isfinite(loss) and scale > 1:
            self.metrics.log(step, "event", name="overflow", scale=scale)
            return
        self.bad_steps += 1
        self.metrics.log(step, "event", name="bad step")
        if self.bad_steps == self.max_bad_steps:
            self.writer.wait()  # for a checkpoint that is about to exist
            self.rt.barrier()  # on rank 0; the others' end would cut it short
            last_good = next(iter(checkpoint.folders(self.metrics.path.parent)), "the start")
            raise UserError(
                f"step {step}: loss or gradient not finite for --max-bad-steps {self.bad_steps} steps in a "
                f"row, all skipped: --resume continues from {last_good}; lower --learning-rate"
                + (f", or set {variable}" if (variable := hardware.without_cudnn(self.device)) else "")
            )
