"""Folders that hold something else than a run, and folders as other systems make them."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import history, posix, write_shard
from loopback_hub import LoopbackHub

from model import GPT, GPTConfig
from pre_tokens import build_shards, fetch_tokens_hf, shards
from pre_tokens.build_shards import Block
from support import checkpoint, files, run_folder
from support.cli import UserError

Train = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_model(folder: Path) -> None:
    GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)


def put(name: str, text: str = "{}") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model": (put_model, "holds a model (model.safetensors), not a run"),
    "a model's settings": (put("config.json", '{"model_type": "gpt2"}'), "holds config.json, not a run"),
    "an editor's settings": (put("config.json", '{"settings": {"tab": 4}}'), "holds config.json, not a run"),
    "a list of settings": (put("config.json", '{"settings": ["max_steps"]}'), "holds config.json, not a run"),
    "settings with comments": (put("config.json", "{} // settings"), "holds config.json, not a run"),
    "another's metrics": (put("metrics.jsonl", '{"epoch": 1}\n'), "holds metrics.jsonl, not a run"),
    "another's samples": (put("samples.txt", "mine"), "holds samples.txt, not a run"),
    "another's figure": (put("loss_curves.png", "mine"), "holds loss_curves.png, not a run"),
    "another's checkpoints": (
        lambda folder: (folder / "checkpoints" / "step_000100").mkdir(parents=True),
        "another program's checkpoints (step_000100)",
    ),
    "a data set": (lambda folder: write_shard(folder / "x_train_000001.npy", 9), "holds x_train_000001.npy"),
    "checkpoints": (
        lambda folder: (folder / "step_000002").mkdir(),
        "the checkpoints of a run (step_000002)",
    ),
    "notes": (put("notes.txt"), "holds notes.txt, not a run"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("flag", ["", "resume", "overwrite"])
def test_training_never_writes_into_another_folder(
    case: str, flag: str, train: Train, tmp_path: Path
) -> None:
    """Whatever the flags; and the message offers no flag that would."""
    fill, message = FOREIGN[case]
    folder = tmp_path / "run"
    folder.mkdir()
    fill(folder)
    before = contents(folder)
    with pytest.raises(UserError) as error:
        train(**{flag: True} if flag else {})
    assert message in str(error.value)
    assert re.search(r", not a run: name another folder( \(logs may end in .*\))?$", str(error.value))
    assert contents(folder) == before


def test_training_into_a_checkpoint_is_refused(train: Train) -> None:
    run = train(max_steps=2)
    for inside in ("run/checkpoints/step_000002", "run/checkpoints"):
        before = contents(run)
        for flag in ("resume", "overwrite"):
            with pytest.raises(UserError, match="not a run: name another folder"):
                train(inside, **{flag: True})
        assert contents(run) == before


def test_a_new_run_starts_beside_harmless_files(train: Train, tmp_path: Path) -> None:
    """Other runs, hidden files, the log file that the output goes to; --overwrite has nothing to delete."""
    folder = tmp_path / "run"
    (folder / "tensorboard" / "another's").mkdir(parents=True)
    for name in (".DS_Store", "nohup.out", "train.log"):
        (folder / name).write_text("x")
    (folder / "train.txt").touch()  # as `| tee train.txt` does
    before = contents(folder).keys()
    assert (train(max_steps=1, overwrite=True) / "metrics.jsonl").exists()
    assert before <= contents(folder).keys() and (folder / "tensorboard" / "another's").is_dir()


def test_the_log_of_the_output_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "output").write_text("x")
    assert run_folder._not_of_a_run(tmp_path) == "output"
    status = (tmp_path / "output").stat()
    monkeypatch.setattr(os, "fstat", lambda number: status)
    assert run_folder._not_of_a_run(tmp_path) == ""


def test_a_run_with_a_damaged_config_is_still_a_run(train: Train) -> None:
    run = train(max_steps=2)
    (run / "config.json").write_bytes(b"")
    train(max_steps=3, resume=True)
    assert [r["step"] for r in history(run, kinds=("train",))] == [1, 2, 3]


def test_a_file_in_place_of_the_run_folder_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match=r"--out-dir .*run: not a folder: name another"):
        train(overwrite=True)
    assert (tmp_path / "run").read_text() == "x"


def test_overwrite_keeps_files_that_are_not_the_runs(train: Train) -> None:
    run = train(max_steps=2)
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "checkpoint-500").mkdir()
    train(max_steps=1, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-500", "step_000001"}


@pytest.mark.parametrize("removed", range(6))
def test_an_interrupted_overwrite_can_be_repeated(
    removed: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it had removed, what is left passes for the run that it was."""
    run = train(max_steps=1)
    (run / "loss_curves.png").write_bytes(b"a figure")
    left, remove = [removed], files.remove

    def remove_some(path: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(path)

    monkeypatch.setattr(files, "remove", remove_some)
    with contextlib.suppress(KeyboardInterrupt):
        train(max_steps=2, overwrite=True)
    left[0] = 100
    train(max_steps=3, overwrite=True)
    assert history(run)[-1]["step"] == 3


class OneBlock:
    size = 3000

    def describe(self) -> dict[str, object]:
        return {"kind": "files"}

    def blocks(self, file: int, block: int) -> list[Block]:
        return iter([Block(0, 0, ["words and more words " * 100], 3000)])


def test_shards_do_not_replace_another_programs_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match=r"manifest\.json: another program's: name another folder"):
        build_shards.build(OneBlock(), tmp_path, "x", shard_size=100)
    assert contents(tmp_path) == {"manifest.json": b'{"name": "a web page"}'}


