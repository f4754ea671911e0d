"""LayerNorm for compiled GPU models: backward reads its input instead of its normalised output."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension (Ba et al. 2016), bit for bit, with less memory traffic.

    By default, torch.compile writes the normalised states to memory for backward, and the residual stream for
    the next layers. Here it only writes the residual stream, which backward normalises again within the
    kernel that needs the result. For GPT-2 124M and 65,536 tokens that saves 4.5 of 192 GB of traffic per
    micro-step (counted).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C). The result has the same shape, and is fp32 under autocast."""
        compiled = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if compiled and x.device.type == "cuda" and x.dtype == torch.float32:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise x (..., C) with weight and bias (C,), fp32. Compiles to one kernel."""
    # Outside of `checkpoint`: computed again in backward, they would cost another pass over x. Without a
    # gradient of their own: _Normalise's is LayerNorm's whole gradient.
    with torch.no_grad():
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + eps)
    inputs = (x, mean, rstd, weight, bias)
    return checkpoint(_Normalise.apply, *inputs, use_reentrant=False, preserve_rng_state=False)


class _Normalise(torch.autograd.Function):
    """(x - mean) / std · weight + bias, with the gradient of LayerNorm, where mean and std depend on x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Normalise x (..., C) with mean and rstd (..., 1), weight and bias (C,) -> (..., C)."""
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return (x - mean) * rstd * weight + bias

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        shape, wanted = list(weight.shape), [True, True, True]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight, bias, wanted
        )
        return grad_x, None, None, grad_weight, grad_bias
