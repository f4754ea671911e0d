"""Plot the curves of one run or several.

    python plot_loss.py                          # log/loss_curves.png
    python plot_loss.py log log2 --out both.png  # several runs in one figure

A run is a run folder, its metrics.jsonl, or a plain log of older training scripts: lines of
`STEP train LOSS`, `STEP val LOSS`, `STEP hella ACC`.
"""

import codecs
import contextlib
import io
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

import hellaswag
from support import cli, files, labels, metrics, run_files
from support.cli import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name on the axis and height in inches.
PANELS = {
    "loss": ("loss (nats per token)", 3.8),
    "hellaswag": ("HellaSwag acc_norm", 2.0),
    "lr": ("learning rate", 1.5),
    "tokens_per_sec": ("tokens/s", 1.5),
}
SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
PLAIN_LINE = re.compile(r"(\d{1,15})\s+(train|val|hella)\s+(\S+)")


@dataclass
class Settings:
    runs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=lambda: [Path("log")])
    """Run folders, metrics.jsonl files or plain logs."""
    out: str | None = None  # a Path would lose a slash at the end, which means a folder
    """The figure (.png, .pdf, .svg, .jpg) or a folder for it. Default: loss_curves.png in the first run."""
    log_x: bool = False
    """Use a logarithmic step axis."""
    smooth: int = 0
    """Width in steps of the training loss's centred moving average. 0: 1/50 of the longest run; 1: none."""


def plot_run(run: Path) -> Path:
    """Draw loss_curves.png in a run folder; returns its path."""
    return plot([run], run / run_files.FIGURE)


def plot(runs: list[Path], out: Path, log_x: bool = False, smooth: int = 0) -> Path:
    """Draw loss, HellaSwag, learning rate and throughput of the runs into one figure; returns its path.

    The path is `out`, loss_curves.png in it if it is a folder, or `out` with .png if it has no suffix.
    A run of a single evaluation (--max-steps 0) is a baseline: a horizontal line. Raises UserError on runs
    that cannot be read or contain nothing to draw, and if the figure cannot be saved.
    """
    out = _figure_file(out)
    series = [read_run(run) for run in runs]
    with _quiet_matplotlib():
        title = _title(runs[0], series[0]) if len(runs) == 1 else ""
        _draw(labels.of_runs(runs), series, out, log_x, smooth, title)
    return out


def _figure_file(out: Path) -> Path:
    if os.path.isdir(out):
        return out / run_files.FIGURE
    if out.suffix in ("", "."):
        return out.with_name(f"{out.name}.png")
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: no figure can be saved as {out.suffix}: use {', '.join(SUFFIXES)}")
    return out


@contextlib.contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Import matplotlib regardless of the environment, and keep its warnings off the terminal.

    Its import fails if MPLBACKEND, which notebooks set, names a backend that is not installed; nothing here
    uses one. It warns of a home that cannot be written, and once per missing character; support/labels.py
    prints one line instead.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if "matplotlib" not in sys.modules:
            _import_matplotlib()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            yield
    finally:
        logger.setLevel(level)


def _import_matplotlib() -> None:
    before = {name: os.environ.get(name) for name in ("MPLBACKEND", "MPLCONFIGDIR")}
    os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        for name, value in before.items():  # matplotlib itself sets MPLCONFIGDIR if it needs a temporary one
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if before["MPLBACKEND"]:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = before["MPLBACKEND"]  # for the notebook's own figures


