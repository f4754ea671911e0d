"""Schedules against their formulas; which parameters decay; Muon against torch's; overflows in fp16."""

import collections
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import T, history
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from model import GPT, GPTConfig
from settings import PRESETS
from support import checkpoint, sampling
from support.cli import UserError

Train = Callable[..., Path]


def factor(step: int, schedule: str, warmup_steps: int = 10, cooldown_fraction: float = 0.3) -> float:
    return optim.learning_rate_factor(step, 100, warmup_steps, 0.1, schedule, cooldown_fraction)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warmup_is_linear(schedule: str) -> None:
    assert [factor(step, schedule) for step in range(10)] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factor(10, schedule) == 1
    assert factor(0, schedule, warmup_steps=0) == 1


def test_cosine_follows_gpt3() -> None:
    for step in range(10, 101):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert factor(step, "cosine") == pytest.approx(expected)
    assert factor(55, "cosine") == pytest.approx(0.55)


def test_the_reference_schedule_equals_build_nanogpts() -> None:
    """Its numbers and its schedule, written anew."""
    s = PRESETS["gpt2-124m"]
    assert (s.n_layer, s.n_head, s.n_embd, s.block_size, s.sequence_length) == (12, 12, 768, 1024, 1024)
    assert (s.total_batch_size, s.max_steps, s.weight_decay, s.grad_clip) == (524_288, 19_073, 0.1, 1.0)
    assert (s.optimizer, s.embedding_lr_ratio, s.dropout, s.init_from) == ("adamw", 1.0, 0.0, "scratch")
    [optimizer] = optim.build_optimizers(
        nn.Linear(2, 2), s.optimizer, s.learning_rate, s.embedding_lr_ratio, s.weight_decay, s.adam_beta2
    )
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.95), 1e-8)
    for it in range(0, s.max_steps, 7):
        progress = (it - 715) / (19_073 - 715)
        cosine = 6e-5 + 0.5 * (1 + math.cos(math.pi * progress)) * (6e-4 - 6e-5)
        expected = 6e-4 * (it + 1) / 715 if it < 715 else cosine
        assert optim.set_learning_rates([optimizer], it + 1, s) == pytest.approx(expected)


def test_linear_and_wsd_decay_linearly() -> None:
    assert factor(55, "linear") == pytest.approx(0.55)
    assert factor(100, "linear") == pytest.approx(0.1)
    assert [factor(step, "wsd") for step in (10, 50, 70)] == [1, 1, 1]
    assert factor(85, "wsd") == pytest.approx(0.55)
    assert factor(100, "wsd") == pytest.approx(0.1)


def test_the_muon_schedule_equals_torchs_schedulers() -> None:
    """No warm-up, the peak for 30 % of the steps, then a line to 0; twice that for the embeddings.

    AdamW's second beta is 0.99.
    """
    s = dataclasses.replace(PRESETS["gpt2-124m-muon"], max_steps=200)
    model = nn.ModuleDict({"wte": nn.Embedding(2, 2), "matrix": nn.Linear(2, 2)})
    ours = optim.build_optimizers(
        model, s.optimizer, s.learning_rate, s.embedding_lr_ratio, s.weight_decay, s.adam_beta2
    )
    assert ours[-1].defaults["betas"] == (0.9, 0.99)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.8e-3)
    peak = torch.optim.lr_scheduler.ConstantLR(theirs, factor=1.0)
    line = torch.optim.lr_scheduler.LinearLR(theirs, 1.0, 0.0, total_iters=140)
    both = torch.optim.lr_scheduler.SequentialLR(theirs, [peak, line], [60])
    for step in range(1, 201):
        rate = theirs.param_groups[0]["lr"]
        assert optim.set_learning_rates(ours, step, s) == pytest.approx(rate, rel=1e-6)
        found = [group["lr"] for optimizer in ours for group in optimizer.param_groups]
        assert found == pytest.approx([rate, 2 * rate, rate], rel=1e-6)  # Muon, embeddings, vectors
        theirs.step()
        both.step()
    assert both.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


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
        [result] = optim.orthogonalize(matrix[None])
        values = torch.linalg.svdvals(result)
        assert 0.6 < values.min() <= values.max() < 1.3
        # The same directions: U'·X·V is near the identity.
        inner = u.t() @ result @ vh.t()
        assert (inner - inner.diag().diag()).norm() < 1e-3


def test_a_batch_is_orthogonalised_like_single_matrices() -> None:
    matrices = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(0))
    matrices *= torch.tensor([1.0, 1e-6, 1e6, 0.0, 1.0]).view(5, 1, 1)
    together = optim.orthogonalize(matrices)
    for matrix, result in zip(matrices, together, strict=True):
        x = matrix / max(matrix.norm(), 1e-7)
        for _ in range(5):
            gram = x @ x.t()
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        torch.testing.assert_close(result, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
def test_muon_steps_equal_torchs(shape: tuple[int, int]) -> None:
    """torch's works in bf16, so the directions agree to about a hundredth."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        optim.Muon([ours], [1], 0.02, 0.1),
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
    optim.Muon([whole], [3], 0.02, 0.1).step()
    for piece, piece_gradient, updated in zip(
        start.chunk(3), gradient.chunk(3), whole.detach().chunk(3), strict=True
    ):
        alone = nn.Parameter(piece.clone())
        alone.grad = piece_gradient
        optim.Muon([alone], [1], 0.02, 0.1).step()
        torch.testing.assert_close(alone.detach(), updated)


def muon_steps(saved: Path | None = None) -> dict[str, object]:
    """Do two Muon steps on this process, from the state in `saved`, and return the result.

    Seven matrices of 8 x 8, four of 5 x 7 or 7 x 5: two or three processes cannot share both equally.
    """
    generator = torch.Generator().manual_seed(0 if saved is None else 1)
    shapes = [(8, 8), (24, 8), (5, 7), (24, 8), (7, 5), (5, 7), (7, 5)]
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    muon = optim.Muon(matrices, [1, 3, 1, 3, 1, 1, 1], 0.02, 0.1)
    if saved is not None:
        muon.load_state_dict(torch.load(saved))
    before = muon.state_dict()["state"]
    for _ in range(2):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        muon.step()
    kept = sum(share.numel() for share in muon.momentum.values())
    weights = [matrix.detach() for matrix in matrices]
    return {"before": before, "weights": weights, "state": muon.state_dict(), "kept": kept}


def muon_process(rank: int, world_size: int, folder: Path, saved: Path) -> None:
    """`muon_steps` as one of several processes, from the start and, where it exists, from `saved`."""
    store = dist.FileStore(f"{folder}/store_of_{world_size}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    results = [muon_steps(), muon_steps(saved if saved.exists() else None)]
    torch.save(results, folder / f"{rank}_of_{world_size}.pt")
    dist.destroy_process_group()
    # Gloo's threads may still hold tensors, and abort the interpreter's exit (pytorch/pytorch#179291).
    os._exit(0)


def assert_equal(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_muon_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Bit for bit, and a state saved by two processes is continued by one and by three."""
    saved = tmp_path / "saved_by_two.pt"
    alone = muon_steps()
    momentum = [state["momentum_buffer"] for state in alone["state"]["state"].values()]
    assert [buffer.shape for buffer in momentum] == [weight.shape for weight in alone["weights"]]
    assert all(buffer.any() for buffer in momentum)
    for world_size in (2, 3):
        torch.multiprocessing.spawn(muon_process, (world_size, tmp_path, saved), nprocs=world_size)
        for rank in range(world_size):
            results, continued = torch.load(tmp_path / f"{rank}_of_{world_size}.pt")
            assert results["kept"] < 1.4 * alone["kept"] / world_size
            for key in ("weights", "state"):
                assert_equal(results[key], alone[key])
            if world_size == 3:
                on_one = muon_steps(saved)
                assert_equal(continued["before"], torch.load(saved)["state"])
                assert_equal(on_one["before"], continued["before"])
                for key in ("weights", "state"):
                    assert_equal(continued[key], on_one[key])
        torch.save(results["state"], saved)


class Operations(TorchDispatchMode):
    """Counts what would be launched on a GPU: all operations but views and uninitialised tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "profiler::")):
            self.counts[func.name().split(".")[0]] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_uses_bf16_only_where_a_gpu_has_it(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    with FakeTensorMode():
        assert optim.orthogonalize(torch.empty(2, 4, 8, device="cuda")).dtype == dtype


@pytest.mark.parametrize("world_size", [1, 8])
def test_muon_launches_few_kernels(world_size: int) -> None:
    """Of twelve layers: two batches, an all-gather for each, and nothing that waits for the device."""
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        model = GPT(GPTConfig(8, 50, 12, 1, 8))
        muon, _ = optim.build_optimizers(model, "muon", 1e-2, 1.0, 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        muon.found_inf = torch.zeros(())
        with Operations() as operations:
            muon.step()
    finally:
        if world_size > 1:
            dist.destroy_process_group()
    collectives = {n: k for n, k in operations.counts.items() if n.startswith("c10d::")}
    assert sum(collectives.values()) == (2 if world_size > 1 else 0), collectives
    assert sum(operations.counts.values()) - sum(collectives.values()) < 70, operations.counts
    assert "aten::_local_scalar_dense" not in operations.counts


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


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("victim", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_an_fp16_overflow_skips_all_optimizers(name: str, victim: str) -> None:
    """Whichever optimizer's gradient it is in: clipping would spread it. Nothing waits for the device."""
    model = GPT(GPTConfig(8, 50, 1, 1, 8))
    optimizers = optim.build_optimizers(model, name, 1e-2, 1.0, 0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step(overflow: bool) -> torch.optim.Optimizer:
        scaler.scale(model(torch.arange(8).view(1, 8), torch.arange(8).view(1, 8))[1]).backward()
        if overflow:
            model.get_parameter(victim).grad[0, 0] = math.inf
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with Operations() as operations:
            optim.step(optimizers, scaler, grad_norm.isfinite().float())
        assert "aten::_local_scalar_dense" not in operations.counts

    def everything() -> object:
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        state = checkpoint.optimizer_state(model, optimizers)
        return weights, {n: {key: v.clone() for key, v in values.items()} for n, values in state.items()}

    step(overflow=False)
    before = everything()
    step(overflow=True)
    assert_equal(everything(), before)
    assert scaler.get_scale() == 2**15
    step(overflow=False)
    assert scaler.get_scale() == 2**15
    changed = everything()[0]
    assert all(value.isfinite().all() for value in changed.values())
    assert not any(torch.equal(changed[n], before[0][n]) for n in (victim, "transformer.wte.weight"))


def overflow(monkeypatch: pytest.MonkeyPatch, steps: range, loss_too: bool = False) -> None:
    """Make the gradients of these steps infinite, and leave the loss as it is or make it infinite too."""
    forward, calls = GPT.forward, iter(range(1, 1000))

    def overflowing(self: GPT, *args: object, **kwargs: object) -> tuple[None, torch.Tensor]:
        logits, loss = forward(self, *args, **kwargs)
        if loss.requires_grad and next(calls) in steps:
            loss.register_hook(lambda gradient: gradient * math.inf)
            loss = loss * math.inf if loss_too else loss
        return logits, loss

    monkeypatch.setattr(GPT, "forward", overflowing)


FP16 = {
    "dtype": "float16", "n_layer": 1, "optimizer": "muon", "val_interval": 0,
    "micro_batch_size": 2, "total_batch_size": 2 * T,
}  # fmt: skip


@pytest.fixture
def train_quickly(train: Train, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Without what takes a CPU seconds in fp16: samples."""
    monkeypatch.setattr(sampling, "draw_samples", lambda model, seed: [])
    return train


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_run_matches_the_fp32_run(train_quickly: Train, optimizer: str) -> None:
    """Losses, norms of gradients, which are clipped, and weights: the scale has no part in any of them."""
    small = {**FP16, "optimizer": optimizer, "grad_clip": 0.1, "max_steps": 5, "checkpoint_interval": 5}
    runs = {name: train_quickly(name, **{**small, "dtype": name}) for name in ("float32", "float16")}
    exact, found = (history(run, kinds=("train",)) for run in runs.values())
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in exact], abs=2e-3)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in exact], rel=1e-2)
    assert min(r["grad_norm"] for r in exact) > 0.1, "else nothing is clipped"
    torch.manual_seed(PRESETS["demo"].seed)
    start = GPT(GPTConfig(T, 50257, 1, 2, 16)).state_dict()
    weights = [GPT.from_pretrained(checkpoint.folders(run)[0]).state_dict() for run in runs.values()]
    for name, first in start.items():
        moves = [own[name] - first for own in weights]
        # Adam divides by the gradient's size, also of a gradient that is nearly 0.
        assert (moves[1] - moves[0]).norm() < 0.1 * moves[0].norm(), name


def test_an_fp16_overflow_is_not_a_bad_step(train_quickly: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow(monkeypatch, range(2, 5))
    run = train_quickly(**FP16, max_bad_steps=2)
    events = [(r["step"], r["name"], r.get("scale")) for r in history(run, kinds=("event",))]
    assert events[1:] == [(2, "overflow", 2**16), (3, "overflow", 2**15), (4, "overflow", 2**14)]
    records = history(run, kinds=("train",))
    assert [r["step"] for r in records if r["grad_norm"] is None] == [2, 3, 4]
    assert all(math.isfinite(r["loss"]) for r in records)


def test_overflows_that_no_scale_prevents_are_bad_steps(
    train_quickly: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 16 halve the scale from 2**16 to 1. It cannot mend the loss, and fp32 has none."""
    bad_steps = {"max_bad_steps": 2, "checkpoint_interval": 0}
    overflow(monkeypatch, range(1, 100))
    with pytest.raises(UserError, match=r"step 18: .*--max-bad-steps 2"):
        train_quickly(**FP16, **bad_steps, max_steps=30)
    with pytest.raises(UserError, match=r"step 2: .*--max-bad-steps 2"):
        train_quickly("fp32", **{**FP16, "dtype": "float32"}, **bad_steps)
    overflow(monkeypatch, range(1, 100), loss_too=True)
    with pytest.raises(UserError, match=r"step 2: .*--max-bad-steps 2"):
        train_quickly("loss", **FP16, **bad_steps)


def test_resume_restores_the_fp16_scale(train_quickly: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        overflow(patch, range(1, 2))
        run = train_quickly(**FP16, max_steps=4)
    saved = {}
    for resumed in (False, True):
        if resumed:
            train_quickly(**FP16, max_steps=8, resume=True)
        for folder in checkpoint.folders(run):
            saved[checkpoint.step_of(folder)] = checkpoint.load_training_state(folder)["scaler"]
    assert {step: (state["scale"], state["_growth_tracker"]) for step, state in saved.items()} == {
        2: (2**15, 1), 4: (2**15, 3), 6: (2**15, 5), 8: (2**15, 7),
    }  # fmt: skip
