"""Parameter groups, optimizers and learning-rate schedules."""

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "linear", "wsd", "constant"]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and embeddings decay; biases and LayerNorm's gains do not (as in GPT-3's recipe)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with betas 0.9/0.95 and eps 1e-8, in one fused kernel."""
    groups = param_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate_factor(
    step: int,
    max_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    schedule: Schedule,
    cooldown_fraction: float,
) -> float:
    """The share of the peak learning rate that update `step` (0 for the first) of `max_steps` takes.

    Linear warm-up to 1 over `warmup_steps`, then down to `min_lr_ratio` at the end of training:
      cosine    half a cosine (Loshchilov & Hutter 2017)
      linear    a straight line
      wsd       1, then a straight line over the last `cooldown_fraction` of all steps (Hu et al. 2024)
      constant  1 throughout
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, max_steps - round(cooldown_fraction * max_steps))
    done = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    if schedule == "constant":
        decay = 0.0
    elif schedule == "cosine":
        decay = 0.5 * (1 - math.cos(math.pi * done))
    else:
        decay = done
    return 1 - (1 - min_lr_ratio) * decay
