"""Compare a training step and sampling with other trainers, in turn, on this machine.

    python benchmarks/compare_trainers.py --peer build-nanogpt nanoGPT --dtype float32

Each --peer is a folder with build-nanogpt's train_gpt2.py or nanoGPT's model.py. Each side runs in separate
processes, A B C A B C, with GPT-2 124M, random weights and equal batches. On a GPU, benchmarks/gpu_report.py
does the same and compares the losses.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import peers
import torch

import bench
from model import GPT, GPTConfig
from support import cli, runtime
from support.cli import AtLeast1, Dtype


@dataclass
class Settings:
    peer: list[Path] = field(default_factory=list)
    """Folders with the peers' files."""
    data_dir: Path | None = None
    """Shards to read instead of random tokens."""
    micro_batch_size: AtLeast1 = 1
    """Sequences of 1,024 tokens per step."""
    new_tokens: AtLeast1 = 64
    """Tokens to sample after a prompt of one."""
    rounds: AtLeast1 = 3
    """How often each side is measured."""
    dtype: Dtype = "float32"
    """Precision of matrix products in training; sampling is in float32."""


def sampling_speed(folder: Path | None, new_tokens: int) -> float:
    """Measure tokens/s of one sample with the `generate` of the peer's model, or ours; 0 if it has none."""
    runtime.start("cpu", "float32")
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config) if folder is None else peers.build(peers.load(folder), config, config.vocab_size)
    if not hasattr(model, "generate"):
        return 0.0
    model.eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    model.generate(prompt, 4, top_k=50)
    begin = time.perf_counter()
    model.generate(prompt, new_tokens, top_k=50)
    return new_tokens / (time.perf_counter() - begin)


def main() -> None:
    s = cli.parse(Settings, "Compare a training step and sampling with other trainers'.")
    step = bench.Settings(
        micro_batch_size=s.micro_batch_size, device="cpu", dtype=s.dtype, data_dir=s.data_dir, steps=3
    )
    sides: dict[str, tuple[Callable[[], dict[str, object]], Path | None]] = {
        "ours": (lambda: bench.measure_apart(step), None)
    }
    for folder in s.peer:
        speed = lambda folder=folder: peers.apart(peers.speed, folder, step)  # noqa: E731
        sides[folder.resolve().name] = (speed, folder)
    rows, sampled = [], {name: [] for name in sides}
    for _ in range(s.rounds):
        for name, (measure, folder) in sides.items():
            result = measure()
            rows.append({"side": name, **{key: result[key] for key in ("tokens_per_sec", "memory_gb")}})
            sampled[name].append(peers.apart(sampling_speed, folder, s.new_tokens))
            print(f"{name:16} {result['tokens_per_sec']:8.1f} tokens/s in training", flush=True)
    table = peers.medians(rows)
    for row in table:
        row["sampled_per_sec"] = statistics.median(sampled[row["side"]]) or None
    print(f"\n{'':16} training   memory  ours / it   sampling")
    for row in table:
        sampling = f"{row['sampled_per_sec']:.1f}" if row["sampled_per_sec"] else "-"
        print(
            f"{row['side']:16} {row['tokens_per_sec']:8.1f} {row['memory_gb']:6.2f} GB"
            f" {row['ours_relative']:10.3f} {sampling:>10}"
        )


if __name__ == "__main__":
    cli.run(main)