def _draw(names: list[str], series: list[dict], out: Path, log_x: bool, smooth: int, title: str) -> None:
    from matplotlib.figure import Figure  # slow to import, and the training script imports this file

    drawn = set().union(*series)
    rows = [["loss"]] if drawn & {"train", "val"} else []
    rows += [["hellaswag"]] if "hellaswag" in drawn else []
    rows += [[kind for kind in ("lr", "tokens_per_sec") if kind in drawn]]
    rows = [[row[0], row[-1]] for row in rows if row]
    heights = [PANELS[row[0]][1] for row in rows]
    figure = Figure(figsize=(12, sum(heights)), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic(rows, height_ratios=heights)
    figure.suptitle(title, fontsize="medium", parse_math=False)

    longest = max((len(s["train"][0]) for s in series if "train" in s), default=0)
    window = smooth or max(1, longest // 50)
    several = len(series) > 1
    # A single run's name appears only at a HellaSwag baseline. Without one, skip the search for fonts.
    named = several or len(series[0].get("hellaswag", [()])[0]) == 1
    names, fonts = labels.tell_apart(names) if named else (names, None)
    for number, (label, values) in enumerate(zip(names, series, strict=True)):
        color = f"C{number % 10}"
        for kind, axis in axes.items():
            if kind == "loss":
                # matplotlib hides names that start with _ from the legend; _add_legend removes the space.
                _draw_losses(axis, values, f" {label}: " if several else "", color, window)
            elif kind in values:
                unnamed = several and not values.keys() & {"train", "val"}  # has no losses to label
                _draw_curve(axis, kind, *values[kind], f" {label}", color, unnamed)

    last = max(steps[-1] for values in series for steps, _ in values.values())
    for kind, axis in axes.items():
        axis.set_ylabel(PANELS[kind][0])
        _set_up_steps(axis, last, log_x)
        if kind == "hellaswag":
            published = hellaswag.PUBLISHED["completion"][1]
            axis.axhline(published, color="gray", linestyle="--", linewidth=1, label="OpenAI's GPT-2 124M")
            axis.axhline(0.25, color="gray", linestyle=":", linewidth=1, label="chance")
        if kind in ("loss", "hellaswag"):
            _add_legend(axis, fonts, rows=int(4 * PANELS[kind][1]))
    for kind in rows[-1]:
        axes[kind].set_xlabel("step")
    if "tokens_per_sec" in axes:
        highest = axes["tokens_per_sec"].dataLim.y1
        axes["tokens_per_sec"].set_ylim(0, 1.1 * highest if 0 < highest < math.inf else 1)
        axes["tokens_per_sec"].yaxis.set_major_formatter("{x:,.0f}")
    if "loss" in axes and not log_x:
        axes["loss"].set_ylim(*_loss_limits(series, window))
    _save(figure, out)


def _set_up_steps(axis: "Axes", last: int, log_x: bool) -> None:
    """Prepare the horizontal axis of a panel for steps from 0 to `last`."""
    from matplotlib.ticker import MaxNLocator

    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if log_x:
        axis.set_xscale("symlog", linthresh=1)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_xlim(0, 1.01 * last or 1)
    axis.xaxis.set_major_formatter("{x:,.0f}")


def _draw_curve(
    axis: "Axes", kind: str, steps: np.ndarray, values: np.ndarray, label: str, color: str, unnamed: bool
) -> None:
    """Draw HellaSwag scores, learning rates or throughputs; a single value as a horizontal line."""
    if len(steps) == 1:
        axis.axhline(values[0], color=color, linestyle=":", label=label)
    else:
        style = "o-" if kind == "hellaswag" else "-"
        axis.plot(
            steps, values, style, color=color, markersize=3, linewidth=1, label=label if unnamed else None
        )


def _save(figure: "Figure", out: Path) -> None:
    """Write the figure to a file, which keeps its earlier contents until the new ones are complete."""
    temporary = out.with_name(f".tmp-{out.name}")  # with the suffix, by which matplotlib chooses the format
    try:
        with contextlib.suppress(FileExistsError):
            out.parent.mkdir(parents=True)
        figure.savefig(temporary)
        files.flush_to_disk(temporary)
        files.replace(temporary, out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out}: cannot be written ({reason}): name another file") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _add_legend(axis: "Axes", fonts: list[str] | None, rows: int) -> None:
    """Add a legend with the names of runs as they are; matplotlib would read $ as mathematics."""
    columns = 1 + (len(axis.get_legend_handles_labels()[1]) - 1) // rows
    legend = axis.legend(frameon=False, prop={"family": fonts}, ncols=columns)
    legend.set_in_layout(False)  # one that is too large would squeeze the curves to nothing
    for text in legend.get_texts():
        text.set_text(text.get_text().removeprefix(" "))
        text.set_parse_math(False)


def _draw_losses(axis: "Axes", values: dict, name: str, color: str, window: int) -> None:
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
        else:  # no lines: nothing was measured between the points
            axis.plot(
                steps, losses, "o", color=color if name else "black", markersize=5, mec="white", label=label
            )


def _loss_limits(series: Iterable[dict], window: int) -> tuple[float | None, float | None]:
    """Limits of the loss axis for the losses after the warm-up, without the noise of single steps."""
    shown = []
    for values in series:
        begin = _end_of_warmup(values)
        for kind in ("train", "val"):
            if kind in values:
                steps, losses = values[kind]
                losses = _moving_average(losses, window) if kind == "train" else losses
                shown.append(losses[steps >= begin])
    shown = np.concatenate(shown or [np.empty(0)])
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0 or shown.min() == shown.max():
        return None, None
    margin = 0.05 * (shown.max() - shown.min())
    return shown.min() - margin, shown.max() + margin


def _end_of_warmup(values: dict) -> float:
    """Return the step of the peak learning rate, but at least 5 % and at most half of the run.

    0 for a run of fewer than 20 steps.
    """
    last = max(steps[-1] for steps, _ in values.values())
    if last < 20:
        return 0
    steps, rates = values.get("lr", ([0], [0.0]))
    peak = steps[int(np.argmax(rates))]
    return min(max(0.05 * last, peak), last / 2)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each, over fewer at both ends; NaN does not count."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(known, values, 0.0).cumsum()])
    counts = np.concatenate([[0], known.cumsum()])
    window = min(window, 2 * len(values))  # as wide as the whole run for each value, and within int64
    center = np.arange(len(values))
    begin = np.maximum(0, center - (window - 1) // 2)
    end = np.minimum(len(values), center + window // 2 + 1)
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[begin]) / (counts[end] - counts[begin])


def _title(run: Path, values: dict) -> str:
    """Name the model, the machine and the time in training steps, if the run has recorded them."""
    config = run_files.read_config(run_files.folder_of(run))
    parts = []
    with contextlib.suppress(KeyError, TypeError):  # recorded by another program
        parts.append(f"GPT-2 with {config['parameters'] / 1e6:,.0f} million parameters")
        parts.append("{processes} x {name}".format(**config["hardware"]).removeprefix("1 x "))
    if "step_ms" in values:
        minutes = np.nansum(values["step_ms"][1]) / 60_000
        parts.append(
            f"{minutes / 60:.1f} hours of training" if minutes > 120 else f"{minutes:.1f} minutes of training"
        )
    return ", ".join(parts)


def read_run(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the curves of a run: train, val, hellaswag, lr, tokens_per_sec or step_ms -> (steps, values).

    Raises UserError if there is nothing to read, or nothing to draw.
    """
    is_folder = os.path.isdir(path)  # unlike Path.is_dir, no error for a name that is too long
    file = path / run_files.METRICS if is_folder else path
    if not os.path.isfile(file):
        others = run_files.runs_below(path) if is_folder else ""
        raise UserError(
            f"{path}: no run there that can be read: name a run folder, a metrics.jsonl or a plain log"
            f"{others}"
        )
    points: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in _records(file) if file.suffix.lower() == ".jsonl" else _plain_lines(file):
        points.setdefault(name, []).append((step, np.nan if value is None else float(value)))
    if not points:
        raise UserError(f"{file}: contains no losses to draw yet: leave it out until it does")
    return {
        name: tuple(np.array(column) for column in zip(*sorted(p), strict=True)) for name, p in points.items()
    }


def _records(file: Path) -> list[tuple[str, int, object]]:
    columns = {
        "train": {"loss": "train", "lr": "lr", "tokens_per_sec": "tokens_per_sec", "step_ms": "step_ms"},
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
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # from PowerShell's >
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")
    found = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
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


def main() -> None:
    settings = cli.parse(Settings, "Draw the loss curves of one run or several.")
    first = settings.runs[0]
    out = Path(settings.out or (first if os.path.isdir(first) else first.parent) / run_files.FIGURE)
    if settings.out and settings.out.endswith(("/", os.sep)):
        out /= run_files.FIGURE
    print(plot(settings.runs, out, settings.log_x, settings.smooth))


if __name__ == "__main__":
    cli.run(main)
