"""A run folder: its files' names, claiming one for a new run, finding the runs and checkpoints in it.

log/config.json      every setting, the versions, the hardware, the git commit
log/metrics.jsonl    one record per line: see support/metrics.py
log/checkpoints/     see support/checkpoint.py
log/loss_curves.png, log/samples.txt, log/summary.json    written at the end of the run
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import uuid
from pathlib import Path, PurePath
from typing import Protocol

import torch
from filelock import FileLock

from support import attempts, checkpoint, files, metrics, pretrained, trackers
from support.cli import UserError

DEFAULT = "log"  # of every script's --model or --run
CONFIG = "config.json"
METRICS = "metrics.jsonl"
FIGURE = "loss_curves.png"
SAMPLES = "samples.txt"
SUMMARY = "summary.json"
BEST = ":best"  # after a run's name: its checkpoint with the lowest validation loss


class Settings(Protocol):
    """The training script's settings, of which these are used here."""

    out_dir: Path
    resume: bool
    overwrite: bool
    init_from: str
    track: str


LOG_SUFFIXES = (".log", ".out", ".err")
# Of a run, besides its checkpoints.
NAMES = (CONFIG, METRICS, FIGURE, SAMPLES, SUMMARY, attempts.UNDER_WAY, trackers.TENSORBOARD_FOLDER)


def check(s: Settings) -> None:
    """Raise UserError if --out-dir holds something other than a run, or a run and no flag says what to do.

    Called before anything is written: a model or a data set in that folder must stay as it is.
    """
    out_dir = s.out_dir
    if os.path.lexists(out_dir) and not out_dir.is_dir():
        raise UserError(f"--out-dir {out_dir}: not a folder: name another")
    if not out_dir.exists():
        return
    if other := _not_of_a_run(out_dir):
        logs = f" (logs may end in {', '.join(LOG_SUFFIXES)})" if other.endswith(".txt") else ""
        raise UserError(f"--out-dir {out_dir}: holds {other}, not a run: name another folder{logs}")
    if _is_run(out_dir) and not (s.resume or s.overwrite):
        raise UserError(
            f"--out-dir {out_dir}: already holds a run: continue it with --resume, replace it with "
            "--overwrite, or name another folder"
        )


def _not_of_a_run(out_dir: Path) -> str:
    """Name something in the folder that belongs to no run; empty if there is a run, or room for one.

    Hidden files, other folders and the files that output goes to do not count.
    """
    names = sorted(path.name for path in out_dir.iterdir() if not path.name.startswith("."))
    for name in names:
        if name.endswith(".safetensors"):
            return f"a model ({name})"
        if checkpoint.STEP_FOLDER.fullmatch(name):
            return f"the checkpoints of a run ({name})"
    if _is_run(out_dir):
        return ""
    if others := checkpoint.folders(out_dir):
        return f"another program's checkpoints ({others[0].name})"
    files = [name for name in names if (out_dir / name).is_file()]
    return next((name for name in files if name in NAMES or not _takes_output(out_dir / name)), "")


def _is_run(out_dir: Path) -> bool:
    """True if the folder holds the record of a run, perhaps damaged, or a checkpoint of one."""
    if (out_dir / attempts.UNDER_WAY).exists():
        return True
    if "max_steps" in recorded_settings(out_dir):
        return True
    if (out_dir / METRICS).is_file() and metrics.has_records(out_dir / METRICS):
        return True
    return any((path / checkpoint.TRAINING_STATE).exists() for path in checkpoint.folders(out_dir))


def _takes_output(path: Path) -> bool:
    """True if a file is a log by its name, or takes this process's output; `tee` begins with an empty one."""
    if path.suffix in LOG_SUFFIXES or path.stat().st_size == 0:
        return True
    with contextlib.suppress(OSError):
        return any(os.path.samestat(path.stat(), os.fstat(number)) for number in (1, 2))
    return False


