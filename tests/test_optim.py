"""Schedules against their formulas; which parameters decay."""

import math

import pytest

import optim
from model import GPT, GPTConfig


def factor(step: int, schedule: str, warmup_steps: int = 10, cooldown_fraction: float = 0.3) -> float:
    return optim.learning_rate_factor(step, 100, warmup_steps, 0.1, schedule, cooldown_fraction)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warmup_climbs_in_a_straight_line_to_the_peak(schedule: str) -> None:
    assert [factor(step, schedule) for step in range(10)] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factor(10, schedule) == 1
    assert factor(0, schedule, warmup_steps=0) == 1


def test_cosine_is_gpt3s() -> None:
    for step in range(10, 101):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert factor(step, "cosine") == pytest.approx(expected)
    assert factor(55, "cosine") == pytest.approx(0.55)


def test_linear_and_wsd_fall_in_straight_lines() -> None:
    assert factor(55, "linear") == pytest.approx(0.55)
    assert factor(100, "linear") == pytest.approx(0.1)
    assert [factor(step, "wsd") for step in (10, 50, 70)] == [1, 1, 1]
    assert factor(85, "wsd") == pytest.approx(0.55)
    assert factor(100, "wsd") == pytest.approx(0.1)
    assert factor(99, "constant") == 1


def test_only_matrices_decay() -> None:
    model = GPT(GPTConfig(16, 100, 2, 2, 8))
    optimizer = optim.build_adamw(model, 1e-3, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    rest = {
        names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]
    }
    assert decayed | rest == set(names.values())
    assert all(name.endswith("bias") or ".ln_" in name for name in rest)
    assert all(name.endswith("weight") and ".ln_" not in name for name in decayed)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
