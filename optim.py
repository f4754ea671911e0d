"""Parameter groups, AdamW, Muon, and the learning rate of each step."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from settings import OptimizerName, Schedule, Settings
from support.pretrained import is_block_matrix

# torch 2.13 renamed the second to the first.
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
    """The optimizers that share the model's parameters; each group has its peak learning rate as "peak_lr".

    Embeddings and the blocks' matrices decay; biases and LayerNorm's gains do not (as in GPT-3).
    adamw: AdamW for all. muon: Muon for the blocks' matrices, AdamW for the rest.
    Embeddings, including the tied head, use `embedding_lr_ratio` times the learning rate.
    AdamW's betas are 0.9 and `adam_beta2`, 0.95 in GPT-3 (Brown et al. 2020).
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
        # Q, K and V are three maps that happen to be stored as one matrix.
        parts = [3 if n.endswith("c_attn.weight") else 1 for n, _ in matrices]
        optimizers.append(Muon([p for _, p in matrices], parts, learning_rate, weight_decay))
    else:
        group = {"params": [p for _, p in matrices], "peak_lr": learning_rate, "weight_decay": weight_decay}
        adamw_groups.append(group)
    # One fused kernel (Loshchilov & Hutter 2019).
    adamw = torch.optim.AdamW(adamw_groups, learning_rate, betas=(0.9, adam_beta2), eps=1e-8, fused=True)
    return [*optimizers, adamw]


def step(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """One step of all optimizers from the gradients, which are cleared; no step where `finite` is 0.

    finite: a scalar on the device, 1.0 or 0.0. Checked on the device: skipping a bad step costs no
    synchronisation. In fp16 the gradients must have been through `scaler.unscale_`, whose findings in
    any optimizer's gradients set the scale of the next step.
    """
    # Not scaler.step: it looks at one optimizer at a time, although clipping has spread a NaN to all, and
    # it waits for the device unless the optimizer is one of torch's fused ones.
    found_inf = 1 - finite
    # On MPS torch's AdamW may ignore found_inf (pytorch/pytorch#186360), and each step is waited for anyway.
    skip = finite.device.type == "mps" and finite.item() == 0
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scaler.update()


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is orthogonalised, so that every direction moves by the same amount.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with the scale of
    Liu et al. 2025, "Muon is Scalable for LLM Training" (0.2·sqrt(larger side), AdamW's usual step size), so
    that learning rate and weight decay are those of AdamW. For each matrix W, and for Q, K and V apart, with
    its gradient G, momentum M, and O(X) the orthogonal matrix nearest to X:

        M = mu·M + (1 - mu)·G
        W = W - lr·weight_decay·W - lr·0.2·sqrt(larger side)·O(mu·M + (1 - mu)·G)

    which is the step of `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw".

    Matrices of one shape are worked on as one batch. Each process of a group keeps the momentum of an equal
    share of every batch, orthogonalises that share, and receives the other updates in the precision in which
    they were computed; the result does not depend on the number of processes.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        parts: Sequence[int],
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """params: two-dimensional. parts: into how many matrices each one's rows are split, 3 for Q, K, V."""
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "peak_lr": learning_rate})
        self.parts = parts
        alone = not dist.is_initialized()
        self.rank, self.world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        # By the matrices' shape: this process's share of their momentum, (share, rows, columns).
        self.momentum = {
            shape: torch.zeros_like(self._share(matrices))
            for shape, matrices in self._by_shape(params).items()
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update from the gradients, which every parameter must have, the same on every process.

        If an attribute `found_inf` is set and not 0, nothing changes, as with torch's fused optimizers.
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
        """Views of the matrices in a tensor per parameter, by shape: Q, K, V apart, tall ones transposed."""
        found: dict[tuple[int, int], list[Tensor]] = {}
        for tensor, parts in zip(tensors, self.parts, strict=True):
            for matrix in tensor.chunk(parts):
                wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
                found.setdefault(tuple(wide.shape), []).append(wide)
        return found

    def _share(self, matrices: list[Tensor]) -> Tensor:
        """A copy of this process's share of matrices of one shape; zeros fill it up where there are too few.

        (share, rows, columns), of the same size on every process, as the all-gather needs it.
        """
        share = -(-len(matrices) // self.world_size)
        own = matrices[self.rank * share : (self.rank + 1) * share]
        filling = [torch.zeros_like(matrices[0]) for _ in range(share - len(own))]
        return torch.stack(own + filling)

    def _all_gather(self, share: Tensor, n: int) -> Tensor:
        """All `n` matrices of a batch, (n, rows, columns), from the share that each process has of them."""
        if self.world_size == 1:
            return share
        gathered = share.new_empty(self.world_size * len(share), *share.shape[1:])
        ALL_GATHER(gathered, share)
        return gathered[:n]

    @torch.no_grad()
    def state_dict(self) -> dict[str, object]:
        """The usual state, with the whole "momentum_buffer" of every parameter.

        Every process has to call it, as it gathers their shares.
        """
        state = super().state_dict()
        whole = [torch.empty_like(parameter) for parameter in self.param_groups[0]["params"]]
        for shape, matrices in self._by_shape(whole).items():
            torch._foreach_copy_(matrices, list(self._all_gather(self.momentum[shape], len(matrices))))
        return {**state, "state": {i: {"momentum_buffer": momentum} for i, momentum in enumerate(whole)}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take over what `state_dict` returned on any number of processes, and keep this process's share."""
        super().load_state_dict({**state_dict, "state": {}})
        keys = state_dict["param_groups"][0]["params"]
        whole = [state_dict["state"][key]["momentum_buffer"] for key in keys]
        for shape, matrices in self._by_shape(whole).items():
            self.momentum[shape].copy_(self._share(matrices))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately U·V' of each of `matrices` (n, rows, columns), its singular value decomposition U·S·V'.

    Newton–Schulz: five steps of the quintic of Jordan et al. 2024 bring every singular value to between
    about 0.7 and 1.2; in bf16 on GPUs that have it, in fp32 elsewhere, which is the dtype of the result. Tall
    matrices are better given transposed: the products are rows x rows.
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
    """Set every group's learning rate for optimizer step `step` (1 for the first); returns the base rate."""
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
    """The fraction of the peak learning rate for the step after `steps_done`, of `max_steps`.

    Linear warm-up to 1 over `warmup_steps`, then down to `min_lr_ratio` at the end of training:
      cosine    half a cosine (Loshchilov & Hutter 2017)
      linear    a straight line
      wsd       1, then a straight line over the last `cooldown_fraction` of all steps (Hu et al. 2024)
    """
    if steps_done < warmup_steps:
        return (steps_done + 1) / warmup_steps
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, max_steps - round(cooldown_fraction * max_steps))
    done = min(1.0, max(0.0, (steps_done - start) / max(1, max_steps - start)))
    decay = 0.5 * (1 - math.cos(math.pi * done)) if schedule == "cosine" else done
    return 1 - (1 - min_lr_ratio) * decay
