"""Which optimizer needs the fewest tokens, each at its own best learning rate.

    python benchmarks/optimizers.py --data-dir DIR            # a small model on a CPU
    python benchmarks/optimizers.py --data-dir DIR --gpu      # GPT-2 124M on one GPU

Trains the same model on the same data with the recipe's AdamW, the tuned AdamW and Muon, with equal seeds and
each at every learning rate of its list. An interrupted call continues where it stopped. Prints the tokens
and the seconds of training after which each optimizer's best run had the loss that the recipe's best run ends
with, and draws the curves.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

from settings import PRESETS
from support import cli, files, metrics
from support.cli import Dtype, UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    data_dir: Path = Path("data/builtin")
    """Folder of token shards."""
    out_dir: Path = Path("benchmarks/log")
    """Folder for the runs, results.json and optimizers.png."""
    gpu: bool = False
    """GPT-2 124M with its own sequence length, rather than a model that a CPU trains in minutes."""
    max_steps: int = 0
    """Steps a run. 0: 200, or 600 with --gpu."""
    dtype: Dtype = "auto"
    """Precision of matrix products."""


@dataclass(frozen=True)
class Candidate:
    name: str
    preset: str
    learning_rates: tuple[float, ...]

    def flags(self, max_steps: int) -> list[str]:
        """The preset's optimizer and schedule, its warm-up in proportion to the length of the run."""
        p = PRESETS[self.preset]
        return [
            *("--optimizer", p.optimizer, "--schedule", p.schedule, "--min-lr-ratio", str(p.min_lr_ratio)),
            *("--embedding-lr-ratio", str(p.embedding_lr_ratio)),
            *("--warmup-steps", str(round(p.warmup_steps / p.max_steps * max_steps))),
        ]


CPU_CANDIDATES = (
    Candidate("recipe's AdamW", "gpt2-124m", (1e-3, 2e-3, 4e-3, 8e-3)),
    Candidate("tuned AdamW", "gpt2-124m-tuned", (1e-3, 2e-3, 4e-3, 8e-3)),
    Candidate("Muon", "gpt2-124m-muon", (1e-3, 2e-3, 4e-3, 8e-3)),
)
CPU_MODEL = (
    "--n-layer 4 --n-head 4 --n-embd 128 --sequence-length 128 --block-size 128 "
    "--total-batch-size 1024 --val-tokens 16384 --val-interval 20"
)

GPU_CANDIDATES = (
    Candidate("recipe's AdamW", "gpt2-124m", (3e-4, 6e-4, 1.2e-3, 2.4e-3)),
    Candidate("tuned AdamW", "gpt2-124m-tuned", (6e-4, 1.2e-3, 1.8e-3, 3.6e-3)),
    Candidate("Muon", "gpt2-124m-muon", (6e-4, 1.2e-3, 1.8e-3, 3.6e-3)),
)
GPU_MODEL = "--total-batch-size 65536 --val-tokens 524288 --val-interval 25"


def train(s: Settings, candidate: Candidate, learning_rate: float, max_steps: int) -> Path:
    """One run, or the rest of it; returns its folder."""
    run = s.out_dir / f"{candidate.preset}-{learning_rate:g}"
    if not (run / "summary.json").exists():
        command = [sys.executable, str(ROOT / "train_gpt2.py"), "--data-dir", str(s.data_dir)]
        command += ["--out-dir", str(run), "--resume", "--keep-checkpoints", "1"]
        command += ["--max-steps", str(max_steps), "--learning-rate", str(learning_rate), "--dtype", s.dtype]
        command += candidate.flags(max_steps)
        command += ["--sample-interval", "0", *(GPU_MODEL if s.gpu else CPU_MODEL).split()]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(cli.last_error(done.stderr))
    return run


def curve(run: Path) -> dict[str, np.ndarray]:
    """A run's validation losses, with the tokens and the seconds of training behind each."""
    records = metrics.read(run / "metrics.jsonl")
    tokens, seconds = {0: 0}, {0: 0.0}
    for record in records:
        if record["kind"] == "train":
            tokens[record["step"]] = record["tokens"]
            seconds[record["step"]] = seconds[record["step"] - 1] + record["step_ms"] / 1000
    val = [(r["step"], r["loss"]) for r in records if r["kind"] == "val"]
    return {
        "tokens": np.array([tokens[step] for step, _ in val]),
        "seconds": np.array([seconds[step] for step, _ in val]),
        "loss": np.array([np.inf if loss is None else loss for _, loss in val]),
    }


def first_reach(curve: dict[str, np.ndarray], target: float, axis: str) -> float | None:
    """Where on `axis` the loss first comes down to `target`, between two validations in a straight line."""
    below = np.flatnonzero(curve["loss"] <= target)
    if not len(below):
        return None
    i = below[0]
    (x0, x1), (y0, y1) = curve[axis][i - 1 : i + 1], curve["loss"][i - 1 : i + 1]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))


def draw(curves: dict[str, dict[str, np.ndarray]], target: float, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, unit in zip(axes, ("tokens", "seconds"), strict=True):
        for label, values in curves.items():
            axis.plot(values[unit], values["loss"], linewidth=1.5, label=label)
        axis.axhline(target, color="black", linestyle=":", linewidth=1)
        axis.set_xlabel({"tokens": "tokens", "seconds": "seconds of training"}[unit])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    top = np.median([values["loss"][1] for values in curves.values()])
    axes[0].set_ylim(min(values["loss"].min() for values in curves.values()) - 0.1, top)
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    s = cli.parse(Settings, "Compare optimizers, each at its own best learning rate.")
    max_steps = s.max_steps or (600 if s.gpu else 200)
    results, curves = [], {}
    for candidate in GPU_CANDIDATES if s.gpu else CPU_CANDIDATES:
        losses = {}
        for learning_rate in candidate.learning_rates:
            run = train(s, candidate, learning_rate, max_steps)
            losses[learning_rate] = float(curve(run)["loss"][-1])
            print(f"{candidate.name:15} learning rate {learning_rate:<7g} loss {losses[learning_rate]:.4f}")
        best = min(losses, key=losses.get)
        curves[f"{candidate.name}, {best:g}"] = curve(s.out_dir / f"{candidate.preset}-{best:g}")
        results.append({"name": candidate.name, "losses": losses, "best_learning_rate": best})
    target = float(next(iter(curves.values()))["loss"][-1])
    for result, values in zip(results, curves.values(), strict=True):
        result["last_loss"] = float(values["loss"][-1])
        result["tokens_to_target"] = first_reach(values, target, "tokens")
        result["seconds_to_target"] = first_reach(values, target, "seconds")
    print(f"\nto a validation loss of {target:.4f}:")
    for result in results:
        tokens, seconds = result["tokens_to_target"], result["seconds_to_target"]
        reached = f"{tokens:,.0f} tokens, {seconds:,.0f} s" if tokens else "not reached"
        label = f"{result['name']} at {result['best_learning_rate']:g}"
        print(f"{label:24} {reached}, last loss {result['last_loss']:.4f}")
    files.write_atomically(
        s.out_dir / "results.json", json.dumps({"target": target, "results": results}, indent=2)
    )
    draw(curves, target, s.out_dir / "optimizers.png")
    print(f"figure: {s.out_dir / 'optimizers.png'}")


if __name__ == "__main__":
    cli.run(main)
