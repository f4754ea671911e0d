"""benchmarks/recipe.py: the sweep, its cache, and how runs of several lengths are compared."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, write_shard

sys.path.append(str(ROOT / "benchmarks"))

import recipe
import recipe_report
import vocabulary
from recipe import Ladder, Settings

from support import tokenizer
from support.cli import UserError


def law(tokens: float, factor: float) -> float:
    """The loss of a recipe that makes do with 1/factor of the tokens."""
    return 8 - 0.5 * math.log(factor * tokens)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5, 3.9])
def test_tokens_to_reach_a_loss_are_interpolated(factor: float) -> None:
    tokens = [1e6, 2e6, 4e6]
    losses = [law(t, factor) for t in tokens]
    target = law(4e6, 1)
    assert recipe_report.tokens_to_reach(target, tokens, losses) == pytest.approx(4e6 / factor)


def test_tokens_far_beyond_the_runs_are_unknown() -> None:
    tokens = [1e6, 2e6]
    assert math.isnan(recipe_report.tokens_to_reach(law(4.1e6, 1), tokens, [law(t, 1) for t in tokens]))
    assert math.isnan(recipe_report.tokens_to_reach(5.0, tokens, [6.0, 6.1]))


def test_confidence_intervals_match_the_t_distribution() -> None:
    mean, half = recipe_report.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3))  # Student's t for two degrees of freedom
    assert math.isnan(recipe_report.interval([1.0])[1])


@pytest.mark.parametrize("best", [-5, 0, 3])
def test_the_sweep_continues_until_the_best_rate_lies_between_two(
    best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def start(self: Ladder, rung: str, name: str, rate: float, length: float, seed: int) -> Future:
        k = round(2 * math.log2(rate / recipe.RECIPES[name].learning_rate))
        tried.append(k)
        future: Future = Future()
        future.set_result({"loss": None if k > 4 else (k - best) ** 2})  # above 4 it diverges
        return future

    monkeypatch.setattr(Ladder, "start", start)
    ladder = Ladder(Settings(results=tmp_path / "results.jsonl"))
    ladder.data = "tiny"
    assert ladder.best_exponent("2x64", "muon") == best
    assert {best - 1, best, best + 1} <= set(tried)
    assert len(tried) == len(set(tried))


def test_recipes_side_by_side_train_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant and its base both ask for the base's sweep, at the same time."""
    trained = []

    def train(self: Ladder, rung: str, name: str, rate: float, length: float, seed: int) -> recipe.Result:
        trained.append((name, rate, length, seed))
        time.sleep(0.01)
        return {"loss": abs(math.log(rate / recipe.RECIPES[name].learning_rate))}

    monkeypatch.setattr(Ladder, "train", train)
    ladder = Ladder(Settings(results=tmp_path / "none.jsonl", lengths=[5.0, 10.0], seeds=2, jobs=2))
    ladder.data = "tiny"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(functools.partial(ladder.finish, "2x64"), ("muon", "muon-beta2-95")))
    assert len(trained) == len(set(trained))
    rate = recipe.RECIPES["muon"].learning_rate
    for name in ("muon", "muon-beta2-95"):
        wanted = {(name, rate, length, seed) for length in (5.0, 10.0) for seed in (1, 2)}
        assert wanted <= set(trained)


def test_a_run_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "tiny_val_000000.npy", 40 * 64)
    write_shard(tmp_path / "tiny_train_000001.npy", 400 * 64, 1)
    monkeypatch.setitem(recipe.RUNGS, "2x64", recipe.Rung(1, 64, 64, 16, 300))
    s = Settings(data_dir=tmp_path, results=tmp_path / "results.jsonl", out_dir=tmp_path / "runs")
    run = ("2x64", "muon", 1e-3, 0.003, 1)
    result = Ladder(s).train(*run)
    assert result["tokens"] == 2 * 64
    assert result["flags"]["optimizer"] == "muon"
    assert result["vocab_size"] == 300
    assert [json.loads(line) for line in s.results.read_text().splitlines()] == [result]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    assert Ladder(s).train(*run) == result
    write_shard(tmp_path / "tiny_train_000002.npy", 400 * 64, 2)
    with pytest.raises(UserError, match="its runs are on tiny-25600, not tiny-51200"):
        Ladder(s).train(*run)


