"""train_gpt2.py over a smaller vocabulary, and with ingredients that no preset has, to see what they save.

    python benchmarks/trial.py 2048 normuon,cautious --optimizer muon …      # then the flags of train_gpt2.py

benchmarks/recipe.py runs this. Each ingredient replaces a part of optim.py or model.py in this process, on
one process only; what turns out to save tokens moves there, the rest goes.
"""

import itertools
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import model
import optim
import train_gpt2
from support import cli
from support.cli import UserError

# Amsel et al. 2025, "The Polar Express", for singular values from 1e-3, with a safety factor of 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
CUBIC = ((2.0, -1.5, 0.5),) * 12


def orthogonalizer(coefficients: tuple[tuple[float, float, float], ...]) -> Callable[[Tensor], Tensor]:
    """`optim.orthogonalize` with other polynomials a·x + b·x³ + c·x⁵."""

    def orthogonalize(matrices: Tensor) -> Tensor:
        x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
        x = x / (1.02 * torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)).clamp_min(1e-7)
        for a, b, c in coefficients:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    return orthogonalize


class TrialMuon(optim.Muon):
    """Muon with the ingredients named in `with_` (of one process)."""

    with_: frozenset[str] = frozenset()
    steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        [group] = self.param_groups
        lr, mu, parameters = group["lr"], group["momentum"], group["params"]
        self.steps += 1
        if "momentum-warmup" in self.with_:  # from 0.85 over 300 steps
            mu = mu - 0.1 * max(0.0, 1 - self.steps / 300)
        gradients = self._by_shape([parameter.grad for parameter in parameters])
        for shape, weights in self._by_shape(parameters).items():
            gradient = torch.stack(gradients[shape])
            momentum = self.momentum[shape].lerp_(gradient, 1 - mu)
            updates = optim.orthogonalize(gradient.lerp_(momentum, mu)).float()
            if "normuon" in self.with_:
                updates = self.normalized(shape, updates)
            updates *= 0.2 * math.sqrt(max(shape)) * lr
            w = torch.stack(weights)
            decay = lr * group["weight_decay"] * w
            if "cautious" in self.with_:  # only where the update shrinks the weight as well
                decay *= (updates * w) > 0
            torch._foreach_sub_(weights, list(updates + decay))

    def normalized(self, shape: tuple[int, int], updates: Tensor) -> Tensor:
        """Li et al. 2025, "NorMuon": rows of equal size over time; here along the longer side."""
        if not hasattr(self, "second"):
            self.second: dict[tuple[int, int], Tensor] = {}
        along = 2 if shape[0] == shape[1] else 1
        now = updates.square().mean(dim=along, keepdim=True)
        before = self.second.setdefault(shape, torch.zeros_like(now))
        before.lerp_(now, 0.05)
        size = torch.linalg.vector_norm(updates, dim=(1, 2), keepdim=True)
        updates = updates / before.sqrt().clamp_min(1e-10)
        return updates * (size / torch.linalg.vector_norm(updates, dim=(1, 2), keepdim=True))


def with_betas(optimizer: type, betas: tuple[float, float]) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer with these betas, whatever it is asked for."""
    return lambda *args, **options: optimizer(*args, **{**options, "betas": betas})


def without_embedding_decay(optimizer: type) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer, whose first group is the embeddings, without weight decay for them."""
    return lambda groups, **options: optimizer([{**groups[0], "weight_decay": 0.0}, *groups[1:]], **options)


def averaging(step: Callable[..., None], max_steps: int) -> Callable[..., None]:
    """`optim.step` that ends with the weights' average over the last 5 % of the steps."""
    last = max(1, max_steps // 20)
    means: list[Tensor] = []
    counter = itertools.count(1 + last - max_steps)  # 1 for the first step of the average

    @torch.no_grad()
    def averaged(optimizers: list[torch.optim.Optimizer], *args: object, **named: object) -> None:
        step(optimizers, *args, **named)
        weights = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        n = next(counter)
        if n == 1:
            means.extend(p.clone() for p in weights)
        elif n > 1:
            torch._foreach_lerp_(means, weights, 1 / n)
        if n == last:
            torch._foreach_copy_(weights, means)

    return averaged


def use(names: list[str]) -> None:
    """Put the named ingredients into this process."""
    polynomials = {"polar-express": POLAR_EXPRESS, "cubic": CUBIC}
    known = {
        *polynomials,
        *("normuon", "cautious", "momentum-warmup", "zero-init", "betas-80", "average", "no-embedding-decay"),
    }
    for name in names:
        if name not in known:
            raise UserError(f"{name}: not one of {', '.join(sorted(known))}")
        if name in polynomials:
            optim.orthogonalize = orthogonalizer(polynomials[name])
        elif name == "zero-init":
            initialize = model.GPT._init_weights

            @torch.no_grad()
            def with_zeros(gpt: model.GPT, initialize: Callable[[model.GPT], None] = initialize) -> None:
                initialize(gpt)
                for key, parameter in gpt.named_parameters():
                    if key.endswith("c_proj.weight"):
                        parameter.zero_()

            model.GPT._init_weights = with_zeros
        elif name == "average":
            max_steps = int(sys.argv[sys.argv.index("--max-steps") + 1])
            optim.step = averaging(optim.step, max_steps)
        elif name == "no-embedding-decay":
            torch.optim.AdamW = without_embedding_decay(torch.optim.AdamW)
        elif name == "betas-80":
            torch.optim.AdamW = with_betas(torch.optim.AdamW, (0.8, 0.95))
    if names:
        TrialMuon.__name__ = optim.Muon.__name__  # as checkpoints know it
        TrialMuon.with_ = frozenset(names)
        optim.Muon = TrialMuon


if __name__ == "__main__":
    train_gpt2.tokenizer = types.SimpleNamespace(VOCAB_SIZE=int(sys.argv.pop(1)))
    use([name for name in sys.argv.pop(1).split(",") if name])
    cli.run(train_gpt2.main)