def claim(s: Settings) -> tuple[Path | None, FileLock]:
    """Lock the folder for this run; returns the checkpoint to resume from, if any, and the lock.

    With --overwrite, removes the run that is there. Raises UserError as `check` does, if the run there began
    with other weights, if another process is training in it, or if the folder cannot be written.
    """
    out_dir = s.out_dir
    check(s)  # again: hours of fetching may have passed
    try:
        files.make_folder(out_dir)
        lock = files.lock_folder(out_dir)
    except OSError as error:
        raise UserError(
            f"--out-dir {out_dir}: cannot be written ({error.strerror}): name another folder"
        ) from error
    if lock is None:
        raise UserError(f"{out_dir}: another process is training in it: wait, or use another --out-dir")
    if s.overwrite and _is_run(out_dir):
        checkpoint.remove_all(out_dir)
        # The record last: if this is cut off, what is left is still a run's.
        for name in reversed(NAMES):
            if os.path.lexists(out_dir / name):
                files.remove(out_dir / name)
    checkpoint.remove_unfinished(out_dir)
    newest, problems = checkpoint.latest_intact(out_dir) if s.resume else (None, [])
    if newest:
        began = recorded_settings(out_dir).get("init_from", s.init_from)
        if began != s.init_from:
            raise UserError(
                f"--init-from {s.init_from}: the run in {out_dir} began with {began}: set it back"
            )
        checkpoint.warn_of_damage(problems, newest)
    elif s.resume:
        print(f"{out_dir}: no checkpoint to resume from: starting at step 0")
    return newest, lock


def open_record(
    settings: Settings, facts: dict[str, object], steps_done: int, silent: bool
) -> metrics.Metrics:
    """Write config.json, open metrics.jsonl, and say and record which settings a resume has changed.

    facts: what config.json records besides settings, versions and commit. silent: touch nothing.
    """
    out_dir = settings.out_dir
    if silent:
        return metrics.Metrics(out_dir / METRICS, silent=True)
    record = {"name": name_of(out_dir), **describe(settings, facts)}
    changed = changed_settings(out_dir, record["settings"]) if steps_done else {}
    write_json(out_dir / CONFIG, record)
    opened = metrics.Metrics(out_dir / METRICS, steps_done or None)
    for name in trackers.names(settings.track):
        opened.track(name, out_dir, record["name"], record)
    processes = facts["hardware"]["processes"]
    opened.log(steps_done, "event", name="resume" if steps_done else "start", processes=processes)
    if changed:
        opened.log(steps_done, "event", name="settings changed", **changed)
    for name, (before, now) in changed.items():
        print(f"changed    --{name.replace('_', '-')} was {before}, is now {now}")
    return opened


