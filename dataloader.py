"""The order of the data, and batches.

The shards of a split form one endless stream of sequences, a pure function of (data, seed, epoch). After s
steps of N sequences, the next step takes sequences s·N to (s+1)·N − 1, whatever the number of processes. So a
run resumes from its step alone, on any number of GPUs, and no rank can drift from the others.

    stream = TokenStream(shards.find_shards(folder)["train"], sequence_length=1024, seed=1337, shuffle=True)
    stream.read(np.arange(0, 512))      # the 512 sequences of the first step: uint16 (512, 1025)
"""

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pre_tokens.shards import Shard, check_ids
from support.cli import UserError

# ---------------------------------------------------------------- order


class TokenStream:
    """Endless stream of sequences: index -> tokens, in constant memory.

    With `shuffle`, each epoch visits the shards, and the sequences within each, in a new order. Without, it
    reads everything from start to end. Only the tail of a shard that is too short for a sequence is skipped.
    """

    def __init__(
        self, shards: list[Shard], sequence_length: int, seed: int = 0, shuffle: bool = False
    ) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        # Inputs and targets are one token apart: of the tokens a b c d e with T = 4, a b c d are the inputs,
        # b c d e the targets, and the next sequence begins with e.
        self.counts = np.array([(shard.n_tokens - 1) // sequence_length for shard in shards])
        if not self.counts.any():
            raise UserError(
                f"{shards[0].path}: {shards[0].n_tokens} tokens, too short for one sequence of "
                f"{sequence_length} + 1: lower --sequence-length or add text"
            )

    def __len__(self) -> int:
        """Sequences per epoch."""
        return int(self.counts.sum())

    def fingerprint(self) -> str:
        """Short hash of the shards' names and sizes. With seed and length, they determine the order."""
        text = "\n".join(f"{shard.path.name} {shard.n_tokens}" for shard in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read the sequences at indices (B,), counted across epochs: uint16 (B, sequence_length + 1)."""
        T = self.sequence_length
        shard_ids, rows = self._locate(indices)
        tokens = np.empty((len(indices), T + 1), dtype=np.uint16)
        for shard_id in np.unique(shard_ids):
            shard = self.shards[shard_id]
            # Mapped anew for each batch, because a lasting map keeps every page it touches in our memory.
            mapped = shard.map()
            in_shard = np.flatnonzero(shard_ids == shard_id)
            for i in in_shard:
                tokens[i] = mapped[rows[i] * T : (rows[i] + 1) * T + 1]
            check_ids(tokens[in_shard], shard.path)
        return tokens

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map indices of sequences to (shard of each, row: its index within that shard)."""
        epochs, offsets = np.divmod(indices, len(self))
        shard_ids, rows = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            in_epoch = np.flatnonzero(epochs == epoch)
            order = np.arange(len(self.shards))
            if self.shuffle:
                order = permute(order, len(self.shards), (self.seed, int(epoch)))
            ends = self.counts[order].cumsum()
            position = np.searchsorted(ends, offsets[in_epoch], side="right")  # of the shard in the order
            shard_ids[in_epoch] = order[position]
            rows[in_epoch] = offsets[in_epoch] - (ends - self.counts[order])[position]
            if self.shuffle:
                for shard_id in np.unique(shard_ids[in_epoch]):
                    in_shard = in_epoch[shard_ids[in_epoch] == shard_id]
                    key = (self.seed, int(epoch), int(shard_id))
                    rows[in_shard] = permute(rows[in_shard], int(self.counts[shard_id]), key)
        return shard_ids, rows


def permute(indices: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Apply the pseudo-random permutation of range(n) that `key` selects to these indices: int64 (k,).

    A Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). It
    needs no table in memory, and is the same for every version of numpy.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = indices.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        x[todo] = left << half | right
        # The network permutes a power of four. Results outside range(n) go through it again until inside.
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(8, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele et al. 2014): every bit of x affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------- batches


def train_batches(
    stream: TokenStream,
    steps_done: int,
    sequences_per_step: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's micro-batches from `steps_done` steps on, without end: (x, y), int64 (B, T).

    A step has sequences_per_step / (B · world_size) micro-batches of B sequences on every rank. They are on
    `device`. The next one is read in the background, into pinned memory for a CUDA device.

    Each micro-batch seeds torch's generators from the seed and the index of its first sequence. So for equal
    B the dropout masks, too, depend only on the step and, unless the model is compiled, not on the number of
    processes.
    """
    B = micro_batch_size
    stride = B * world_size

    def load(begin: int) -> tuple[Tensor, Tensor]:
        return _to_tensors(stream.read(np.arange(begin, begin + B)), device)

    with ThreadPoolExecutor(1, thread_name_prefix="dataloader") as pool:
        begin = steps_done * sequences_per_step + rank * B
        next_batch = pool.submit(load, begin)
        while True:
            x, y = next_batch.result()
            next_batch = pool.submit(load, begin + stride)
            mixed = np.random.SeedSequence((stream.seed, begin)).generate_state(1, np.uint64)
            torch.manual_seed(int(mixed[0]))
            begin += stride
            yield _move(x, device), _move(y, device)


def val_batches(
    stream: TokenStream,
    n_sequences: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of the first `n_sequences`: (x, y), each int64 (B, T) on `device`.

    Every batch has B rows, so that a compiled model sees a single shape. Spare rows of the last batch have
    targets of -100.
    """
    mine = np.arange(rank, n_sequences, world_size)
    for begin in range(0, len(mine), micro_batch_size):
        indices = mine[begin : begin + micro_batch_size]
        padded = np.concatenate([indices, np.full(micro_batch_size - len(indices), indices[0])])
        x, y = _to_tensors(stream.read(padded), device)
        y[len(indices) :] = -100
        yield _move(x, device), _move(y, device)


def _to_tensors(tokens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split uint16 (B, T + 1) into inputs and targets, int64 (B, T), pinned for a CUDA device."""
    sequences = torch.from_numpy(tokens.astype(np.int64))
    x, y = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # Blocking except on CUDA, because MPS reads the memory after it was freed (pytorch/pytorch#189690).
    return tensor.to(device, non_blocking=device.type == "cuda")
