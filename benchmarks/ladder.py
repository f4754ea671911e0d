"""Shapes and recipes that benchmarks/recipe.py compares."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

from settings import PRESETS
from support import tokenizer


@dataclass(frozen=True)
class Rung:
    n_layer: int
    n_embd: int
    total_batch_size: int
    sequence_length: int = 256
    vocab_size: int = 2048

    @property
    def block_parameters(self) -> int:
        return 12 * self.n_layer * self.n_embd**2

    def steps(self, length: float) -> int:
        return max(1, round(length * self.block_parameters / self.total_batch_size))

    def flags(self) -> dict[str, object]:
        names = ("n_layer", "n_embd", "total_batch_size", "sequence_length")
        shape = {name: getattr(self, name) for name in names}
        return {**shape, "block_size": self.sequence_length, "n_head": self.n_embd // 64}


RUNGS = {
    "2x64": Rung(2, 64, 1024),
    "4x64": Rung(4, 64, 1024),
    "2x128": Rung(2, 128, 2048),
    "2x192": Rung(2, 192, 4096),
    "4x192": Rung(4, 192, 4096),
    "6x256": Rung(6, 256, 8192),
    "12x768": Rung(12, 768, 65_536, 1024, tokenizer.VOCAB_SIZE),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The sweep searches its learning rate, starting at `learning_rate`."""

    learning_rate: float
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.02  # fraction of all steps
    min_lr_ratio: float = 0.0
    cooldown_fraction: float = 0.3
    weight_decay: float = 0.1
    embedding_lr_ratio: float = 1.0
    adam_beta2: float = 0.95

    @classmethod
    def of_preset(cls, name: str) -> "Recipe":
        p = PRESETS[name]
        names = [f.name for f in dataclasses.fields(cls) if hasattr(p, f.name) and f.name != "learning_rate"]
        rate = p.learning_rate * 2  # small models take larger rates
        return cls(rate, warmup=p.warmup_steps / p.max_steps, **{name: getattr(p, name) for name in names})

    def flags(self, steps: int) -> dict[str, object]:
        values = dataclasses.asdict(self)
        values["warmup_steps"] = round(values.pop("warmup") * steps)
        return values


REFERENCE = "reference"
RECIPES = {
    REFERENCE: Recipe.of_preset("gpt2-124m"),
    "adamw": Recipe(4.8e-3, schedule="linear", warmup=0.1),
    "muon": Recipe.of_preset("gpt2-124m-muon"),
}
# Recipes that differ in one thing from the recipe with which their name begins.
VARIANTS = {
    "adamw": {
        "warmup-2": {"warmup": 0.02},
        "cosine": {"schedule": "cosine"},
        "no-decay": {"weight_decay": 0.0},
        "decay": {"weight_decay": 0.4},
        "embedding-2": {"embedding_lr_ratio": 2.0},
        "embedding-4": {"embedding_lr_ratio": 4.0},
        "embedding-8": {"embedding_lr_ratio": 8.0},
    },
    "adamw-embedding-2": {"beta2-99": {"adam_beta2": 0.99}},
    "adamw-embedding-4": {"beta2-99": {"adam_beta2": 0.99}},
    "muon": {
        "beta2-95": {"adam_beta2": 0.95},
        "beta2-997": {"adam_beta2": 0.997},
    },
    "muon-beta2-95": {
        "cooldown-30": {"cooldown_fraction": 0.3},
        "linear": {"schedule": "linear"},
        "warmup-10": {"warmup": 0.1},
        "no-decay": {"weight_decay": 0.0},
        "decay": {"weight_decay": 0.4},
        "embedding-1": {"embedding_lr_ratio": 1.0},
        "embedding-4": {"embedding_lr_ratio": 4.0},
    },
}
for base, variants in VARIANTS.items():
    for name, changes in variants.items():
        RECIPES[f"{base}-{name}"] = dataclasses.replace(RECIPES[base], **changes)


def base_of(recipe: str) -> str | None:
    """Return the base of a variant: the recipe with the longest name that begins the variant's."""
    while "-" in recipe:
        recipe = recipe.rpartition("-")[0]
        if recipe in RECIPES:
            return recipe
    return None
