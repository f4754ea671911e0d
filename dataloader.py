"""Token shards on disk, and batches of them in one global order.

A shard is a file NAME_{train,val}_NNNNNN.npy: one-dimensional uint16, each document preceded by 50256.
The shards of a split make up one endless stream of sequences that is a pure function of (data, seed,
epoch). Step s of training takes sequences s·N to (s+1)·N of it, however many processes share them out; so
a run can be continued on another number of GPUs from nothing but its step, and no rank can drift.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from tokenizer import VOCAB_SIZE

Split = Literal["train", "val"]
SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)_(?P<number>\d{6})\.npy")
SPOT_CHECK_TOKENS = 2**20


@dataclass(frozen=True)
class Shard:
    path: Path
    offset: int  # bytes before the first token
    n_tokens: int

    def map(self) -> np.ndarray:
        """The tokens, uint16 (n_tokens,), as a memory map: only what is read gets into memory."""
        try:
            return np.memmap(self.path, np.uint16, "r", self.offset, (self.n_tokens,))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: gone or cut short while in use: restore it and --resume"
            ) from error


def open_shard(path: Path) -> Shard:
    """Check a shard's header, its length and the ids at both ends.

    Raises UserError where it is not a whole npy file of one-dimensional uint16 ids below 50257.
    """
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
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not a npy file, or a damaged one: fetch or build it again") from error
    if dtype != np.dtype("<u2"):
        raise UserError(f"{path}: holds {dtype}, not uint16: build it again with pre_tokens/handle_tokens.py")
    if len(shape) != 1:
        raise UserError(f"{path}: has {len(shape)} dimensions, not 1: build it again")
    if shape[0] == 0:
        raise UserError(f"{path}: is empty: fetch or build it again")
    if size != offset + 2 * shape[0]:
        raise UserError(
            f"{path}: {size} bytes where its header says {offset + 2 * shape[0]}: fetch or build it again"
        )
    shard = Shard(path, offset, shape[0])
    tokens = shard.map()
    for part in (tokens[:SPOT_CHECK_TOKENS], tokens[-SPOT_CHECK_TOKENS:]):
        _check_ids(part, path)
    return shard


def _check_ids(tokens: np.ndarray, path: Path) -> None:
    largest = int(tokens.max())
    if largest >= VOCAB_SIZE:
        raise UserError(f"{path}: holds id {largest}, GPT-2's end at {VOCAB_SIZE - 1}: build it again")


def find_shards(data_dir: Path, num_shards: int = 0) -> dict[Split, list[Shard]]:
    """The folder's shards by split, each split in order of name and number, all of them checked.

    num_shards: use only the first so many by number, the validation shard included; 0: all.
    Raises UserError where the folder, the training shards or the validation shards are missing.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder: name one that holds shards with --data-dir")
    named = [(match, path) for path in data_dir.iterdir() if (match := SHARD_NAME.fullmatch(path.name))]
    # Validation comes first among shards of one number, as it does in the data sets that count both from 0.
    named.sort(key=lambda item: (item[0]["number"], item[0]["split"] != "val", item[0]["name"]))
    if num_shards:
        named = named[:num_shards]
    named.sort(key=lambda item: item[1].name)
    shards: dict[Split, list[Shard]] = {"train": [], "val": []}
    for match, path in named:
        shards[match["split"]].append(open_shard(path))
    for split, found in shards.items():
        if not found:
            among = f" among the first {num_shards} (--num-shards)" if num_shards else ""
            raise UserError(
                f"{data_dir}: no shard named NAME_{split}_NNNNNN.npy{among}: check --data-dir, or build "
                "shards with pre_tokens/handle_tokens.py"
            )
    return shards


