"""metrics.jsonl, checkpoints on the disk, figures, and the built-in corpus."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import metrics
import plot_loss
from cli import UserError
from metrics import Metrics
from model import GPT, GPTConfig
from optim import build_optimizers
from pre_tokens import builtin_corpus

# ---------------------------------------------------------------- metrics


def test_records_come_back_and_nan_is_null(tmp_path: Path) -> None:
    log = Metrics(tmp_path / "m.jsonl")
    log.log(1, "train", loss=0.1 + 0.2, lr=3e-4)
    log.log(1, "val", loss=math.inf)
    assert metrics.read(tmp_path / "m.jsonl") == [
        {"step": 1, "kind": "train", "loss": 0.1 + 0.2, "lr": 3e-4},
        {"step": 1, "kind": "val", "loss": None},
    ]


def test_reopening_drops_what_a_kill_left_beyond_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = Metrics(path)
    for step in range(1, 6):
        log.log(step, "train", loss=1.0)
    with open(path, "a") as file:
        file.write('{"step": 6, "ki')
    again = Metrics(path, keep_until=3)
    again.log(4, "train", loss=2.0)
    assert [(r["step"], r["loss"]) for r in metrics.read(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    Metrics(path)
    assert metrics.read(path) == []


# ---------------------------------------------------------------- checkpoints


def small_model() -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50257, 1, 1, 4, padded_vocab_size=50304))
    [optimizer] = build_optimizers(model, "adamw", 1e-2, 1.0, 0.1)
    idx = torch.randint(50257, (2, 8))
    model(idx, idx)[1].backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_is_never_seen_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of saving dies, the folder lists whole checkpoints only, and the next save clears up."""
    model, optimizer = small_model()
    state = {"step": 1, "optimizer": checkpoint.optimizer_state(model, [optimizer])}
    checkpoint.save(tmp_path, 1, model, state, keep=1)
    whole = checkpoint.folders(tmp_path)
    for victim in ("save", "fsync", "rename"):
        owner = {"save": torch, "fsync": os, "rename": Path}[victim]
        original = getattr(owner, victim)

        def die(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, victim, die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, model, state, keep=1)
        monkeypatch.setattr(owner, victim, original)
        assert checkpoint.folders(tmp_path) == whole
        assert checkpoint.newest_whole(tmp_path) == (whole[0], [])
    saved = checkpoint.save(tmp_path, 2, model, state, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [saved]


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    model, _ = small_model()
    folder = checkpoint.save(tmp_path, 7, model, {"step": 7}, keep=1)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {p.name for p in folder.iterdir()} - {"SHA256SUMS"}
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_state_moves_between_models_with_and_without_padding(tmp_path: Path) -> None:
    """A run begun on a GPU, padded, goes on where there is no padding, and back."""
    padded, optimizer = small_model()
    folder = checkpoint.save(
        tmp_path,
        1,
        padded,
        {
            "identity": {},
            "scaler": {},
            "seconds": {},
            "optimizer": checkpoint.optimizer_state(padded, [optimizer]),
        },
        keep=1,
    )
    plain = GPT(GPTConfig(8, 50257, 1, 1, 4))
    plain.load_weights(folder)
    [plain_optimizer] = build_optimizers(plain, "adamw", 1e-2, 1.0, 0.1)
    saved = checkpoint.load_training_state(folder)["optimizer"]
    checkpoint.load_optimizer_state(plain, [plain_optimizer], saved)
    idx = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(1))
    for model, its_optimizer in ((padded, optimizer), (plain, plain_optimizer)):
        its_optimizer.zero_grad()
        model(idx, idx)[1].backward()
        its_optimizer.step()
    assert torch.equal(padded.lm_head.weight[:50257], plain.lm_head.weight)
    assert (padded.lm_head.weight[50257:] == 0).all()
    back = checkpoint.optimizer_state(plain, [plain_optimizer])
    checkpoint.load_optimizer_state(padded, [optimizer], back)
    assert optimizer.state[padded.lm_head.weight]["exp_avg"].shape == (50304, 4)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": Malicious()}, tmp_path / "training_state.pt")
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load_training_state(tmp_path)
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------- figures


