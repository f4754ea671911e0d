"""--recompute: the same gradients with less memory, whatever else is on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY, as_flags, history, run_script
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from model import GPT, GPTConfig
from settings import PRESETS
from support import planning
from support.cli import UserError

Train = Callable[..., Path]


def small_model(dropout: float, recompute: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 101, 3, 4, 32, dropout=dropout))
    model.recompute = recompute
    return model


def gradients(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of the loss of one batch, with torch's generator in one state."""
    idx, targets = torch.randint(101, (2, 4, 24), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(idx, targets, 2)[1].backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_gives_the_same_gradients_bit_for_bit(dtype: torch.dtype, dropout: float) -> None:
    kept, computed = (gradients(small_model(dropout, recompute), dtype) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_recompute_gives_the_same_gradients(dropout: float) -> None:
    """By what torch.compile makes of the passes before Inductor: one graph, which computes blocks again."""
    torch._dynamo.reset()
    results = []
    for recompute in (False, True):
        model = torch.compile(
            small_model(dropout, recompute), fullgraph=True, backend="aot_eager_decomp_partition"
        )
        results.append(gradients(model))
    for kept, computed in zip(*results, strict=True):
        torch.testing.assert_close(computed, kept, atol=1e-7, rtol=1e-5)


def test_recompute_keeps_only_the_inputs_of_blocks() -> None:
    kept = []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            small_model(0.0, recompute).hidden(torch.zeros(4, 24, dtype=torch.int64))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 10


def test_recomputed_flops_match_the_plan() -> None:
    """By torch's own count: everything in a block but its last product, which backward does not need."""
    config, flops = GPTConfig(24, 101, 3, 4, 32), []
    for recompute in (False, True):
        with torch.device("meta"):  # where torch counts attention too
            model, idx = GPT(config), torch.zeros(4, 24, dtype=torch.int64)
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter:
            model(idx)[0].sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 4 * 24 * planning.recompute_flops_per_token(config, 24)


@pytest.mark.parametrize("values", [{"optimizer": "muon"}, {"dtype": "bfloat16", "dropout": 0.1}])
def test_a_run_with_recompute_has_the_same_losses(train: Train, values: dict[str, object]) -> None:
    assert history(train("on", recompute=True, **values)) == history(train("off", **values))


@pytest.mark.slow
def test_two_processes_recompute_to_the_same_losses(tmp_path: Path, data_dir: Path) -> None:
    flags = {**TINY, "data_dir": data_dir, "dataset_repo": "none", "micro_batch_size": 2, "dropout": 0.1}
    runs = []
    for recompute in (False, True):
        values = {**flags, "recompute": recompute, "out_dir": tmp_path / str(recompute)}
        done = run_script("train_gpt2.py", "--preset", "demo", *as_flags(values), nproc=2)
        assert done.returncode == 0, done.stderr
        runs.append(history(values["out_dir"]))
    assert runs[0] == runs[1]
    assert json.loads((tmp_path / "True" / "config.json").read_text())["settings"]["recompute"]


def test_recompute_with_dropout_is_refused_on_apples_gpus() -> None:
    """torch.utils.checkpoint keeps the state of no generator there."""
    s = dataclasses.replace(PRESETS["demo"], n_layer=1, n_head=1, n_embd=4, dropout=0.1, recompute=True)
    with pytest.raises(UserError, match="--recompute --dropout: not together"):
        train_gpt2.build_model(s, torch.device("mps"))
    assert train_gpt2.build_model(s, torch.device("cpu")).recompute
