"""Print the start and the results of a training run; write samples.txt and summary.json."""

from typing import TYPE_CHECKING

from support import files, hardware, metrics, run_files
from support.sampling import SAMPLES_PER_PROMPT

if TYPE_CHECKING:
    from pathlib import Path

    from settings import Settings
    from train_gpt2 import Trainer


def at_start(s: "Settings", trainer: "Trainer", n_tokens: int, steps_done: int) -> None:
    """Print the model, the data, the batch and the machine. n_tokens: tokens of training data."""
    rt, config, B, n = trainer.rt, trainer.model.config, trainer.micro_batch_size, trainer.accumulation_steps
    T, compiled = s.sequence_length, "compiled" if s.compile else "not compiled"
    head_size = config.n_embd // config.n_head
    attention = hardware.attention_backend(rt, config.n_head, head_size, T, config.dropout)
    processes = f"{rt.world_size} process{'es' * (rt.world_size > 1)}"
    accumulation = f"{n} accumulation step{'s' * (n > 1)}"
    rt.say(f"model      {config.n_parameters:,} parameters: {s.init_from}, {config}")
    rt.say(f"data       {s.data_dir}: {n_tokens:,} training tokens")
    rt.say(f"batch      {s.total_batch_size:,} tokens = {B} x {T} x {processes} x {accumulation}")
    rt.say(f"device     {hardware.describe(rt)['name']}, {rt.dtype}, {compiled}, {attention} attention")
    rt.say(f"run        {s.out_dir}: steps {steps_done} to {s.max_steps}")
    if 2 * s.warmup_steps > s.max_steps > 0:
        rt.say(f"warning: most of the {s.max_steps} steps are warm-up: lower --warmup-steps {s.warmup_steps}")
    if T < config.block_size and s.init_from == "scratch":
        rt.say(f"warning: positions {T} and above are never trained: --block-size {T} drops them")


def at_end(
    s: "Settings",
    trainer: "Trainer",
    step: int,
    seconds: dict[str, float],
    samples: list[str] | None,
    figure: "Path | None",
) -> None:
    """Write samples.txt and summary.json, and print the results and the paths.

    seconds: per activity. samples, figure: None if they failed.
    """
    folder = s.out_dir
    if samples:
        files.write_atomically(folder / run_files.SAMPLES, "\n\n---\n\n".join(samples) + "\n")
        print(f"\nsamples ({folder / run_files.SAMPLES}):")
        for text in samples[::SAMPLES_PER_PROMPT]:
            print(f"  {text!r}")
    losses = {"train": [], "val": []}
    for record in metrics.read(folder / run_files.METRICS):
        if record["kind"] in losses and record["loss"] is not None:
            losses[record["kind"]].append((record["loss"], record["step"]))
    best = min(losses["val"], default=(None, None))
    tokens = step * s.total_batch_size
    summary = {
        "parameters": trainer.model.config.n_parameters,
        "steps": step,
        "tokens": tokens,
        "last_train_loss": losses["train"][-1][0] if losses["train"] else None,
        "last_val_loss": losses["val"][-1][0] if losses["val"] else None,
        "best_val_loss": best[0],
        "best_val_step": best[1],
        "tokens_per_sec": tokens / seconds["training"] if seconds["training"] else None,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hardware": hardware.describe(trainer.rt),
    }
    files.write_json(folder / run_files.SUMMARY, summary)
    if losses["val"]:
        first, last = losses["val"][0][0], losses["val"][-1][0]
        print(f"validation loss: {last:.4f}, from {first:.4f} ({folder / run_files.METRICS})")
    print(f"summary: {folder / run_files.SUMMARY}")
    if figure is not None:
        print(f"figure: {figure}")
