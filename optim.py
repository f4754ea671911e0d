"""Parameter groups, AdamW, Muon, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from settings import OptimizerName, Schedule, Settings

# ---------------------------------------------------------------- optimizers


def build_optimizers(
    model: nn.Module,
    name: OptimizerName,
    learning_rate: float,
    embedding_lr_ratio: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """The optimizers that share the model's parameters; each group has its peak learning rate as "peak_lr".

    Embeddings and the blocks' matrices decay; biases and LayerNorm's gains do not (as in GPT-3).
    adamw: AdamW for all. muon: Muon for the blocks' matrices, AdamW for the rest.
    Embeddings, including the tied head, use `embedding_lr_ratio` times the learning rate.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    embeddings = [p for n, p in named if n.endswith(("wte.weight", "wpe.weight"))]
    vectors = [p for _, p in named if p.dim() < 2]
    matrices = [(n, p) for n, p in named if p.dim() == 2 and not n.endswith(("wte.weight", "wpe.weight"))]
    adamw_groups = [
        {"params": embeddings, "peak_lr": embedding_lr_ratio * learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "peak_lr": learning_rate, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon":
        # Q, K and V are three maps that happen to be stored as one matrix.
        groups = [
            {
                "params": [p for n, p in matrices if n.endswith("c_attn.weight") == (parts == 3)],
                "parts": parts,
            }
            for parts in (1, 3)
        ]
        groups = [{**group, "peak_lr": learning_rate} for group in groups]
        optimizers.append(Muon(groups, learning_rate, weight_decay))
    else:
        group = {"params": [p for _, p in matrices], "peak_lr": learning_rate, "weight_decay": weight_decay}
        adamw_groups.append(group)
    # Betas 0.9/0.95 as in GPT-3, in one fused kernel (Loshchilov & Hutter 2019).
    adamw = torch.optim.AdamW(adamw_groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [*optimizers, adamw]


def step(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """One step of all optimizers from the gradients, which are cleared; no step where `finite` is 0.

    finite: a scalar on the device, 1.0 or 0.0. Checked on the device: skipping a bad step costs no
    synchronisation. In fp16 the scaler makes this check itself.
    """
    for optimizer in optimizers:
        if not scaler.is_enabled():
            optimizer.found_inf = 1 - finite
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is orthogonalised, so that every direction moves by the same amount.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with the scale of
    Liu et al. 2025, "Muon is Scalable for LLM Training" (0.2·sqrt(larger side), AdamW's usual step size), so
    that learning rate and weight decay are those of AdamW. The same step as `torch.optim.Muon` with
    adjust_lr_fn="match_rms_adamw"; beyond it, a parameter group's `parts` splits each of its matrices by rows
    into that many, and all processes share the work.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update from the gradients, which must be the same on every process.

        If an attribute `found_inf` is set and not 0, nothing changes, as with torch's fused optimizers.
        """
        keep = 1 - getattr(self, "found_inf", 0)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            # Each process orthogonalises every world_size-th matrix, then all exchange theirs.
            for begin in range(0, len(parameters), world_size):
                shared = parameters[begin : begin + world_size]
                updates = [torch.empty_like(p) for p in shared]
                for owner, parameter in enumerate(shared):
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    gradient = parameter.grad.nan_to_num(0.0, 0.0, 0.0)
                    momentum = state["momentum_buffer"].lerp_(gradient, (1 - group["momentum"]) * keep)
                    if owner == rank:
                        nesterov = gradient.lerp(momentum, group["momentum"])
                        pieces = [orthogonalize(piece) for piece in nesterov.chunk(group["parts"])]
                        updates[owner] = torch.cat(pieces).to(parameter.dtype)
                if world_size > 1:
                    for owner, update in enumerate(updates):
                        dist.broadcast(update, src=owner)
                for parameter, update in zip(shared, updates, strict=True):
                    rows, columns = parameter.shape[0] // group["parts"], parameter.shape[1]
                    parameter.mul_(1 - group["lr"] * group["weight_decay"] * keep)
                    parameter.sub_(update.mul_(0.2 * math.sqrt(max(rows, columns)) * group["lr"] * keep))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximately U·V' of a matrix (rows, columns) whose singular value decomposition is U·S·V'.

    Newton–Schulz: five steps of the quintic of Jordan et al. 2024 bring every singular value to between
    about 0.7 and 1.2; in bf16 on a GPU, in fp32 elsewhere.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.t() if tall else x


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
