"""train_gpt2.py over a smaller vocabulary, and with ingredients that no preset has, to see what they save.

    python benchmarks/trial.py 2048 soap,power-1.2 --optimizer muon …      # then the flags of train_gpt2.py

benchmarks/recipe.py runs this. Each ingredient replaces a part of optim.py in this process, on one process
only; what turns out to save tokens moves there, the rest goes.
"""

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import optim
import train_gpt2
from support import cli
from support.cli import UserError


class SoapMuon(optim.Muon):
    """Muon whose momentum is first scaled as Adam would, in the eigenbasis of Shampoo's two factors.

    Vyas et al. 2024, "SOAP", before orthogonalisation as in modded-nanogpt's pull request 278: basis anew
    every `every` steps, all averages with 0.9, the size of the momentum kept. Of one process.
    """

    every = 10
    steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        [group] = self.param_groups
        lr, mu, parameters = group["lr"], group["momentum"], group["params"]
        gradients = self._by_shape([parameter.grad for parameter in parameters])
        for shape, weights in self._by_shape(parameters).items():
            gradient = torch.stack(gradients[shape]).float()
            momentum = self.momentum[shape].lerp_(gradient, 1 - mu)
            nesterov = gradient.lerp(momentum, mu)
            updates = optim.orthogonalize(self.scaled(shape, gradient, nesterov)).float()
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(weights, list(updates * (0.2 * math.sqrt(max(shape)) * lr)))
        self.steps += 1

    def scaled(self, shape: tuple[int, int], gradient: Tensor, update: Tensor) -> Tensor:
        """`update` over the root of the gradients' mean square, both in the eigenbasis; size as before."""
        if not hasattr(self, "factors"):
            self.factors: dict[tuple[int, int], list[Tensor]] = {}
            self.bases: dict[tuple[int, int], list[Tensor]] = {}
            self.squares: dict[tuple[int, int], Tensor] = {}
        products = [gradient @ gradient.mT, gradient.mT @ gradient]
        if shape not in self.factors:
            self.factors[shape] = products
            self.bases[shape] = [torch.linalg.eigh(f).eigenvectors.flip(-1) for f in products]
            self.squares[shape] = torch.zeros_like(gradient)
        for factor, product in zip(self.factors[shape], products, strict=True):
            factor.lerp_(product, 0.1)
        if self.steps % self.every == 0:  # one power iteration, kept orthogonal
            pairs = zip(self.factors[shape], self.bases[shape], strict=True)
            self.bases[shape] = [torch.linalg.qr(factor @ basis).Q for factor, basis in pairs]
        left, right = self.bases[shape]
        self.squares[shape].lerp_((left.mT @ gradient @ right).square(), 0.1)
        rotated = (left.mT @ update @ right) / self.squares[shape].sqrt().clamp_min(1e-12)
        result = left @ rotated @ right.mT
        size = torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True)
        return result * (size / torch.linalg.vector_norm(result, dim=(1, 2), keepdim=True).clamp_min(1e-12))


Build = Callable[..., list[torch.optim.Optimizer]]


def with_rates(build: Build, positions: float, vectors: float) -> Build:
    """`optim.build_optimizers` with other rates of the position embeddings and of the vectors."""

    def build_optimizers(*args: object, **named: object) -> list[torch.optim.Optimizer]:
        optimizers = build(*args, **named)
        embeddings, *others = optimizers[-1].param_groups
        others[0]["peak_lr"] *= vectors
        wpe = min(embeddings["params"], key=lambda p: p.numel())
        embeddings["params"] = [p for p in embeddings["params"] if p is not wpe]
        optimizers[-1].add_param_group(
            {**embeddings, "params": [wpe], "peak_lr": embeddings["peak_lr"] * positions}
        )
        return optimizers

    return build_optimizers


def with_power(factor: Callable[..., float], power: float) -> Callable[..., float]:
    """The schedule whose decay to 0 is a power of the straight line."""

    def learning_rate_factor(done: int, steps: int, warmup: int, *rest: object) -> float:
        value = factor(done, steps, warmup, *rest)
        return value if done < warmup else value**power

    return learning_rate_factor


def with_beta2(build: Build, which: str, beta2: float) -> Build:
    """`optim.build_optimizers` with another beta2 of AdamW's: for embeddings ("e"), vectors ("v") or all."""

    def build_optimizers(*args: object, **named: object) -> list[torch.optim.Optimizer]:
        optimizers = build(*args, **named)
        groups = optimizers[-1].param_groups
        for group in {"e": groups[:1], "v": groups[1:2], "": groups}[which]:
            group["betas"] = (0.9, beta2)
        return optimizers

    return build_optimizers


def use(names: list[str]) -> None:
    """Put the named ingredients into this process."""
    for name in names:
        kind, _, value = name.partition("-")
        if kind == "soap":
            SoapMuon.__name__ = optim.Muon.__name__  # as checkpoints know it
            SoapMuon.every = int(value or SoapMuon.every)
            optim.Muon = SoapMuon
        elif kind == "power":
            optim.learning_rate_factor = with_power(optim.learning_rate_factor, float(value))
        elif kind == "positions":
            optim.build_optimizers = with_rates(optim.build_optimizers, float(value), 1.0)
        elif kind == "vectors":
            optim.build_optimizers = with_rates(optim.build_optimizers, 1.0, float(value))
        elif kind in ("beta2", "beta2e", "beta2v"):
            which = kind.removeprefix("beta2")
            optim.build_optimizers = with_beta2(optim.build_optimizers, which, float(value))
        else:
            raise UserError(f"{name}: not one of soap-N and power-, positions-, vectors-, beta2[ev]-X")


if __name__ == "__main__":
    train_gpt2.tokenizer = types.SimpleNamespace(VOCAB_SIZE=int(sys.argv.pop(1)))
    use([name for name in sys.argv.pop(1).split(",") if name])
    cli.run(train_gpt2.main)
