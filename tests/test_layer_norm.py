"""LayerNorm as it is compiled for a GPU, here on a CPU, against torch's own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.layer_norm import layer_norm

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


def test_equals_torchs() -> None:
    for found, expected in zip(results(ours, torch.float64), results(torchs, torch.float64), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_equals_torchs_to_the_bit(dtype: torch.dtype) -> None:
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
