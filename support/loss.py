"""LM head and cross-entropy without materialising all logits: blockwise on CPUs, row-wise on GPUs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Columns of logits made at a time on a CPU; with 512 positions they stay in its cache.
VOCABULARY_BLOCK = 1024


def default_chunks(n_tokens: int, device: torch.device) -> int:
    """Number of chunks for `n_tokens`: of 512 tokens on a CPU, where that is fastest, of 16,384 on CUDA.

    On CUDA more chunks need less memory and move more bytes. Counted for a micro-step of GPT-2 124M with
    65,536 tokens: one chunk has logits of 6.6 GB and moves 186.2 GB, the four chosen here 1.6 and 187.6,
    sixteen 0.4 and 191.9. Without torch.compile the peak of memory is 60, 34 and 26 GB.
    """
    tokens_per_chunk = {"cpu": 512, "cuda": 16_384}.get(device.type, n_tokens)
    return max(1, n_tokens // tokens_per_chunk)


class BlockCrossEntropy(torch.autograd.Function):
    """LM head and loss for a CPU, with the gradients computed along the way.

    The logits of a small GPT-2 are by far its largest tensors, and reading them from memory repeatedly would
    take longer than the products. So we compute one block of the vocabulary at a time, small enough for the
    cache, and keep exp(logit - largest of the block). A factor for each position and block turns these into
    probabilities: exp(largest of the block - log-sum-exp of all). We apply it to the (n, C) side of the two
    products that form the gradients, which is smaller than the logits. The target's column, whose gradient is
    the probability - 1, stays out of both products and is added in fp32.

    One chunk of positions at a time bounds the memory. Nothing is computed twice. Backward scales the
    weight's gradient in place, so it can run only once: torch raises RuntimeError the second time.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunks: int
    ) -> Tensor:
        """Mean fp32 loss of states (N, C), weight (rows, C) and targets (N,), without targets of -100.

        Rows of the weight from `vocab_size` on are padding and get no probability.
        """
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        if dtype == torch.float16:  # the factors would vanish in it, and few CPUs compute in it
            dtype = torch.float32
        with torch.autocast(kind, enabled=False):
            w = weight[:vocab_size].to(dtype)
            blocks = w.split(VOCABULARY_BLOCK)
            count = (targets != -100).sum()
            loss = torch.zeros((), device=states.device)
            grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
            pieces = zip(states.chunk(chunks), targets.chunk(chunks), grad_states.chunk(chunks), strict=True)
            for x, target, grad_x in pieces:
                x, known, target = x.to(dtype), (target != -100)[:, None], target.clamp_min(0)
                wants_grad = ctx.needs_input_grad[0]  # not in validation, where only the weight asks for one
                nll, exps, factors = _softmax(x, blocks, target, wants_grad)
                loss += (nll * known).sum()
                if not wants_grad:
                    continue
                at_target = torch.expm1(-nll) * known / count  # probability - 1
                sum_x = at_target * w[target].float()
                factors *= known / count
                for block, exp, factor, grad_w in zip(
                    blocks, exps, factors.split(1, dim=1), grad_weight.split(VOCABULARY_BLOCK), strict=False
                ):
                    sum_x.addcmul_((exp @ block).float(), factor)
                    grad_w[: len(block)] += exp.t() @ (x * factor).to(dtype)
                grad_x.copy_(sum_x)
                # Row after row: index_put_ has several threads add to the same rows, in any order.
                grad_weight.index_add_(0, target, (at_target * x).to(grad_weight.dtype))
        ctx.save_for_backward(grad_states, grad_weight)
        return loss / count

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grad_loss, grad_weight.mul_(grad_loss), None, None, None


def _softmax(
    x: Tensor, blocks: Sequence[Tensor], target: Tensor, keep: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute the softmax of the logits x (n, C) @ all `blocks` (b, C) of the vocabulary, in factors.

    Returns the negative log-likelihood of target (n,), fp32 (n, 1). With `keep`, also returns the
    exponentials (n, b) of each block, in the dtype of x and 0 in the target's column, and the factors that
    turn each row of a block into probabilities, fp32 (n, blocks).
    """
    target_logit = torch.empty(len(x), 1, device=x.device)
    exps, largest, totals = [], [], []
    begin = 0
    for block in blocks:
        logits = x @ block.t()
        column = (target[:, None] - begin).clamp(0, len(block) - 1)
        inside = target[:, None] - begin == column
        begin += len(block)
        exp = logits.float()
        target_logit = torch.where(inside, exp.gather(1, column), target_logit)
        largest.append(exp.amax(dim=1, keepdim=True))
        exp.sub_(largest[-1]).exp_()
        totals.append(exp.sum(dim=1, keepdim=True))
        if keep:
            exp.scatter_(1, column, exp.gather(1, column).masked_fill_(inside, 0))
            exps.append(logits.copy_(exp))
    tops = torch.cat(largest, dim=1)
    log_total = (tops + torch.cat(totals, dim=1).log()).logsumexp(dim=1, keepdim=True)
    return log_total - target_logit, exps, (tops - log_total).exp()


class RowCrossEntropy(torch.autograd.Function):
    """LM head and loss for a GPU: one row of logits per position, written for torch.compile.

    It compiles to four large kernels per chunk: the product that makes the logits, one that reads each row
    for its softmax and writes the gradient over it, and a product for each of the two gradients. Only those
    two are kept for backward, which may run more than once.

    Libraries do not fit. Liger Kernel's would cut 65,536 tokens into 64 chunks. torch's own chunked
    `linear_cross_entropy` (from 2.13) passes over the logits five times and leaves the compiled graph. Both
    give padding rows probability.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunks: int
    ) -> Tensor:
        """Mean fp32 loss of states (N, C), weight (rows, C) and targets (N,); NaN if all targets are -100.

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