def test_a_recipe_changed_under_its_name_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the folder of its earlier run is still there."""
    write_shard(tmp_path / "tiny_val_000000.npy", 40 * 64)
    write_shard(tmp_path / "tiny_train_000001.npy", 400 * 64, 1)
    monkeypatch.setitem(recipe.RUNGS, "2x64", recipe.Rung(1, 64, 64, 16, 300))
    s = Settings(
        data_dir=tmp_path, results=tmp_path / "results.jsonl", out_dir=tmp_path / "runs", dtype="float32"
    )
    run = ("2x64", "muon", 1e-3, 0.003, 1)
    earlier = Ladder(s).train(*run)
    changed = dataclasses.replace(recipe.RECIPES["muon"], embedding_lr_ratio=50.0)
    monkeypatch.setitem(recipe.RECIPES, "muon", changed)
    assert Ladder(s).train(*run)["loss"] != earlier["loss"]


def test_a_diverged_run_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the end of the ladder, as the fifth step in a row that is not finite would be."""
    write_shard(tmp_path / "tiny_val_000000.npy", 40 * 64)
    write_shard(tmp_path / "tiny_train_000001.npy", 400 * 64, 1)
    monkeypatch.setitem(recipe.RUNGS, "2x64", recipe.Rung(1, 64, 64, 16, 300))
    s = Settings(data_dir=tmp_path, results=tmp_path / "results.jsonl", out_dir=tmp_path / "runs")
    result = Ladder(s).train("2x64", "adamw", 1e30, 0.013, 1)
    assert recipe.as_loss(result["loss"]) > 100
    assert result["tokens"] == 10 * 64


@pytest.mark.parametrize("vocab_size", [257, 2048, 50257])
def test_a_smaller_vocabulary_tells_the_same_text(vocab_size: int) -> None:
    texts = ["", "Merges that were learned first.\n\n  Ünïcødé, 漢字, 🙂", "\x00 the the the", "naïve" * 30]
    full, small = tokenizer.get_encoding(), vocabulary.encoding(vocab_size)
    tokens = [id_ for text in texts for id_ in (50256, *full.encode_ordinary(text))]
    ids = vocabulary.reencode(np.array(tokens, dtype=np.uint16), vocab_size)
    assert ids.dtype == np.uint16
    assert ids.max() == vocab_size - 1
    assert small.decode(ids.tolist()) == full.decode(tokens)
    assert np.flatnonzero(ids == vocab_size - 1)[0] == 0
    if vocab_size == 257:  # no merges: bytes
        assert len(ids) == sum(len(text.encode()) + 1 for text in texts)
    if vocab_size == 50257:
        assert ids.tolist() == tokens


def results(name: str, factor: float, noise: tuple[float, ...]) -> list[recipe_report.Result]:
    """Runs at three rates with the first seed, and at the best of them with three seeds and two lengths."""
    common = {"rung": "2x64", "recipe": name, "seconds": 10.0 / factor}
    runs = [
        {**common, "length": 5.0, "tokens": 1e6, "loss": law(1e6, factor) + worse, "flags": flags}
        for worse, flags in (
            (0.3, {"learning_rate": 1e-3, "seed": 1}),
            (0.2, {"learning_rate": 4e-3, "seed": 1}),
        )
    ]
    for seed, off in enumerate(noise, start=1):
        flags = {"learning_rate": 2e-3, "seed": seed}
        runs += [
            {**common, "length": n, "tokens": t, "loss": law(t, factor) + off, "flags": flags}
            for n, t in ((5.0, 1e6), (10.0, 2e6))
        ]
    return runs


def test_recipes_are_compared_by_seed() -> None:
    """An effect of the seed that both sides share does not widen the confidence interval."""
    noise = (0.1, -0.1, 0.05)
    runs = results("reference", 1.0, noise) + results("muon", 1.6, noise)
    row = recipe_report.compare(runs, "2x64", "muon")
    assert (row["rate"], row["length"], row["seeds"]) == (2e-3, 10.0, 3)
    assert row["ratio"] == pytest.approx(1 / 1.6)
    assert row["ratio_low"] == pytest.approx(row["ratio_high"])
    assert row["loss"] == pytest.approx(law(2e6, 1.6) + sum(noise) / 3)
    assert row["step_time"] == pytest.approx(1 / 1.6)
    other = recipe_report.compare(
        results("reference", 1.0, noise) + results("muon", 1.6, noise[::-1]), "2x64", "muon"
    )
    assert other["ratio_low"] < other["ratio"] < other["ratio_high"]
    runs += results("adamw", 1.1, noise) + results("adamw-cosine", 1.25, noise)
    assert recipe_report.tuned_adamw(runs, "2x64") == "adamw-cosine"
    assert recipe_report.compare(runs, "2x64", "muon", "adamw-cosine")["ratio"] == pytest.approx(1.25 / 1.6)
    for run in runs:
        del run["seconds"]
    assert recipe_report.compare(runs, "2x128", "muon") is None
    # Where no AdamW was tuned, nothing is compared with one.
    assert recipe_report.tuned_adamw(runs, "2x128") is None
    untuned = [r for r in runs if not r["recipe"].startswith("adamw")]
    assert [len(rows) for rows in recipe_report.pairs(untuned).values()] == [0, 0, 1, 0]
    text = recipe_report.text(untuned)
    assert "| 2x64 | muon | 0.002 | 10 | 3 | 0.5273 | 0.62 (0.62 to 0.62) |  |  |" in text
    text = recipe_report.text(runs)
    assert "nan" not in text
    assert "| 2x64 | reference | 0.002 | 10 | 3 | 0.7623 |  | 1.25 (1.25 to 1.25) |  |" in text
    assert "| 2x64 | muon | 0.002 | 10 | 3 | 0.5273 | 0.62 (0.62 to 0.62) | 0.78 (0.78 to 0.78) |  |" in text


