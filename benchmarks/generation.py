"""Tokens/s of our sampling, with and without a cache, of transformers', and the most that memory allows.

    python benchmarks/generation.py                       # GPT-2 124M with random weights
    python benchmarks/generation.py --model gpt2 --new-tokens 128

All variants take turns in one process, so that a drift in the machine's speed affects all of them. The bound
is the time of the model's matrix-vector products alone: each weight is read once per token.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, GPTConfig
from support import cli, run_folder
from support.linear import Linear


@dataclass
class Settings:
    model: str = ""
    """A run, a folder or a Hub name. Default: random weights in the shape of GPT-2 124M."""
    prompt_tokens: int = 16
    """Length of the prompt."""
    new_tokens: int = 64
    """Tokens to generate."""
    rounds: int = 5
    """How often each variant is measured; the median counts."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print one JSON object: tokens/s of each variant."""


def without_cache(model: GPT, idx: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy decoding that recomputes the entire context for each token, the head only at its end."""
    for _ in range(new_tokens):
        idx = torch.cat([idx, model.head(model.hidden(idx)[:, -1:]).argmax(dim=-1)], dim=1)
    return idx


def products_alone(model: GPT, new_tokens: int, product: Callable) -> None:
    """The matrix-vector products of `new_tokens` tokens, and nothing else."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device=model.device) for layer in layers}
    for _ in range(new_tokens):
        for layer in layers:
            product(layer, inputs[layer.in_features])


def main() -> None:
    s = cli.parse(Settings, "Measure sampling.")
    import transformers

    torch.manual_seed(0)
    model = GPT.from_pretrained(run_folder.find_model(s.model)) if s.model else GPT(GPTConfig())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval().to(s.device)
    model.to(s.device)
    idx = torch.randint(model.config.vocab_size, (1, s.prompt_tokens), device=s.device)
    eight = torch.randint(model.config.vocab_size, (8, s.prompt_tokens), device=s.device)
    greedy = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": s.new_tokens}
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "the products alone": (1, lambda: products_alone(model, s.new_tokens, Linear.forward)),
        "the products, by nn.Linear": (
            1, lambda: products_alone(model, s.new_tokens, torch.nn.Linear.forward),
        ),
        "ours, greedy": (1, lambda: model.generate(idx, s.new_tokens, temperature=0)),
        "ours, top-k 50": (1, lambda: model.generate(idx, s.new_tokens, temperature=0.8, top_k=50)),
        "transformers generate, greedy": (
            1, lambda: theirs.generate(idx, max_new_tokens=s.new_tokens, **greedy),
        ),
        "without a cache, greedy": (1, lambda: without_cache(model, idx, s.new_tokens)),
        "ours, batch 8, greedy": (8, lambda: model.generate(eight, s.new_tokens, temperature=0)),
        "transformers generate, batch 8, greedy": (
            8, lambda: theirs.generate(eight, max_new_tokens=s.new_tokens, **greedy),
        ),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(s.rounds + 1):  # the first round warms up
            for name, (_, way) in ways.items():
                begin = time.perf_counter()
                way()
                if s.device != "cpu":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begin)
    speed = {n: rows * s.new_tokens / statistics.median(seconds[n][1:]) for n, (rows, _) in ways.items()}
    if s.json:
        print(json.dumps(speed))
        return
    print(
        f"{s.prompt_tokens} + {s.new_tokens} tokens, median of {s.rounds} rounds; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {s.device}, {torch.get_num_threads()} threads"
    )
    for name, tokens_per_sec in speed.items():
        share = speed["ours, greedy"] / tokens_per_sec
        print(f"{name:38} {tokens_per_sec:8.2f} tokens/s   ours is {share:.2f}x")


if __name__ == "__main__":
    cli.run(main)
