"""The settings of a training run: what they mean, the presets, and the checks before anything is touched."""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import cli
import optim
import runtime
from cli import UserError


@dataclass
class Settings:
    preset: str = "gpt2-124m"
    """gpt2-124m, gpt2-124m-tuned, gpt2-124m-muon, gpt2-medium, gpt2-large, gpt2-xl, rehearsal, demo, or the
    path of a run's config.json."""

    # data
    data_dir: Path = Path("data/fineweb-edu-10b")
    """Folder of token shards, NAME_{train,val}_NNNNNN.npy."""
    dataset_repo: str = "ShallowU/FineWeb-Edu-10B-Tokens-NPY"
    """Where missing shards come from: a data set on the Hub. builtin: the documentation that Python carries,
    made into data/builtin. none: only what --data-dir holds."""
    num_shards: int = 0
    """Use the first so many shards of the data set, the validation shard included. 0: all."""
    shuffle: bool = True
    """Take shards, and the sequences within each, in a new random order each epoch."""

    # run
    out_dir: Path = Path("log")
    """Run folder: settings, metrics, checkpoints, samples and figures."""
    max_steps: int = 19_073
    """Updates of the weights in all. 0 only evaluates the initial weights."""
    resume: bool = False
    """Go on from the newest whole checkpoint of the run folder; start afresh where there is none."""
    overwrite: bool = False
    """Delete the run that the folder holds, and start afresh."""
    init_from: str = "scratch"
    """First weights: scratch, a Hub name (gpt2), or a folder (a run, a checkpoint, a Hugging Face GPT-2)."""
    seed: int = 1337
    """Decides the first weights, the order of the data and the samples."""

    # batch
    total_batch_size: int = 524_288
    """Tokens a step, over all processes and accumulation steps."""
    micro_batch_size: int = 0
    """Sequences a process takes at once. 0: the largest power of two that fits into memory."""
    sequence_length: int = 1024
    """Tokens a sequence."""
    loss_chunks: int = 0
    """Parts that the loss is computed in: more need less memory. 0: one on a GPU, of 512 tokens on a CPU."""

    # model
    block_size: int = 1024
    """Positions the model has; only the first --sequence-length of them are trained."""
    n_layer: int = 12
    """Blocks."""
    n_head: int = 12
    """Attention heads."""
    n_embd: int = 768
    """Width, a multiple of the heads."""

    # optimizer
    optimizer: optim.OptimizerName = "adamw"
    """adamw for all, or muon for the blocks' matrices and adamw for the rest."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    embedding_lr_ratio: float = 1.0
    """Learning rate of the embeddings, as a multiple of --learning-rate."""
    min_lr_ratio: float = 0.1
    """The learning rate at the end, as a share of the peak."""
    warmup_steps: int = 715
    """Steps in which the learning rate climbs to its peak."""
    schedule: optim.Schedule = "cosine"
    """The way down from the peak; wsd stays there and falls in a straight line at the end."""
    cooldown_fraction: float = 0.3
    """Share of all steps that the fall of --schedule wsd takes."""
    weight_decay: float = 0.1
    """Decay of matrices; biases and LayerNorms have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it. 0: no limit."""
    max_bad_steps: int = 5
    """Stop after so many steps in a row with a loss or gradient not finite; such updates are left out."""

    # evaluation and checkpoints
    val_interval: int = 250
    """Steps between validations, besides one before the first step and one after the last. 0: none."""
    val_tokens: int = 10_485_760
    """Tokens a validation reads, always the same; or all there are, if that is less."""
    hellaswag_interval: int = 250
    """Steps between HellaSwag evaluations, besides one before the first step and after the last. 0: none."""
    hellaswag_data: str = ""
    """HellaSwag examples in a local file. Left out: the published validation file, fetched once."""
    sample_interval: int = 1000
    """Steps between samples. 0: only at the end."""
    checkpoint_interval: int = 500
    """Steps between checkpoints. 0: only at the end."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    reload_checkpoints: bool = False
    """Load each checkpoint back after writing it and train on from what was read, as a resume would."""

    # machine
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps."""
    dtype: runtime.Dtype = "auto"
    """Of matrix products. auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    compile: bool = False
    """Compile the model. On by default on CUDA only."""
    tensorboard: bool = False
    """Write metrics for TensorBoard as well."""
    wandb: bool = False
    """Send metrics to Weights & Biases as well."""


# The recipe of record and its faster relatives: the same model, data and batch.
RECORD = Settings()
# Published for this data and 10B tokens: loss 3.00 where the recipe of record ends at 3.066.
TUNED = dataclasses.replace(RECORD, learning_rate=1.8e-3, warmup_steps=285)
# Published for it: in 6,200 steps the loss that tuned AdamW reaches in 9,536 and the recipe in about 19,000.
MUON = dataclasses.replace(
    RECORD,
    optimizer="muon",
    max_steps=6200,
    learning_rate=1.8e-3,
    embedding_lr_ratio=2.0,
    warmup_steps=0,
    schedule="wsd",
    min_lr_ratio=0.0,
)

