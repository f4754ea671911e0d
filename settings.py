"""Settings of a training run, presets, and checks before anything is touched."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from support import cli, compiler, trackers
from support.cli import Above0, AtLeast1, Below1, Dtype, Fraction, Seed, UserError, flag

Schedule = Literal["cosine", "linear", "wsd"]
OptimizerName = Literal["adamw", "muon"]


@dataclass
class DataSettings:
    data_dir: Path = Path("data/fineweb-edu-10b")
    """Folder of token shards, NAME_{train,val}_NNNNNN.npy."""
    dataset_repo: str = "ShallowU/FineWeb-Edu-10B-Tokens-NPY"
    """Source of missing shards: a data set on the Hub, builtin (Python's documentation) or none."""
    num_shards: int = 0
    """Use only the first N shards, including the validation shard. 0: all."""
    shuffle: bool = True
    """Visit shards, and the sequences within each, in a new random order every epoch."""


@dataclass
class RunSettings:
    preset: str = "gpt2-124m"
    """gpt2-124m, gpt2-124m-tuned, gpt2-124m-muon, gpt2-medium, gpt2-large, gpt2-xl, finetune, rehearsal, demo; or a run to repeat (its folder or config.json)."""  # noqa: E501
    out_dir: Path = Path("log")
    """Run folder: settings, metrics, checkpoints, samples and figures."""
    max_steps: int = 19_073
    """Total optimizer steps. 0 only evaluates the initial weights."""
    resume: bool = False
    """Continue from the newest intact checkpoint of the run folder; start afresh if there is none."""
    overwrite: bool = False
    """Delete the run in --out-dir, and start afresh."""
    push_to_hub: str = ""
    """Send each checkpoint to this model repository, USER/NAME; --resume brings a lost run back from it."""
    push_public: bool = False
    """Create the repository of --push-to-hub as public. Default: private."""
    init_from: str = "scratch"
    """Initial weights: scratch, a Hub name (gpt2), or a folder: a run, a checkpoint, a Hugging Face GPT-2."""
    seed: Seed = 1337
    """Seed of initial weights, data order and samples."""


@dataclass
class BatchSettings:
    total_batch_size: AtLeast1 = 524_288
    """Tokens per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int = 0
    """Sequences per process and forward pass. 0: the largest power of two that fits."""
    sequence_length: AtLeast1 = 1024
    """Tokens per sequence."""
    loss_chunks: int = 0
    """Chunks of the loss; more need less memory. 0: chunks of 16,384 tokens on CUDA, of 512 on a CPU."""


@dataclass
class ModelSettings:
    block_size: AtLeast1 = 1024
    """Context length of the model, at least --sequence-length; positions beyond that are not trained."""
    n_layer: AtLeast1 = 12
    """Transformer blocks."""
    n_head: AtLeast1 = 12
    """Attention heads per block."""
    n_embd: AtLeast1 = 768
    """Width, a multiple of --n-head."""
    dropout: Below1 = 0.0
    """Dropout in training, of embeddings, attention and residuals. transformers' GPT-2 has 0.1."""


@dataclass
class OptimizerSettings:
    optimizer: OptimizerName = "adamw"
    """adamw for all parameters, or muon for the matrices of the blocks and adamw for the rest."""
    learning_rate: Above0 = 6e-4
    """Peak learning rate."""
    embedding_lr_ratio: Above0 = 1.0
    """Learning rate of the embeddings, as a multiple of --learning-rate."""
    adam_beta2: Below1 = 0.95
    """AdamW's beta2, the decay rate of the mean squared gradient."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate, as a fraction of the peak."""
    warmup_steps: int = 715
    """Steps of linear warm-up to the peak."""
    schedule: Schedule = "cosine"
    """Decay after warm-up. wsd: hold the peak, then decay linearly over the last --cooldown-fraction."""
    cooldown_fraction: Fraction = 0.3
    """Fraction of all steps in which wsd decays."""
    weight_decay: float = 0.1
    """Weight decay of embeddings and matrices; biases and LayerNorms have none."""
    grad_clip: float = 1.0
    """Clip gradients to this norm. 0: no clipping."""
    max_bad_steps: AtLeast1 = 5
    """Stop after this many steps in a row with a non-finite loss or gradient. Such steps are skipped."""


@dataclass
class EvaluationSettings:
    val_interval: int = 500
    """Steps between validations; also before the first step and after the last. 0: no validation."""
    val_tokens: AtLeast1 = 10_485_760
    """Validation tokens, from the start of the validation shards; all of them if there are fewer."""
    hellaswag_interval: int = 1000
    """Steps between HellaSwag evaluations; also before the first step and after the last. 0: none."""
    hellaswag_data: str = ""
    """HellaSwag examples, .jsonl or the Hub's .parquet. Default: the published ones, fetched once."""
    sample_interval: int = 1000
    """Steps between samples. 0: only at the end."""
    checkpoint_interval: int = 500
    """Steps between checkpoints. 0: only at the end."""
    keep_checkpoints: AtLeast1 = 3
    """Number of newest checkpoints to keep."""
    checkpoint_minutes: float = 15.0
    """Also write a checkpoint when the last one is this many minutes old. 0: by steps only."""
    keep_best: bool = False
    """Also write a checkpoint at each validation, and keep the one with the lowest validation loss."""
    patience: int = 0
    """Early stopping: end the run after this many validations in a row without a lower loss. 0: off."""
    reload_checkpoints: bool = False
    """Load every checkpoint right after writing it, and continue from it as a resumed run would."""


@dataclass
class MachineSettings:
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Precision of matrix products. auto: bfloat16 if the hardware has it, else float16 (GPU) or float32."""
    compile: bool = False
    """Compile the model. On by default on CUDA, with Triton and a V100 or newer."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in backward. Far less memory, a fifth more work."""
    track: str = ""
    """Also send metrics to tensorboard, wandb or trackio, or to several, separated by commas."""


@dataclass
class CommandLine:
    """Groups of settings in --help."""

    data: DataSettings
    run: RunSettings
    batch: BatchSettings
    model: ModelSettings
    optimizer: OptimizerSettings
    evaluation: EvaluationSettings
    machine: MachineSettings


# Bases in reverse, because the fields of a dataclass begin with those of its last base.
@dataclass
class Settings(
    MachineSettings,
    EvaluationSettings,
    OptimizerSettings,
    ModelSettings,
    BatchSettings,
    RunSettings,
    DataSettings,
):
    """All settings in one flat class, for the code and config.json."""


SHAPE = ("block_size", "n_layer", "n_head", "n_embd")

# ---------------------------------------------------------------- presets

REFERENCE = Settings()
# garg-aayush published 3.021 with it on this data and 10B tokens, and 3.066 with the reference recipe.
TUNED = dataclasses.replace(REFERENCE, learning_rate=1.8e-3, warmup_steps=285)
# Half of the reference's tokens, which is an estimate for 124M (BENCHMARKS.md, "Recipes"): small models of
# this architecture reach the reference's loss with 0.36 to 0.42 of its tokens; published runs, with rotary
# positions and on FineWeb, need 0.58 to 0.66 of tuned AdamW's steps. Both learning rates and the missing
# warm-up come from modded-nanogpt's early Muon record, the long cooldown and beta2 from our small models.
MUON = dataclasses.replace(
    REFERENCE,
    optimizer="muon",
    max_steps=9536,
    learning_rate=1.8e-3,
    embedding_lr_ratio=2.0,
    adam_beta2=0.99,
    warmup_steps=0,
    schedule="wsd",
    cooldown_fraction=0.7,
    min_lr_ratio=0.0,
)

PRESETS = {
    "gpt2-124m": REFERENCE,
    "gpt2-124m-tuned": TUNED,
    "gpt2-124m-muon": MUON,
    # Learning rates of GPT-3's models of these sizes (Brown et al. 2020).
    "gpt2-medium": dataclasses.replace(REFERENCE, n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4),
    "gpt2-large": dataclasses.replace(REFERENCE, n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4),
    "gpt2-xl": dataclasses.replace(REFERENCE, n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4),
    # For a small text: 2.5 million tokens are 8 epochs of 300,000. Learning rate and schedule are those of
    # transformers' trainer; nanoGPT has 3e-5 for the far larger XL. The validation loss falls for a few
    # epochs and then rises: dropout delays that, and keep_best saves the best. On a small model neither Muon
    # nor another beta2 gained much (BENCHMARKS.md, "Recipes").
    "finetune": Settings(
        data_dir=Path("data/mine"),
        dataset_repo="none",
        out_dir=Path("log/finetune"),
        init_from="gpt2",
        max_steps=300,
        total_batch_size=8192,
        dropout=0.1,
        learning_rate=5e-5,
        warmup_steps=20,
        schedule="linear",
        min_lr_ratio=0.0,
        val_interval=25,
        hellaswag_interval=0,
        sample_interval=100,
        checkpoint_interval=0,
        keep_checkpoints=1,
        keep_best=True,
    ),
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
        max_steps=400,
        total_batch_size=512,
        sequence_length=128,
        block_size=128,
        n_layer=4,
        n_head=4,
        n_embd=128,
        optimizer="muon",
        learning_rate=6e-3,
        embedding_lr_ratio=2.0,
        adam_beta2=0.99,
        warmup_steps=20,
        schedule="linear",
        min_lr_ratio=0.0,
        val_interval=50,
        val_tokens=16_384,
        hellaswag_interval=0,
        checkpoint_interval=100,
        device="cpu",
    ),
}


