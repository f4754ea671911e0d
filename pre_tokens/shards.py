"""Format of token shards: their names, their contents, the manifest beside them.

DIR/NAME_val_000000.npy      the first shard, for validation
DIR/NAME_train_000001.npy …  one-dimensional uint16, every document preceded by 50256
DIR/manifest.json            source of the text; tokens, documents and SHA-256 of each shard
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from support import files
from support.cli import UserError
from support.tokenizer import VOCAB_SIZE

Split = Literal["train", "val"]

# No path separators, so that a name from the Hub or a manifest cannot leave the folder. No leading dot,
# because Macs leave a hidden file beside each file on other systems' disks.
SHARD_NAME = re.compile(r"(?P<name>[^./\\:\0][^/\\:\0]*)_(?P<split>train|val)_(?P<number>\d{6})\.npy")
MANIFEST = "manifest.json"
SPOT_CHECK_TOKENS = 2**20


# ---------------------------------------------------------------- one shard


@dataclass(frozen=True)
class Shard:
    path: Path
    offset: int  # bytes before the first token
    n_tokens: int

    @property
    def name(self) -> str:
        """Name of the data set: NAME in NAME_train_000001.npy."""
        return SHARD_NAME.fullmatch(self.path.name)["name"]

    def map(self) -> np.ndarray:
        """Map the tokens, uint16 (n_tokens,), into memory; only the parts that are read take any."""
        try:
            return np.memmap(self.path, np.uint16, "r", self.offset, (self.n_tokens,))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: deleted or cut short while in use: restore it and --resume"
            ) from error


def open_shard(path: Path) -> Shard:
    """Check the header, the length, and the ids at both ends of a shard.

    Raises UserError unless it is a complete npy file of one-dimensional uint16 ids below 50257.
    """
    files.check_regular(path)
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
            offset = file.tell()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check --data-dir") from error
    except Exception as error:  # numpy's parser fails in many ways on a damaged header
        if files.is_lfs_pointer(path):
            raise UserError(f"{path}: a Git LFS pointer, not the shard: `git lfs pull` beside it") from error
        raise UserError(f"{path}: not an npy file, or a damaged one: fetch or build it again") from error
    if dtype != np.dtype("<u2"):
        raise UserError(
            f"{path}: contains {dtype}, not uint16: build it again with pre_tokens/handle_tokens.py"
        )
    if len(shape) != 1:
        raise UserError(f"{path}: has {len(shape)} dimensions, not 1: build it again")
    if shape[0] == 0:
        raise UserError(f"{path}: is empty: fetch or build it again")
    if size != offset + 2 * shape[0]:
        raise UserError(
            f"{path}: {size} bytes, but its header says {offset + 2 * shape[0]}: fetch or build it again"
        )
    shard = Shard(path, offset, shape[0])
    tokens = shard.map()
    for part in (tokens[:SPOT_CHECK_TOKENS], tokens[-SPOT_CHECK_TOKENS:]):
        check_ids(part, path)
    return shard


def check_ids(tokens: np.ndarray, path: Path) -> None:
    """Raise UserError if any of a shard's tokens is not an id of GPT-2's vocabulary."""
    largest = int(tokens.max())
    if largest >= VOCAB_SIZE:
        raise UserError(
            f"{path}: contains token id {largest}; the largest valid id is {VOCAB_SIZE - 1}: build it again"
        )


# ---------------------------------------------------------------- a folder of shards


def names_in(folder: Path) -> list[str]:
    """List the file names of the shards in a folder, by number. Empty if there is no folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return in_order(name for name in names if SHARD_NAME.fullmatch(name))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of shards by number. Ties put validation first, for data sets that count both from 0."""

    def key(name: str) -> tuple[str, bool, str]:
        match = SHARD_NAME.fullmatch(name)
        return match["number"], match["split"] != "val", match["name"]

    return sorted(names, key=key)


def find_shards(data_dir: Path, num_shards: int = 0) -> dict[Split, list[Shard]]:
    """Find and check the shards of a folder, by split, sorted by name and number.

    num_shards: use only this many by number, including the validation shard; 0: all.
    Raises UserError if the folder, the training shards or the validation shards are missing.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder: name a folder of shards with --data-dir")
    shards: dict[Split, list[Shard]] = {"train": [], "val": []}
    for name in sorted(names_in(data_dir)[: num_shards or None]):
        shards[SHARD_NAME.fullmatch(name)["split"]].append(open_shard(data_dir / name))
    for split, found in shards.items():
        if not found:
            among = f" among the first {num_shards} (--num-shards)" if num_shards else ""
            raise UserError(
                f"{data_dir}: no shard named NAME_{split}_NNNNNN.npy{among}: check --data-dir, or build "
                "shards with pre_tokens/handle_tokens.py"
            )
    return shards


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock, waiting for any other process or machine that writes there.

    Raises UserError if another program's manifest.json is there, which ours would replace.
    """
    path = folder / MANIFEST
    if path.exists() and read_manifest(path) is None:
        raise UserError(f"{path}: another program's: name another folder")
    files.make_folder(folder)
    lock = files.lock_folder(folder)
    if lock is None:
        print(f"{folder}: waiting for another process that is writing shards there", file=sys.stderr)
        lock = files.lock_folder(folder, wait=True)
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- manifests


@dataclass(frozen=True)
class Place:
    """Place in a source where the next shard begins: the manifest's "next" while a build is incomplete."""

    file: int = 0
    block: int = 0
    token: int = 0  # within the block
    skipped: int = 0  # documents without text in the blocks before