PRESETS = {
    "gpt2-124m": RECORD,
    "gpt2-124m-tuned": TUNED,
    "gpt2-124m-muon": MUON,
    # The sizes of the family, with the learning rates of GPT-3's models of their size (Brown et al. 2020).
    "gpt2-medium": dataclasses.replace(RECORD, n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4),
    "gpt2-large": dataclasses.replace(RECORD, n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4),
    "gpt2-xl": dataclasses.replace(RECORD, n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4),
    "rehearsal": Settings(
        num_shards=2,
        out_dir=Path("log/rehearsal"),
        max_steps=50,
        warmup_steps=10,
        val_interval=25,
        val_tokens=1_048_576,
        hellaswag_interval=25,
        sample_interval=25,
        checkpoint_interval=25,
        reload_checkpoints=True,
    ),
    "demo": Settings(
        data_dir=Path("data/builtin"),
        dataset_repo="builtin",
        out_dir=Path("log/demo"),
        max_steps=300,
        total_batch_size=512,
        sequence_length=128,
        block_size=128,
        n_layer=4,
        n_head=4,
        n_embd=128,
        optimizer="muon",
        learning_rate=3e-3,
        warmup_steps=20,
        schedule="linear",
        min_lr_ratio=0.0,
        val_interval=50,
        val_tokens=16_384,
        hellaswag_interval=0,
        checkpoint_interval=100,
    ),
}


def read_settings(args: list[str] | None = None) -> Settings:
    """Settings from the command line: a preset's, with what the flags say put over it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A flag without its value is left for the full parser to complain of.
    first.add_argument("--preset", nargs="?", default="gpt2-124m", const="gpt2-124m")
    first.add_argument("--device", nargs="?", default="auto", const="auto")
    known, _ = first.parse_known_args(args)
    if known.preset in PRESETS:
        on_cuda = known.device.startswith(("auto", "cuda")) and torch.cuda.is_available()
        defaults = dataclasses.replace(PRESETS[known.preset], preset=known.preset, compile=on_cuda)
    else:
        defaults = settings_from_config(Path(known.preset))
    return cli.parse(Settings, "Train GPT-2 from scratch.", default=defaults, args=args)


def settings_from_config(path: Path) -> Settings:
    """The settings that a run's config.json records."""
    if not path.is_file():
        raise UserError(f"--preset {path}: neither a file nor one of {', '.join(PRESETS)}")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["settings"]
        values = {}
        for field in dataclasses.fields(Settings):
            if field.name in recorded:
                values[field.name] = type(field.default)(recorded.pop(field.name))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"--preset {path}: not the config.json of a run ({error!r})") from error
    if recorded:
        raise UserError(f"--preset {path}: unknown settings: {', '.join(recorded)}")
    return Settings(**{**values, "preset": str(path), "resume": False, "overwrite": False})


def check_settings(s: Settings, world_size: int) -> None:
    """Raise UserError on values that cannot work, before anything is touched."""
    flag = lambda name: f"--{name.replace('_', '-')} {getattr(s, name)}"  # noqa: E731
    for name in ("total_batch_size", "sequence_length", "block_size", "n_layer", "n_head", "n_embd"):
        if getattr(s, name) < 1:
            raise UserError(f"{flag(name)}: must be at least 1")
    for name in ("learning_rate", "embedding_lr_ratio", "val_tokens", "keep_checkpoints", "max_bad_steps"):
        if not getattr(s, name) > 0:
            raise UserError(f"{flag(name)}: must be above 0")
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if isinstance(value, int | float) and (value < 0 or not math.isfinite(value)):
            raise UserError(f"{flag(field.name)}: must be a finite number of at least 0")
    if s.resume and s.overwrite:
        raise UserError("--resume --overwrite: one keeps the run, the other deletes it: leave one out")
    if s.num_shards == 1:
        raise UserError(
            "--num-shards 1: training needs a validation and a training shard: use 2 or more, or 0"
        )
    if s.cooldown_fraction > 1 or s.min_lr_ratio > 1:
        name = "cooldown_fraction" if s.cooldown_fraction > 1 else "min_lr_ratio"
        raise UserError(f"{flag(name)}: a share, at most 1")
    sequences, rest = divmod(s.total_batch_size, s.sequence_length)
    per_round = max(1, s.micro_batch_size) * world_size
    if rest or sequences % per_round:
        micro = f" x {flag('micro_batch_size')}" if s.micro_batch_size else ""
        raise UserError(
            f"{flag('total_batch_size')}: not a multiple of {flag('sequence_length')}{micro} x {world_size} "
            f"process{'es' * (world_size > 1)} = {s.sequence_length * per_round}: change one of them"
        )
