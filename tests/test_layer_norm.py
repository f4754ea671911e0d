"""LayerNorm as it is compiled for a GPU, here on a CPU, against torch's own."""

import contextlib
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.distributed import DDPOptimizer

from model import GPT, GPTConfig
from support import runtime
from support.layer_norm import LayerNorm, layer_norm
from support.runtime import Runtime

EPS = 1e-5


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all inputs, for states far from normalised."""
    torch.manual_seed(0)
    values = (3 * torch.randn(40, 24) + 5, torch.rand(24) + 0.5, torch.randn(24))
    given = [v.to(dtype).requires_grad_() for v in values]
    y = function(*given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return [y, *torch.autograd.grad((weights * y).sum(), given)]


def test_layer_norm_equals_torchs() -> None:
    for found, expected in zip(results(ours, torch.float64), results(torchs, torch.float64), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layer_norm_equals_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    """In an fp32 residual stream with matrix products in `dtype`, from the operations Inductor would get."""

    def layers(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def stream(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            for _ in range(3):
                x = x + norm(x, weight, bias).to(dtype) @ torch.ones(24, 24, dtype=dtype)
            return x

        return torch.compile(stream, backend="aot_eager_decomp_partition", fullgraph=True)

    found, expected = (results(layers(norm), torch.float32) for norm in (ours, torchs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_layer_norm_compiles_in_the_graphs_of_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph is cut at DDP's buckets: the gradients of an accumulated step stay the model's own."""
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    gpus_path = lambda self, x: layer_norm(x, self.weight, self.bias, self.eps)  # noqa: E731
    whole_graph, buckets = DDPOptimizer.compile_fn, []

    def split(self: DDPOptimizer, *args: object, **kwargs: object) -> object:
        compiled = whole_graph(self, *args, **kwargs)
        buckets.extend(self.buckets)
        return compiled

    monkeypatch.setattr(DDPOptimizer, "compile_fn", split)
    torch.manual_seed(0)
    monkeypatch.setattr(runtime, "BUCKET_MB", 16)
    model = GPT(GPTConfig(16, 500, n_layer=4, n_head=2, n_embd=512))
    batches = torch.randint(500, (2, 2, 2, 16))  # micro-batches of inputs and targets
    rt = Runtime(torch.device("cpu"), torch.bfloat16, world_size=2)

    def gradients(train_model: nn.Module) -> list[Tensor]:
        for number, (x, y) in enumerate(batches):
            local = hasattr(train_model, "no_sync") and number == 0
            with train_model.no_sync() if local else contextlib.nullcontext(), rt.autocast():
                loss = train_model(x, y)[1]
            loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        return found

    expected = gradients(model)
    monkeypatch.setattr(LayerNorm, "forward", gpus_path)
    with rt:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        found = gradients(rt.wrap(model, compiled=True)[0])
    torch.compiler.reset()
    assert len(buckets) >= 4  # torch's own would be three
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
