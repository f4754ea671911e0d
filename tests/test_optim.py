"""Schedules against their formulas; which parameters decay."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import optim
from model import GPT, GPTConfig
from support import checkpoint


def factor(step: int, schedule: str, warmup_steps: int = 10, cooldown_fraction: float = 0.3) -> float:
    return optim.learning_rate_factor(step, 100, warmup_steps, 0.1, schedule, cooldown_fraction)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name: str) -> None:
    model = GPT(GPTConfig(16, 100, 2, 2, 8))
    optimizers = optim.build_optimizers(model, name, 1e-3, 2.0, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decayed = [names[p] for group in groups if group["weight_decay"] for p in group["params"]]
    rest = [names[p] for group in groups if not group["weight_decay"] for p in group["params"]]
    assert sorted(decayed + rest) == sorted(names.values())
    assert all(name.endswith("bias") or ".ln_" in name for name in rest)
    assert all(name.endswith("weight") and ".ln_" not in name for name in decayed)
    peak = {names[p]: group["peak_lr"] for group in groups for p in group["params"]}
    assert peak["transformer.wte.weight"] == peak["transformer.wpe.weight"] == 2e-3
    assert peak["transformer.h.0.attn.c_attn.weight"] == peak["transformer.ln_f.bias"] == 1e-3
    assert optimizers[-1].defaults["betas"] == (0.9, 0.95)
    assert sum(isinstance(optimizer, optim.Muon) for optimizer in optimizers) == (name == "muon")


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((32, 32), (64, 16), (16, 64)):
        matrix = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(optim.orthogonalize(matrix))
        assert 0.6 < values.min() <= values.max() < 1.3
        # The same directions: U'·X·V is near the identity.
        inner = u.t() @ optim.orthogonalize(matrix) @ vh.t()
        assert (inner - inner.diag().diag()).norm() < 1e-3


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
def test_muon_takes_the_steps_of_torchs_muon(shape: tuple[int, int]) -> None:
    """torch's works in bf16, so the directions agree to about a hundredth."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        optim.Muon([{"params": [ours]}], 0.02, 0.1),
        torch.optim.Muon([theirs], 0.02, 0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_q_k_and_v_are_orthogonalised_separately() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 8), torch.randn(24, 8)
    whole = nn.Parameter(start.clone())
    whole.grad = gradient
    optim.Muon([{"params": [whole], "parts": 3}], 0.02, 0.1).step()
    for piece, piece_gradient, updated in zip(
        start.chunk(3), gradient.chunk(3), whole.detach().chunk(3), strict=True
    ):
        alone = nn.Parameter(piece.clone())
        alone.grad = piece_gradient
        optim.Muon([{"params": [alone]}], 0.02, 0.1).step()
        torch.testing.assert_close(alone.detach(), updated)


def muon_steps(rank: int, world_size: int, folder: Path) -> None:
    """Two Muon steps on three matrices, as one of several processes; what comes out goes into a file."""
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(n, 8, generator=generator)) for n in (8, 12, 24)]
    muon = optim.Muon([{"params": matrices[:2]}, {"params": matrices[2:], "parts": 3}], 0.02, 0.1)
    for _ in range(2):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        muon.step()
    buffers = [muon.state[matrix]["momentum_buffer"] for matrix in matrices]
    torch.save([*(matrix.data for matrix in matrices), *buffers], folder / f"{rank}_of_{world_size}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def test_muon_on_two_processes_equals_one(tmp_path: Path) -> None:
    muon_steps(0, 1, tmp_path)
    torch.multiprocessing.spawn(muon_steps, (2, tmp_path), nprocs=2)
    alone = torch.load(tmp_path / "0_of_1.pt")
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}_of_2.pt")
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_with_found_inf_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 1, 1, 4))
    optimizers = optim.build_optimizers(model, name, 1e-2, 1.0, 0.1)

    def step(loss_factor: float) -> None:
        idx = torch.arange(16).view(2, 8)
        (loss_factor * model(idx, idx)[1]).backward()
        for optimizer in optimizers:
            optimizer.found_inf = torch.tensor(0.0 if math.isfinite(loss_factor) else 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step(1.0)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = checkpoint.optimizer_state(model, optimizers)
    state = {name: {key: value.clone() for key, value in s.items()} for name, s in state.items()}
    step(math.nan)
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[parameter_name])
        for key, value in checkpoint.optimizer_state(model, optimizers)[parameter_name].items():
            assert torch.equal(value, state[parameter_name][key]), (parameter_name, key)
    step(1.0)
    assert not torch.equal(model.lm_head.weight, weights["transformer.wte.weight"])
