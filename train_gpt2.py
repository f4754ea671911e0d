"""Train GPT-2 from scratch.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the reference recipe on 8 GPUs
    python train_gpt2.py --preset rehearsal                    # 50 steps that exercise every stage of it
    python train_gpt2.py --preset demo                         # a small model on any CPU, no network
    python train_gpt2.py --preset log/config.json --out-dir log2     # repeat a run

A step is one optimizer step; steps count from 1. The training loss of step s is that of its batch before the
update, the validation loss of step s that of the weights after it.
"""

if __name__ == "__main__":  # Ctrl-C during the imports below: end without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import gc
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from filelock import FileLock
from torch import Tensor, nn

import dataloader
import hellaswag
import optim
import plot_loss
from dataloader import TokenStream
from model import GPT, GPTConfig
from pre_tokens import builtin_corpus, fetch_tokens_hf, shards
from settings import PRESETS, Settings, check_settings, read_settings
from support import checkpoint, cli, files, hardware, metrics, run_folder, runtime, sampling, tokenizer
from support.cli import UserError
from support.loss import default_chunks
from support.metrics import Metrics
from support.progress import Clock, Progress
from support.runtime import Runtime, StopSignal


@dataclass
class Run:
    """What `set_up` builds and the loop uses."""

    settings: Settings
    rt: Runtime
    clock: Clock
    metrics: Metrics
    train_stream: TokenStream
    val_stream: TokenStream
    hellaswag_examples: list[hellaswag.Example]
    model: GPT  # the module itself: saved, sampled from, evaluated on HellaSwag
    train_model: nn.Module  # wrapped by DDP if there are several processes, and compiled
    eval_model: nn.Module  # compiled
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # does nothing except in fp16
    micro_batch_size: int
    accumulation_steps: int
    loss_chunks: int
    identity: dict[str, object]  # what a resumed run must have in common with this one
    writer: checkpoint.Writer
    steps_done: int  # before this process started: 0, or the step of the checkpoint it resumed from
    lock: FileLock | None  # of the run folder, held by rank 0 as long as this object lives

    def say(self, step: int, text: str) -> None:
        """Print a line about `step`, on rank 0."""
        self.rt.say(f"step {step}/{self.settings.max_steps} | {text}")


# ---------------------------------------------------------------- set-up


def set_up(s: Settings) -> Run:
    """Everything a run needs, from settings to a resumed state. Raises UserError on a user's mistake."""
    check_settings(s, runtime.world_size())
    rt, clock = runtime.start(s.device, s.dtype), Clock()
    shape = GPTConfig(s.block_size, tokenizer.VOCAB_SIZE, s.n_layer, s.n_head, s.n_embd)
    flops = s.max_steps * s.total_batch_size * shape.flops_per_token(s.sequence_length)
    hardware.refuse_days_on_cpu(s.device, flops, rt)
    with clock("data"):
        rt.run_on_some(rt.local_rank == 0, lambda: prepare_data(s), fetches=True)
        data = shards.find_shards(s.data_dir, s.num_shards)
        train_stream = TokenStream(data["train"], s.sequence_length, s.seed, s.shuffle)
        val_stream = TokenStream(data["val"], s.sequence_length)
        examples = hellaswag.prepare(s.hellaswag_data, rt) if s.hellaswag_interval else []

    model = build_model(s, rt.device)
    examples = hellaswag.truncate_contexts(examples, model.config.block_size)
    sequences = s.total_batch_size // s.sequence_length // rt.world_size  # per step and process
    B = s.micro_batch_size or hardware.largest_micro_batch(
        model, s.sequence_length, sequences, s.loss_chunks, s.optimizer, rt
    )
    optimizers = optim.build_optimizers(
        model, s.optimizer, s.learning_rate, s.embedding_lr_ratio, s.weight_decay
    )
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)

    # Not before now: a mistake in the settings or the data must not leave a run folder behind.
    claimed = rt.run_on_some(rt.is_main, lambda: run_folder.claim(s.out_dir, s.resume, s.overwrite))
    newest, lock = claimed or (None, None)
    steps_done = checkpoint.step_of(newest) if newest else 0
    steps_done = int(rt.all_reduce(torch.tensor(steps_done, device=rt.device), "MAX"))
    own_identity = identity(s, model.config, train_stream)
    if steps_done:
        folder = checkpoint.folder_of(s.out_dir, steps_done)
        clock.add(checkpoint.restore(folder, model, optimizers, scaler, own_identity))
    if steps_done > s.max_steps:
        raise UserError(
            f"--max-steps {s.max_steps}: the run in {s.out_dir} has already done {steps_done} steps"
        )
    train_model, eval_model = rt.wrap(model, s.compile)
    facts = {
        "data": shards.describe(s.data_dir, train_stream.shards),
        "micro_batch_size": B,
        "parameters": model.config.n_parameters,
        "hardware": hardware.describe(rt),
    }
    run = Run(
        settings=s, rt=rt, clock=clock, train_stream=train_stream, val_stream=val_stream, lock=lock,
        metrics=run_folder.open_record(s, facts, steps_done, silent=not rt.is_main),
        hellaswag_examples=examples, model=model, train_model=train_model, eval_model=eval_model,
        optimizers=optimizers, scaler=scaler, micro_batch_size=B, accumulation_steps=sequences // B,
        loss_chunks=s.loss_chunks or default_chunks(B * s.sequence_length, rt.device),
        identity=own_identity, writer=checkpoint.Writer(), steps_done=steps_done,
    )  # fmt: skip
    print_setup(run)
    return run


