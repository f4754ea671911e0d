"""Parameter groups, AdamW, Muon, and the learning rate of each step."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from settings import OptimizerName, Schedule, Settings
from support.pretrained import is_block_matrix

# torch 2.13 renamed all_gather_into_tensor.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# ---------------------------------------------------------------- optimizers


def build_optimizers(
    model: nn.Module,
    name: OptimizerName,
    learning_rate: float,
    embedding_lr_ratio: float,
    weight_decay: float,
    adam_beta2: float = 0.95,
) -> list[torch.optim.Optimizer]:
    """Build the optimizers. Each parameter group holds its peak learning rate as "peak_lr".

    adamw: AdamW for all parameters. muon: Muon for the matrices of the blocks, AdamW for the rest.
    Weight decay applies to embeddings and matrices, not to biases and LayerNorms. The embeddings, including
    the tied head, use `embedding_lr_ratio` times the learning rate. AdamW's betas are 0.9 and `adam_beta2`
    (0.95 in GPT-3, Brown et al. 2020).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [(n, p) for n, p in named if is_block_matrix(n, p)]
    embeddings = [p for n, p in named if p.dim() == 2 and not is_block_matrix(n, p)]
    vectors = [p for _, p in named if p.dim() < 2]
    adamw_groups = [
        {"params": embeddings, "peak_lr": embedding_lr_ratio * learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "peak_lr": learning_rate, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon":
        # Q, K and V are three matrices stored as one.
        parts = [3 if n.endswith("c_attn.weight") else 1 for n, _ in matrices]
        optimizers.append(Muon([p for _, p in matrices], parts, learning_rate, weight_decay))
    else:
        group = {"params": [p for _, p in matrices], "peak_lr": learning_rate, "weight_decay": weight_decay}
        adamw_groups.append(group)
    # One fused kernel (Loshchilov & Hutter 2019).
    adamw = torch.optim.AdamW(adamw_groups, learning_rate, betas=(0.9, adam_beta2), eps=1e-8, fused=True)
    return [*optimizers, adamw]


def step(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Update the parameters and clear the gradients. Without an update if `finite` is 0.

    finite: a scalar on the device, 1.0 or 0.0, so that skipping a bad step needs no synchronisation.
    In fp16 `scaler.unscale_` must have seen the gradients of every optimizer; it sets the next loss scale.
    """
    # Not scaler.step(), which looks at one optimizer at a time, although clipping spreads a NaN to all of
    # them, and which waits for the device unless the optimizer is one of torch's fused ones.
    found_inf = 1 - finite
    # On MPS torch's AdamW may ignore found_inf (pytorch/pytorch#186360). Steps are synchronous there anyway.
    skip = finite.device.type == "mps" and finite.item() == 0
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scaler.update()


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalised, so that all directions move equally far.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The scale of the update,
    0.2·sqrt(larger side), is that of Liu et al. 2025, "Muon is Scalable for LLM Training": it matches the
    usual step size of AdamW, so learning rate and weight decay carry over. For each matrix W, with gradient
    G, momentum M, and O(X) the orthogonal matrix nearest to X:

        M = mu·M + (1 - mu)·G
        W = W - lr·weight_decay·W - lr·0.2·sqrt(larger side)·O(mu·M + (1 - mu)·G)

    This is the step of `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw". Q, K and V are updated as
    separate matrices.

    Matrices of equal shape form one batch. Each process holds the momentum of an equal share of every batch,
    orthogonalises that share, and gathers the other updates in the precision in which they were computed.
    The result does not depend on the number of processes.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        parts: Sequence[int],
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """params: two-dimensional. parts: the number of matrices in the rows of each; 3 for Q, K, V."""
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "peak_lr": learning_rate})
        self.parts = parts
        alone = not dist.is_initialized()
        self.rank, self.world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        # Shape of the matrices -> this process's share of their momentum, (share, rows, columns).
        self.momentum = {
            shape: torch.zeros_like(self._share(matrices))
            for shape, matrices in self._by_shape(params).items()
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Do one update. Every parameter must have a gradient, the same on every process.

        Nothing changes if the attribute `found_inf` is set and not 0, as in torch's fused optimizers.
        """
        [group] = self.param_groups
        lr, mu, parameters = group["lr"], group["momentum"], group["params"]
        keep = 1 - getattr(self, "found_inf", 0)
        decay = 1 - lr * group["weight_decay"] * keep
        gradients = self._by_shape([parameter.grad for parameter in parameters])
        for shape, weights in self._by_shape(parameters).items():
            gradient = self._share(gradients[shape]).nan_to_num_(0.0, 0.0, 0.0)
            momentum = self.momentum[shape].lerp_(gradient, (1 - mu) * keep)
            nesterov = gradient.lerp_(momentum, mu)
            updates = self._all_gather(orthogonalize(nesterov), len(weights))
            updates = updates.float() * (0.2 * math.sqrt(max(shape)) * lr * keep)
            torch._foreach_mul_(weights, decay)
            torch._foreach_sub_(weights, list(updates))

    def _by_shape(self, tensors: Sequence[Tensor]) -> dict[tuple[int, int], list[Tensor]]:
        """Group views of the matrices by shape: Q, K and V separate, tall matrices transposed."""
        found: dict[tuple[int, int], list[Tensor]] = {}
        for tensor, parts in zip(tensors, self.parts, strict=True):
            for matrix in tensor.chunk(parts):
                wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
                found.setdefault(tuple(wide.shape), []).append(wide)
        return found

    def _share(self, matrices: list[Tensor]) -> Tensor:
        """Copy this process's share of matrices of one shape: (share, rows, columns).

        Zeros pad the last shares, because the all-gather needs equal sizes.
        """
        share = -(-len(matrices) // self.world_size)
        own = matrices[self.rank * share : (self.rank + 1) * share]
        filling = [torch.zeros_like(matrices[0]) for _ in range(share - len(own))]
        return torch.stack(own + filling)

    def _all_gather(self, share: Tensor, n: int) -> Tensor:
        """Gather all `n` matrices of a batch from the shares of the processes: (n, rows, columns)."""
        if self.world_size == 1:
            return share
        gathered = share.new_empty(self.world_size * len(share), *share.shape[1:])
        ALL_GATHER(gathered, share)
        return gathered[:n]

    @torch.no_grad()
    def state_dict(self) -> dict[str, object]:
        """Return the usual state, with the full "momentum_buffer" of every parameter.

        It gathers the shares, so every process must call it.
        """
        state = super().state_dict()
        whole = [torch.empty_like(parameter) for parameter in self.param_groups[0]["params"]]
        for shape, matrices in self._by_shape(whole).items():
            torch._foreach_copy_(matrices, list(self._all_gather(self.momentum[shape], len(matrices))))
        return {**state, "state": {i: {"momentum_buffer": momentum} for i, momentum in enumerate(whole)}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Load a `state_dict`, saved by any number of processes, and keep this process's share."""
        super().load_state_dict({**state_dict, "state": {}})
        keys = state_dict["param_groups"][0]["params"]
        whole = [state_dict["state"][key]["momentum_buffer"] for key in keys]
        for shape, matrices in self._by_shape(whole).items():
            self.momentum[shape].copy_(self._share(matrices))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Map each matrix U·S·V' (its singular value decomposition) to about U·V': (n, rows, columns).

    Five Newton–Schulz steps with the quintic of Jordan et al. 2024 bring every singular value to between
    about 0.7 and 1.2. Computes in, and returns, bf16 on GPUs that have it, fp32 elsewhere. Pass tall matrices
    transposed, because the products are rows x rows.
    """
    in_bf16 = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if in_bf16 else matrices.float()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


# ---------------------------------------------------------------- learning rate


def set_learning_rates(optimizers: list[torch.optim.Optimizer], step: int, s: Settings) -> float:
    """Set the learning rate of every group for step `step`, from 1. Returns the base learning rate."""
    factor = learning_rate_factor(
        step - 1, s.max_steps, s.warmup_steps, s.min_lr_ratio, s.schedule, s.cooldown_fraction
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
    return factor * s.learning_rate


def learning_rate_factor(
    steps_done: int,
    max_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    schedule: Schedule,
    cooldown_fraction: float,
) -> float:
    """Return the learning rate of the step after `steps_done`, of `max_steps`, as a fraction of the peak.

    Linear warm-up over `warmup_steps`, then a decay to `min_lr_ratio` at the end of training:
      cosine    half a cosine (Loshchilov & Hutter 2017)
      linear    a straight line
      wsd       constant, then a straight line over the last `cooldown_fraction` of all steps (Hu et al. 2024)
    """
    if steps_done < warmup_steps:
        return (steps_done + 1) / warmup_steps
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, max_steps - round(cooldown_fraction * max_steps))
    done = min(1.0, max(0.0, (steps_done - start) / max(1, max_steps - start)))
    decay = 0.5 * (1 - math.cos(math.pi * done)) if schedule == "cosine" else done
    return 1 - (1 - min_lr_ratio) * decay
