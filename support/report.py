"""What a training run says of itself at its start and at its end."""

from pathlib import Path
from typing import Protocol

from support import hardware, metrics, run_folder
from support.runtime import Runtime
from support.sampling import SAMPLES_PER_PROMPT


class Settings(Protocol):
    """The training script's settings, of which these are used here."""

    data_dir: Path
    out_dir: Path
    init_from: str
    compile: bool
    total_batch_size: int
    sequence_length: int
    max_steps: int
    warmup_steps: int


class ModelConfig(Protocol):
    """The shape of a model: GPTConfig has it."""

    block_size: int
    n_head: int
    n_embd: int
    dropout: float

    @property
    def n_parameters(self) -> int: ...


def at_start(
    s: Settings,
    rt: Runtime,
    config: ModelConfig,
    sequences: int,
    B: int,
    accumulation_steps: int,
    steps_done: int,
) -> None:
    """Print what is about to be trained, on which data and machine.

    sequences: in the training data. B: the micro-batch.
    """
    T, compiled = s.sequence_length, "compiled" if s.compile else "not compiled"
    head_size = config.n_embd // config.n_head
    attention = hardware.attention_backend(rt, config.n_head, head_size, T, config.dropout)
    processes = f"{rt.world_size} process{'es' * (rt.world_size > 1)}"
    accumulation = f"{accumulation_steps} accumulation step{'s' * (accumulation_steps > 1)}"
    rt.say(f"model      {config.n_parameters:,} parameters: {s.init_from}, {config}")
    rt.say(f"data       {s.data_dir}: {sequences * T:,} training tokens")
    rt.say(f"batch      {s.total_batch_size:,} tokens = {B} x {T} x {processes} x {accumulation}")
    rt.say(f"device     {hardware.describe(rt)['name']}, {rt.dtype}, {compiled}, {attention} attention")
    rt.say(f"run        {s.out_dir}: steps {steps_done} to {s.max_steps}")
    if 2 * s.warmup_steps > s.max_steps > 0:
        rt.say(f"warning: most of the {s.max_steps} steps are warm-up: lower --warmup-steps {s.warmup_steps}")
    if T < config.block_size and s.init_from == "scratch":
        rt.say(f"warning: positions {T} and above are never trained: --block-size {T} drops them")


def at_end(
    folder: Path, records: list[metrics.Record], samples: list[str] | None, figure: Path | None
) -> None:
    """Print the results of a run and where they are; samples, figure: None if they failed."""
    if samples is not None:
        print(f"\nsamples ({folder / run_folder.SAMPLES}):")
        for text in samples[::SAMPLES_PER_PROMPT]:
            print(f"  {text!r}")
    if val_losses := [r["loss"] for r in records if r["kind"] == "val" and r["loss"] is not None]:
        print(
            f"validation loss: {val_losses[-1]:.4f}, from {val_losses[0]:.4f} ({folder / run_folder.METRICS})"
        )
    print(f"summary: {folder / run_folder.SUMMARY}")
    if figure is not None:
        print(f"figure: {figure}")