def read_manifest(path: Path, where: str = "") -> dict | None:
    """Read a manifest. Returns None if there is no file, or if it lists no shards.

    where: name of the file in messages; its path if left out. Raises UserError on a damaged manifest, or one
    that names a file outside its folder.
    """
    where = where or str(path)
    files.check_regular(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): restore the file or remove it") from error
    if not isinstance(manifest, dict) or "shards" not in manifest:
        return None
    try:
        for shard in manifest["shards"]:
            valid = (
                SHARD_NAME.fullmatch(shard["file"])
                and (shard["sha256"] is None or re.fullmatch("[0-9a-f]{64}", shard["sha256"]))
                and type(shard["bytes"]) is int
                and shard["bytes"] > 0
            )
            if not valid:
                raise ValueError(f"shard {shard!r}")
        if not 0 < manifest.get("vocab_size", VOCAB_SIZE) <= VOCAB_SIZE:
            raise ValueError(f"vocab_size {manifest['vocab_size']!r}")
        Place(**(manifest.get("next") or {}))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a manifest of shards ({error!r}): restore it or remove it") from error
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    """Replace the folder's manifest."""
    files.write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def missing(folder: Path, manifest: dict, num_shards: int = 0) -> list[dict]:
    """List the manifest's entries, of the first `num_shards` (0: all), whose shards are not in the folder."""
    entries = {shard["file"]: shard for shard in manifest["shards"]}
    names = in_order(entries)[: num_shards or None]
    return [entries[name] for name in names if not (folder / name).is_file()]


def check_complete(folder: Path, num_shards: int = 0) -> None:
    """Raise UserError if a shard in the manifest, of the first `num_shards` (0: all), is missing.

    Only the user may decide to train on less data than before.
    """
    manifest = read_manifest(folder / MANIFEST)
    if manifest and (gone := missing(folder, manifest, num_shards)):
        raise UserError(
            f"{folder / gone[0]['file']}: missing, but {MANIFEST} lists it: restore it, or use fewer shards "
            f"with --num-shards ({len(gone)} missing)"
        )


def vocab_size(folder: Path) -> int:
    """Number of token ids that a model of these shards needs: the manifest's, or GPT-2's."""
    return (read_manifest(folder / MANIFEST) or {}).get("vocab_size", VOCAB_SIZE)


def describe(folder: Path, used: list[Shard]) -> dict[str, object]:
    """Describe the data for config.json: the names of the data sets, and their source by the manifest."""
    manifest = read_manifest(folder / MANIFEST) or {}
    return {"names": sorted({shard.name for shard in used}), "source": manifest.get("source")}