def test_a_runs_curves_are_read_as_recorded(train: Callable[..., Path]) -> None:
    run = train()
    curves = plot_loss.read_run(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, kind, key in (("train", "train", "loss"), ("val", "val", "loss"), ("lr", "train", "lr")):
        steps, values = curves[name]
        expected = [(r["step"], r[key]) for r in records if r["kind"] == kind]
        assert list(zip(steps.tolist(), values.tolist(), strict=True)) == expected


def test_a_plain_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("0 val 10.95\n0 hella 0.2463\n0 train 10.955029\n\n1 train 9.5\n250 hella 0.26\n")
    curves = plot_loss.read_run(log)
    assert {name: [c.tolist() for c in columns] for name, columns in curves.items()} == {
        "val": [[0], [10.95]],
        "hellaswag": [[0, 250], [0.2463, 0.26]],
        "train": [[0, 1], [10.955029, 9.5]],
    }


def test_moving_average_is_the_mean_of_the_values_around() -> None:
    values = np.random.default_rng(0).random(50)
    values[7] = np.nan
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(50)]
    np.testing.assert_allclose(plot_loss._moving_average(values, 5), expected)
    ramp = np.arange(50.0)
    np.testing.assert_allclose(plot_loss._moving_average(ramp, 7)[3:-3], ramp[3:-3])  # no lag
    np.testing.assert_allclose(plot_loss._moving_average(values, 1)[8:], values[8:])


def test_runs_compared_in_one_figure(train: Callable[..., Path], tmp_path: Path) -> None:
    """Two runs, a baseline of one evaluation and a plain log, in a vector figure whose text can be read."""
    run = train("first")
    train("second", seed=2)
    train("baseline", init_from=str(run), max_steps=0)
    (tmp_path / "old.txt").write_text("0 train 10\n5 train 9\n0 hella 0.25\n5 hella 0.26\n")
    runs = [tmp_path / name for name in ("first", "second", "baseline", "old.txt")]
    out = plot_loss.plot(runs, tmp_path / "deep" / "figure.svg", log_x=True, smooth=3)
    svg = out.read_text()
    for text in (
        "first: training",
        "second: training",
        "baseline: validation",
        "HellaSwag acc_norm",
        "chance",
        "step",
    ):
        assert f"<!-- {text}" in svg, text
    assert plot_loss.plot_run(run) == run / "loss_curves.png"


def test_a_figure_of_one_evaluation_and_two_lengths(train: Callable[..., Path], tmp_path: Path) -> None:
    """Ticks at whole steps where there is nothing but step 0; compared runs averaged over the same span."""
    train("baseline", max_steps=0)
    svg = plot_loss.plot([tmp_path / "baseline"], tmp_path / "a.svg").read_text()
    assert {tick for tick in ("-0", "0.5", "0.25") if f"<!-- {tick} -->" in svg} == set()
    assert "<!-- 0 -->" in svg and "<!-- 1 -->" in svg
    for name, length in (("long.txt", 500), ("short.txt", 100)):
        (tmp_path / name).write_text("".join(f"{step} train 5\n" for step in range(length)))
    svg = plot_loss.plot([tmp_path / "long.txt", tmp_path / "short.txt"], tmp_path / "b.svg").read_text()
    assert svg.count("mean of 10 steps -->") == 2


# ---------------------------------------------------------------- corpus


def test_the_builtin_corpus_is_documentation_and_always_the_same() -> None:
    documents = list(builtin_corpus.documents())
    assert documents == list(builtin_corpus.documents())
    text = "\n".join(documents)
    assert "The with statement is used to wrap the execution of a block" in text.replace("“", "").replace(
        '"', ""
    )
    assert json.dumps.__doc__.strip().splitlines()[0] in text
    assert len(set(documents)) > 3000
    # Mixed well: no document is a large part of a shard, so validation text is like training text.
    assert max(map(len, documents)) < 0.05 * 4 * builtin_corpus.SHARD_SIZE
