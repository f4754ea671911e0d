"""Figures: what the curves are drawn from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import plot_loss


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


def test_the_loss_axis_leaves_out_a_long_runs_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a loss of 11 to one of 3: the axis has the losses after the first 5 % of the steps."""
    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out: axes.append(figure.axes[0]))
    losses = [3 + 8 * np.exp(-step / 100) for step in range(2001)]
    for name, last in (("long.txt", 2000), ("short.txt", 500)):
        text = "".join(f"{step} train {losses[step]}\n" for step in range(last + 1))
        (tmp_path / name).write_text(f"{text}7 train nan\n0 val {losses[0]}\n{last} val {losses[last]}\n")
        plot_loss.plot([tmp_path / name], tmp_path / "figure.png", smooth=1)
    long, short = (axis.get_ylim() for axis in axes)
    assert losses[100] < long[1] < losses[90] and 2.5 < long[0] < losses[2000]
    assert short[1] > losses[0]
