"""Plot the curves of one run or several.

    python plot_loss.py                          # log/loss_curves.png
    python plot_loss.py log log2 --out both.png  # several runs in one figure

A run is a run folder, its metrics.jsonl, or a plain log of older training scripts: lines of
`STEP train LOSS`, `STEP val LOSS`, `STEP hella ACC`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import hellaswag
from support import cli, metrics, run_folder
from support.cli import UserError

PLAIN_LINE = re.compile(r"(\d{1,15})\s+(train|val|hella)\s+(\S+)")


@dataclass
class Settings:
    runs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=lambda: [Path("log")])
    """Run folders, metrics.jsonl files or plain logs."""
    out: Path | None = None
    """The figure's file (.png, .pdf, .svg). Default: loss_curves.png in the first run's folder."""
    log_x: bool = False
    """Use a logarithmic step axis."""
    smooth: int = 0
    """Width in steps of the training loss's centred moving average. 0: 1/50 of the longest run; 1: none."""


def plot_run(run: Path) -> Path:
    """Draw loss_curves.png in a run folder; returns its path."""
    return plot([run], run / run_folder.FIGURE)


def plot(runs: list[Path], out: Path, log_x: bool = False, smooth: int = 0) -> Path:
    """Draw loss, HellaSwag, learning rate and throughput of the runs into one figure.

    A run of a single evaluation (--max-steps 0) is a baseline: a horizontal line. Raises UserError on runs
    that cannot be read or contain nothing to draw.
    """
    from matplotlib.figure import Figure  # slow to import, and the training script imports this file
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    series = {label: read_run(path) for label, path in zip(_labels(runs), runs, strict=True)}
    titles = {"loss": "loss (nats per token)", "hellaswag": "HellaSwag acc_norm", "lr": "learning rate"}
    titles["tokens_per_sec"] = "tokens/s"
    drawn = {"loss"}.union(*series.values())
    panels = [(kind, title) for kind, title in titles.items() if kind in drawn]

    longest = max((len(s["train"][0]) for s in series.values() if "train" in s), default=0)
    window = smooth or max(1, longest // 50)

    heights = [3.2] + [1.0] * (len(panels) - 1)
    figure = Figure(figsize=(12, 2.1 * sum(heights)), dpi=100, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for number, (label, values) in enumerate(series.items()):
        color = f"C{number % 10}"
        name = f"{label}: " if len(series) > 1 else ""
        for axis, (kind, _) in zip(axes, panels, strict=True):
            if kind == "loss":
                _draw_losses(axis, values, name, color, window)
            elif kind in values:
                steps, points = values[kind]
                if len(steps) == 1:
                    axis.axhline(points[0], color=color, linestyle=":", label=name.removesuffix(": "))
                else:
                    style = "o-" if kind == "hellaswag" else "-"
                    axis.plot(steps, points, style, color=color, markersize=3, linewidth=1)
    for axis, (kind, title) in zip(axes, panels, strict=True):
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if log_x:
            axis.set_xscale("symlog", linthresh=1)
        if kind == "hellaswag":
            published = hellaswag.PUBLISHED["completion"][1]
            axis.axhline(published, color="gray", linestyle="--", linewidth=1, label="OpenAI's GPT-2 124M")
            axis.axhline(0.25, color="gray", linestyle=":", linewidth=1, label="chance")
            axis.legend(frameon=False)
        if kind == "tokens_per_sec":
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if longest > 1000 and not log_x:
        axes[0].set_ylim(*_loss_limits(series.values(), window))
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")
    last = max(steps[-1] for values in series.values() for steps, _ in values.values())
    axes[-1].set_xlim(0, None if last else 1)
    if not log_x:
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out)
    except ValueError as error:
        raise UserError(f"--out {out}: {error}".splitlines()[0]) from error
    return out


def _draw_losses(axis: object, values: dict, name: str, color: str, window: int) -> None:
    if "train" in values:
        steps, losses = values["train"]
        axis.plot(steps, losses, color=color, alpha=0.25 if window > 1 else 0.8, linewidth=0.8)
        label = f"{name}training" + (f", mean of {window} steps" if window > 1 else "")
        axis.plot(steps, _moving_average(losses, window), color=color, linewidth=1.5, label=label)
    if "val" in values:
        steps, losses = values["val"]
        label = f"{name}validation, last {losses[-1]:.4f}"
        if len(steps) == 1:
            axis.axhline(losses[0], color=color, linestyle=":", label=label)
        else:
            axis.plot(steps, losses, "o--", color="black" if not name else color, markersize=4, label=label)


def _loss_limits(series: Iterable[dict], window: int) -> tuple[float | None, float | None]:
    """Limits of the loss axis without the first 5 % of each run and the noise of single training steps."""
    shown = []
    for values in series:
        for kind in ("train", "val"):
            if kind in values:
                steps, losses = values[kind]
                losses = _moving_average(losses, window) if kind == "train" else losses
                shown.append(losses[steps >= 0.05 * steps[-1]])
    shown = np.concatenate(shown or [np.empty(0)])
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0 or shown.min() == shown.max():
        return None, None
    margin = 0.05 * (shown.max() - shown.min())
    return shown.min() - margin, shown.max() + margin


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each, over fewer at both ends; NaN does not count."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(known, values, 0.0).cumsum()])
    counts = np.concatenate([[0], known.cumsum()])
    center = np.arange(len(values))
    begin = np.maximum(0, center - (window - 1) // 2)
    end = np.minimum(len(values), center + window // 2 + 1)
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[begin]) / (counts[end] - counts[begin])


def read_run(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curves of a run: name -> (steps, values), with the names train, val, hellaswag, lr, tokens_per_sec.

    Raises UserError if there is nothing to read, or nothing to draw.
    """
    file = path / run_folder.METRICS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path}: no run there: name a run folder, a metrics.jsonl or a plain log"
            f"{run_folder.runs_below(path)}"
        )
    points: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in _records(file) if file.suffix == ".jsonl" else _plain_lines(file):
        points.setdefault(name, []).append((step, np.nan if value is None else float(value)))
    if not points:
        raise UserError(f"{file}: contains no losses to draw yet")
    return {
        name: tuple(np.array(column) for column in zip(*sorted(p), strict=True)) for name, p in points.items()
    }


def _records(file: Path) -> list[tuple[str, int, object]]:
    columns = {
        "train": {"loss": "train", "lr": "lr", "tokens_per_sec": "tokens_per_sec"},
        "val": {"loss": "val"},
        "hellaswag": {"acc_norm": "hellaswag"},
    }
    return [
        (name, record["step"], record[key])
        for record in metrics.read(file)
        for key, name in columns.get(record["kind"], {}).items()
        if key in record
    ]


def _plain_lines(file: Path) -> list[tuple[str, int, object]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        match = PLAIN_LINE.match(line.strip())
        try:
            step, kind, value = int(match[1]), match[2], float(match[3])
            value = value if abs(value) < 1e300 else math.nan
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: line {number} is not `STEP train|val|hella VALUE`") from error
        found.append(("hellaswag" if kind == "hella" else kind, step, value))
    return found


def _labels(runs: list[Path]) -> list[str]:
    """A short name for each run: its folder's, or the full path if names repeat."""
    names = [
        run.parent.name if run.name == run_folder.METRICS else run.stem if run.is_file() else run.name
        for run in runs
    ]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def main() -> None:
    settings = cli.parse(Settings, "Draw the loss curves of one run or several.")
    first = settings.runs[0]
    out = settings.out or (first if first.is_dir() else first.parent) / run_folder.FIGURE
    print(plot(settings.runs, out, settings.log_x, settings.smooth))


if __name__ == "__main__":
    cli.run(main)
