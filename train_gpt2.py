"""Train GPT-2 from scratch.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the recipe of record on 8 GPUs
    python train_gpt2.py --preset rehearsal                    # 50 steps of it, through every stage
    python train_gpt2.py --preset demo                         # a small model on any CPU, no network
    python train_gpt2.py --preset log/config.json --out-dir log2     # repeat a run

A step is one update of the weights. `step` counts finished updates: the training loss of step s is that of
the batch behind update s, the validation loss of step s is that of the weights after it.
"""

if __name__ == "__main__":  # Ctrl-C during the imports below: end without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import collections
import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import dataloader
import hellaswag
import metrics
import optim
import plot_loss
import runtime
import tokenizer
from cli import UserError
from model import GPT, GPTConfig, default_loss_chunks
from pre_tokens import builtin_corpus, shards
from settings import PRESETS, Settings, check_settings, read_settings

# ---------------------------------------------------------------- set-up


def prepare_data(s: Settings) -> None:
    """See to it that there are shards in --data-dir."""
    if s.dataset_repo == "builtin" and s.data_dir == PRESETS["demo"].data_dir:
        builtin_corpus.complete(s.data_dir)
    elif s.dataset_repo not in ("builtin", "none"):
        dataloader.fetch(s.dataset_repo, s.data_dir, s.num_shards)
    dataloader.find_shards(s.data_dir, s.num_shards)
    # A manifest lists what the data was; training on less of it must be somebody's decision.
    manifest = shards.read_manifest(s.data_dir / shards.MANIFEST)
    if manifest and (gone := shards.missing(s.data_dir, manifest, s.num_shards)):
        raise UserError(
            f"{s.data_dir / gone[0]['file']}: missing, though {shards.MANIFEST} lists it: restore it, or "
            f"use fewer with --num-shards ({len(gone)} missing)"
        )


def prepare_hellaswag(s: Settings, rt: runtime.Runtime) -> list[hellaswag.Example]:
    """The examples that the run is evaluated on; none where it is not to be, or they cannot be had."""
    if not s.hellaswag_interval:
        return []
    if s.hellaswag_data:
        return hellaswag.load(Path(s.hellaswag_data))
    try:
        rt.lead(rt.local_rank == 0, hellaswag.fetch)
    except UserError as error:
        if rt.is_main:
            print(f"warning: the run goes without HellaSwag: {error}")
        return []
    return hellaswag.load()


RUN_FILES = ("config.json", "metrics.jsonl", "checkpoints", "loss_curves.png", "samples.txt", "summary.json")


def prepare_out_dir(s: Settings) -> tuple[Path | None, IO[str]]:
    """Make the run folder ours; returns the checkpoint to go on from, if any, and the lock that we hold.

    Raises UserError where the folder holds a run and neither --resume nor --overwrite says what to do.
    """
    held = [s.out_dir / name for name in RUN_FILES if (s.out_dir / name).exists()]
    if held and not (s.resume or s.overwrite):
        raise UserError(
            f"--out-dir {s.out_dir}: holds a run already: go on with --resume, replace it with --overwrite, "
            "or name another folder"
        )
    try:
        s.out_dir.mkdir(parents=True, exist_ok=True)
        lock = runtime.lock_folder(s.out_dir)
    except OSError as error:
        why = error.strerror
        raise UserError(f"--out-dir {s.out_dir}: cannot be written ({why}): name another folder") from error
    if s.overwrite:
        for path in held:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoint.remove_unfinished(s.out_dir)
    newest, complaints = checkpoint.newest_whole(s.out_dir) if s.resume else (None, [])
    if newest:
        checkpoint.warn_of_damage(complaints, newest)
    elif s.resume:
        print(f"{s.out_dir}: no checkpoint to resume from: starting at step 0")
    return newest, lock


