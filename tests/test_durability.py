"""Files are flushed before they get their names, and their folders afterwards.

No machine is switched off here. A spy records what the calls to fsync have put on the disk. At every rename
it checks that everything under the new name is on record.
"""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import write_shard
from tqdm import tqdm

from pre_tokens import build_shards, fetch_tokens_hf, shards
from pre_tokens.build_shards import Block
from support import checkpoint, files, metrics
from support.cli import UserError


class Disk:
    """Below `root`: of files the size and time of the last fsync, of folders the names at the last fsync."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.flushed: dict[int, object] = {}  # by inode
        self.unflushed: dict[int, Path] = {}  # by thread: the newest name whose folder is not flushed yet
        self.named: list[str] = []
        self.problems: list[str] = []
        self.fsync, self.replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.on_fsync)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self.on_rename)
        monkeypatch.setattr(Path, "rename", lambda path, to: self.on_rename(path, to) or Path(to))

    def on_fsync(self, handle: int) -> None:
        self.fsync(handle)
        status = os.fstat(handle)
        is_folder = stat.S_ISDIR(status.st_mode)
        self.flushed[status.st_ino] = set(os.listdir(handle)) if is_folder else state_of(status)
        last = self.unflushed.get(threading.get_ident())
        if last and status.st_ino == last.parent.stat().st_ino:
            del self.unflushed[threading.get_ident()]

    def on_rename(self, source: Path, target: Path) -> None:
        source, target = Path(source), Path(target)
        if self.root not in target.parents:  # the cache of a library
            return self.replace(source, target)
        if earlier := self.unflushed.get(threading.get_ident()):
            self.problems.append(f"{target.name} appears while {earlier.name} may still be lost")
        counts = not target.name.startswith(".")  # else it is about to be deleted
        if counts:
            self.check(source, target)
        self.replace(source, target)
        if counts:
            self.named.append(target.name)
            self.unflushed[threading.get_ident()] = target

    def check(self, source: Path, target: Path) -> None:
        """Note a problem for each file of this rename that is not on the disk yet."""
        for path in (source, *source.rglob("*")):
            status = path.stat()
            found = set(os.listdir(path)) if path.is_dir() else state_of(status)
            if self.flushed.get(status.st_ino) != found:
                self.problems.append(f"{path} was not flushed before its rename")
        for folder in target.parents[: len(target.relative_to(self.root).parts) - 1]:
            if folder.name not in self.flushed.get(folder.parent.stat().st_ino, ()):
                self.problems.append(f"the folder {folder} may not be there when {target.name} is")
        if checkpoint.STEP_FOLDER.fullmatch(target.name):
            record = target.parent.parent / "metrics.jsonl"
            size, _ = self.flushed[record.stat().st_ino]
            last_step = b'"step": %d, "kind": "train"' % checkpoint.step_of(target)
            if last_step not in record.read_bytes()[:size]:
                self.problems.append(f"{target.name} appears before the metrics of its step are on the disk")

    def verdict(self) -> list[str]:
        return self.problems + [f"the folder of {path} was not flushed" for path in self.unflushed.values()]


def state_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


def test_write_atomically_flushes_before_it_renames(disk: Disk, tmp_path: Path) -> None:
    for text in ("old", "new"):
        files.write_atomically(tmp_path / "file.json", text)
    assert disk.named == ["file.json"] * 2 and disk.verdict() == []
    assert (tmp_path / "file.json").read_text() == "new"


def test_a_run_flushes_its_files_before_it_renames(
    disk: Disk, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Its checkpoints, each after the metrics of the steps that it stands for; and its other files."""
    train("new/run", keep_checkpoints=1, val_interval=0)
    train("new/run", keep_checkpoints=1, val_interval=0, max_steps=8, resume=True)
    for step in (2, 4, 6, 8):
        assert f"step_{step:06d}" in disk.named
    assert {"metrics.jsonl", "config.json", "summary.json", "samples.txt"} <= set(disk.named)
    assert disk.verdict() == []


class Text:
    """A source of three documents."""

    size = 3

    def describe(self) -> dict[str, object]:
        return {"kind": "test"}

    def blocks(self, file: int, block: int) -> list[Block]:
        return iter([Block(0, n, ["some words " * 20], n + 1) for n in range(block, 3)])


def test_built_shards_are_flushed_before_they_are_named(disk: Disk, tmp_path: Path) -> None:
    build_shards.build(Text(), tmp_path / "new" / "data", "text", shard_size=50, workers=1)
    assert disk.named[:3] == ["manifest.json", "text_val_000000.npy", "manifest.json"]
    assert len(disk.named) > 6
    assert disk.verdict() == []


def test_a_fetched_shard_is_flushed_before_it_is_named(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_shard(tmp_path / "original.npy", 100)

    def arrive(url: str, part: Path, n_bytes: int, bar: tqdm) -> None:
        part.write_bytes(original.read_bytes())

    monkeypatch.setattr(fetch_tokens_hf, "_continue_download", arrive)
    entry = {"file": "x_train_000001.npy", "bytes": original.stat().st_size, "sha256": None}
    with shards.locked(tmp_path / "data"):
        fetch_tokens_hf._download(
            "", tmp_path / "data", tmp_path / "data" / ".part", entry, tqdm(disable=True)
        )
    assert disk.named == ["x_train_000001.npy"] and disk.verdict() == []
    assert np.load(tmp_path / "data" / "x_train_000001.npy").shape == (100,)


def test_the_spy_notices_a_missing_flush(disk: Disk, tmp_path: Path) -> None:
    """Without this, a spy that sees nothing would pass all tests above."""
    (tmp_path / "a").write_text("a")
    os.replace(tmp_path / "a", tmp_path / "b")
    assert [problem.split(" ", 1)[1] for problem in disk.verdict()] == [
        "was not flushed before its rename", f"folder of {tmp_path / 'b'} was not flushed",
    ]  # fmt: skip


def test_a_full_disk_during_a_flush_of_metrics_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems notice only then."""
    record = metrics.Metrics(tmp_path / "metrics.jsonl")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device: free some space"):
        record.sync()