# ---------------------------------------------------------------- other systems


@posix
def test_a_link_to_a_larger_disk_keeps_its_place(train: Train, tmp_path: Path) -> None:
    """checkpoints/ is a link: --overwrite empties what it leads to, and new checkpoints go there."""
    run = train(max_steps=4, keep_checkpoints=5)
    shutil.move(run / "checkpoints", tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    train(max_steps=2, overwrite=True)
    assert (run / "checkpoints").is_symlink()
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["step_000002"]


@posix
def test_removing_a_linked_checkpoint_removes_only_the_link(train: Train, tmp_path: Path) -> None:
    run = train(max_steps=4, keep_checkpoints=5)
    shutil.move(run / "checkpoints" / "step_000002", tmp_path / "kept")
    (run / "checkpoints" / "step_000002").symlink_to(tmp_path / "kept")
    train(max_steps=8, keep_checkpoints=1, resume=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000008"]
    checkpoint.verify(tmp_path / "kept")


def refuse(kind: int, only: Callable[..., bool], work: Callable) -> Callable:
    """A call that the file system answers with an error."""

    def call(*args: object) -> object:
        if only(*args):
            raise OSError(kind, os.strerror(kind))
        return work(*args)

    return call


@posix
@pytest.mark.parametrize("kind", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_training_works_on_a_disk_without_flush_locks_or_modes(
    kind: int, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(kind, lambda handle: True, os.fsync))
    monkeypatch.setattr(fcntl, "flock", refuse(kind, lambda handle, how: True, fcntl.flock))
    monkeypatch.setattr(Path, "chmod", refuse(errno.EPERM, lambda path, mode: True, Path.chmod))
    run = train(max_steps=2)
    checkpoint.verify(run / "checkpoints" / "step_000002")
    if kind != errno.ENOSYS:  # for which the library has another kind of lock
        assert "cannot lock files" in capsys.readouterr().err


@posix
def test_a_disk_that_fails_to_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO, lambda handle: True, os.fsync))
    with pytest.raises(OSError):
        files.write_atomically(tmp_path / "file", "x")


def test_contents_are_copied_where_names_cannot_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of folders in a lower layer of a container."""
    monkeypatch.setattr(os, "replace", refuse(errno.EXDEV, lambda *args: True, os.replace))
    files.write_atomically(tmp_path / "file", "old")
    files.write_atomically(tmp_path / "file", "new")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    files.replace(tmp_path / "a", tmp_path / "d")
    assert contents(tmp_path) == {"file": b"new", os.path.join("d", "b", "c"): b"x"}


def test_hidden_files_are_not_shards(data_dir: Path, train: Train) -> None:
    """A Mac leaves a ._ file beside each on disks that are not its own."""
    before = history(train("before", max_steps=1))
    for path in list(data_dir.iterdir()):
        (data_dir / f"._{path.name}").write_bytes(b"\0\5\26\7Mac OS X")
    assert not any(name.startswith(".") for name in shards.names_in(data_dir))
    assert history(train(max_steps=1)) == before


def test_fetching_does_not_replace_another_programs_manifest(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although all shards are there already."""
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path)
        hub.put("ann/words", {path.name: path.read_bytes() for path in data_dir.iterdir()}, "dataset")
        (data_dir / "manifest.json").write_text('{"name": "a web page"}')
        before = contents(data_dir)
        fetch_tokens_hf.fetch("ann/words", data_dir)
        assert contents(data_dir) == before
