"""The run folder in training: lock, settings, metrics, checkpoints, and their copy on the Hub.

support/run_files.py names the files in it.
"""

import contextlib
import dataclasses
import os
import platform
import re
import subprocess
import sys
import uuid
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from support import attempts, checkpoint, files, hardware, metrics, push, run_files, trackers
from support.attempts import Attempts
from support.cli import UserError
from support.metrics import Metrics
from support.progress import Clock
from support.runtime import Runtime

if TYPE_CHECKING:
    from settings import Settings
    from train_gpt2 import Trainer

LOG_SUFFIXES = (".log", ".out", ".err")
# The files of a run besides its checkpoints.
NAMES = (
    run_files.CONFIG, run_files.METRICS, run_files.FIGURE, run_files.SAMPLES, run_files.SUMMARY,
    attempts.UNDER_WAY, trackers.TENSORBOARD_FOLDER,
)  # fmt: skip


class RunFolder:
    """The run on the disk. Every rank calls the same methods; rank 0 writes."""

    def __init__(self, s: "Settings", rt: Runtime, clock: Clock, hub_head: str | None) -> None:
        """Lock the folder and find the checkpoint to resume from.

        hub_head: the result of `push.prepare`.
        Raises UserError if the folder cannot be used for this run.
        """
        self.settings, self.rt, self.clock, self.hub_head = s, rt, clock, hub_head
        claimed = rt.run_on(rt.is_main, lambda: claim(s))
        self.newest, self.lock = claimed or (None, None)
        [self.steps_done] = rt.max_over_ranks(checkpoint.step_of(self.newest) if self.newest else 0)
        if self.steps_done > s.max_steps:
            raise UserError(
                f"--max-steps {s.max_steps}: the run in {s.out_dir} has already done {self.steps_done} steps"
            )
        self.writer = checkpoint.Writer()
        self.saved = -1  # step of the checkpoint handed to the writer last

    def resume(self, trainer: "Trainer", data: str, facts: dict[str, object]) -> None:
        """Load the newest checkpoint, if there is one, and continue or begin the metrics.

        data: fingerprint of the training data. facts: entries of config.json about data and model.
        Raises UserError if the checkpoint is damaged or belongs to a run with other settings.
        """
        s, rt = self.settings, self.rt
        self.fingerprint = checkpoint.fingerprint(s, trainer.model.config, data)
        if self.steps_done:
            self.clock.add(rt.run_on(True, lambda: self._load(trainer, self.steps_done)))
        facts = {**facts, "micro_batch_size": trainer.micro_batch_size}
        facts |= {"parameters": trainer.model.config.n_parameters, "hardware": hardware.describe(rt)}
        self.metrics = open_metrics(s, facts, self.steps_done, silent=not rt.is_main)
        self.attempt = Attempts(rt, self.metrics, self.steps_done)
        self.pusher = push.Pusher(s, self.hub_head, self.newest, not rt.is_main)

    def checkpoint_is_overdue(self) -> bool:
        """True on rank 0 if the last checkpoint is older than --checkpoint-minutes."""
        return self.rt.is_main and self.writer.is_overdue(self.settings.checkpoint_minutes)

    def save(self, step: int, trainer: "Trainer", wait: bool) -> None:
        """Write the checkpoint of `step`, in the background or, with `wait`, before returning.

        Does nothing if it is on the disk already, or if this process started from it. With
        --reload-checkpoints, training continues from the checkpoint that was read back. A failed write is
        recorded when the next checkpoint is written. If that fails too, it raises UserError.
        """
        s, rt = self.settings, self.rt
        if step == self.steps_done:
            return
        if step == self.saved and not rt.on_any(rt.is_main and not self.writer.has_written(step)):
            return
        self.saved = step
        with self.clock("checkpoints"):
            # Every rank takes part, because each may hold a share of the optimizer state.
            optimizer_state = checkpoint.optimizer_state(trainer.model, trainer.optimizers)
            if rt.is_main:
                state = {"step": step, "identity": self.fingerprint, "optimizer": optimizer_state}
                state |= {"scaler": trainer.scaler.state_dict(), "seconds": self.clock.seconds()}
                self._write(step, checkpoint.snapshot(trainer.model, state), wait or s.reload_checkpoints)
            if s.reload_checkpoints:
                rt.barrier()
                self._load(trainer, step)
                rt.say(f"step {step}/{s.max_steps} | checkpoint loaded back")

    def _write(self, step: int, state: checkpoint.Snapshot, wait: bool) -> None:
        s, folder = self.settings, checkpoint.folder_of(self.settings.out_dir, step)
        message = f"step {step}/{s.max_steps} | "
        if failure := self.writer.wait():
            print(f"{message}warning: {failure}")
            self.metrics.log(step, "event", name="checkpoint failed", reason=str(failure))
        self.metrics.sync()
        best = run_files.by_validation_loss(s.out_dir)[:1] if s.keep_best else ()
        message += f"checkpoint {folder}"
        self.writer.start(s.out_dir, step, state, s.keep_checkpoints, message, keep_also=best)
        self.pusher.send(self.metrics, step, folder, self.writer.writing)
        if (wait or failure) and (failure := self.writer.wait()):
            raise failure

    def _load(self, trainer: "Trainer", step: int) -> dict[str, float]:
        folder = checkpoint.folder_of(self.settings.out_dir, step)
        return checkpoint.restore(folder, trainer.model, trainer.optimizers, trainer.scaler, self.fingerprint)

    def close(self) -> None:
        """Finish sending to the Hub and the trackers."""
        self.pusher.close(self.metrics)
        self.metrics.close()