def build_model(s: Settings, device: torch.device) -> GPT:
    """The model with its first weights, on the device; the same weights on every device."""
    # A multiple of 128 rows suits the GPU's matrix units; a CPU gains nothing from it.
    padded = -(-tokenizer.VOCAB_SIZE // 128) * 128 if device.type == "cuda" else 0
    if s.init_from == "scratch":
        torch.manual_seed(s.seed)
        model = GPT(GPTConfig(s.block_size, tokenizer.VOCAB_SIZE, s.n_layer, s.n_head, s.n_embd, padded))
    else:
        model = GPT.from_pretrained(checkpoint.find_model(s.init_from), padded)
        if model.config.vocab_size != tokenizer.VOCAB_SIZE:
            raise UserError(
                f"--init-from {s.init_from}: {model.config.vocab_size} ids, the data has GPT-2's 50257"
            )
    if s.sequence_length > model.config.block_size:
        flag = "--block-size" if s.init_from == "scratch" else "--init-from"
        raise UserError(
            f"--sequence-length {s.sequence_length}: the model has {model.config.block_size} positions: "
            f"lower it, or change {flag}"
        )
    return model.to(device)


def describe_run(
    s: Settings, rt: runtime.Runtime, model: GPT, micro_batch_size: int, train_shards: list[dataloader.Shard]
) -> dict[str, object]:
    """What config.json records: every setting, the versions, the hardware, the git commit."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(s).items()}
    manifest = shards.read_manifest(s.data_dir / shards.MANIFEST) or {}
    return {
        "settings": settings,
        "data": {
            "names": sorted({shards.SHARD_NAME.fullmatch(shard.path.name)["name"] for shard in train_shards}),
            "source": manifest.get("source"),
        },
        "micro_batch_size": micro_batch_size,
        "parameters": model.num_parameters(),
        "hardware": runtime.hardware(rt),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "git_commit": commit,
    }


def changed_settings(config: Path, new: dict[str, object]) -> dict[str, list[object]]:
    """Settings that differ from those in a run's config.json: name -> [before, now].

    Those that say how to start, not what to train, are left out; so is all where there is no such file.
    """
    try:
        old = dict(json.loads(config.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    ignored = {"preset", "resume", "overwrite", "out_dir"}
    names = [name for name in new if name in old and name not in ignored]
    return {name: [old[name], new[name]] for name in names if old[name] != new[name]}


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def validate(
    model: nn.Module,
    stream: dataloader.TokenStream,
    n_sequences: int,
    micro_batch_size: int,
    loss_chunks: int,
    rt: runtime.Runtime,
) -> float:
    """Mean loss in nats over the stream's first `n_sequences`, shared out over the processes."""
    sums = []
    batches = dataloader.val_batches(stream, n_sequences, micro_batch_size, rt.rank, rt.world_size, rt.device)
    for x, y in batches:
        with rt.autocast():
            _, loss = model(x, y, loss_chunks)
        sums.append(loss * (y != -100).sum())
    total = torch.stack(sums).cpu().double().sum() if sums else torch.zeros((), dtype=torch.float64)
    total = rt.all_reduce(total.to(rt.device)) if rt.world_size > 1 else total
    return float(total) / (n_sequences * stream.sequence_length)


SAMPLE_PROMPTS = ("Hello, I'm a language model,", "Hello, I'm a computer science student,")


def draw_samples(model: GPT, seed: int, rt: runtime.Runtime) -> list[str]:
    """Three continuations of each prompt, 64 tokens long, by top-50 sampling."""
    enc = tokenizer.get_encoding()
    prompts = [enc.encode_ordinary(prompt) for prompt in SAMPLE_PROMPTS for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    with rt.autocast():
        rows = model.generate(
            prompts, 64, temperature=0.8, top_k=50, generator=generator, eos_token_id=tokenizer.END_OF_TEXT_ID
        )
    return [enc.decode([token for token in row if token != tokenizer.END_OF_TEXT_ID]) for row in rows]


def finish_run(s: Settings, rt: runtime.Runtime, model: GPT, seconds: dict[str, float]) -> None:
    """Write samples.txt, summary.json and loss_curves.png, and say where they are."""
    samples = draw_samples(model, s.seed, rt)
    metrics.write_atomically(s.out_dir / "samples.txt", "\n\n---\n\n".join(samples) + "\n")
    records = metrics.read(s.out_dir / "metrics.jsonl")
    losses = {
        kind: [(r["loss"], r["step"]) for r in records if r["kind"] == kind and r["loss"] is not None]
        for kind in ("train", "val")
    }
    tokens = s.max_steps * s.total_batch_size
    summary = {
        "parameters": model.num_parameters(),
        "steps": s.max_steps,
        "tokens": tokens,
        "last_train_loss": losses["train"][-1][0] if losses["train"] else None,
        "last_val_loss": losses["val"][-1][0] if losses["val"] else None,
        "best_val_loss": min(losses["val"])[0] if losses["val"] else None,
        "best_val_step": min(losses["val"])[1] if losses["val"] else None,
        "tokens_per_sec": tokens / seconds["training"] if seconds["training"] else None,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hardware": runtime.hardware(rt),
    }
    metrics.write_atomically(s.out_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    figure = plot_loss.plot_run(s.out_dir)
    print(f"\nsamples ({s.out_dir / 'samples.txt'}):")
    for text in samples[::3]:
        print(f"  {text!r}")
    if losses["val"]:
        first, last = losses["val"][0][0], losses["val"][-1][0]
        print(f"validation loss: {last:.4f}, from {first:.4f} ({s.out_dir / 'metrics.jsonl'})")
    print(f"summary: {s.out_dir / 'summary.json'}")
    print(f"figure: {figure}")


# ---------------------------------------------------------------- training


def restore(
    folder: Path,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    identity: dict[str, object],
) -> dict[str, float]:
    """Put weights, optimizer and scaler back as a checkpoint holds them; returns the seconds spent till then.

    Raises UserError where the checkpoint is of a run with another `identity`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not on this machine: --out-dir must be on a disk that every machine sees")
    state = checkpoint.load_training_state(folder)
    for key, value in identity.items():
        saved = state["identity"].get(key)
        if saved != value:
            name = "the data (--data-dir, --num-shards)" if key == "data" else f"--{key.replace('_', '-')}"
            name = "the shape of the model" if key == "model" else name
            raise UserError(
                f"{folder}: {name} was {saved} and is now {value}: set it back, or use another --out-dir"
            )
    model.load_weights(folder)
    try:
        checkpoint.load_optimizer_state(model, optimizers, state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16
            scaler.load_state_dict(state["scaler"])
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: not a state of this run ({error!r}): use another checkpoint") from error
    return state["seconds"]


def how_to_continue(s: Settings, world_size: int) -> str:
    """What to type to continue a stopped run. The same command would delete it where it has --overwrite."""
    if not s.overwrite:
        return "continue with the same command and --resume"
    if world_size > 1:
        return "continue with the same command, --resume in place of --overwrite"
    python = os.path.relpath(sys.executable)
    return f"continue with {python} {sys.argv[0]} --preset {s.out_dir / 'config.json'} --resume"


def train(s: Settings) -> int:
    """Train as the settings say. Returns the exit status: 0, or 128 + signal where one ended the run."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_settings(s, world_size)
    rt = runtime.start(s.device, s.dtype)
    say = print if rt.is_main else lambda *_: None
    seconds = collections.Counter(data=0.0, training=0.0, evaluation=0.0, checkpoints=0.0)
    clock = time.perf_counter

    # Data first: a run without data must not leave a run folder behind.
    begin = clock()
    rt.lead(rt.local_rank == 0, lambda: prepare_data(s))
    found = dataloader.find_shards(s.data_dir, s.num_shards)
    train_stream = dataloader.TokenStream(found["train"], s.sequence_length, s.seed, s.shuffle)
    val_stream = dataloader.TokenStream(found["val"], s.sequence_length)
    n_val_sequences = max(1, min(s.val_tokens // s.sequence_length, len(val_stream)))
    hellaswag_examples = prepare_hellaswag(s, rt)
    seconds["data"] += clock() - begin

    model = build_model(s, rt.device)
    hellaswag_examples = hellaswag.fit(hellaswag_examples, model.config.block_size)
    sequences_per_step = s.total_batch_size // s.sequence_length
    B = s.micro_batch_size or runtime.largest_micro_batch(
        model, s.sequence_length, sequences_per_step // world_size, rt
    )
    accumulation_steps = sequences_per_step // (B * world_size)
    loss_chunks = s.loss_chunks or default_loss_chunks(B * s.sequence_length, rt.device)
    optimizers = optim.build_optimizers(
        model, s.optimizer, s.learning_rate, s.embedding_lr_ratio, s.weight_decay
    )
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)

    # The run folder comes last, when all that can be wrong with the settings has been looked at.
    newest, _lock = rt.lead(rt.is_main, lambda: prepare_out_dir(s)) or (None, None)
    first_step = torch.tensor(checkpoint.step_of(newest) if newest else 0, device=rt.device)
    first_step = int(rt.all_reduce(first_step, "MAX"))
    # What the order of the data and the shape of the state depend on: a resumed run must have the same.
    identity = {
        "model": dataclasses.asdict(dataclasses.replace(model.config, padded_vocab_size=0)),
        "data": dataloader.fingerprint(found["train"]),
        **{
            name: getattr(s, name)
            for name in ("sequence_length", "total_batch_size", "seed", "shuffle", "optimizer")
        },
    }
    if first_step:
        folder = s.out_dir / "checkpoints" / f"step_{first_step:06d}"
        seconds = collections.Counter(restore(folder, model, optimizers, scaler, identity))
    if first_step > s.max_steps:
        raise UserError(
            f"--max-steps {s.max_steps}: the run in {s.out_dir} has done {first_step} steps already"
        )

    train_model: nn.Module = model
    if world_size > 1:
        train_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    eval_model: nn.Module = model
    if s.compile:
        # The wrapper is compiled with the model, so that gradients travel while earlier ones are computed.
        eval_model = torch.compile(model)
        train_model = eval_model if world_size == 1 else torch.compile(train_model)

    log = None
    if rt.is_main:
        record = describe_run(s, rt, model, B, found["train"])
        changed = {}
        if first_step:
            changed = changed_settings(s.out_dir / "config.json", record["settings"])
        sinks = [metrics.tensorboard_sink(s.out_dir / "tensorboard")] if s.tensorboard else []
        sinks += [metrics.wandb_sink(record, s.out_dir)] if s.wandb else []
        metrics.write_atomically(s.out_dir / "config.json", json.dumps(record, indent=2) + "\n")
        log = metrics.Metrics(s.out_dir / "metrics.jsonl", first_step or None, sinks)
        log.log(first_step, "event", name="resume" if first_step else "start", processes=world_size)
        if changed:
            log.log(first_step, "event", name="settings changed", **changed)
        for name, (before, now) in changed.items():
            say(f"changed    --{name.replace('_', '-')} was {before}, is now {now}")
    peak_flops = runtime.peak_flops(rt.device, rt.dtype) * world_size

    say(f"model      {model.num_parameters():,} parameters: {s.init_from}, {model.config}")
    say(f"data       {s.data_dir}: {len(train_stream) * s.sequence_length:,} training tokens")
    shape = f"{B} x {s.sequence_length} x {world_size} processes x {accumulation_steps} rounds"
    say(f"batch      {s.total_batch_size:,} tokens = {shape}")
    compiled = "compiled" if s.compile else "not compiled"
    config = model.config
    attention = runtime.attention_backend(
        rt, config.n_head, config.n_embd // config.n_head, s.sequence_length
    )
    say(f"device     {runtime.hardware(rt)['name']}, {rt.dtype}, {compiled}, {attention} attention")
    say(f"run        {s.out_dir}: steps {first_step} to {s.max_steps}")
    if s.sequence_length < model.config.block_size:
        say(f"warning: positions from {s.sequence_length} on stay untrained: --block-size leaves them out")

    def timed_evaluation(step: int) -> None:
        """What is due after `step` updates, outside the steps' own time."""
        begin = clock()
        last = step == s.max_steps
        if s.val_interval and (step % s.val_interval == 0 or last):
            loss = validate(eval_model, val_stream, n_val_sequences, B, loss_chunks, rt)
            say(f"step {step}/{s.max_steps} | validation loss {loss:.4f}")
            if log:
                log.log(step, "val", loss=loss)
        if hellaswag_examples and (step % s.hellaswag_interval == 0 or last):
            # The module itself: batches of many shapes, for each of which a compiled one would be compiled.
            score = hellaswag.evaluate(model, hellaswag_examples, rt)
            say(f"step {step}/{s.max_steps} | HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}")
            if log:
                log.log(step, "hellaswag", acc=score.acc, acc_norm=score.acc_norm, n=score.n)
        if s.sample_interval and step and step % s.sample_interval == 0 and not last and log:
            for text in draw_samples(model, s.seed, rt)[::3]:
                say(f"step {step}/{s.max_steps} | sample: {text!r}")
                log.log(step, "event", name="sample", text=text)
        rt.barrier()
        seconds["evaluation"] += clock() - begin

    def timed_checkpoint(step: int) -> None:
        begin = clock()
        if log:
            log.sync()
            state = {
                "step": step,
                "identity": identity,
                "optimizer": checkpoint.optimizer_state(model, optimizers),
                "scaler": scaler.state_dict(),
                "seconds": dict(seconds),
            }
            folder = checkpoint.save(s.out_dir, step, model, state, s.keep_checkpoints)
            say(f"step {step}/{s.max_steps} | checkpoint {folder}")
        rt.barrier()
        if s.reload_checkpoints:
            folder = s.out_dir / "checkpoints" / f"step_{step:06d}"
            restore(folder, model, optimizers, scaler, identity)
            say(f"step {step}/{s.max_steps} | loaded back {folder}")
        seconds["checkpoints"] += clock() - begin

    pending: collections.deque[tuple[int, float, Tensor]] = collections.deque()
    recent_losses: collections.deque[float] = collections.deque(maxlen=100)
    if log:
        earlier = (r["loss"] for r in metrics.read(log.path) if r["kind"] == "train")
        recent_losses.extend(loss for loss in earlier if loss is not None)
    bad_steps = 0
    run_begin = step_begin = clock()

    def log_oldest() -> int:
        """Record the oldest step that is still pending; returns the signal that any process has received."""
        nonlocal step_begin, bad_steps
        step, lr, stats = pending.popleft()
        loss, grad_norm, terminated, interrupted = stats.tolist()  # waits for the device
        now = clock()
        duration, step_begin = now - step_begin, now
        seconds["training"] += duration
        tokens_per_sec = s.total_batch_size / duration
        mfu = model.flops_per_token(s.sequence_length) * tokens_per_sec / peak_flops
        left = (now - run_begin) / (step - first_step) * (s.max_steps - step)
        say(
            f"step {step}/{s.max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
            f"{1000 * duration:.0f} ms | {tokens_per_sec:,.0f} tokens/s | MFU {100 * mfu:.1f} % | "
            f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left"
        )
        if log:
            log.log(
                step,
                "train",
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                step_ms=1000 * duration,
                tokens_per_sec=tokens_per_sec,
                mfu=mfu,
                tokens=step * s.total_batch_size,
            )
        finite = math.isfinite(loss + grad_norm)
        bad_steps = 0 if finite else bad_steps + 1
        if log and not finite:
            log.log(step, "event", name="bad step")
        elif log:
            if metrics.is_spike(loss, recent_losses):
                log.log(step, "event", name="loss spike", loss=loss)
            recent_losses.append(loss)
        if bad_steps == s.max_bad_steps:
            last_good = next(iter(checkpoint.folders(s.out_dir)), "none")
            raise UserError(
                f"step {step}: loss or gradient not finite in --max-bad-steps {bad_steps} steps in a row, "
                f"their updates left out: --resume goes on from {last_good}; lower --learning-rate"
            )
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0

    stop = runtime.StopSignal(announce=rt.is_main)
    stopped_by = 0
    batches = dataloader.train_batches(
        train_stream, first_step, sequences_per_step, B, rt.rank, world_size, rt.device
    )
    if first_step == 0:
        timed_evaluation(0)
        run_begin = step_begin = clock()
    for step in range(first_step + 1, s.max_steps + 1):
        factor = optim.learning_rate_factor(
            step - 1, s.max_steps, s.warmup_steps, s.min_lr_ratio, s.schedule, s.cooldown_fraction
        )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = factor * group["peak_lr"]

        loss_sum = torch.zeros((), device=rt.device)
        for micro_step in range(accumulation_steps):
            x, y = next(batches)
            # Gradients travel once a step: forward and backward of all but the last round stay local.
            local = world_size > 1 and micro_step < accumulation_steps - 1
            with train_model.no_sync() if local else contextlib.nullcontext():
                with rt.autocast():
                    _, loss = train_model(x, y, loss_chunks)
                scaler.scale(loss / accumulation_steps).backward()
            loss_sum += loss.detach() / accumulation_steps
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        # Filled on the device: copying a number there would wait for it.
        flags = [torch.full_like(loss_sum, stop.number == n) for n in (signal.SIGTERM, signal.SIGINT)]
        shared = rt.all_reduce(torch.stack([loss_sum / world_size, *flags]))
        for optimizer in optimizers:
            if not scaler.is_enabled():
                # Looked at on the device, where an update that would spoil the weights is left out.
                optimizer.found_inf = 1 - (shared[0] + grad_norm).isfinite().float()
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        pending.append((step, factor * s.learning_rate, torch.stack([shared[0], grad_norm, *shared[1:]])))

        # A GPU works on this step while the numbers of the one before are fetched and printed. Where
        # something else comes next, it finishes first, so that a step's time is its own.
        intervals = (s.val_interval, s.hellaswag_interval, s.sample_interval, s.checkpoint_interval)
        due = [interval and step % interval == 0 for interval in intervals]
        last = step == s.max_steps
        lag = 0 if rt.device.type == "cpu" or any(due) or last else 1
        while len(pending) > lag:
            stopped_by = log_oldest() or stopped_by
            lag = 0 if stopped_by else lag
        if any(due) or last or stopped_by:
            timed_evaluation(step)
            if due[-1] or last or stopped_by:
                timed_checkpoint(step)
            step_begin = clock()
        if stopped_by and not last:
            name = signal.Signals(stopped_by).name
            say(f"stopped by {name} after step {step}: {how_to_continue(s, world_size)}")
            batches.close()
            rt.close()
            return 128 + stopped_by
    batches.close()

    if log:
        finish_run(s, rt, model, dict(seconds))
    rt.barrier()
    rt.close()
    return 0


def main() -> int:
    settings = read_settings()
    try:
        return train(settings)
    except torch.OutOfMemoryError as error:
        record = settings.out_dir / "config.json"
        raise UserError(f"out of GPU memory: lower --micro-batch-size ({record} says what it was)") from error


if __name__ == "__main__":
    cli.run(main)
