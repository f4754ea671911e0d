"""Measure this project on a GPU, in one report: run it on any GPU box before you rent eight.

    python benchmarks/gpu_report.py --data-dir DIR --minutes 25 --out FOLDER
    python benchmarks/gpu_report.py --data-dir DIR --out FOLDER --only speed,recipes     # repeat some parts
    python benchmarks/gpu_report.py --data-dir DIR --tiny      # a dry run in about a minute, on a CPU too

The parts, in this order:
    device          versions, measured peak rates, the tests that need a GPU
    speed           of a step, compared with the plan and the roofline; then of other settings
    rehearsal       every stage of a run, with a SIGKILL and a resume
    peers           other trainers in turn with ours, if --peer names them
    recipes         AdamW, tuned AdamW and Muon over the same tokens
    between-steps   evaluation, checkpoints, sampling, Muon's share of a step

Each part runs in a separate process, which ends when its share of the time is over. report.json, report.md
and the figures are written after each part, so that an interrupted report keeps its results.
"""

import contextlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import gpu_parts
import gpu_runs
import numpy as np
import peers
import torch
from gpu_parts import Part, Settings

from pre_tokens.shards import find_shards
from support import cli, files, hellaswag_data, run_folder
from support.cli import UserError

# Each part and its share of the time: these minutes, of 25.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "device": (gpu_parts.device, 3.5),
    "speed": (gpu_parts.speed, 4.5),
    "rehearsal": (gpu_runs.rehearsal, 4.5),
    "peers": (gpu_runs.compare_trainers, 5),
    "recipes": (gpu_runs.recipes, 4.5),
    "between-steps": (gpu_runs.between_steps, 3),
}
GRACE = 5.0  # seconds that a part has, once its time is over, to note that it is
TITLES = {
    "device": "The device",
    "speed": "Speed of a training step",
    "rehearsal": "The rehearsal, killed and resumed",
    "peers": "Compared with other trainers",
    "recipes": "Three recipes over the same tokens",
    "between-steps": "Between steps",
}


def check(s: Settings) -> list[str]:
    """Return the names of the parts to run. Raises UserError on settings that cannot work."""
    names = [name.strip() for name in s.only.split(",") if name.strip()] or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"--only {name}: not one of {', '.join(PARTS)}")
    if not s.tiny and not torch.cuda.is_available():
        raise UserError("no CUDA device: --tiny tries out the report on a CPU")
    if s.hellaswag_data and not s.hellaswag_data.is_file():
        raise UserError(f"--hellaswag-data {s.hellaswag_data}: no such file")
    find_shards(s.data_dir)
    for folder in s.peer:
        peers.load(folder)
    return [name for name in PARTS if name in names]


# ---------------------------------------------------------------- running the parts


def log_of(s: Settings, name: str) -> Path:
    """Path of the log of a part."""
    return s.out / "logs" / f"{name}.txt"