def prepare_data(s: Settings) -> None:
    """Fetch or build missing shards; ensure that --data-dir holds every shard that its manifest lists."""
    if s.dataset_repo == "builtin" and s.data_dir == PRESETS["demo"].data_dir:
        builtin_corpus.complete(s.data_dir)
    elif s.dataset_repo not in ("builtin", "none"):
        fetch_tokens_hf.fetch(s.dataset_repo, s.data_dir, s.num_shards)
    shards.check_complete(s.data_dir, s.num_shards)


def build_model(s: Settings, device: torch.device) -> GPT:
    """The model with its initial weights, on the device; the same weights on every device."""
    # A multiple of 128 rows suits the GPU's matrix units; a CPU gains nothing from it.
    padded = -(-tokenizer.VOCAB_SIZE // 128) * 128 if device.type == "cuda" else 0
    if s.init_from == "scratch":
        torch.manual_seed(s.seed)
        model = GPT(GPTConfig(s.block_size, tokenizer.VOCAB_SIZE, s.n_layer, s.n_head, s.n_embd, padded))
    else:
        model = GPT.from_pretrained(run_folder.find_model(s.init_from), padded)
        if model.config.vocab_size != tokenizer.VOCAB_SIZE:
            raise UserError(
                f"--init-from {s.init_from}: {model.config.vocab_size} token ids, the data has GPT-2's 50257"
            )
    if s.sequence_length > model.config.block_size:
        fix = "--block-size" if s.init_from == "scratch" else "--init-from"
        raise UserError(
            f"--sequence-length {s.sequence_length}: the model has {model.config.block_size} positions: "
            f"lower it, or change {fix}"
        )
    return model.to(device)


def identity(s: Settings, config: GPTConfig, stream: TokenStream) -> dict[str, object]:
    """What the order of the data and the shape of the state depend on: a resumed run must have the same."""
    names = ("sequence_length", "total_batch_size", "seed", "shuffle", "optimizer")
    model = dataclasses.asdict(dataclasses.replace(config, padded_vocab_size=0))
    return {"model": model, "data": stream.fingerprint(), **{name: getattr(s, name) for name in names}}


def print_setup(run: Run) -> None:
    """Print what is about to be trained, on which data and machine."""
    s, rt, config, n = run.settings, run.rt, run.model.config, run.accumulation_steps
    T, compiled = s.sequence_length, "compiled" if s.compile else "not compiled"
    attention = hardware.attention_backend(rt, config.n_head, config.n_embd // config.n_head, T)
    processes = f"{rt.world_size} process{'es' * (rt.world_size > 1)}"
    rounds = f"{n} accumulation step{'s' * (n > 1)}"
    rt.say(f"model      {config.n_parameters:,} parameters: {s.init_from}, {config}")
    rt.say(f"data       {s.data_dir}: {len(run.train_stream) * T:,} training tokens")
    rt.say(
        f"batch      {s.total_batch_size:,} tokens = {run.micro_batch_size} x {T} x {processes} x {rounds}"
    )
    rt.say(f"device     {hardware.describe(rt)['name']}, {rt.dtype}, {compiled}, {attention} attention")
    rt.say(f"run        {s.out_dir}: steps {run.steps_done} to {s.max_steps}")
    if T < config.block_size:
        rt.say(f"warning: positions {T} and above are never trained: --block-size {T} drops them")


# ---------------------------------------------------------------- training


def train(s: Settings) -> int:
    """Train as the settings say. Returns the exit status: 0, or 128 + signal if one ended the run."""
    run = set_up(s)
    rt, status = run.rt, run_steps(run)
    # The process group is left with no model alive: a DDP reducer torn down at exit can hang or abort.
    del run
    torch.compiler.reset()
    gc.collect()
    rt.close()
    return status


def run_steps(run: Run) -> int:
    """All optimizer steps that are left, and what is due between them. Returns the exit status."""
    s, rt = run.settings, run.rt
    stop = StopSignal(announce=rt.is_main, agent=rt.agent)
    batches = dataloader.train_batches(
        run.train_stream, run.steps_done, s.total_batch_size // s.sequence_length, run.micro_batch_size,
        rt.rank, rt.world_size, rt.device,
    )  # fmt: skip
    if run.steps_done == 0:
        evaluate(run, 0)
    progress = make_progress(run)
    with contextlib.closing(batches), run.clock("training"):
        for step in range(run.steps_done + 1, s.max_steps + 1):
            progress.begin()
            lr = optim.set_learning_rates(run.optimizers, step, s)
            progress.add(step, lr, update(run, batches, stop))  # nothing waits for the device
            last = step == s.max_steps
            pause = last or is_due(
                step, s.val_interval, s.hellaswag_interval, s.sample_interval, s.checkpoint_interval
            )
            stopped = progress.report(catch_up=pause)  # a signal's number, read with the step's numbers
            if pause or stopped:
                evaluate(run, step)
            if last or stopped or is_due(step, s.checkpoint_interval):
                save(run, step, wait=last or stopped > 0)
            if stopped and not last:
                how = run_folder.how_to_continue(s.out_dir, s.overwrite, rt.world_size)
                rt.say(f"stopped by {signal.Signals(stopped).name} after step {step}: {how}")
                return 128 + stopped
    finish(run)
    return 0


def is_due(step: int, *intervals: int) -> bool:
    """Whether anything that happens every so many steps (0: never) happens after `step`."""
    return any(interval > 0 and step % interval == 0 for interval in intervals)


def make_progress(run: Run) -> Progress:
    """The object that prints and records steps."""
    s, rt = run.settings, run.rt
    return Progress(
        run.metrics, rt.say, rt.device, steps_done=run.steps_done, max_steps=s.max_steps,
        tokens_per_step=s.total_batch_size, max_bad_steps=s.max_bad_steps,
        flops_per_token=run.model.config.flops_per_token(s.sequence_length),
        peak_flops=hardware.peak_flops(rt.device, rt.dtype) * rt.world_size,
    )  # fmt: skip


def update(run: Run, batches: Iterator[tuple[Tensor, Tensor]], stop: StopSignal) -> Tensor:
    """One optimizer step over all micro-batches. Does not wait for the device.

    Returns float32 (5,) on the device: the mean loss over all processes, the gradient norm before clipping,
    how many processes have received SIGTERM and SIGINT, and the scale of the loss (1 except in fp16).
    """
    rt, n = run.rt, run.accumulation_steps
    loss_sum = torch.zeros((), device=rt.device)
    for micro_step in range(n):
        x, y = next(batches)
        # DDP averages the gradients over all processes inside backward(), overlapping with it; no_sync()
        # postpones that to the last micro-batch of the step.
        local = rt.world_size > 1 and micro_step < n - 1
        with run.train_model.no_sync() if local else contextlib.nullcontext():
            with rt.autocast():
                _, loss = run.train_model(x, y, run.loss_chunks)
            run.scaler.scale(loss / n).backward()
        loss_sum += loss.detach() / n
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.grad_clip or math.inf)
    # The loss and the signals travel together. full_like fills on the device: a copy would synchronise.
    signals = [torch.full_like(loss_sum, stop.number == number) for number in (signal.SIGTERM, signal.SIGINT)]
    mean_loss, *signals = rt.all_reduce(torch.stack([loss_sum / rt.world_size, *signals]))
    scale = run.scaler.scale(torch.ones_like(loss_sum))
    optim.step(run.optimizers, run.scaler, finite=(mean_loss + grad_norm).isfinite().float())
    return torch.stack([mean_loss, grad_norm, *signals, scale])


# ---------------------------------------------------------------- between steps


def evaluate(run: Run, step: int) -> None:
    """Validation and HellaSwag if due after `step`, or if it is the last; samples if due (not the last)."""
    s, rt = run.settings, run.rt
    last = step == s.max_steps
    with run.clock("evaluation"):
        if s.val_interval and (is_due(step, s.val_interval) or last):
            val_loss = validate(run)
            run.say(step, f"validation loss {val_loss:.4f}")
            run.metrics.log(step, "val", loss=val_loss)
        if run.hellaswag_examples and (is_due(step, s.hellaswag_interval) or last):
            # On the module itself: its batches have many shapes, and each would be compiled anew.
            score = hellaswag.evaluate(run.model, run.hellaswag_examples, rt)
            run.say(step, f"HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}")
            run.metrics.log(step, "hellaswag", acc=score.acc, acc_norm=score.acc_norm, n=score.n)
        if step and is_due(step, s.sample_interval) and not last and rt.is_main:
            with rt.autocast():
                samples = sampling.draw_samples(run.model, s.seed)
            for text in samples[::3]:
                run.say(step, f"sample: {text!r}")
                run.metrics.log(step, "event", name="sample", text=text)
        rt.barrier()


@torch.no_grad()
def validate(run: Run) -> float:
    """Mean loss in nats over the first --val-tokens of the validation shards, shared among the processes."""
    s, rt, stream = run.settings, run.rt, run.val_stream
    n_sequences = max(1, min(s.val_tokens // s.sequence_length, len(stream)))
    sums = []
    batches = dataloader.val_batches(
        stream, n_sequences, run.micro_batch_size, rt.rank, rt.world_size, rt.device
    )
    for x, y in batches:
        with rt.autocast():
            _, loss = run.eval_model(x, y, run.loss_chunks)
        sums.append(loss * (y != -100).sum())
    total = torch.stack(sums).cpu().double().sum() if sums else torch.zeros((), dtype=torch.float64)
    total = rt.all_reduce(total.to(rt.device)) if rt.world_size > 1 else total
    return float(total) / (n_sequences * s.sequence_length)


def save(run: Run, step: int, wait: bool) -> None:
    """Write the checkpoint of `step` in the background, or, with `wait`, before returning.

    In a rehearsal, also load it and continue from what was read. A write that fails is recorded, and the next
    one awaited: if that fails too, it raises UserError.
    """
    s, rt = run.settings, run.rt
    folder = checkpoint.folder_of(s.out_dir, step)
    with run.clock("checkpoints"):
        optimizer_state = checkpoint.optimizer_state(run.model, run.optimizers)  # on every process
        if rt.is_main:
            if failure := run.writer.wait():
                run.say(step, f"warning: {failure}")
                run.metrics.log(step, "event", name="checkpoint failed", reason=str(failure))
            run.metrics.sync()
            state = {
                "step": step,
                "identity": run.identity,
                "optimizer": optimizer_state,
                "scaler": run.scaler.state_dict(),
                "seconds": run.clock.seconds(),
            }
            message = f"step {step}/{s.max_steps} | checkpoint {folder}"
            snapshot = checkpoint.snapshot(run.model, state)
            run.writer.start(s.out_dir, step, snapshot, s.keep_checkpoints, message)
            if (wait or failure or s.reload_checkpoints) and (failure := run.writer.wait()):
                raise failure
        if s.reload_checkpoints:
            rt.barrier()
            checkpoint.restore(folder, run.model, run.optimizers, run.scaler, run.identity)
            run.say(step, "checkpoint loaded back")


def finish(run: Run) -> None:
    """Write samples.txt, summary.json and loss_curves.png, and say where they are."""
    s, rt, folder = run.settings, run.rt, run.settings.out_dir
    if rt.is_main:
        with rt.autocast():
            samples = sampling.draw_samples(run.model, s.seed)
        files.write_atomically(folder / run_folder.SAMPLES, "\n\n---\n\n".join(samples) + "\n")
        tokens, seconds = s.max_steps * s.total_batch_size, run.clock.seconds()
        machine, n_parameters = hardware.describe(rt), run.model.config.n_parameters
        records = metrics.read(run.metrics.path)
        run_folder.write_summary(folder, records, n_parameters, s.max_steps, tokens, seconds, machine)
        figure = plot_loss.plot_run(folder)
        print(f"\nsamples ({folder / run_folder.SAMPLES}):")
        for text in samples[::3]:
            print(f"  {text!r}")
        if val_losses := [r["loss"] for r in records if r["kind"] == "val" and r["loss"] is not None]:
            print(f"validation loss: {val_losses[-1]:.4f}, from {val_losses[0]:.4f} ({run.metrics.path})")
        print(f"summary: {folder / run_folder.SUMMARY}")
        print(f"figure: {figure}")
    rt.barrier()


def main() -> int:
    settings = read_settings()
    try:
        return train(settings)
    except torch.OutOfMemoryError as error:
        record = settings.out_dir / run_folder.CONFIG
        raise UserError(f"out of GPU memory: lower --micro-batch-size (its value is in {record})") from error


if __name__ == "__main__":
    cli.run(main)