# ---------------------------------------------------------------- reading and checking


def read_settings(args: list[str] | None = None) -> Settings:
    """Read the command line: a preset, overridden by flags."""
    name = cli.given("preset", args) or "gpt2-124m"
    if name in PRESETS:
        preset = PRESETS[name]
        compiled = compiler.on_by_default(cli.given("device", args) or preset.device)
        defaults = dataclasses.replace(preset, preset=name, compile=compiled)
    else:
        defaults = settings_from_config(Path(name))
    s = parse(defaults, args)
    for name in SHAPE:
        if s.init_from != "scratch" and getattr(s, name) != getattr(defaults, name):
            raise UserError(f"{flag(name, getattr(s, name))}: --init-from {s.init_from} has its own: drop it")
    return s


def in_groups(s: Settings) -> CommandLine:
    """Sort settings into the groups of --help."""
    groups = {}
    for group in dataclasses.fields(CommandLine):
        names = [field.name for field in dataclasses.fields(group.type)]
        groups[group.name] = group.type(**{name: getattr(s, name) for name in names})
    return CommandLine(**groups)


def settings_from_config(path: Path) -> Settings:
    """Read settings from a run's config.json, checked like flags. path: that file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--preset {path}: neither a run, nor a file, nor one of {', '.join(PRESETS)}")
    try:
        recorded = dict(json.loads(file.read_text(encoding="utf-8-sig"))["settings"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"--preset {path}: not the config.json of a run ({error!r})") from error
    known = {field.name: field.default for field in dataclasses.fields(Settings)}
    if unknown := recorded.keys() - known:
        raise UserError(f"--preset {path}: unknown settings: {', '.join(sorted(unknown))}")
    for name, value in recorded.items():
        wanted = bool if isinstance(known[name], bool) else str | int | float
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            kind = "true or false" if wanted is bool else "text or a number"
            raise UserError(f"--preset {path}: {name} is {json.dumps(value)}, not {kind}: correct it")
    recorded |= {"preset": str(path), "resume": False, "overwrite": False}
    try:
        return parse(Settings(), cli.flags(recorded))
    except UserError as error:
        raise UserError(f"--preset {path}: {error}") from error


def parse(defaults: Settings, args: list[str] | None) -> Settings:
    """Parse flags (None: the command line) over `defaults`."""
    parsed = cli.parse(CommandLine, "Train GPT-2 from scratch.", default=in_groups(defaults), args=args)
    return Settings(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def check_settings(s: Settings, world_size: int) -> None:
    """Raise UserError on settings that cannot work together, before anything is touched."""
    trackers.names(s.track)
    if s.resume and s.overwrite:
        raise UserError("--resume --overwrite: one keeps the run, the other deletes it: drop one of them")
    if (s.keep_best or s.patience) and not s.val_interval:
        name = "--keep-best" if s.keep_best else flag("patience", s.patience)
        raise UserError(f"{name} --val-interval 0: needs validations: set --val-interval, or drop it")
    compiler.check(s.compile, s.device)
    if s.num_shards == 1:
        raise UserError(
            "--num-shards 1: training needs a validation and a training shard: use 2 or more, or 0"
        )
    sequences, rest = divmod(s.total_batch_size, s.sequence_length)
    per_pass = max(1, s.micro_batch_size) * world_size
    if rest or sequences % per_pass:
        micro = f" x {flag('micro_batch_size', s.micro_batch_size)}" if s.micro_batch_size else ""
        raise UserError(
            f"{flag('total_batch_size', s.total_batch_size)}: not a multiple of "
            f"{flag('sequence_length', s.sequence_length)}{micro} x {world_size} "
            f"process{'es' * (world_size > 1)} = {s.sequence_length * per_pass}: change one of them"
        )
