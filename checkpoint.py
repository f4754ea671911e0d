"""Saved states of a run: written whole or not at all, found, checked, loaded.

    OUT_DIR/checkpoints/step_000500/    500 updates done
        model.safetensors, config.json, …, tokenizer.json    what transformers loads as it is
        training_state.pt                                     the optimizer and the step, for resuming
        SHA256SUMS                                            of all the others: `sha256sum -c` checks them

A checkpoint is written to a folder with a temporary name, flushed to the disk, then renamed.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

import tokenizer
from cli import UserError
from model import GPT
from optim import Muon
from pre_tokens.shards import sha256_of

STEP_FOLDER = re.compile(r"step_(\d{6,})")
TRAINING_STATE = "training_state.pt"
CHECKSUMS = "SHA256SUMS"
UNFINISHED = ".unfinished-"


def save(out_dir: Path, step: int, model: GPT, training_state: dict[str, object], keep: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`. Returns its folder.

    training_state: tensors, numbers, strings, lists and dictionaries only, as `load` reads nothing else.
    """
    parent = out_dir / "checkpoints"
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{parent}: a file, where a folder has to be: remove it, then --resume") from error
    remove_unfinished(out_dir)
    folder = parent / f"step_{step:06d}"
    temporary = parent / (UNFINISHED + folder.name)
    try:
        temporary.mkdir()
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary, model.config.block_size)
        torch.save(training_state, temporary / TRAINING_STATE)
        sums = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir())]
        (temporary / CHECKSUMS).write_text("".join(sums), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
    except (OSError, SafetensorError, RuntimeError) as error:  # each writer has its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: cannot be written ({reason}): make room, then --resume") from error
    if folder.exists():
        _remove(folder)
    temporary.rename(folder)
    _flush(parent)
    for old in folders(out_dir)[keep:]:
        _remove(old)
    return folder


def folders(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    parent = out_dir / "checkpoints"
    found = [path for path in parent.glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The number of updates behind a checkpoint folder, from its name."""
    return int(STEP_FOLDER.fullmatch(folder.name)[1])


def check(folder: Path) -> None:
    """Raise UserError unless every file of the checkpoint is as it was written."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        for line in lines:
            digest, name = line.split("  ", 1)
            if sha256_of(folder / Path(name).name) != digest:
                raise UserError(f"{folder / name}: damaged")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a complete checkpoint ({error})") from error


def newest_whole(out_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, None if there is none, and what is wrong with newer ones.

    Raises UserError where there are checkpoints but not one of them is whole.
    """
    complaints = []
    for folder in folders(out_dir):
        try:
            check(folder)
            return folder, complaints
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError(f"{complaints[0]}: no checkpoint of {out_dir} is intact: --overwrite starts afresh")
    return None, complaints


def load_training_state(folder: Path) -> dict[str, object]:
    """What `save` was given as training_state, on the CPU. Raises UserError where it cannot be read."""
    file = folder / TRAINING_STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        json.dumps([state["identity"], state["scaler"]])  # plain values, no tensors
        if not sum(state["seconds"].values()) >= 0 or not isinstance(state["optimizer"], dict):
            raise TypeError("not a training state")
        return state
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: cannot be loaded ({reason}): use another checkpoint") from error


DEFAULT_RUN = "log"  # of every script's --model or --run


def find_model(name: str) -> str:
    """The folder or Hub name behind a `--model`: a run stands for its newest whole checkpoint.

    Says on stderr where a newer one is damaged. Raises UserError for a run without checkpoints, and for the
    default run where there is none.
    """
    folder = Path(name)
    if (folder / "model.safetensors").exists():
        return name
    if not folder.is_dir():
        if name == DEFAULT_RUN:
            raise UserError(f"{name}: no run there yet: train one, or name a model{runs_below(folder)}")
        return name
    newest, complaints = newest_whole(folder)
    if newest is None:
        if (folder / "config.json").exists() and (folder / "metrics.jsonl").exists():
            raise UserError(f"{folder}: no checkpoint yet: wait for the run's first (--checkpoint-interval)")
        if runs := runs_below(folder):
            raise UserError(f"{folder}: holds no run itself{runs}")
        return name
    warn_of_damage(complaints, newest)
    return str(newest)


def warn_of_damage(complaints: list[str], used: Path) -> None:
    """Say on stderr which checkpoints are damaged and which one is used instead."""
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)
    if complaints:
        print(f"warning: using {used} instead", file=sys.stderr)


def runs_below(folder: Path) -> str:
    """The end of a message that misses a run in `folder`: the runs one level below, or nothing."""
    runs = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))
    return f" (runs there: {', '.join(runs)})" if runs else ""


def remove_unfinished(out_dir: Path) -> None:
    """Clear away what a crash left of checkpoints that were being written or removed."""
    for path in (out_dir / "checkpoints").glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def optimizer_state(model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, object]:
    """The optimizers' state by parameter name, without padding: fit for a model with another padding."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = model.config.vocab_size
    return {
        names[parameter]: {
            key: value[:rows].clone() if _is_padded(names[parameter], value) else value
            for key, value in state.items()
        }
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    }


def load_optimizer_state(
    model: GPT, optimizers: Sequence[torch.optim.Optimizer], saved: dict[str, object]
) -> None:
    """Put back what `optimizer_state` took. Raises UserError where it is of another optimizer or model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    padding = model.config.embedding_rows - model.config.vocab_size
    if set(names.values()) != set(saved):
        raise UserError("training_state.pt: the state of another optimizer or model: start a new --out-dir")
    for optimizer in optimizers:
        state = {}
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        keys = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        for index, (name, parameter) in enumerate((names[parameter], parameter) for parameter in order):
            rows = parameter[: model.config.vocab_size] if name.endswith("wte.weight") else parameter
            shapes = {key: torch.Size() if key == "step" else rows.shape for key in keys}
            # The fused optimizers write into these without looking at their size.
            if {key: value.shape for key, value in saved[name].items()} != shapes:
                raise ValueError(f"the state of {name} has another shape")
            state[index] = {
                key: F.pad(value, (0, 0, 0, padding)) if _is_padded(name, value) else value.contiguous()
                for key, value in saved[name].items()
            }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_padded(name: str, value: object) -> bool:
    return name.endswith("wte.weight") and isinstance(value, torch.Tensor) and value.dim() == 2


def _remove(folder: Path) -> None:
    # Out of sight first: a crash half-way must not leave a part under a checkpoint's name.
    hidden = folder.with_name(UNFINISHED + "old-" + folder.name)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
