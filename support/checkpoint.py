"""Checkpoints: written completely or not at all, listed, verified, loaded.

    OUT_DIR/checkpoints/step_000500/    after 500 optimizer steps
        model.safetensors, config.json, …, tokenizer.json    a folder that transformers loads directly
        training_state.pt                                     optimizer state and step, for resuming
        SHA256SUMS                                            of all other files, for `sha256sum -c`

A checkpoint is written to a folder with a temporary name, flushed to the disk, then renamed. Training only
waits for a copy of the state in host memory. A `Writer` does the rest in the background.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from support import pretrained, tokenizer
from support.cli import UserError
from support.files import check_regular, flush_to_disk, make_folder, remove, replace, sha256_of

if TYPE_CHECKING:
    from model import GPTConfig
    from settings import Settings

FOLDER = "checkpoints"
STEP_FOLDER = re.compile(r"step_(\d{6,})")
TRAINING_STATE = "training_state.pt"
CHECKSUMS = "SHA256SUMS"
UNFINISHED = ".unfinished-"
STATE_KEYS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def folder_of(out_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return out_dir / FOLDER / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """Number of optimizer steps behind a checkpoint, from the name of its folder."""
    return int(STEP_FOLDER.fullmatch(folder.name)[1])


def folders(out_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    found = [path for path in (out_dir / FOLDER).glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


# ---------------------------------------------------------------- writing


@dataclass
class Snapshot:
    """Content of a checkpoint in host memory, so that training can continue while it is written."""

    weights: dict[str, Tensor]
    config: "GPTConfig"
    training_state: dict[str, object]


def snapshot(model: nn.Module, training_state: dict[str, object]) -> Snapshot:
    """Copy a model and its training state.

    training_state: only tensors, numbers, strings, lists and dictionaries, because nothing else is loaded.
    """
    return Snapshot(pretrained.copy_weights(model), model.config, _copied(training_state))


def _copied(value: object) -> object:
    """Deep copy with all tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


class Writer:
    """Writes one checkpoint at a time in the background."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.written = -1  # step of the newest checkpoint on the disk
        self.started = time.monotonic()

    def start(
        self,
        out_dir: Path,
        step: int,
        state: Snapshot,
        keep: int,
        message: str,
        keep_also: Collection[Path] = (),
    ) -> None:
        """Start to `save`; print `message` once that is done. Call `wait` before the next checkpoint."""
        assert self.writing is None
        self.started = time.monotonic()
        self.writing = self.pool.submit(self._save, out_dir, step, state, keep, message, keep_also)

    def _save(
        self, out_dir: Path, step: int, state: Snapshot, keep: int, message: str, keep_also: Collection[Path]
    ) -> None:
        save(out_dir, step, state, keep, keep_also)
        self.written = step
        print(message)

    def is_overdue(self, minutes: float) -> bool:
        """True if the last checkpoint is older than `minutes` (0: never)."""
        return 0 < minutes < (time.monotonic() - self.started) / 60

    def has_written(self, step: int) -> bool:
        """True if the checkpoint of `step` is on the disk. Waits for one that is being written."""
        if self.writing:
            self.writing.exception()
        return self.written == step

    def wait(self) -> UserError | None:
        """Wait for the checkpoint that is being written, if any. Returns the error if that failed."""
        writing, self.writing = self.writing, None
        error = writing.exception() if writing else None
        if error is None or isinstance(error, UserError):
            return error
        raise error


def save(out_dir: Path, step: int, state: Snapshot, keep: int, keep_also: Collection[Path] = ()) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep` and the `keep_also`.

    An intact checkpoint of this step stays as it is. Those of later steps go too, because a run only resumes
    before them if they are damaged. Returns the folder.
    Raises UserError if it cannot be written; then all earlier checkpoints are still there.
    """
    folder = folder_of(out_dir, step)
    if not folder.exists() or first_intact([folder])[0] is None:
        _write(folder, state)
    found = folders(out_dir)
    later = found.index(folder)
    for old in found[:later] + [old for old in found[later + keep :] if old not in keep_also]:
        # Windows refuses while someone reads a file in it. The next checkpoint tries again.
        with contextlib.suppress(PermissionError):
            _remove(old)
    return folder


