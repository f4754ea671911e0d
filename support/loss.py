"""The head and its cross-entropy without a batch of logits."""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def default_chunks(n_tokens: int, device: torch.device) -> int:
    """Chunks for the loss of `n_tokens`: one on a GPU; on a CPU of 512 tokens each, which is fastest."""
    return max(1, n_tokens // 512) if device.type == "cpu" else 1


class ChunkedCrossEntropy(torch.autograd.Function):
    """The head and its loss, one chunk of positions at a time, with the gradients computed along the way.

    The logits of a whole batch, their softmax and its gradient are by far the largest tensors of a small
    GPT-2. Here only one chunk's logits exist at a time, and become their own gradient in place (the idea of
    Liger Kernel's fused linear cross-entropy, Hsu et al. 2024). Nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunks: int
    ) -> Tensor:
        """states (N, C), weight (rows, C), targets (N,) -> mean loss over targets that are not -100.

        Rows of the weight from `vocab_size` on are padding and get no probability.
        """
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            count = (targets != -100).sum()
            loss = torch.zeros((), device=states.device)
            grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
            pieces = zip(states.chunk(chunks), targets.chunk(chunks), grad_states.chunk(chunks), strict=True)
            for x, target, grad_x in pieces:
                x = x.to(dtype)
                # One column per position: CPU libraries are up to 1.5 times as fast in this layout.
                logits = (w @ x.t()).float()
                logits[vocab_size:] = -math.inf
                known = (target != -100).to(logits.dtype)
                target = target.clamp_min(0)[None]
                largest, target_logit = logits.amax(dim=0), logits.gather(0, target).squeeze(0)
                probs = logits.sub_(largest).exp_()
                total = probs.sum(dim=0)
                loss += ((largest + total.log() - target_logit) * known).sum()
                if ctx.needs_input_grad[0]:  # false in validation, where only the weight asks for a gradient
                    # d loss / d logits = (softmax - one-hot) · known / count, one factor per column.
                    probs.div_(total).scatter_add_(0, target, torch.full_like(probs[:1], -1.0))
                    factor = (known / count)[:, None]
                    grad = probs.to(dtype)
                    grad_x.copy_((grad.t() @ w) * factor)
                    x = x * factor.to(dtype)
                    if dtype == weight.dtype:
                        grad_weight.addmm_(grad, x)
                    else:
                        grad_weight += grad @ x
        ctx.save_for_backward(grad_states, grad_weight)
        return loss / count

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grad_loss, grad_weight.mul_(grad_loss), None, None, None
