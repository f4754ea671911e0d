"""Dropout against transformers' GPT-2, and what must never drop; a run with it, interrupted and divided."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import TINY, as_flags, history, run_script
from torch import Tensor

from model import GPT, GPTConfig
from settings import read_settings
from support import hardware, pretrained, runtime, sampling
from support.cli import UserError

SMALL = GPTConfig(block_size=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32, dropout=0.1)
Train = Callable[..., Path]


class Masks:
    """Stands in for F.dropout: the n-th call of a pass drops the same numbers whatever shape they are in."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def __call__(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        generator = torch.Generator().manual_seed(len(self.rates))
        self.rates.append(p)
        return x * (torch.rand(x.numel(), generator=generator).view(x.shape) >= p) / (1 - p)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    """scaled_dot_product_attention as its documentation defines it, its dropout through F.dropout."""
    assert is_causal
    T = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 of transformers with random weights everywhere, and the dropout of GPT-2 as published."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32, bos_token_id=0, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_training_with_equal_masks_equals_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in the same places, at the same rate, in the same order: logits and gradients are equal."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").train()
    ours = GPT.from_pretrained(folder).train()
    idx, targets = torch.randint(101, (2, 4, 21))
    passes = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_by_hand)
    for model in (theirs, ours):
        monkeypatch.setattr(F, "dropout", Masks())
        result = model(idx)
        logits = result.logits if model is theirs else result[0]
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        passes.append((logits.detach(), F.dropout.rates))
    assert passes[0][1] == passes[1][1] == [0.1] * (1 + 3 * 3)  # embeddings; per block three
    torch.testing.assert_close(passes[1][0], passes[0][0], atol=1e-4, rtol=0)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = expected[name].t() if name.endswith(pretrained.CONV1D_WEIGHTS) else expected[name]
        own = pretrained.without_padding(name, parameter.grad, 101)
        assert (own - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_dropout_is_active_only_in_training(folder: Path) -> None:
    """from_pretrained returns a model that does not; one that trains does not under no_grad."""
    model, idx = GPT.from_pretrained(folder), torch.randint(101, (2, 24))
    assert model.config.dropout == 0.1
    expected = GPT.from_pretrained(folder, dropout=0.0).train()(idx)[0]
    assert torch.equal(model(idx)[0], expected)
    model.train()
    assert not torch.equal(model(idx)[0], expected)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    with torch.no_grad():
        assert torch.equal(model(idx)[0], expected)
    row = idx[:1, :5].tolist()
    plain = GPT.from_pretrained(folder, dropout=0.0).generate(row, 12, temperature=0)
    assert model.generate(row, 12, temperature=0) == plain
    cache = sampling.KVCache(3, 24, [0])
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.hidden(idx[:1], cache)), expected[:1], atol=1e-5, rtol=0)


def test_config_json_keeps_the_dropout_rate(folder: Path, tmp_path: Path) -> None:
    GPT(SMALL).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [config[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")] == [0.1] * 3
    assert GPT.from_pretrained(tmp_path / "saved").config == SMALL
    for change, rate in ({"attn_pdrop": 0.2}, 0.0), (dict.fromkeys(pretrained.DROPOUTS, 0.3), 0.3):
        (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, **change}))
        assert GPT.from_pretrained(tmp_path / "saved").config.dropout == rate
    for damaged in ("much", 1.5, None):
        (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "attn_pdrop": damaged}))
        with pytest.raises(UserError, match="not the configuration"):
            GPT.from_pretrained(tmp_path / "saved")


def test_attention_with_dropout_uses_math_on_a_cpu() -> None:
    here = runtime.Runtime(torch.device("cpu"), torch.float32)
    assert [hardware.attention_backend(here, 2, 8, 16, rate) for rate in (0.0, 0.1)] == ["flash", "math"]


# ---------------------------------------------------------------- runs

DROPPING = {"dropout": 0.1, "micro_batch_size": 2}


def test_a_run_with_dropout_resumes_bit_for_bit(train: Train) -> None:
    whole = train("whole", **DROPPING)
    train("parts", **DROPPING, max_steps=2)
    # Between the two, and within the second, other things draw from torch's generator.
    torch.rand(7)
    parts = train("parts", **DROPPING, resume=True, sample_interval=1)
    assert history(parts) == history(whole)
    assert history(parts) != history(train("none", micro_batch_size=2))
    config = json.loads((parts / "checkpoints" / "step_000006" / "config.json").read_text())
    assert config["resid_pdrop"] == 0.1
    train("parts", **{**DROPPING, "dropout": 0.2}, resume=True, max_steps=8)  # may change, as the rate may


def test_micro_batches_draw_different_masks(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], GPT.forward

    def note(model: GPT, *args: object) -> object:
        if torch.is_grad_enabled():
            seen.append(tuple(torch.get_rng_state().tolist()))
        return forward(model, *args)

    monkeypatch.setattr(GPT, "forward", note)
    train(**DROPPING)
    assert len(seen) == len(set(seen)) == 6 * 4  # steps, micro-batches


@pytest.mark.slow
def test_two_processes_draw_the_masks_of_one(tmp_path: Path, data_dir: Path) -> None:
    flags = as_flags({**TINY, **DROPPING, "data_dir": data_dir})
    runs = []
    for nproc in (0, 2):
        out = tmp_path / f"run{nproc}"
        done = run_script("train_gpt2.py", "--preset", "demo", *flags, "--out-dir", str(out), nproc=nproc)
        assert done.returncode == 0, done.stderr
        runs.append([r["loss"] for r in history(out)])
    assert runs[1] == pytest.approx(runs[0], abs=2e-5)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_invalid_dropout_rates_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"--dropout .*must be"):
        read_settings(["--dropout", str(value)])