def _write(folder: Path, state: Snapshot) -> None:
    parent = folder.parent
    try:
        make_folder(parent)
    except FileExistsError as error:
        raise UserError(f"{parent}: a file, where a folder has to be: remove it, then --resume") from error
    remove_unfinished(parent.parent)
    temporary = parent / (UNFINISHED + folder.name)
    try:
        temporary.mkdir()
        pretrained.save(temporary, state.weights, state.config)
        tokenizer.save_pretrained(temporary, state.config.block_size)
        torch.save(state.training_state, temporary / TRAINING_STATE)
        sums = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir())]
        (temporary / CHECKSUMS).write_text("".join(sums), encoding="utf-8", newline="\n")
        for file in temporary.iterdir():
            flush_to_disk(file)
        flush_to_disk(temporary)
    except (OSError, SafetensorError, RuntimeError) as error:  # each library raises its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: cannot be written ({reason}): free some space, then --resume") from error
    put_in_place(temporary, folder)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Give a complete checkpoint its name, replacing any other of that name."""
    make_folder(folder.parent)
    if folder.exists():
        _remove(folder)
    replace(temporary, folder)


def remove_unfinished(out_dir: Path) -> None:
    """Remove half-written checkpoints that a crash has left (best effort)."""
    for path in (out_dir / FOLDER).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    if not folder.is_symlink():
        # Renamed first, so that a crash cannot leave a part under a checkpoint's name.
        hidden = folder.with_name(UNFINISHED + "old-" + folder.name)
        replace(folder, hidden)
        folder = hidden
    remove(folder)


def remove_all(out_dir: Path) -> None:
    """Remove the checkpoints of a run, and their folder if it is empty then.

    A link in place of the folder, to a larger disk, stays.
    """
    remove_unfinished(out_dir)
    for folder in folders(out_dir):
        _remove(folder)
    with contextlib.suppress(OSError):
        (out_dir / FOLDER).rmdir()


# ---------------------------------------------------------------- verifying


def verify(folder: Path) -> None:
    """Raise UserError unless every file of the checkpoint is as it was written."""
    check_regular(folder / CHECKSUMS)
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if missing := {pretrained.WEIGHTS, TRAINING_STATE} - set(digests):
            raise UserError(f"{folder / CHECKSUMS}: does not list {min(missing)}")
        for name, digest in digests.items():
            if sha256_of(folder / Path(name).name) != digest:
                raise UserError(f"{folder / name}: damaged")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a complete checkpoint ({error})") from error


def first_intact(candidates: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Return the first intact checkpoint, or None, and the problems of those before it."""
    problems = []
    for folder in candidates:
        try:
            verify(folder)
            return folder, problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def latest_intact(out_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, or None, and the problems of newer ones.

    Raises UserError if there are checkpoints but none is intact.
    """
    newest, problems = first_intact(folders(out_dir))
    if newest is None and problems:
        raise UserError(f"{problems[0]}: no checkpoint of {out_dir} is intact: --overwrite starts afresh")
    return newest, problems


def warn_of_damage(problems: list[str], used: Path) -> None:
    """Warn on stderr about damaged checkpoints, and name the one that is used instead."""
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if problems:
        print(f"warning: using {used} instead", file=sys.stderr)


# ---------------------------------------------------------------- loading


def fingerprint(s: "Settings", config: "GPTConfig", data: str) -> dict[str, object]:
    """Collect the facts that a resumed run must share, for the order of data and the shape of the state.

    data: fingerprint of the stream of training data.
    """
    names = ("sequence_length", "total_batch_size", "seed", "shuffle", "optimizer")
    model = dataclasses.asdict(config) | {"padded_vocab_size": 0}  # as in earlier checkpoints
    del model["dropout"]  # may change, like the learning rate
    return {"model": model, "data": data, **{name: getattr(s, name) for name in names}}


def restore(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    expected: dict[str, object],
) -> dict[str, float]:
    """Load weights, optimizer and scaler states. Returns the seconds per activity of the run so far.

    Raises UserError if the checkpoint is damaged, or belongs to a run with another `fingerprint` than
    `expected`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not on this machine: --out-dir must be on a disk that all machines share")
    state = load_training_state(folder)
    names = {"data": "the data (--data-dir, --num-shards)", "model": "the shape of the model"}
    for key, value in expected.items():
        saved = state["identity"].get(key)
        if saved != value:
            name = names.get(key, f"--{key.replace('_', '-')}")
            raise UserError(
                f"{folder}: {name} was {saved} and is now {value}: set it back, or use another --out-dir"
            )
    pretrained.load_weights(model, folder)
    try:
        load_optimizer_state(model, optimizers, state["optimizer"])
        if state["scaler"]:  # empty unless the run was in fp16
            scaler.load_state_dict(state["scaler"])
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: not a state of this run ({error!r}): use another checkpoint") from error
    return state["seconds"]


def load_training_state(folder: Path) -> dict[str, object]:
    """Load the training state of a checkpoint on the CPU. Raises UserError if it cannot be read."""
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


def optimizer_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, object]:
    """Return the state of the optimizers by parameter name, without padding rows.

    Every process must call it, because each may hold a share of the state.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = model.config.vocab_size
    state = {}
    for optimizer in optimizers:
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in optimizer.state_dict()["state"].items():
            name = order[index]
            if name.endswith("wte.weight"):
                values = {k: pretrained.without_padding(name, v, rows).clone() for k, v in values.items()}
            state[name] = values
    return state


def load_optimizer_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], saved: dict[str, object]
) -> None:
    """Restore an `optimizer_state`. Raises UserError if it belongs to another optimizer or model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    if set(names.values()) != set(saved):
        raise UserError("training_state.pt: the state of another optimizer or model: start a new --out-dir")
    for optimizer in optimizers:
        state = {}
        # Entries are matched by key, so names can stand for torch's numbers.
        groups = [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups]
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            name = names[parameter]
            rows = pretrained.without_padding(name, parameter, model.config.vocab_size)
            shapes = {
                key: torch.Size() if key == "step" else rows.shape
                for key in STATE_KEYS[type(optimizer).__name__]
            }
            # The fused optimizers write into these without checking their size.
            if {key: value.shape for key, value in saved[name].items()} != shapes:
                raise ValueError(f"the state of {name} has another shape")
            padding = len(parameter) - len(rows)
            state[name] = {
                key: F.pad(value, (0, 0, 0, padding)) if padding and value.dim() == 2 else value.contiguous()
                for key, value in saved[name].items()
            }
        optimizer.load_state_dict({"state": state, "param_groups": groups})
