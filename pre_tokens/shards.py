"""Writing token shards: NAME_val_000000.npy, then NAME_train_000001.npy and on, each whole or not there."""

import os
from pathlib import Path

import numpy as np


class ShardWriter:
    """Cuts a stream of tokens into shards of `shard_size`; the first is for validation.

    A document that a shard's end falls into goes on in the next shard: no token is lost.
    """

    def __init__(self, out_dir: Path, name: str, shard_size: int) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        self.out_dir = out_dir
        self.name = name
        self.buffer = np.empty(shard_size, dtype=np.uint16)
        self.filled = 0
        self.paths: list[Path] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens, uint16 (n,), any number of them."""
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.buffer):
                self._write()

    def close(self) -> None:
        """Write what is left as the last, shorter shard."""
        if self.filled:
            self._write()

    def _write(self) -> None:
        number = len(self.paths)
        path = self.out_dir / f"{self.name}_{'train' if number else 'val'}_{number:06d}.npy"
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.save(file, self.buffer[: self.filled])
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        self.paths.append(path)
        self.filled = 0
