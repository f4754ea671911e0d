"""Measure HellaSwag examples/s, and compare with scoring the four full rows of one example at a time.

    python benchmarks/hellaswag_speed.py --data hellaswag_val.jsonl --limit 100

Both ways take turns in one process. The losses of every ending must agree.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import hellaswag
from model import GPT, GPTConfig
from support import cli, hardware, run_files, runtime
from support.cli import AtLeast1, Dtype


@dataclass
class Settings:
    model: str = ""
    """A run, a folder or a Hub name. Default: random weights in the shape of GPT-2 124M."""
    data: Path | None = None
    """A local HellaSwag file. Default: the published validation file, fetched once."""
    limit: int = 100
    """Only the first N examples. 0: all."""
    rounds: AtLeast1 = 3
    """How often each way is measured; the median counts."""
    device: str = "auto"
    """cpu or cuda."""
    dtype: Dtype = "auto"
    """Precision of matrix products."""
    json: bool = False
    """Print one JSON object: examples/s of each way, and how far their losses differ."""


@torch.no_grad()
def four_rows(model: GPT, example: hellaswag.Example) -> torch.Tensor:
    """Summed loss of each ending, (4,), from four padded rows with logits at every position."""
    rows = [example.context + ending for ending in example.endings]
    T = max(map(len, rows))
    idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=model.device)
    logits, _ = model(idx)
    targets = idx[:, 1:].clone()
    for target, row in zip(targets, rows, strict=True):
        target[: len(example.context) - 1] = -100
        target[len(row) - 1 :] = -100
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(4, -1).sum(dim=1).cpu()


def main() -> None:
    s = cli.parse(Settings, "Measure HellaSwag.")
    rt = runtime.start(s.device, s.dtype)
    torch.manual_seed(0)
    model = GPT.from_pretrained(run_files.find_model(s.model)) if s.model else GPT(GPTConfig())
    model.to(rt.device)
    examples = hellaswag.load(s.data, limit=s.limit)
    todo = hellaswag.batches(examples, hellaswag.BATCH_TOKENS[rt.device.type])
    in_order = [example for batch in todo for example in batch]
    seconds: dict[str, list[float]] = {"four full rows, one example at a time": [], "ours": []}
    for _ in range(s.rounds + 1):  # the first round warms up
        begin = time.perf_counter()
        with rt.autocast():
            theirs = torch.stack([four_rows(model, example) for example in in_order])
        middle = time.perf_counter()
        with rt.autocast():
            ours = torch.cat([hellaswag.ending_losses(model, batch) for batch in todo])
        for name, duration in zip(seconds, (middle - begin, time.perf_counter() - middle), strict=True):
            seconds[name].append(duration)
    medians = [statistics.median(durations[1:]) for durations in seconds.values()]
    lengths = torch.tensor([example.lengths for example in in_order])
    summed, mean = (float(d.abs().max()) for d in (ours - theirs, (ours - theirs) / lengths))
    if s.json:
        rates = {name: len(examples) / median for name, median in zip(seconds, medians, strict=True)}
        print(json.dumps({**rates, "ratio": medians[0] / medians[1], "largest mean loss difference": mean}))
        return
    for name, median in zip(seconds, medians, strict=True):
        print(f"{name:40} {len(examples) / median:8.2f} examples/s")
    print(f"ratio {medians[0] / medians[1]:.2f}; largest difference of an ending's summed loss", end=" ")
    print(f"{summed:.1e}; its mean token loss {mean:.1e}")
    print(
        f"{len(examples)} examples, median of {s.rounds} rounds; torch {torch.__version__}, "
        f"{hardware.describe(rt)['name']}, {rt.dtype}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    cli.run(main)