def in_child(work: Callable[[Part], None], s: Settings, name: str, until: float) -> None:
    """Run a part in a child process that writes to a log, and can be ended with its own children."""
    if os.name == "posix":
        os.setsid()
    with open(log_of(s, name), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    work(Part(s, name, until))


def run_part(work: Callable[[Part], None], s: Settings, name: str, seconds: float) -> str:
    """Run a part for at most so many seconds. Returns "done", or what went wrong."""
    log_of(s, name).write_text("", encoding="utf-8")
    until = time.monotonic() + seconds - GRACE
    process = multiprocessing.get_context("spawn").Process(target=in_child, args=(work, s, name, until))
    process.start()
    try:
        process.join(seconds)
        late = process.is_alive()
    finally:
        end(process)  # also what it has left behind, and if Ctrl-C ends this one
    if late:
        return f"ended when its {seconds:.0f} s were over"
    if process.exitcode:
        log = log_of(s, name).read_text(encoding="utf-8", errors="replace")
        how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else "failed"
        return f"{how}: {cli.last_error(log)}"
    return "done"


def end(process: multiprocessing.Process) -> None:
    """Kill a part and everything that it has started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: macOS, for zombies
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# ---------------------------------------------------------------- the report


def write(s: Settings, begun: dict[str, object], outcomes: dict[str, dict[str, object]]) -> None:
    """Write report.json, report.md and the figures from the results so far."""
    parts = {}
    for name in PARTS:
        with contextlib.suppress(OSError, ValueError):
            parts[name] = {"results": json.loads((s.results / f"{name}.json").read_text(encoding="utf-8"))}
        if name in outcomes:
            parts.setdefault(name, {"results": {}}).update(outcomes[name])
    text = json.dumps({**begun, "parts": parts}, indent=1, default=str)
    files.write_atomically(s.out / "report.json", text + "\n")
    figures = {}
    for name, draw in FIGURES.items():
        if curves := parts.get(name, {}).get("results", {}).get("curves"):
            with contextlib.suppress(Exception):  # half of the curves are no reason to lose the rest
                draw(curves, s.out / f"{name}.png")
                figures[name] = f"{name}.png"
    files.write_atomically(s.out / "report.md", as_markdown(begun, parts, figures))


def as_markdown(
    begun: dict[str, object], parts: dict[str, dict[str, object]], figures: dict[str, str]
) -> str:
    """Format the report as text: a heading for each part, and tables."""
    lines = ["# GPU report", "", f"{begun['date']}, commit {begun['git_commit']}", ""]
    lines += [f"    {begun['command']}", ""]
    for name, part in parts.items():
        state = f"{part['state']}, {part['seconds']:.0f} s" if "state" in part else "of an earlier call"
        lines += [f"## {TITLES[name]}", "", f"`{name}`: {state}", ""]
        for title, value in part["results"].items():
            if title != "curves":
                lines += [f"### {title.replace('_', ' ')}", "", *table(value), ""]
        if name in figures:
            lines += [f"![{TITLES[name]}]({figures[name]})", ""]
    return "\n".join(lines)


def table(value: object) -> list[str]:
    """Format a dict (a row each) or a list of dicts (a column per key) as lines of a Markdown table."""
    if isinstance(value, dict):
        value = [{"": key.replace("_", " "), " ": item} for key, item in value.items()]
    if not isinstance(value, list):
        return [shown(value)]
    columns = list(dict.fromkeys(key for row in value for key in row))
    heads = [key.replace("_", " ") for key in columns]
    rows = [heads, ["---"] * len(columns), *([shown(row.get(key)) for key in columns] for row in value)]
    return [f"| {' | '.join(row)} |" for row in rows]


def shown(value: object) -> str:
    """Format a value for a table: four digits, thousands separated."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def draw_recipes(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Validation loss against tokens and seconds; the dotted line is where the first recipe ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    target = next(iter(curves.values()))["loss"][-1]
    for axes, unit, label in zip(both, ("tokens", "seconds"), ("tokens", "seconds of training"), strict=True):
        for name, curve in curves.items():
            axes.plot(curve[unit], curve["loss"], linewidth=1.5, label=name)
        axes.axhline(target, color="black", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    top = np.median([curve["loss"][1] for curve in curves.values()])
    both[0].set_ylim(min(min(curve["loss"]) for curve in curves.values()) - 0.1, top)
    both[0].set_ylabel("validation loss (nats per token)")
    both[0].legend(frameon=False)
    figure.savefig(path)


def draw_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Draw the training losses of ours and of the peers, and the difference of each peer from ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, losses in curves.items():
        steps = range(1, len(losses) + 1)
        (line,) = left.plot(steps, losses, linewidth=1.5, label=name)
        if name != "ours":
            right.plot(steps, np.subtract(losses, curves["ours"]), linewidth=1.5, color=line.get_color())
    for axes, label in ((left, "training loss (nats per token)"), (right, "its difference from ours")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path)


FIGURES = {"peers": draw_losses, "recipes": draw_recipes}


def main() -> None:
    s = cli.parse(Settings, __doc__.split("\n\n")[0])
    names = check(s)
    s.out.mkdir(parents=True, exist_ok=True)
    for folder in (s.results, s.out / "logs"):
        folder.mkdir(exist_ok=True)
    for name in names:
        (s.results / f"{name}.json").unlink(missing_ok=True)
    if s.tiny and s.hellaswag_data:  # a few examples show as many errors
        lines = hellaswag_data.read(s.hellaswag_data)
        s.hellaswag_data = s.out / "hellaswag.jsonl"
        s.hellaswag_data.write_text("".join(lines[:8]), encoding="utf-8")
    begun = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["python", *sys.argv]),
        **run_folder.describe(s, {}),
    }
    start, outcomes = time.monotonic(), {}
    for number, name in enumerate(names):
        shares = [PARTS[other][1] for other in names[number:]]
        seconds = (60 * s.minutes - (time.monotonic() - start)) * shares[0] / sum(shares)
        print(f"{name}: at most {seconds:.0f} s")
        begin = time.monotonic()
        state = run_part(PARTS[name][0], s, name, max(1.0, seconds))
        outcomes[name] = {"state": state, "seconds": time.monotonic() - begin}
        write(s, begun, outcomes)
        print(f"{name}: {state}, {outcomes[name]['seconds']:.0f} s")
    print(f"report: {s.out / 'report.md'}")


if __name__ == "__main__":
    cli.run(main)
