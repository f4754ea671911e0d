"""The head and its cross-entropy without a batch of logits: by columns on a CPU, by rows on a GPU."""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def default_chunks(n_tokens: int, device: torch.device) -> int:
    """Chunks for the loss of `n_tokens`: of 512 tokens on a CPU, which is fastest there; of 16,384 on CUDA.

    On CUDA more chunks need less memory and move more bytes. Counted for a micro-step of GPT-2 124M with
    65,536 tokens: logits of 6.6 GB in 186.2 GB of traffic with one chunk, 1.6 in 187.6 with the four chosen
    here, 0.4 in 191.9 with sixteen; without torch.compile all of it peaks at 60, 34 and 26 GB.
    """
    tokens_per_chunk = {"cpu": 512, "cuda": 16_384}.get(device.type, n_tokens)
    return max(1, n_tokens // tokens_per_chunk)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The head and its loss, one chunk of positions at a time, with the gradients computed along the way.

    The logits of a whole batch, their softmax and its gradient are by far the largest tensors of a small
    GPT-2. Here only one chunk's logits exist at a time, and become their own gradient in place (the idea of
    Liger Kernel's fused linear cross-entropy, Hsu et al. 2024). Nothing is computed twice. Backward scales
    the weight's gradient in place, so it can run only once: torch raises RuntimeError the second time.
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


class RowCrossEntropy(torch.autograd.Function):
    """The same for a GPU: one row of logits per position, written for what torch.compile makes of it.

    Per chunk that is four large kernels: the product that makes the logits, one that reads each row for its
    softmax and writes the gradient over it, and a product for each of the two gradients. Only those two are
    kept for backward, which may run more than once.

    Why not a library's: Liger Kernel's would cut 65,536 tokens into 64 chunks, whatever that costs; torch's
    own chunked `linear_cross_entropy` (from 2.13) passes over the logits five times and drops out of the
    compiled graph; both give padded rows probability.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunks: int
    ) -> Tensor:
        """states (N, C), weight (rows, C), targets (N,) -> mean loss in fp32, NaN if every target is -100.

        Rows of the weight from `vocab_size` on are padding and get no probability.
        """
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        # In fp16 the weight's gradient summed over N positions could overflow, and its mean vanish; the sum
        # over sqrt(N), as a power of two, does neither.
        ctx.shrink = 0.5 ** (len(states).bit_length() // 2) if dtype == torch.float16 else 1.0
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            columns = torch.arange(len(w), device=w.device)
            count = (targets != -100).sum()
            loss = torch.zeros((), device=states.device)
            grad_states, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
            for x, target in zip(states.chunk(chunks), targets[:, None].chunk(chunks), strict=True):
                x, known = x.to(dtype), target != -100
                logits = x @ w.t()
                # Compared, not gathered or scattered: this is computed along with the row it belongs to.
                one_hot = columns == target
                target_logit = torch.where(one_hot, logits, 0).sum(dim=1, keepdim=True, dtype=torch.float32)
                probs = logits.float()
                probs[:, vocab_size:] = -math.inf
                largest = probs.amax(dim=1, keepdim=True)
                total = probs.sub_(largest).exp_().sum(dim=1, keepdim=True)
                nll = largest + total.log() - target_logit
                loss += (nll * known).sum()
                if ctx.needs_input_grad[0]:  # false in validation, where only the weight asks for a gradient
                    # d nll / d logits = softmax - one-hot, expm1(-nll) at the target. With nll in it the
                    # compiler knows that nothing else still reads the logits, and writes over them.
                    grad = torch.where(one_hot, torch.expm1(-nll), probs.div_(total)).mul_(known)
                    grad = logits.copy_(grad)  # not divided by the count, which fp16 would not survive
                    grad_states.append(grad @ w)
                    grad_weight += grad.t() @ (x * ctx.shrink)
            if grad_states:
                ctx.save_for_backward(torch.cat(grad_states), grad_weight, count)
        return loss / count

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count.clamp_min(1)
        # Autograd casts both to what they are the gradients of.
        return grad_states.float() * scale, grad_weight * (scale / ctx.shrink), None, None, None
