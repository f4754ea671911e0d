"""Find and read runs: the names of their files, and the checkpoint behind a --model.

log/config.json      every setting, the versions, the hardware, the git commit
log/metrics.jsonl    one record per line: see support/metrics.py
log/checkpoints/     see support/checkpoint.py
log/loss_curves.png, log/samples.txt, log/summary.json    written at the end of the run
"""

import json
from pathlib import Path

from support import checkpoint, metrics, pretrained
from support.cli import UserError

DEFAULT = "log"  # of every script's --model or --run
CONFIG = "config.json"
METRICS = "metrics.jsonl"
FIGURE = "loss_curves.png"
SAMPLES = "samples.txt"
SUMMARY = "summary.json"
BEST = ":best"  # after a run's name: its checkpoint with the lowest validation loss


def read_config(out_dir: Path) -> dict[str, object]:
    """Read a run's config.json. Returns an empty dictionary unless it can be read and is that of a run."""
    try:
        config = json.loads((out_dir / CONFIG).read_text(encoding="utf-8-sig"))
        return config if isinstance(config["settings"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def folder_of(run: Path) -> Path:
    """Return the folder of a run that is named by itself or by its metrics.jsonl; else the path unchanged."""
    return run.parent if run.name.lower() == METRICS and run.is_file() else run


def recorded_settings(out_dir: Path) -> dict[str, object]:
    """Return the settings in a run's config.json; none without a readable file."""
    return read_config(out_dir).get("settings", {})


def step_of_summary(out_dir: Path) -> int | None:
    """Last step of the run when it wrote summary.json and samples.txt; None without a readable summary."""
    try:
        return json.loads((out_dir / SUMMARY).read_text(encoding="utf-8-sig"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def by_validation_loss(out_dir: Path) -> list[Path]:
    """List the checkpoints whose validation loss is recorded, lowest first. Ties go to the earlier step."""
    records = metrics.read(out_dir / METRICS)
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "val" and r["loss"] is not None}
    found = [path for path in checkpoint.folders(out_dir) if checkpoint.step_of(path) in losses]
    return sorted(found, key=lambda path: (losses[checkpoint.step_of(path)], checkpoint.step_of(path)))


def best_checkpoint(out_dir: Path) -> Path:
    """Return the intact checkpoint with the lowest validation loss. Raises UserError if there is none."""
    best, problems = checkpoint.first_intact(by_validation_loss(out_dir))
    if best is None:
        reason = problems[0] if problems else f"{out_dir}: no checkpoint there has a validation loss"
        raise UserError(f"{reason}: train with --keep-best, or take the newest checkpoint")
    checkpoint.warn_of_damage(problems, best)
    return best


def stale_validations(out_dir: Path) -> tuple[int, int | None]:
    """Count the validations after the best one. Also returns the step of the best one, or None."""
    records = [r for r in metrics.read(out_dir / METRICS) if r["kind"] == "val"]
    best = min(((r["loss"], r["step"]) for r in records if r["loss"] is not None), default=(None, -1))[1]
    return sum(r["step"] > best for r in records), None if best < 0 else best


def find_model(name: str) -> str:
    """Resolve a `--model` to a folder or Hub name. A run means its newest checkpoint, RUN:best its best.

    Damaged checkpoints are passed over with a warning on stderr. Raises UserError for a run without
    checkpoints, and for the default run if there is none.
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
    """Return a hint for an error about a missing run: the runs one level below the folder; or ""."""
    runs = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS}"))
    return f" (runs there: {', '.join(runs)})" if runs else ""
