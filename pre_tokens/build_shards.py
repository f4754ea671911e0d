"""Turn a stream of text into shards.

Each shard appears complete. Then the manifest lists it, together with the place in the source where the next
shard begins. So a killed build continues after the last complete shard, and produces the same bytes.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pre_tokens import shards
from pre_tokens.shards import MANIFEST, Place
from support import files, tokenizer
from support.cli import UserError

SHARD_SIZE = 100_000_000  # tokens
SEQUENCE = 1024 + 1  # tokens of GPT-2's context, and the target of the last
COUNTED = 10_000_000  # tokens from which the size of the whole source is estimated
_END_OF_TEXT = np.array([tokenizer.END_OF_TEXT_ID], dtype=np.uint32)


@dataclass(frozen=True)
class Block:
    """A group of documents, read at once."""

    file: int
    number: int  # within the file
    texts: list[str | None]
    bytes_read: int  # of all files, up to the end of this block
    continues: bool = False  # the first text continues the document that the previous block ended with


class Source(Protocol):
    size: int  # bytes of all files

    def describe(self) -> dict[str, object]:
        """Describe the input for the manifest, in enough detail to recognise another one."""

    def blocks(self, file: int, block: int) -> Iterator[Block]:
        """Yield the blocks from this one on, the same for every call."""


def build(source: Source, out_dir: Path, name: str, shard_size: int = 0, workers: int = 0) -> dict:
    """Write the tokens of the source as shards of `shard_size`, continuing an interrupted build.

    shard_size 0: of 100 million tokens, after a validation shard of `validation_size`.

    A document that crosses the end of a shard continues in the next one, so no token is lost. The bytes do
    not depend on `workers` (threads; 0: one per core). Memory: one shard and a few blocks, whatever the size
    of the source. Returns the manifest.
    Raises UserError if the folder contains shards of something else, or the source no text or too little.
    """
    workers = workers or os.cpu_count() or 1
    # Before the folder is created, so that a source that cannot be read leaves nothing behind.
    recipe = {
        "source": source.describe(),
        "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256},
        "name": name,
        "shard_size": shard_size or SHARD_SIZE,
    }
    tokenizer.get_encoding()
    val_size = shard_size or validation_size(source, workers)
    with shards.locked(out_dir):
        manifest = _begin(out_dir, recipe, val_size)
        if manifest["next"] is not None:
            _write_shards(source, out_dir, manifest, workers)
    return manifest


def validation_size(source: Source, workers: int) -> int:
    """Choose the size of the validation shard: about 1 % of the source's tokens, from 1,025 to 100 million.

    It counts the tokens before anything is written, which encodes a text of up to 10 million tokens twice.
    For more, it estimates them by the bytes. The size is one more than a multiple of 1,024, so that sequences
    of that length leave no rest.
    Raises UserError if the source has too few tokens for one sequence of validation and one of training.
    """
    tokens = 0
    for block, ids, _ in encoded(source.blocks(0, 0), workers):
        tokens += len(ids)
        if tokens >= COUNTED:
            tokens = tokens * source.size // block.bytes_read
            break
    if 0 < tokens < 2 * SEQUENCE:
        raise UserError(
            f"the source has {tokens:,} tokens: at least {2 * SEQUENCE:,} are needed, about 9,000 characters "
            "of English: add text, or set --shard-size, and train with a shorter --sequence-length"
        )
    sequences = min(max(tokens // 100, SEQUENCE), SHARD_SIZE) // (SEQUENCE - 1)
    return sequences * (SEQUENCE - 1) + 1


def _begin(out_dir: Path, recipe: dict, val_size: int) -> dict:
    """Return the manifest of an earlier build with this recipe, or a new one."""
    new = {**recipe, "val_size": val_size, "shards": [], "next": asdict(Place())}
    manifest = shards.read_manifest(out_dir / MANIFEST)
    if manifest is not None:
        for key, value in {**recipe, **recipe["source"]}.items():
            earlier = {**manifest, **manifest.get("source", {})}.get(key)
            if earlier != value and key != "source":
                now = f" ({earlier}, now {value})" if isinstance(value, str | int) else ""
                raise UserError(f"--out-dir {out_dir}: its shards differ in {key}{now}: name another folder")
        if not shards.missing(out_dir, manifest):
            return manifest
        return new  # some were removed, so build all again
    if others := shards.names_in(out_dir):
        raise UserError(
            f"--out-dir {out_dir}: contains shards from elsewhere ({others[0]}): name another folder"
        )
    return new


class ShardWriter:
    """Cuts a stream of tokens into shards, and lists each in the manifest once it is on the disk."""

    def __init__(self, out_dir: Path, manifest: dict) -> None:
        self.out_dir, self.manifest = out_dir, manifest
        self.buffer = np.empty(manifest["shard_size"], dtype=np.uint16)
        self.filled = 0

    @property
    def size(self) -> int:
        """Tokens for the current shard."""
        return len(self.buffer) if self.manifest["shards"] else self.manifest["val_size"]

    @property
    def is_full(self) -> bool:
        return self.filled == self.size

    def add(self, tokens: np.ndarray) -> int:
        """Take as many tokens as fit into the current shard; returns their number."""
        part = tokens[: self.size - self.filled]
        self.buffer[self.filled : self.filled + len(part)] = part
        self.filled += len(part)
        return len(part)

    def finish_shard(self, following: Place | None) -> None:
        """Save the shard. The next one begins at `following` (None: there is none)."""
        number = len(self.manifest["shards"])
        if number == 0:  # so that a build killed after its first shard can continue
            shards.write_manifest(self.out_dir, self.manifest)
        entry = _save(self.out_dir, self.manifest["name"], number, self.buffer[: self.filled])
        self.manifest["shards"].append(entry)
        self.manifest["next"] = asdict(following) if following else None
        shards.write_manifest(self.out_dir, self.manifest)
        self.filled = 0


def _write_shards(source: Source, out_dir: Path, manifest: dict, workers: int) -> None:
    start = Place(**manifest["next"])
    writer = ShardWriter(out_dir, manifest)
    skipped = start.skipped
    documents, tokens = (sum(shard[key] for shard in manifest["shards"]) for key in ("documents", "tokens"))
    with tqdm(total=source.size, unit="B", unit_scale=True, desc=manifest["name"], disable=None) as bar:
        for block, ids, empty in encoded(source.blocks(start.file, start.block), workers):
            used = start.token if (block.file, block.number) == (start.file, start.block) else 0
            documents += int(np.count_nonzero(ids[used:] == tokenizer.END_OF_TEXT_ID))
            tokens += len(ids) - used
            while used < len(ids):
                used += writer.add(ids[used:])
                if writer.is_full:
                    writer.finish_shard(Place(block.file, block.number, used, skipped))
            skipped += empty
            bar.update(block.bytes_read - bar.n)
            bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens", refresh=False)
    if not tokens:
        raise UserError(f"no text in the source ({skipped} empty documents): check --text-column and --files")
    manifest |= {"documents": documents, "tokens": tokens, "skipped": skipped}
    if writer.filled:
        writer.finish_shard(None)
    manifest["next"] = None
    shards.write_manifest(out_dir, manifest)


def _save(out_dir: Path, name: str, number: int, tokens: np.ndarray) -> dict[str, object]:
    """Write one shard, completely or not at all. Returns its entry in the manifest."""
    path = out_dir / f"{name}_{'train' if number else 'val'}_{number:06d}.npy"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, tokens)
        file.flush()
        files.fsync(file.fileno())
    entry = {
        "file": path.name,
        "documents": int(np.count_nonzero(tokens == tokenizer.END_OF_TEXT_ID)),
        "tokens": len(tokens),
        "bytes": temporary.stat().st_size,
        "sha256": files.sha256_of(temporary),
    }
    files.replace(temporary, path)
    return entry


# ---------------------------------------------------------------- encoding


def encoded(blocks: Iterator[Block], workers: int) -> Iterator[tuple[Block, np.ndarray, int]]:
    """Yield each block with its tokens, in order. One thread reads and `workers` encode, a few blocks ahead.

    Threads are enough, and need no copies, because tiktoken releases Python's global lock.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as encoders:
        pending: deque[tuple[Block, Future]] = deque()
        following = reader.submit(next, blocks, None)
        while True:
            while following is not None and len(pending) < 2 * workers:
                block = following.result()
                following = None if block is None else reader.submit(next, blocks, None)
                if block is not None:
                    pending.append((block, encoders.submit(encode, block.texts, block.continues)))
            if not pending:
                return
            block, future = pending.popleft()
            yield block, *future.result()


def encode(texts: list[str | None], continues: bool = False) -> tuple[np.ndarray, int]:
    """Encode documents, each preceded by 50256: uint16 (n,). Also counts the documents without text.

    continues: the first text is the rest of a document, without a 50256.
    """
    parts, empty = [], 0
    for index, text in enumerate(texts):
        if not text:
            empty += 1
            continue
        if not (continues and index == 0):
            parts.append(_END_OF_TEXT)
        parts.append(tokenizer.encode(text))
    ids = np.concatenate(parts, dtype=np.uint16, casting="unsafe") if parts else np.empty(0, np.uint16)
    return ids, empty