# ---------------------------------------------------------------- whose folder it is


def check(s: "Settings") -> None:
    """Raise UserError if --out-dir holds something else, or a run without --resume or --overwrite.

    Writes nothing, so that a model or a data set in that folder stays as it is.
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
    """Name a file that does not belong to a run; "" if the folder holds a run or could hold one.

    Hidden files, other folders and log files do not count.
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
    found = [name for name in names if (out_dir / name).is_file()]
    return next((name for name in found if name in NAMES or not _is_log(out_dir / name)), "")


def _is_run(out_dir: Path) -> bool:
    """True if the folder holds the metrics of a run, perhaps damaged, or a checkpoint of one."""
    if (out_dir / attempts.UNDER_WAY).exists():
        return True
    if "max_steps" in run_files.recorded_settings(out_dir):
        return True
    if (out_dir / run_files.METRICS).is_file() and metrics.has_records(out_dir / run_files.METRICS):
        return True
    return any((path / checkpoint.TRAINING_STATE).exists() for path in checkpoint.folders(out_dir))


def _is_log(path: Path) -> bool:
    """True if a file has the name of a log, is empty like a new one of `tee`, or receives our output."""
    if path.suffix in LOG_SUFFIXES or path.stat().st_size == 0:
        return True
    with contextlib.suppress(OSError):
        return any(os.path.samestat(path.stat(), os.fstat(number)) for number in (1, 2))
    return False


def claim(s: "Settings") -> tuple[Path | None, FileLock]:
    """Lock the folder for this run, after removing an earlier run with --overwrite.

    Returns the checkpoint to resume from, if any, and the lock. Raises UserError as `check` does, and if the
    folder cannot be written, another process trains in it, or its run began with other weights.
    """
    out_dir = s.out_dir
    check(s)  # again, after hours of downloading perhaps
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
        # The settings last, so that an interrupted removal still counts as a run.
        for name in reversed(NAMES):
            if os.path.lexists(out_dir / name):
                files.remove(out_dir / name)
    checkpoint.remove_unfinished(out_dir)
    newest, problems = checkpoint.latest_intact(out_dir) if s.resume else (None, [])
    if newest:
        began = run_files.recorded_settings(out_dir).get("init_from", s.init_from)
        if began != s.init_from:
            raise UserError(
                f"--init-from {s.init_from}: the run in {out_dir} began with {began}: set it back"
            )
        checkpoint.warn_of_damage(problems, newest)
    elif s.resume:
        print(f"{out_dir}: no checkpoint to resume from: starting at step 0")
    return newest, lock


# ---------------------------------------------------------------- settings and metrics


def open_metrics(s: "Settings", facts: dict[str, object], steps_done: int, silent: bool) -> Metrics:
    """Write config.json and open metrics.jsonl; print and record the settings that a resume has changed.

    facts: further entries of config.json. silent: touch nothing.
    """
    out_dir = s.out_dir
    if silent:
        return Metrics(out_dir / run_files.METRICS, silent=True)
    config = {"name": tracked_name(out_dir), **describe(s, facts)}
    changed = changed_settings(out_dir, config["settings"]) if steps_done else {}
    files.write_json(out_dir / run_files.CONFIG, config)
    opened = Metrics(out_dir / run_files.METRICS, steps_done or None)
    for name in trackers.names(s.track):
        opened.track(name, out_dir, config["name"], config)
    processes = facts["hardware"]["processes"]
    opened.log(steps_done, "event", name="resume" if steps_done else "start", processes=processes)
    if changed:
        opened.log(steps_done, "event", name="settings changed", **changed)
    for name, (before, now) in changed.items():
        print(f"changed    --{name.replace('_', '-')} was {before}, is now {now}")
    return opened


def tracked_name(out_dir: Path) -> str:
    """Name of the run in trackers: from its config.json, or a new unique one."""
    if name := run_files.read_config(out_dir).get("name"):
        return str(name)
    # wandb restricts the characters of an id.
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"{out_dir.resolve().name}-{uuid.uuid4().hex[:8]}")


def describe(settings: object, facts: dict[str, object]) -> dict[str, object]:
    """Build the content of config.json: every setting, the `facts`, the versions, the git commit."""
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


def changed_settings(out_dir: Path, new: dict[str, object]) -> dict[str, list[object]]:
    """Compare with the run's config.json the settings that affect training: name -> [before, now].

    Empty if that file cannot be read.
    """
    old = run_files.recorded_settings(out_dir)
    ignored = {"preset", "resume", "overwrite", "out_dir", "track"}
    ignored |= {"block_size", "n_layer", "n_head", "n_embd"}  # a checkpoint of another shape is refused
    names = [name for name in new if name in old and name not in ignored]
    return {name: [old[name], new[name]] for name in names if old[name] != new[name]}


def how_to_continue(out_dir: Path, overwrite: bool, processes: int) -> str:
    """Explain how to continue a stopped run. With --overwrite, the same command would delete it."""
    if not overwrite:
        return "continue with the same command and --resume"
    if processes > 1:
        return "continue with the same command, --resume in place of --overwrite"
    python = Path(sys.executable)
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return f"continue with {python} {sys.argv[0]} --preset {out_dir / run_files.CONFIG} --resume"
