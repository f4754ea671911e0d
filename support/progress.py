"""A run's progress: where the time goes, and the steps whose numbers are still on the device."""

import collections
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from support import checkpoint, metrics
from support.cli import UserError

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


class Stopwatch:
    """Times between marks, taken with the device's own events on CUDA, so that marking never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []

    def mark(self, part: str) -> None:
        """Note that the time since the last mark belongs to `part`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds per part; the first mark only starts the watch."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            duration = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            totals[part] = totals.get(part, 0.0) + duration
        return totals


class Progress:
    """Prints and records steps once their numbers have arrived, one step behind a GPU.

    A GPU works on one step while the numbers of the previous one are fetched: asking for them at once would
    leave it idle between steps.
    """

    def __init__(
        self,
        run_metrics: metrics.Metrics,
        say: Callable[[str], None],
        clock: Clock,
        steps_done: int,
        max_steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        max_bad_steps: int,
        lag: int,
    ) -> None:
        """steps_done: before this process started. lag: how many steps may be left unreported."""
        self.metrics, self.say, self.clock = run_metrics, say, clock
        self.steps_done, self.max_steps = steps_done, max_steps
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak_flops = peak_flops
        self.max_bad_steps = max_bad_steps
        self.lag = lag
        self.pending: collections.deque[tuple[int, float, Tensor]] = collections.deque()
        self.bad_steps = 0  # in a row
        earlier = [r["loss"] for r in metrics.read(run_metrics.path) if r["kind"] == "train"]
        self.recent_losses = collections.deque((loss for loss in earlier if loss is not None), maxlen=100)
        self.started = time.perf_counter()
        self.reported_seconds = clock.seconds()["training"]

    def add(self, step: int, lr: float, stats: Tensor) -> None:
        """Note a step: its learning rate, and on the device (4,): loss, gradient norm, SIGTERM, SIGINT."""
        self.pending.append((step, lr, stats))

    def report(self, catch_up: bool) -> int:
        """Report all steps but the newest `lag` (with `catch_up`, all), waiting for their numbers.

        Returns the number of the signal that any process has received, or 0.
        Raises UserError after max_bad_steps steps in a row whose loss or gradient was not finite.
        """
        stop_signal = 0
        while len(self.pending) > (0 if catch_up or stop_signal else self.lag):
            step, lr, stats = self.pending.popleft()
            loss, grad_norm, terminated, interrupted = stats.tolist()  # waits for the device
            self._report(step, lr, loss, grad_norm)
            self._watch(step, loss, grad_norm)
            received = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
            stop_signal = received or stop_signal
        return stop_signal

    def _report(self, step: int, lr: float, loss: float, grad_norm: float) -> None:
        training = self.clock.seconds()["training"]
        duration, self.reported_seconds = training - self.reported_seconds, training
        tokens_per_sec = self.tokens_per_step / duration
        mfu = self.flops_per_token * tokens_per_sec / self.peak_flops
        elapsed = time.perf_counter() - self.started
        left = int(elapsed / (step - self.steps_done) * (self.max_steps - step))
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
            f"{1000 * duration:.0f} ms | {tokens_per_sec:,.0f} tokens/s | MFU {100 * mfu:.1f} % | "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
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

    def _watch(self, step: int, loss: float, grad_norm: float) -> None:
        """Record steps that were skipped and losses that jump; give up after too many bad steps."""
        if math.isfinite(loss + grad_norm):
            self.bad_steps = 0
            if metrics.is_spike(loss, self.recent_losses):
                self.metrics.log(step, "event", name="loss spike", loss=loss)
            self.recent_losses.append(loss)
            return
        self.bad_steps += 1
        self.metrics.log(step, "event", name="bad step")
        if self.bad_steps == self.max_bad_steps:
            last_good = next(iter(checkpoint.folders(self.metrics.path.parent)), "the start")
            raise UserError(
                f"step {step}: loss or gradient not finite for --max-bad-steps {self.bad_steps} steps in a "
                f"row, all skipped: --resume continues from {last_good}; lower --learning-rate"
            )
