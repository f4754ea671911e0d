"""Trackers: services and programs that draw the metrics of a run while it trains.

    --track tensorboard,wandb,trackio

A resumed run continues its run in the tracker. After a kill TensorBoard drops the steps that the resumed run
repeats; the other two show them twice, with the same values.
"""

import importlib.util
from pathlib import Path
from typing import Protocol

from support.cli import UserError

PROJECT = "gpt2-124m"
TENSORBOARD_FOLDER = "tensorboard"  # within the run folder


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values, named `kind/key`, of one step."""

    def finish(self) -> None:
        """Send what is left. Nothing is logged afterwards."""


class TensorBoard:
    def __init__(self, out_dir: Path, name: str, config: dict[str, object], steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides records of earlier files from this step on.
        begin = steps_done + 1 if steps_done else 0
        # A kill costs what has not been flushed: some seconds of a curve.
        self.writer = SummaryWriter(str(out_dir / TENSORBOARD_FOLDER), purge_step=begin, flush_secs=10)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, out_dir: Path, name: str, config: dict[str, object], steps_done: int) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT, id=name, name=name, dir=str(out_dir), config=config, resume="allow"
        )
        # Its own step counter only rises, and would refuse the steps that a resumed run repeats.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    def __init__(self, out_dir: Path, name: str, config: dict[str, object], steps_done: int) -> None:
        import trackio

        self.run = trackio.init(project=PROJECT, name=name, config=config, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        import trackio

        trackio.finish()  # not self.run.finish(), after which it is finished again at exit


KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}  # by package


def names(track: str) -> list[str]:
    """Return the trackers in a `--track`, each once. Raises UserError if one is unknown or not installed."""
    found = list(dict.fromkeys(name.strip() for name in track.split(",") if name.strip()))
    for name in found:
        if name not in KINDS:
            raise UserError(f"--track {track}: {name} is not one of {', '.join(KINDS)}")
        spec = importlib.util.find_spec(name)
        # A folder of that name, such as the one for wandb's files, is not a package.
        if spec is None or spec.origin is None:
            raise UserError(f"--track {track}: its package is missing: pip install {name}")
    return found


def numbers(record: dict[str, object]) -> dict[str, float]:
    """Return the numeric values of a record, named `kind/key`."""
    return {
        f"{record['kind']}/{key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }
