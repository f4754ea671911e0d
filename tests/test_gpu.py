"""Compare a GPU with a CPU: precision, kernels, compilation, memory and timing.

Skipped without a CUDA device. With GPU_TESTS_DEVICE=cpu the tests themselves can be tried on a CPU:

    GPU_TESTS_DEVICE=cpu python -m pytest -m gpu -n 0 tests/test_gpu.py
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from helpers import TINY, as_flags, command, environment, history, run_script
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hellaswag
import optim
from bench import KERNELS
from model import GPT, Dropout, GPTConfig
from support import metrics, sampling
from support.progress import Stopwatch
from support.runtime import Runtime

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 256}
# The largest error of a gradient relative to its norm, of a 16-bit one some roundings of 2⁻⁸ or 2⁻¹¹.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """fp32 without TF32, which a training run in this process turns on."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One test at a time on the GPU, of whose memory some take all; pytest's workers run side by side."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "gpu.lock"):
        yield


def make(device: torch.device, spread: float = 0.0) -> GPT:
    """A model whose weights depend on nothing but `spread`, which makes its predictions differ more."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[: model.config.vocab_size] *= 1 + spread
    return model.to(device)


def batch(B: int = 2, T: int = 256) -> Tensor:
    """Inputs and targets, int64 (2, B, T)."""
    return torch.randint(50257, (2, B, T), generator=torch.Generator().manual_seed(1))


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖; NaN if there is one in either."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def loss_and_gradients(dtype: torch.dtype, compiled: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Of a model on the device, with the loss in two chunks; in fp16 with a scale, as in training."""
    rt, model = Runtime(DEVICE, dtype), make(DEVICE)
    x, y = batch().to(DEVICE)
    with rt.autocast():
        _, loss = (torch.compile(model) if compiled else model)(x, y, 2)
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    (loss * scale).backward()
    return loss.item(), {name: p.grad / scale for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, Tensor]]:
    """The same in fp32 on a CPU, of a model without padding, by torch's own loss over all logits."""
    model = make(CPU)
    x, y = batch()
    loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_and_gradients_equal_those_on_the_cpu(dtype: torch.dtype, expected: tuple[float, dict]) -> None:
    loss, gradients = loss_and_gradients(dtype)
    assert loss == pytest.approx(expected[0], rel=TOLERANCES[dtype] / 10)
    assert not gradients["transformer.wte.weight"][50257:].any()
    for name, gradient in expected[1].items():
        assert distance(gradients[name][: len(gradient)], gradient) < TOLERANCES[dtype], name


