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
from support import cli, files, metrics, run_files
from support.cli import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    that cannot be read or contain nothing to draw, on a negative `smooth`, and if the figure cannot be saved.
    """
    if smooth < 0:
        raise UserError(f"--smooth {smooth}: is negative: give a number of steps, or 0 for 1/50 of the run")
    out = _figure_file(out)
    series = [read_run(run) for run in runs]
    with _quiet_matplotlib():
        _draw(_labels(runs), series, out, log_x, smooth)
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
    uses one. It warns of a home that cannot be written, and once per missing character; _tell_apart prints
    one line instead.
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


def _draw(labels: list[str], series: list[dict], out: Path, log_x: bool, smooth: int) -> None:
    from matplotlib.figure import Figure  # slow to import, and the training script imports this file
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    titles = {"loss": "loss (nats per token)", "hellaswag": "HellaSwag acc_norm", "lr": "learning rate"}
    titles["tokens_per_sec"] = "tokens/s"
    drawn = set().union(*series)
    panels = [
        (kind, title)
        for kind, title in titles.items()
        if kind in drawn or (kind == "loss" and drawn & {"train", "val"})
    ]

    longest = max((len(s["train"][0]) for s in series if "train" in s), default=0)
    window = smooth or max(1, longest // 50)

    several = len(series) > 1
    # A single run's name appears only at a HellaSwag baseline. Without one, skip the search for fonts.
    named = several or len(series[0].get("hellaswag", [()])[0]) == 1
    labels, fonts = _tell_apart(labels) if named else (labels, None)

    heights = [3.2] + [1.0] * (len(panels) - 1)
    figure = Figure(figsize=(12, 2.1 * sum(heights)), dpi=100, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for number, (label, values) in enumerate(zip(labels, series, strict=True)):
        color = f"C{number % 10}"
        # matplotlib leaves names that start with _ out of the legend; _add_legend removes the space again.
        name = f" {label}: " if several else ""
        for axis, (kind, _) in zip(axes, panels, strict=True):
            if kind == "loss":
                _draw_losses(axis, values, name, color, window)
            elif kind in values:
                steps, points = values[kind]
                if len(steps) == 1:
                    axis.axhline(points[0], color=color, linestyle=":", label=f" {label}")
                else:
                    style = "o-" if kind == "hellaswag" else "-"
                    unnamed = several and not values.keys() & {"train", "val"}  # has no losses to label
                    text = f" {label}" if unnamed else None
                    axis.plot(steps, points, style, color=color, markersize=3, linewidth=1, label=text)
    for axis, (kind, title), height in zip(axes, panels, heights, strict=True):
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if log_x:
            axis.set_xscale("symlog", linthresh=1)
        if kind == "hellaswag":
            published = hellaswag.PUBLISHED["completion"][1]
            axis.axhline(published, color="gray", linestyle="--", linewidth=1, label="OpenAI's GPT-2 124M")
            axis.axhline(0.25, color="gray", linestyle=":", linewidth=1, label="chance")
        if kind in ("loss", "hellaswag"):
            _add_legend(axis, fonts, rows=int(9 * height))
        if kind == "tokens_per_sec":
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if longest > 1000 and not log_x:
        axes[0].set_ylim(*_loss_limits(series, window))
    axes[-1].set_xlabel("step")
    last = max(steps[-1] for values in series for steps, _ in values.values())
    axes[-1].set_xlim(0, None if last else 1)
    if not log_x:
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels()
    _save(figure, out)


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
    window = min(window, 2 * len(values))  # as wide as the whole run for each value, and within int64
    center = np.arange(len(values))
    begin = np.maximum(0, center - (window - 1) // 2)
    end = np.minimum(len(values), center + window // 2 + 1)
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[begin]) / (counts[end] - counts[begin])


def read_run(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curves of a run: name -> (steps, values), with the names train, val, hellaswag, lr, tokens_per_sec.

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


def _labels(runs: list[Path]) -> list[str]:
    """A name for each run: its folder's, or its path if names repeat."""
    sources = [run.parent if run.name.lower() == run_files.METRICS and run.is_file() else run for run in runs]
    sources = [source.resolve() if source.name in ("", "..") else source for source in sources]
    names = [source.stem if source.is_file() else source.name for source in sources]
    if len(set(names)) < len(names):
        names = [str(source) for source in sources]
    # A line break would split the label, and an SVG cannot hold a control character.
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names]


def _tell_apart(labels: list[str]) -> tuple[list[str], list[str]]:
    """Number the labels that would look alike, and find the font families that draw them all.

    Characters that no installed font has are drawn as boxes, with a note on stderr.
    """
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font

    families = list(rcParams["font.family"])
    usual = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    missing = {c for c in "".join(labels) if not any(font.get_char_index(ord(c)) for font in usual)}
    # The files rather than matplotlib's list of them: that is cached, and lacks fonts installed since.
    paths = sorted(findSystemFonts()) if missing else []
    found = {path: _outlines(path, missing) for path in paths if "lastresort" not in path.lower()}
    for path in sorted(found, key=lambda path: (-len(found[path]), "regular" not in path.lower())):
        if found[path] & missing:
            fontManager.addfont(path)
            families.append(FontProperties(fname=path).get_name())
            missing -= found[path]
    if missing:
        print(
            f"note: no installed font has {''.join(sorted(missing))}: such runs are numbered in the legend; "
            "install Noto Sans CJK for Chinese or Noto Emoji for emoji, then draw again",
            file=sys.stderr,
        )
    numbered = [
        f"{label} (run {number})" if labels.count(label) > 1 or missing & set(label) else label
        for number, label in enumerate(labels, start=1)
    ]
    return numbered, families


def _outlines(path: str, characters: set[str]) -> set[str]:
    """The characters that a font file has an outline for. Fonts of coloured emoji have none."""
    from matplotlib import font_manager

    found = set()
    with contextlib.suppress(RuntimeError, OSError):  # a file that FreeType does not read
        font = font_manager.get_font(path)
        font.set_size(10, 72)
        for character in characters:
            if font.get_char_index(ord(character)):
                font.load_char(ord(character))
                if len(font.get_path()[0]):
                    found.add(character)
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
