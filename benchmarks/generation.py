"""Measure sampling: tokens/s with and without our cache, of transformers, and the bound by memory.

    python benchmarks/generation.py                       # GPT-2 124M with random weights
    python benchmarks/generation.py --model gpt2 --new-tokens 128

In fp32, and in the precision that generate.py chooses on this machine. All variants take turns in one
process, so that a drift in the speed of the machine affects all of them. The bound is the time of the model's
matrix-vector products alone, in which each weight is read once per token.
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
from support import cli, run_files, runtime
from support.cli import AtLeast1
from support.linear import Linear, cast_once
from support.runtime import Runtime


@dataclass
class Settings:
    model: str = ""
    """A run, a folder or a Hub name. Default: random weights in the shape of GPT-2 124M."""
    prompt_tokens: AtLeast1 = 16
    """Length of the prompt."""
    new_tokens: AtLeast1 = 64
    """Tokens to generate."""
    rounds: AtLeast1 = 5
    """How often each variant is measured; the median counts."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print one JSON object: precision -> tokens/s of each variant."""


def without_cache(model: GPT, idx: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Decode greedily, recomputing the entire context for each token, and the head only at its end."""
    for _ in range(new_tokens):
        idx = torch.cat([idx, model.head(model.hidden(idx)[:, -1:]).argmax(dim=-1)], dim=1)
    return idx


def products_alone(model: GPT, new_tokens: int, product: Callable) -> None:
    """Compute only the matrix-vector products of `new_tokens` tokens."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device=model.device) for layer in layers}
    for _ in range(new_tokens):
        for layer in layers:
            product(layer, inputs[layer.in_features])


def variants(s: Settings, model: GPT, rt: Runtime, folder: str) -> dict[str, tuple[int, Callable]]:
    """Return the variants in one precision: name -> (samples at once, one call)."""
    import transformers

    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=rt.dtype).eval().to(s.device)
    idx = torch.randint(model.config.vocab_size, (1, s.prompt_tokens), device=s.device)
    eight = torch.randint(model.config.vocab_size, (8, s.prompt_tokens), device=s.device)
    fixed = {
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": s.new_tokens,
        "min_new_tokens": s.new_tokens,
    }

    def in_precision(work: Callable[..., object], *args: object, **options: object) -> Callable[[], None]:
        """Call our `generate` like generate.py: the weights are cast before, not for each token."""

        def call() -> None:
            with rt.autocast(), cast_once(model):
                work(*args, **options)

        return call

    return {
        "the products alone": (1, in_precision(products_alone, model, s.new_tokens, Linear.forward)),
        "the products, by nn.Linear": (
            1, in_precision(products_alone, model, s.new_tokens, torch.nn.Linear.forward),
        ),
        "ours, greedy": (1, in_precision(model.generate, idx, s.new_tokens, temperature=0)),
        "ours, top-k 50": (1, in_precision(model.generate, idx, s.new_tokens, temperature=0.8, top_k=50)),
        "transformers generate, greedy": (1, lambda: theirs.generate(idx, **fixed)),
        "without a cache, greedy": (1, in_precision(without_cache, model, idx, s.new_tokens)),
        "ours, batch 8, greedy": (8, in_precision(model.generate, eight, s.new_tokens, temperature=0)),
        "transformers generate, batch 8, greedy": (8, lambda: theirs.generate(eight, **fixed)),
    }  # fmt: skip


def main() -> None:
    s = cli.parse(Settings, "Measure sampling.")
    import transformers

    torch.manual_seed(0)
    model = GPT.from_pretrained(run_files.find_model(s.model)) if s.model else GPT(GPTConfig())
    model.to(s.device)
    device = torch.device(s.device)
    dtypes = dict.fromkeys((torch.float32, runtime.pick_dtype(device, "auto")))
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ways = {
            (str(dtype).removeprefix("torch."), name): way
            for dtype in dtypes
            for name, way in variants(s, model, Runtime(device, dtype), folder).items()
        }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    with torch.inference_mode():
        for _ in range(s.rounds + 1):  # the first round warms up
            for key, (_, way) in ways.items():
                begin = time.perf_counter()
                way()
                if s.device != "cpu":
                    torch.cuda.synchronize()
                seconds[key].append(time.perf_counter() - begin)
    speed: dict[str, dict[str, float]] = {}
    for (dtype, name), (rows, _) in ways.items():
        median = statistics.median(seconds[dtype, name][1:])
        speed.setdefault(dtype, {})[name] = rows * s.new_tokens / median
    if s.json:
        print(json.dumps(speed))
        return
    print(
        f"{s.prompt_tokens} + {s.new_tokens} tokens, median of {s.rounds} rounds; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {s.device}, {torch.get_num_threads()} threads"
    )
    for dtype, rates in speed.items():
        for name, tokens_per_sec in rates.items():
            share = rates["ours, greedy"] / tokens_per_sec
            print(f"{dtype:9} {name:38} {tokens_per_sec:8.2f} tokens/s   ours is {share:.2f}x")


if __name__ == "__main__":
    cli.run(main)
