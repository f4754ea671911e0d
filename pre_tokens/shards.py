"""Token shards on disk: their names, their manifest, and how a stream of text becomes them.

    OUT_DIR/NAME_val_000000.npy      the first shard, for validation
    OUT_DIR/NAME_train_000001.npy …  uint16 (shard_size,), every document preceded by 50256
    OUT_DIR/manifest.json            where the text is from, and of each shard its tokens, documents, sha256

A shard appears whole, then the manifest takes it in together with the place in the source where the next one
begins. So a build that was killed goes on after the last whole shard, to the same bytes.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import metrics
import tokenizer
from cli import UserError

# No separators in the name: one that comes from the Hub or a manifest stays inside the folder.
SHARD_NAME = re.compile(r"(?P<name>[^/\\:\0]+)_(?P<split>train|val)_(?P<number>\d{6})\.npy")
MANIFEST = "manifest.json"
_END_OF_TEXT = np.array([tokenizer.END_OF_TEXT_ID], dtype=np.uint32)


@dataclass(frozen=True)
class Place:
    """Where in a source the next shard begins."""

    file: int = 0
    block: int = 0
    token: int = 0  # of the block
    skipped: int = 0  # documents without text in the blocks before


@dataclass(frozen=True)
class Block:
    """A handful of documents, read in one go."""

    file: int
    number: int  # in the file
    texts: list[str | None]
    bytes_read: int  # of all files, up to the end of this block
    continues: bool = False  # the first text goes on the document that the block before ended with


class Source(Protocol):
    size: int  # bytes of all files

    def describe(self) -> dict[str, object]:
        """What tells this input from another, for the manifest."""

    def blocks(self, file: int, block: int) -> Iterator[Block]:
        """The blocks from this one on: the same for every call, wherever it starts."""


# ---------------------------------------------------------------- names and manifests


def in_order(names: Iterable[str]) -> list[str]:
    """Names of shards by number. Of one number, validation comes first, as in sets that count both from 0."""

    def key(name: str) -> tuple[str, bool, str]:
        match = SHARD_NAME.fullmatch(name)
        return match["number"], match["split"] != "val", match["name"]

    return sorted(names, key=key)


def read_manifest(path: Path, where: str = "") -> dict | None:
    """The manifest in a file; None where there is no file, or one of something else than shards.

    where: how messages name it, the path if left out. Raises UserError on a damaged manifest, or one that
    names a file outside its folder.
    """
    where = where or str(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): restore the file or remove it") from error
    if not isinstance(manifest, dict) or "shards" not in manifest:
        return None
    try:
        for shard in manifest["shards"]:
            sound = (
                SHARD_NAME.fullmatch(shard["file"])
                and (shard["sha256"] is None or re.fullmatch("[0-9a-f]{64}", shard["sha256"]))
                and type(shard["bytes"]) is int
                and shard["bytes"] > 0
            )
            if not sound:
                raise ValueError(f"shard {shard!r}")
        Place(**(manifest.get("next") or {}))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a manifest of shards ({error!r}): restore it or remove it") from error
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    metrics.write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def missing(folder: Path, manifest: dict, num_shards: int = 0) -> list[dict]:
    """Entries of the manifest's shards that are not in the folder, of the first `num_shards` (0: of all)."""
    entries = {shard["file"]: shard for shard in manifest["shards"]}
    names = in_order(entries)[: num_shards or None]
    return [entries[name] for name in names if not (folder / name).is_file()]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Write into the folder, which is made, while no other process does: on a shared disk of any machine.

    A process that is killed leaves its lock free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0.1)
    except Timeout:
        print(f"{folder}: waiting for another process that writes shards there", file=sys.stderr)
        held.acquire()
    try:
        yield
    finally:
        held.release()


# ---------------------------------------------------------------- text to shards


