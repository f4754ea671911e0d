"""Checkpoints: written completely or not at all, checked, loaded."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY, T, as_flags, posix, run_script

from model import GPT, GPTConfig
from optim import build_optimizers
from support import checkpoint, pretrained
from support.cli import UserError


def small_model() -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50257, 1, 1, 4))
    [optimizer] = build_optimizers(model, "adamw", 1e-2, 1.0, 0.1)
    idx = torch.randint(50257, (2, 8))
    model(idx, idx)[1].backward()
    optimizer.step()
    return model, optimizer


def test_readers_never_see_an_unfinished_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of saving dies, the folder lists whole checkpoints only, and the next save clears up."""
    model, optimizer = small_model()
    state = {"step": 1, "optimizer": checkpoint.optimizer_state(model, [optimizer])}
    snapshot = checkpoint.snapshot(model, state)
    checkpoint.save(tmp_path, 1, snapshot, keep=1)
    whole = checkpoint.folders(tmp_path)
    for victim in ("save", "fsync", "replace"):
        owner = {"save": torch, "fsync": os, "replace": os}[victim]
        original = getattr(owner, victim)

        def die(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, victim, die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, snapshot, keep=1)
        monkeypatch.setattr(owner, victim, original)
        assert checkpoint.folders(tmp_path) == whole
        assert checkpoint.latest_intact(tmp_path) == (whole[0], [])
    saved = checkpoint.save(tmp_path, 2, snapshot, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [saved]


@posix
@pytest.mark.parametrize("name", ["SHA256SUMS", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_counts_as_damage(tmp_path: Path, name: str) -> None:
    model, _ = small_model()
    snapshot = checkpoint.snapshot(model, {})
    older, newer = (checkpoint.save(tmp_path, step, snapshot, keep=2) for step in (1, 2))
    (newer / name).unlink()
    os.mkfifo(newer / name)
    intact, [problem] = checkpoint.latest_intact(tmp_path)
    assert intact == older and f"{newer / name}: not a regular file" in problem


def test_checksums_without_the_weights_count_as_damage(tmp_path: Path) -> None:
    model, _ = small_model()
    folder = checkpoint.save(tmp_path, 1, checkpoint.snapshot(model, {}), keep=1)
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    for kept in ([], [line for line in sums if "model.safetensors" not in line]):
        (folder / "SHA256SUMS").write_text("".join(kept))
        with pytest.raises(UserError, match=r"SHA256SUMS: does not list model\.safetensors"):
            checkpoint.verify(folder)


def test_sha256sum_accepts_the_checksums(tmp_path: Path) -> None:
    model, _ = small_model()
    folder = checkpoint.save(tmp_path, 7, checkpoint.snapshot(model, {"step": 7}), keep=1)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {p.name for p in folder.iterdir()} - {"SHA256SUMS"}
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_checkpoints_do_not_contain_the_padding(tmp_path: Path) -> None:
    """Weights and states are stored for 50257 ids; a model that loads them continues like the first."""
    first, optimizer = small_model()
    state = {"identity": {}, "scaler": {}, "seconds": {}}
    state["optimizer"] = checkpoint.optimizer_state(first, [optimizer])
    folder = checkpoint.save(tmp_path, 1, checkpoint.snapshot(first, state), keep=1)
    saved = checkpoint.load_training_state(folder)["optimizer"]
    assert saved["transformer.wte.weight"]["exp_avg"].shape == (50257, 4)
    second = GPT(GPTConfig(8, 50257, 1, 1, 4))
    pretrained.load_weights(second, folder)
    [second_optimizer] = build_optimizers(second, "adamw", 1e-2, 1.0, 0.1)
    checkpoint.load_optimizer_state(second, [second_optimizer], saved)
    idx = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(1))
    for model, its_optimizer in ((first, optimizer), (second, second_optimizer)):
        its_optimizer.zero_grad()
        model(idx, idx)[1].backward()
        its_optimizer.step()
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert (second.lm_head.weight[50257:] == 0).all()


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The checkpoint holds the state at the time of the snapshot, although training goes on."""
    model, optimizer = small_model()
    state = {"identity": {}, "scaler": {}, "seconds": {}}
    state["optimizer"] = checkpoint.optimizer_state(model, [optimizer])
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = optimizer.state[model.lm_head.weight]["exp_avg"].clone()
    may_write, torch_save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: may_write.wait(30) and torch_save(*args))
    writer = checkpoint.Writer()
    writer.start(tmp_path, 1, checkpoint.snapshot(model, state), 1, "it is there")
    optimizer.step()
    assert checkpoint.folders(tmp_path) == [] and "it is there" not in capsys.readouterr().out
    may_write.set()
    assert writer.wait() is None and writer.wait() is None
    assert "it is there" in capsys.readouterr().out
    loaded = checkpoint.load_training_state(checkpoint.folder_of(tmp_path, 1))["optimizer"]
    assert torch.equal(loaded["transformer.wte.weight"]["exp_avg"], moments[:50257])
    pretrained.load_weights(model, checkpoint.folder_of(tmp_path, 1))
    assert all(torch.equal(expected[name], parameter) for name, parameter in model.named_parameters())


def test_a_failed_write_gives_its_reason(tmp_path: Path) -> None:
    model, _ = small_model()
    (tmp_path / "checkpoints").write_text("a file")
    writer = checkpoint.Writer()
    writer.start(tmp_path, 1, checkpoint.snapshot(model, {}), 1, "")
    assert "a file, where a folder has to be" in str(writer.wait())
    assert writer.wait() is None


@pytest.mark.slow
def test_optimizer_state_moves_between_numbers_of_processes(
    train: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    """Of a run with Muon on two processes, whose checkpoint one and three continue, bit for bit.

    Their gradients differ in rounding, so the continuation clips them to nothing: the step that is left is a
    function of the state alone.
    """
    settings = {"total_batch_size": 12 * T, "micro_batch_size": 2, "val_interval": 0, "optimizer": "muon"}

    def train_on(nproc: int, out: str, **more: object) -> None:
        values = {**TINY, **settings, "data_dir": data_dir, "out_dir": tmp_path / out, **more}
        done = run_script("train_gpt2.py", "--preset", "demo", *as_flags(values), nproc=nproc)
        assert done.returncode == 0, done.stderr

    def result(out: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        folder = checkpoint.folders(tmp_path / out)[0]
        model = GPT.from_pretrained(folder)
        return checkpoint.load_training_state(folder)["optimizer"], dict(model.named_parameters())

    train_on(2, "run", max_steps=2)
    saved, _ = result("run")
    shutil.copytree(tmp_path / "run", tmp_path / "three")
    further = {"max_steps": 3, "grad_clip": 1e-30, "resume": True}
    train("run", **settings, **further)
    train_on(3, "three", **further)
    (state, weights), (state_of_three, weights_of_three) = result("run"), result("three")
    assert set(state) == set(saved) == set(state_of_three) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(weight, weights_of_three[name]), name
        assert set(state[name]) == set(saved[name])
        for key, value in state[name].items():
            assert torch.equal(value, state_of_three[name][key]), (name, key)
        momentum = saved[name].get("momentum_buffer")
        assert (momentum is not None) == (".h." in name and weight.dim() == 2)
        if momentum is not None:
            assert momentum.shape == weight.shape and momentum.any()
            torch.testing.assert_close(state[name]["momentum_buffer"], 0.95 * momentum)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": Malicious()}, tmp_path / "training_state.pt")
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load_training_state(tmp_path)
    assert not (tmp_path / "pwned").exists()