def test_compiled_equals_eager(expected: tuple[float, dict]) -> None:
    eager, compiled = (loss_and_gradients(torch.bfloat16, compiled=c) for c in (False, True))
    assert compiled[0] == pytest.approx(eager[0], rel=3e-3)
    for name, gradient in expected[1].items():
        assert distance(compiled[1][name][: len(gradient)], gradient) < TOLERANCES[torch.bfloat16], name
        assert distance(compiled[1][name], eager[1][name]) < TOLERANCES[torch.bfloat16], name


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_use_the_same_dropout_masks(compiled: bool) -> None:
    """Else the gradient would be that of another loss (pytorch/pytorch#190717): here its length is the
    loss's slope along it. Compiled, dropout has a random generator of its own.
    """
    model = make(DEVICE)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.rate = 0.25
    model.recompute = True
    loss_of = torch.compile(model) if compiled else model
    x, y = batch().to(DEVICE)

    def loss() -> Tensor:
        torch.manual_seed(7)
        return loss_of(x, y)[1]

    loss().backward()
    parameters = list(model.parameters())
    gradients = [p.grad.clone() for p in parameters]
    length = torch.stack([g.norm() for g in gradients]).norm().item()
    losses = []
    for sign in (1, -2):  # half a step forwards, then back to half a step behind
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=sign * 0.01 / length)
        losses.append(loss().item())
    slope = (losses[0] - losses[1]) / 0.02
    assert slope == pytest.approx(length, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attention_kernel_gives_the_same_loss(kernel: str, dtype: torch.dtype) -> None:
    """Forward and backward of causal attention, on inputs laid out as in the model, against float64."""
    B, T, n_head, size = 2, 256, 4, 64  # cuDNN's backward may crash at 192 on torch 2.9
    qkv = torch.randn(B * T, 3 * n_head * size, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = torch.randn(B, n_head, T, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for device, kind, backend in ((CPU, torch.float64, SDPBackend.MATH), (DEVICE, dtype, KERNELS[kernel])):
        leaf = qkv.to(device, kind, copy=True).requires_grad_()
        q, k, v = (t.view(B, T, n_head, size).transpose(1, 2) for t in leaf.split(n_head * size, dim=1))
        try:
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                (y * weights.to(device, kind)).sum().backward()
        except RuntimeError as error:
            if not any(text in str(error) for text in ("No available kernel", "No viable backend")):
                raise
            pytest.skip(f"not for this device: {error}".splitlines()[0])
        results.append((y, leaf.grad))
    for ours, exact in zip(results[1], results[0], strict=True):
        assert distance(ours, exact) < (2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-3), ("muon", 0.1)])
def test_an_optimizer_step_equals_that_on_the_cpu(name: str, tolerance: float) -> None:
    """Fused AdamW, and Muon's products in bf16. A step that is not finite changes nothing."""
    updates = []
    for device in (CPU, DEVICE):
        model = make(device)
        optimizers = optim.build_optimizers(model, name, 1e-2, 1.0, 0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        parameters = dict(model.named_parameters())
        for finite in (0.0, 1.0):
            before = {name: p.detach().clone() for name, p in parameters.items()}
            generator = torch.Generator().manual_seed(4)
            for p in parameters.values():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
                if not finite:
                    p.grad[0] = torch.nan
            optim.step(optimizers, scaler, torch.tensor(finite, device=device))
            moved = {name: p.detach() - before[name] for name, p in parameters.items()}
            assert all(bool(m.any()) == bool(finite) for m in moved.values())
        updates.append(moved)
    for parameter, update in updates[0].items():
        assert distance(updates[1][parameter], update) < tolerance, parameter


# ---------------------------------------------------------------- memory and time


def test_the_micro_batch_that_the_search_finds_fits_a_step() -> None:
    """GPT-2 124M, in a process of its own: out of memory would end it."""
    flags = ["--json", "--no-compile", "--steps", "2", "--device", DEVICE.type]
    done = run_script("bench.py", *flags, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["micro_batch_size"].bit_count() == 1 and result["tokens_per_sec"] > 0
    assert 0 < result["memory_gb"] < result["hardware"]["memory_gb"]


def test_events_and_the_clock_agree() -> None:
    rt, watch = Runtime(DEVICE, torch.float32), Stopwatch(DEVICE)
    a = torch.randn(1024, 1024, device=DEVICE)
    for laps in (3, 20):  # the first warm up
        rt.synchronize()
        begin = time.perf_counter()
        for _ in range(laps):
            watch.start_lap()
            for _ in range(20):
                a @ a
            watch.mark("products")
        rt.synchronize()
        elapsed = time.perf_counter() - begin
    assert sum(lap["products"] for lap in watch.seconds()[3:]) == pytest.approx(elapsed, rel=0.2)


# ---------------------------------------------------------------- sampling and HellaSwag


def test_the_cache_gives_the_logits_of_a_full_pass() -> None:
    model = make(DEVICE, spread=2.0)
    rows = batch(B=2, T=40)[0].tolist()
    rows[1] = rows[1][:23]
    cache = sampling.KVCache(model.config.n_layer, 50, [0, 0])
    with torch.inference_mode():
        logits = sampling.prefill(model, rows, cache)
        for token in (5, 50000, 256):
            for row, own in zip(rows, logits, strict=True):
                whole, _ = model(torch.tensor([row], device=DEVICE))
                torch.testing.assert_close(own, whole[0, -1], rtol=1e-3, atol=1e-3)
                row.append(token)
            logits = sampling.decode_one_token(model, [token, token], cache)


TEXTS = (
    ("A man is on the roof. He", "is ripping tiles off.", "sits down", "is using wrap on his skis.", "x"),
    ("[header] How to sit [title] Find a chair.", "[step] Sit down.", "Run [substeps] off", "Eat.", "Stand."),
    ("Two dogs", "play in the snow.", "are reading about 3,000 naïve cats.", "bark.", "sleep, then run."),
)  # fmt: skip


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_hellaswag_losses_equal_those_on_the_cpu(style: hellaswag.Style, tmp_path: Path) -> None:
    lines = [
        json.dumps(
            {"activity_label": "Roof", "ctx": ctx, "ctx_a": ctx, "ctx_b": "", "endings": ends, "label": label}
        )
        for label, (ctx, *ends) in enumerate(TEXTS * 5)
        for label in [label % 4]
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    examples = hellaswag.load(path, style)
    losses, scores = [], []
    for device in (CPU, DEVICE):
        model = make(device, spread=5.0)
        losses.append(hellaswag.ending_losses(model, examples))
        scores.append(hellaswag.evaluate(model, examples, Runtime(device, torch.float32)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-3)
    assert scores[1] == scores[0] and 0 < scores[0].acc < 1
    with Runtime(DEVICE, torch.bfloat16).autocast():
        rounded = hellaswag.ending_losses(model, examples)
    torch.testing.assert_close(rounded, losses[0], rtol=0, atol=0.3)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 5e-2), ("float16", 2e-2)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_has_the_losses_of_a_run_on_the_cpu(
    train: Callable[..., Path], dtype: str, tolerance: float, optimizer: str
) -> None:
    """Every stage in one process: batches, validation, samples, checkpoints that are loaded back, figures."""
    whole = train("cpu", optimizer=optimizer)
    run = train("device", optimizer=optimizer, device=DEVICE.type, dtype=dtype, reload_checkpoints=True)
    expected, found = history(whole), history(run)
    assert [(r["step"], r["kind"]) for r in found] == [(r["step"], r["kind"]) for r in expected]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=tolerance)
    records = metrics.read(run / "metrics.jsonl")
    assert not [r for r in records if "failed" in r.get("name", "")]
    seconds = json.loads((run / "summary.json").read_text())["seconds"]["training"]
    assert 0 < sum(r["step_ms"] for r in records if r["kind"] == "train") / 1000 < seconds + 0.1


def test_a_killed_run_resumes_with_the_same_losses(data_dir: Path, tmp_path: Path) -> None:
    """The same losses, but for the order in which a GPU adds."""
    settings = {
        **TINY, "max_steps": 200, "val_interval": 0, "checkpoint_interval": 20, "data_dir": data_dir,
        "device": DEVICE.type, "compile": False, "resume": True,
        "reload_checkpoints": True,  # waits for each; else a fast GPU is done before the first is written
    }  # fmt: skip
    whole, killed = (
        ["train_gpt2.py", "--preset", "demo", *as_flags({**settings, "out_dir": tmp_path / name})]
        for name in ("whole", "killed")
    )
    done = run_script(*whole)
    assert done.returncode == 0, done.stderr
    record = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command(*killed), env=environment(), stdout=subprocess.DEVNULL)
    while process.poll() is None and sum(r["kind"] == "train" for r in metrics.read(record)) < 30:
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=60) != 0, "it has ended before it was killed"
    done = run_script(*killed)
    assert done.returncode == 0, done.stderr
    assert any(r.get("name") == "resume" and r["step"] >= 20 for r in metrics.read(record))
    losses = [[r["loss"] for r in history(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