def test_extrapolation_has_a_valid_confidence_interval() -> None:
    """The interval holds the truth in 95 of 100 draws."""
    rng = np.random.default_rng(0)
    x, at = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0], 8.0
    held = 0
    for _ in range(2000):
        y = [0.5 - 0.2 * value + rng.normal(0, 0.1) for value in x]
        middle, half = recipe_report.line_at(at, x, y)
        held += abs(middle - (0.5 - 0.2 * at)) < half
    assert held / 2000 == pytest.approx(0.95, abs=0.02)
    same = {"log_ratios": [math.log(0.5)] * 2, "length": 20.0}
    rows = [{"rung": rung, **same} for rung in ("2x64", "2x128")]
    rows.append({"rung": "6x256", "log_ratios": [math.log(0.1)] * 2, "length": 10.0})  # too short to count
    assert recipe_report.extrapolated(rows, 1e8) is None
    rows.append({"rung": "4x192", **same})
    assert recipe_report.extrapolated(rows, 1e8) == pytest.approx((0.5, 0.5, 0.5))


def test_a_variant_is_named_after_what_it_differs_from() -> None:
    for name, base in (
        ("reference", None),
        ("muon-beta2-95", "muon"),
        ("muon-beta2-95-no-decay", "muon-beta2-95"),
        ("adamw-embedding-4-beta2-99", "adamw-embedding-4"),
        ("adamw-with-removed-code", "adamw"),
    ):
        assert recipe.base_of(name) == base


def test_variants_are_compared_with_their_base() -> None:
    """At equal tokens; how many of them that is worth follows from how the base's loss falls."""
    noise = (0.1, -0.1, 0.05)
    runs = results("muon", 1.0, noise) + results("muon-beta2-95", 1.25, noise)
    row = recipe_report.vary(runs, "2x64", "muon-beta2-95")
    assert (row["rate"], row["length"], row["seeds"]) == (2e-3, 10.0, 3)
    assert row["difference"] == pytest.approx(-0.5 * math.log(1.25))
    assert row["saved"] == pytest.approx(1 - 1 / 1.25)
    other = recipe_report.vary(
        results("muon", 1.0, noise) + results("muon-beta2-95", 1.25, noise[::-1]), "2x64", "muon-beta2-95"
    )
    assert other["saved_low"] < other["saved"] < other["saved_high"]
    assert recipe_report.vary(runs, "2x128", "muon-beta2-95") is None
    assert "| muon-beta2-95 | 2x64 | 0.002 | 10 | 3 | -0.1116 ± 0.0000 | 20 % (20 % to 20 %) |" in (
        recipe_report.text(runs)
    )
    of_one_length = [run for run in runs if run["length"] == 5.0]
    assert math.isnan(recipe_report.vary(of_one_length, "2x64", "muon-beta2-95")["saved"])
    assert "nan" not in recipe_report.text(of_one_length)


def test_sweeps_start_at_the_best_rate_of_base_or_smaller_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []
    best = {"muon": 4, "muon-beta2-95": 3}

    def start(self: Ladder, rung: str, name: str, rate: float, length: float, seed: int) -> Future:
        k = round(2 * math.log2(rate / recipe.RECIPES[name].learning_rate))
        tried.append((name, k))
        future: Future = Future()
        future.set_result({"loss": (k - best[name]) ** 2})
        return future

    monkeypatch.setattr(Ladder, "start", start)
    ladder = Ladder(Settings(results=tmp_path / "none.jsonl"))
    ladder.data = "tiny"
    assert ladder.best_exponent("2x64", "muon-beta2-95") == 3
    assert sorted(k for name, k in tried if name == "muon-beta2-95") == [2, 3, 4, 5]
    tried.clear()
    rate = recipe.RECIPES["muon"].learning_rate * 2**2.5
    flags = {"learning_rate": rate, "seed": 1}
    ladder.results.append({"rung": "2x64", "recipe": "muon", "length": 5.0, "loss": 2.0, "flags": flags})
    assert ladder.best_exponent("2x128", "muon") == 4
    assert sorted(k for _, k in tried) == [3, 4, 5, 6]
    tried.clear()
    for k, loss in ((3, 1.0), (4, 2.0), (5, 1.5)):  # these are known, one of them by luck
        ladder.results.append(
            {**ladder.key("4x192", "muon", ladder.rate("muon", k), 5.0, 1), "loss": loss, "tokens": 1}
        )
    best["muon"] = 2
    assert ladder.best_exponent("4x192", "muon") == 2
    assert [k for _, k in tried] == [2, 1]