def fingerprint(shards: list[Shard]) -> str:
    """A short hash of the shards' names and lengths: what the order of a stream depends on."""
    text = "\n".join(f"{shard.path.name} {shard.n_tokens}" for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TokenStream:
    """The endless sequence of training examples: number -> tokens, in constant memory.

    With `shuffle`, each epoch visits the shards in an order of its own and the sequences of a shard in an
    order of their own; without, all is read from the start to the end. Nothing is left out but the tail of
    a shard that is too short for a sequence.
    """

    def __init__(
        self, shards: list[Shard], sequence_length: int, seed: int = 0, shuffle: bool = False
    ) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        # Each sequence needs one more token, the target of its last.
        self.counts = np.array([(shard.n_tokens - 1) // sequence_length for shard in shards])
        for shard, count in zip(shards, self.counts, strict=True):
            if count == 0:
                raise UserError(
                    f"{shard.path}: {shard.n_tokens} tokens, too short for one sequence of "
                    f"{sequence_length} + 1: lower --sequence-length or remove the file"
                )

    def __len__(self) -> int:
        """Sequences an epoch."""
        return int(self.counts.sum())

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences of these numbers (B,), from 0 up without end: uint16 (B, sequence_length + 1)."""
        T = self.sequence_length
        shard_of, row_of = self._locate(numbers)
        tokens = np.empty((len(numbers), T + 1), dtype=np.uint16)
        for index in np.unique(shard_of):
            shard = self.shards[index]
            # Mapped anew for each batch: a map that stays would count every page it ever touched as ours.
            mapped = shard.map()
            places = np.flatnonzero(shard_of == index)
            for place, row in zip(places, row_of[places], strict=True):
                tokens[place] = mapped[row * T : (row + 1) * T + 1]
            _check_ids(tokens[places], shard.path)
        return tokens

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequence numbers -> (index of the shard, number of the sequence within it)."""
        epochs, rests = np.divmod(numbers, len(self))
        shard_of, row_of = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            order = np.arange(len(self.shards))
            if self.shuffle:
                order = permute(order, len(self.shards), (self.seed, int(epoch)))
            ends = self.counts[order].cumsum()
            place = np.searchsorted(ends, rests[here], side="right")
            shard_of[here] = order[place]
            row_of[here] = rests[here] - (ends - self.counts[order])[place]
            if self.shuffle:
                for index in np.unique(shard_of[here]):
                    these = here[shard_of[here] == index]
                    key = (self.seed, int(epoch), int(index))
                    row_of[these] = permute(row_of[these], int(self.counts[index]), key)
        return shard_of, row_of


def permute(numbers: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by `key`, sends these numbers, int64 (k,).

    A Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"):
    any element without the memory of a table, and the same for every version of numpy.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = numbers.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        x[todo] = left << half | right
        # The network permutes a power of four; what falls outside range(n) walks on until it is inside.
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(8, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of x stirs every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_batches(
    stream: TokenStream,
    first_step: int,
    sequences_per_step: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches from `first_step` on, without end: (x, y), each int64 (B, T) on `device`.

    A step is sequences_per_step / (B · world_size) micro-batches; each holds B sequences for every rank.
    The next one is read in the background, into pinned memory for a CUDA device.
    """
    B = micro_batch_size
    stride = B * world_size

    def load(number: int) -> tuple[Tensor, Tensor]:
        begin = first_step * sequences_per_step + number * stride + rank * B
        return _to_tensors(stream.read(np.arange(begin, begin + B)), device)

    with ThreadPoolExecutor(1, thread_name_prefix="dataloader") as pool:
        number = 0
        coming = pool.submit(load, number)
        while True:
            x, y = coming.result()
            number += 1
            coming = pool.submit(load, number)
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def val_batches(
    stream: TokenStream,
    n_sequences: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `n_sequences`: (x, y), each int64 (B, T) on `device`.

    Every batch has B rows, so that a compiled model sees one shape; where sequences run out, the rows that
    are left over have targets of -100 throughout.
    """
    mine = np.arange(rank, n_sequences, world_size)
    for begin in range(0, len(mine), micro_batch_size):
        numbers = mine[begin : begin + micro_batch_size]
        padded = np.concatenate([numbers, np.full(micro_batch_size - len(numbers), numbers[0])])
        x, y = _to_tensors(stream.read(padded), device)
        y[len(numbers) :] = -100
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _to_tensors(tokens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint16 (B, T + 1) -> inputs and targets, int64 (B, T), pinned where they go to a CUDA device."""
    whole = torch.from_numpy(tokens.astype(np.int64))
    x, y = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)
