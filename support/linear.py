"""For sampling: a linear layer that is fast for few rows on a CPU, and weights cast to 16 bits only once."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` with a faster path for few rows on a CPU, as in sampling.

    With bf16 units, `weight @ xᵀ` takes 0.65 to 0.8 of the time of `x @ weightᵀ` in bf16. In fp32 it depends
    on the CPU: there it was faster from 6 rows on, and up to twice as slow for 2 to 4.
    """

    FEW_ROWS = 16  # up to here a CPU spends its time reading the matrix, not multiplying
    cast: tuple[Tensor, Tensor | None] | None = None  # in 16 bits, while `cast_once` holds them

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        if torch.is_grad_enabled():
            return super().forward(x)
        weight, bias = self.cast or (self.weight, self.bias)
        if self.cast:
            x = x.to(weight.dtype)
        rows = x.shape[:-1].numel()
        autocast_casts = self.cast is None and torch.is_autocast_enabled(x.device.type)
        if rows > self.FEW_ROWS or x.device.type != "cpu" or autocast_casts:
            return F.linear(x, weight, bias)
        columns = x.reshape(rows, -1).t()
        if rows == 1:  # as a matrix and a vector: the fastest of several ways (BENCHMARKS.md)
            vector = columns.squeeze(1)
            y = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        else:
            y = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
        return y.view(-1, rows).t().reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Within autocast, hold a 16-bit copy of the weights of each `Linear`. Otherwise do nothing.

    Autocast casts every matrix again for every token, which takes longer than the products of the token. Do
    not train the model meanwhile, because the copies would not change.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    dtype = torch.get_autocast_dtype(device)
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        layer.cast = layer.weight.detach().to(dtype), bias
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None