def name_of(out_dir: Path) -> str:
    """What trackers call the run in a folder: kept in config.json, or a new name that no other run has."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((out_dir / CONFIG).read_text(encoding="utf-8-sig"))["name"])
    # In wandb it is also the run's id, and must do without some characters.
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"{out_dir.resolve().name}-{uuid.uuid4().hex[:8]}")


def describe(settings: object, facts: dict[str, object]) -> dict[str, object]:
    """What config.json records: every setting, the `facts`, the versions, the git commit."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    values = dataclasses.asdict(settings)
    return {
        "settings": {k: v.as_posix() if isinstance(v, PurePath) else v for k, v in values.items()},
        **facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "git_commit": commit,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write one of the folder's JSON files, indented for people to read."""
    files.write_atomically(path, json.dumps(content, indent=2) + "\n")


def recorded_settings(out_dir: Path) -> dict[str, object]:
    """The settings in a run's config.json; none without a readable file."""
    try:
        return dict(json.loads((out_dir / CONFIG).read_text(encoding="utf-8-sig"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def changed_settings(out_dir: Path, new: dict[str, object]) -> dict[str, list[object]]:
    """Settings that differ from those in a run's config.json: name -> [before, now].

    Only those that affect training count. Without a readable file nothing has changed.
    """
    old = recorded_settings(out_dir)
    ignored = {"preset", "resume", "overwrite", "out_dir", "track"}
    ignored |= {"block_size", "n_layer", "n_head", "n_embd"}  # a checkpoint of another shape is refused
    names = [name for name in new if name in old and name not in ignored]
    return {name: [old[name], new[name]] for name in names if old[name] != new[name]}


def write_summary(
    out_dir: Path,
    records: list[dict[str, object]],
    parameters: int,
    steps: int,
    tokens: int,
    seconds: dict[str, float],
    hardware: dict[str, object],
) -> None:
    """Write summary.json: size, losses, speed and time of a finished run."""
    losses = {
        kind: [(r["loss"], r["step"]) for r in records if r["kind"] == kind and r["loss"] is not None]
        for kind in ("train", "val")
    }
    best = min(losses["val"], default=(None, None))
    summary = {
        "parameters": parameters,
        "steps": steps,
        "tokens": tokens,
        "last_train_loss": losses["train"][-1][0] if losses["train"] else None,
        "last_val_loss": losses["val"][-1][0] if losses["val"] else None,
        "best_val_loss": best[0],
        "best_val_step": best[1],
        "tokens_per_sec": tokens / seconds["training"] if seconds["training"] else None,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hardware": hardware,
    }
    write_json(out_dir / SUMMARY, summary)


def step_of_summary(out_dir: Path) -> int | None:
    """The last step of the run that summary.json and samples.txt are of; None without a readable summary."""
    try:
        return json.loads((out_dir / SUMMARY).read_text(encoding="utf-8-sig"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def by_validation_loss(out_dir: Path) -> list[Path]:
    """The checkpoints whose validation loss is on record, lowest first, of equals the earlier."""
    records = metrics.read(out_dir / METRICS)
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "val" and r["loss"] is not None}
    found = [path for path in checkpoint.folders(out_dir) if checkpoint.step_of(path) in losses]
    return sorted(found, key=lambda path: (losses[checkpoint.step_of(path)], checkpoint.step_of(path)))


def best_checkpoint(out_dir: Path) -> Path:
    """The intact checkpoint with the lowest validation loss. Raises UserError if there is none."""
    best, problems = checkpoint.first_intact(by_validation_loss(out_dir))
    if best is None:
        reason = problems[0] if problems else f"{out_dir}: no checkpoint there has a validation loss"
        raise UserError(f"{reason}: train with --keep-best, or take the newest checkpoint")
    checkpoint.warn_of_damage(problems, best)
    return best


def stale_validations(out_dir: Path) -> tuple[int, int | None]:
    """How many validations came after that of the lowest loss, and the step of the lowest (None: none)."""
    records = [r for r in metrics.read(out_dir / METRICS) if r["kind"] == "val"]
    best = min(((r["loss"], r["step"]) for r in records if r["loss"] is not None), default=(None, -1))[1]
    return sum(r["step"] > best for r in records), None if best < 0 else best


def find_model(name: str) -> str:
    """The folder or Hub name behind a `--model`: for a run, its newest intact checkpoint; RUN:best: its best.

    Warns on stderr if a newer one is damaged. Raises UserError for a run without checkpoints, and for the
    default run if there is none.
    """
    folder = Path(name)
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # too long a name, a folder that may not be read
        raise UserError(f"{name:.60}: {error.strerror}: name a run, a checkpoint or a model") from error
    if name.endswith(BEST) and not folder.exists():
        folder = Path(name.removesuffix(BEST))
        if not folder.is_dir():
            raise UserError(
                f"{name}: no run there: {BEST} takes the best checkpoint of a run{runs_below(folder)}"
            )
        return str(best_checkpoint(folder))
    if pretrained.has_weights(folder):
        return name
    if not folder.is_dir():
        if name == DEFAULT:
            raise UserError(f"{name}: no run there yet: train one, or name a model{runs_below(folder)}")
        return name
    newest, problems = checkpoint.latest_intact(folder)
    if newest is None:
        if (folder / CONFIG).exists() and (folder / METRICS).exists():
            raise UserError(
                f"{folder}: no checkpoint yet: wait for the run's first (--checkpoint-interval)"
                f"{pretrained.hidden_model(name)}"
            )
        if runs := runs_below(folder):
            raise UserError(f"{folder}: not a run{runs}{pretrained.hidden_model(name)}")
        return name
    checkpoint.warn_of_damage(problems, newest)
    return str(newest)


def runs_below(folder: Path) -> str:
    """The end of a message about a missing run: the runs one level below the folder, or nothing."""
    runs = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS}"))
    return f" (runs there: {', '.join(runs)})" if runs else ""


def how_to_continue(out_dir: Path, overwrite: bool, processes: int) -> str:
    """How to continue a stopped run. The command that started it would delete it if it has --overwrite."""
    if not overwrite:
        return "continue with the same command and --resume"
    if processes > 1:
        return "continue with the same command, --resume in place of --overwrite"
    python = Path(sys.executable)
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return f"continue with {python} {sys.argv[0]} --preset {out_dir / CONFIG} --resume"