def build(source: Source, out_dir: Path, name: str, shard_size: int, workers: int = 0) -> dict:
    """Write the source's tokens as shards of `shard_size`, going on where an earlier call was cut off.

    A document that a shard's end falls into goes on in the next shard: no token is lost. The bytes do not
    depend on `workers` (threads; 0: one a core). Memory: one shard and a few blocks, whatever the size of the
    source. Returns the manifest.
    Raises UserError where the folder holds shards of something else, or the source holds no text.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: must be at least 1")
    # Found before the folder is made: a source that cannot be read must leave nothing behind.
    is_of = {
        "source": source.describe(),
        "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256},
        "name": name,
        "shard_size": shard_size,
    }
    tokenizer.get_encoding()
    with lock(out_dir):
        manifest = _begin(out_dir, is_of)
        if manifest["next"] is not None:
            _write_shards(source, out_dir, manifest, workers or os.cpu_count() or 1)
    return manifest


def _begin(out_dir: Path, is_of: dict) -> dict:
    """The manifest of what is there already, or that of a new build."""
    manifest = read_manifest(out_dir / MANIFEST)
    if manifest is not None:
        for key, value in {**is_of, **is_of["source"]}.items():
            held = {**manifest, **manifest.get("source", {})}.get(key)
            if held != value and key != "source":
                now = f" ({held}, now {value})" if isinstance(value, str | int) else ""
                raise UserError(
                    f"--out-dir {out_dir}: holds shards with another {key}{now}: name another folder"
                )
        if not missing(out_dir, manifest):
            return manifest
        return {**is_of, "shards": [], "next": asdict(Place())}  # some were removed: all are made again
    others = [path.name for path in out_dir.iterdir() if SHARD_NAME.fullmatch(path.name)]
    if others:
        raise UserError(
            f"--out-dir {out_dir}: holds shards from elsewhere ({others[0]}): name another folder"
        )
    return {**is_of, "shards": [], "next": asdict(Place())}


def _write_shards(source: Source, out_dir: Path, manifest: dict, workers: int) -> None:
    start = Place(**manifest["next"])
    buffer = np.empty(manifest["shard_size"], dtype=np.uint16)
    filled, skipped = 0, start.skipped
    documents, tokens = (sum(shard[key] for shard in manifest["shards"]) for key in ("documents", "tokens"))

    def finish_shard(following: Place | None) -> None:
        nonlocal filled
        manifest["shards"].append(_save(out_dir, manifest["name"], len(manifest["shards"]), buffer[:filled]))
        manifest["next"] = asdict(following) if following else None
        write_manifest(out_dir, manifest)
        filled = 0

    with tqdm(total=source.size, unit="B", unit_scale=True, desc=manifest["name"], disable=None) as bar:
        for block, ids, empty in encoded(source.blocks(start.file, start.block), workers):
            used = start.token if (block.file, block.number) == (start.file, start.block) else 0
            documents += int(np.count_nonzero(ids[used:] == tokenizer.END_OF_TEXT_ID))
            tokens += len(ids) - used
            while used < len(ids):
                part = ids[used : used + len(buffer) - filled]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                used += len(part)
                if filled == len(buffer):
                    finish_shard(Place(block.file, block.number, used, skipped))
            skipped += empty
            bar.update(block.bytes_read - bar.n)
            bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens", refresh=False)
    if not tokens:
        raise UserError(f"no text in the source ({skipped} empty documents): check --text-column and --files")
    manifest |= {"documents": documents, "tokens": tokens, "skipped": skipped}
    if filled:
        finish_shard(None)
    manifest["next"] = None
    write_manifest(out_dir, manifest)


def _save(out_dir: Path, name: str, number: int, tokens: np.ndarray) -> dict[str, object]:
    """Write one shard, whole or not at all. Returns its entry in the manifest."""
    path = out_dir / f"{name}_{'train' if number else 'val'}_{number:06d}.npy"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, tokens)
        file.flush()
        os.fsync(file.fileno())
    entry = {
        "file": path.name,
        "documents": int(np.count_nonzero(tokens == tokenizer.END_OF_TEXT_ID)),
        "tokens": len(tokens),
        "bytes": temporary.stat().st_size,
        "sha256": sha256_of(temporary),
    }
    os.replace(temporary, path)
    return entry


def encoded(blocks: Iterator[Block], workers: int) -> Iterator[tuple[Block, np.ndarray, int]]:
    """Each block with its tokens, in order: read by one thread, encoded by `workers`, a few blocks ahead.

    Threads do, and need no copies: tiktoken works outside Python's lock.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as encoders:
        coming: deque[tuple[Block, Future]] = deque()
        following = reader.submit(next, blocks, None)
        while True:
            while following is not None and len(coming) < 2 * workers:
                block = following.result()
                following = None if block is None else reader.submit(next, blocks, None)
                if block is not None:
                    coming.append((block, encoders.submit(encode, block.texts, block.continues)))
            if not coming:
                return
            block, future = coming.popleft()
            yield block, *future.result()


def encode(texts: list[str | None], continues: bool = False) -> tuple[np.ndarray, int]:
    """Documents -> (tokens, each document preceded by 50256, uint16 (n,); how many held no text).

    Text that looks like a special token is encoded as the characters it is made of, lone surrogates as
    U+FFFD: as `encode_ordinary` does. continues: the first text is the rest of a document, without a 50256.
    """
    enc = tokenizer.get_encoding()
    parts, empty = [], 0
    for index, text in enumerate(texts):
        if not text:
            empty += 1
            continue
        if not (continues and index == 0):
            parts.append(_END_OF_TEXT)
        try:
            parts.append(enc.encode_to_numpy(text, disallowed_special=()))
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            parts.append(enc.encode_to_numpy(text, disallowed_special=()))
    ids = np.concatenate(parts, dtype=np.uint16, casting="unsafe") if parts else np.empty(0, np.uint16)
    return ids, empty
