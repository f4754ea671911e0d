"""Train GPT-2 from scratch.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the reference recipe on 8 GPUs
    python train_gpt2.py --preset rehearsal                    # 50 steps that exercise every stage of it
    python train_gpt2.py --preset demo                         # a small model on any CPU, no network
    python train_gpt2.py --preset log/config.json --out-dir log2     # repeat a run

A step is one optimizer step; steps count from 1. The training loss of step s is that of its batch before the
update, the validation loss of step s that of the weights after it.
"""

if __name__ == "__main__":
    from support import launch

    launch.prepare()

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
from settings import PRESETS, SHAPE, Settings, check_settings, read_settings
from support import (
    checkpoint,
    cli,
    compiler,
    files,
    hardware,
    metrics,
    push,
    report,
    run_folder,
    runtime,
    sampling,
    tokenizer,
)
from support.attempts import Attempts
from support.cli import UserError
from support.loss import default_chunks
from support.metrics import Metrics
from support.progress import Clock, Progress
from support.runtime import Runtime

# ---------------------------------------------------------------- one step


class StepResult(NamedTuple):
    """The numbers of an optimizer step, float32 on the device, where they may still be in the making."""

    loss: Tensor  # mean over all processes, of the batch before the update
    grad_norm: Tensor  # before clipping
    scale: Tensor  # of the loss in fp16, else 1
    votes: Tensor  # (3,), not of the step: see Runtime.mean_and_votes


@dataclass
class Trainer:
    """A model and everything that one training step of it needs."""

    rt: Runtime
    model: GPT  # the module itself: saved, sampled from, evaluated on HellaSwag
    train_model: nn.Module  # wrapped by DDP if there are several processes, and compiled
    eval_model: nn.Module  # compiled
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # does nothing except in fp16
    micro_batch_size: int
    accumulation_steps: int  # micro-batches per step
    loss_chunks: int
    grad_clip: float  # 0: no clipping

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> StepResult:
        """Do one optimizer step on the next micro-batches. Does not wait for the device."""
        rt, n = self.rt, self.accumulation_steps
        loss_sum = torch.zeros((), device=rt.device)
        for micro_step in range(n):
            x, y = next(batches)
            # Gradients of micro-batches add up, and the loss of the whole batch is the mean of theirs: hence
            # loss / n. DDP averages over the processes inside backward(), overlapping with it; no_sync()
            # leaves that to the last micro-batch.
            local = rt.world_size > 1 and micro_step < n - 1
            with self.train_model.no_sync() if local else contextlib.nullcontext():
                with rt.autocast():
                    _, loss = self.train_model(x, y, self.loss_chunks)
                self.scaler.scale(loss / n).backward()
            loss_sum += loss.detach() / n
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        mean_loss, votes = rt.mean_and_votes(loss_sum)
        scale = self.scaler.scale(torch.ones_like(loss_sum))
        # A step that is not finite changes nothing. This is decided on the device.
        optim.step(self.optimizers, self.scaler, finite=(mean_loss + grad_norm).isfinite().float())
        return StepResult(mean_loss, grad_norm, scale, votes)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], n_tokens: int) -> Tensor:
        """The loss in nats summed over `batches`, divided by `n_tokens`: float64 ().

        If these are the tokens of all processes, the results of all add up to the mean loss.
        """
        sums = []
        for x, y in batches:
            with self.rt.autocast():
                _, loss = self.eval_model(x, y, self.loss_chunks)
            sums.append(loss * (y != -100).sum())
        total = torch.stack(sums).cpu().double().sum() if sums else torch.zeros((), dtype=torch.float64)
        share = total / n_tokens
        return share.to(self.rt.device) if self.rt.world_size > 1 else share  # MPS has no float64


def build_trainer(s: Settings, rt: Runtime, model: GPT) -> Trainer:
    """The trainer of a model that is on the device already, as the settings say."""
    sequences = s.total_batch_size // s.sequence_length // rt.world_size  # per step and process
    B = s.micro_batch_size or hardware.largest_micro_batch(
        model, s.sequence_length, sequences, s.loss_chunks, s.optimizer, rt
    )
    optimizers = optim.build_optimizers(
        model, s.optimizer, s.learning_rate, s.embedding_lr_ratio, s.weight_decay, s.adam_beta2
    )
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    chunks = s.loss_chunks or default_chunks(B * s.sequence_length, rt.device)
    train_model, eval_model = rt.wrap(model, s.compile)
    return Trainer(
        rt, model, train_model, eval_model, optimizers, scaler, B, sequences // B, chunks, s.grad_clip
    )


# ---------------------------------------------------------------- set-up


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
    trainer: Trainer
    identity: dict[str, object]  # what a resumed run must have in common with this one
    writer: checkpoint.Writer
    attempt: Attempts  # at what may fail without ending the run
    pusher: push.Pusher  # does nothing without --push-to-hub
    steps_done: int  # before this process started: 0, or the step of the checkpoint it resumed from
    last_step: int  # --max-steps, or the step at which --patience ran out
    lock: FileLock | None  # of the run folder, held by rank 0 as long as this object lives

    def say(self, step: int, text: str) -> None:
        """Print a line about `step`, on rank 0."""
        self.rt.say(f"step {step}/{self.settings.max_steps} | {text}")


def set_up(s: Settings, rt: Runtime) -> Run:
    """Everything a run needs, from settings to a resumed state. Raises UserError on a user's mistake."""
    clock = Clock()
    rt.run_on_some(rt.is_main, lambda: run_folder.check(s))  # before anything is fetched into it
    if s.init_from == "scratch":  # before anything is fetched; other models first say how large they are
        refuse_long_run(s, scratch_config(s), rt)
    s = dataclasses.replace(s, compile=not rt.on_any(not s.compile))  # the default of one GPU may differ
    if s.compile:
        compiler.try_out(rt)
    hub_state = rt.run_on_some(rt.is_main, lambda: push.prepare(s), fetches=s.push_to_hub != "")
    model = rt.run_on_some(True, lambda: build_model(s, rt.device))
    hardware.avoid_faulty_attention(s.sequence_length, s.dropout)
    s = dataclasses.replace(s, **{name: getattr(model.config, name) for name in SHAPE})  # to be recorded
    if s.init_from != "scratch":
        refuse_long_run(s, model.config, rt)
    with clock("data"):
        rt.run_on_some(rt.local_rank == 0, lambda: prepare_data(s), fetches=True)
        train_stream, val_stream = rt.run_on_some(True, lambda: open_streams(s))
        if not all(rt.agree(int(each.fingerprint(), 16) >> 1) for each in (train_stream, val_stream)):
            raise UserError(f"--data-dir {s.data_dir}: not the same shards on every machine: copy them over")
        examples, problem = [], ""
        if s.hellaswag_interval:  # a file that is damaged later must not end a restart loop
            begun = rt.on_any(s.resume and len(checkpoint.folders(s.out_dir)) > 0)
            examples, problem = hellaswag.prepare(s.hellaswag_data, rt, required=not begun)

    examples = hellaswag.truncate_contexts(examples, model.config.block_size)
    trainer = build_trainer(s, rt, model)

    # Not before now: a mistake in the settings or the data must not leave a run folder behind.
    claimed = rt.run_on_some(rt.is_main, lambda: run_folder.claim(s))
    newest, lock = claimed or (None, None)
    steps_done = checkpoint.step_of(newest) if newest else 0
    [steps_done] = rt.highest(steps_done)  # rank 0 tells the others
    identity = checkpoint.identity(s, model.config, train_stream.fingerprint())
    if steps_done:
        folder = checkpoint.folder_of(s.out_dir, steps_done)
        earlier = lambda: checkpoint.restore(folder, model, trainer.optimizers, trainer.scaler, identity)  # noqa: E731
        clock.add(rt.run_on_some(True, earlier))
    if steps_done > s.max_steps:
        raise UserError(
            f"--max-steps {s.max_steps}: the run in {s.out_dir} has already done {steps_done} steps"
        )
    B = trainer.micro_batch_size
    facts = {"data": shards.describe(s.data_dir, train_stream.shards), "micro_batch_size": B}
    facts |= {"parameters": model.config.n_parameters, "hardware": hardware.describe(rt)}
    record = run_folder.open_record(s, facts, steps_done, silent=not rt.is_main)
    if problem:
        record.log(steps_done, "event", name="evaluation failed", what="HellaSwag", reason=problem)
    run = Run(
        settings=s, rt=rt, clock=clock, trainer=trainer, train_stream=train_stream, val_stream=val_stream,
        lock=lock, metrics=record, attempt=Attempts(rt, record, steps_done), steps_done=steps_done,
        hellaswag_examples=examples, last_step=s.max_steps, identity=identity, writer=checkpoint.Writer(),
        pusher=push.Pusher(s, hub_state, newest, not rt.is_main),
    )  # fmt: skip
    report.at_start(s, rt, model.config, len(train_stream), B, trainer.accumulation_steps, steps_done)
    return run


def scratch_config(s: Settings, padded: int = 0) -> GPTConfig:
    """The model that the flags describe. padded: rows of the embedding, see GPTConfig."""
    sizes = (s.block_size, tokenizer.VOCAB_SIZE, s.n_layer, s.n_head, s.n_embd)
    return GPTConfig(*sizes, padded, s.dropout)


def refuse_long_run(s: Settings, config: GPTConfig, rt: Runtime) -> None:
    """Raise UserError if the whole run would take more than 6 hours on a CPU that --device auto chose."""
    flops = s.max_steps * s.total_batch_size * config.flops_per_token(s.sequence_length)
    hardware.refuse_long_runs_on_cpu(s.device, flops, rt)


def prepare_data(s: Settings) -> None:
    """Fetch or build missing shards; ensure that --data-dir holds every shard that its manifest lists."""
    if s.dataset_repo == "builtin" and s.data_dir == PRESETS["demo"].data_dir:
        builtin_corpus.complete(s.data_dir)
    elif s.dataset_repo not in ("builtin", "none"):
        fetch_tokens_hf.fetch(s.dataset_repo, s.data_dir, s.num_shards)
    shards.check_complete(s.data_dir, s.num_shards)


def open_streams(s: Settings) -> tuple[TokenStream, TokenStream]:
    """The sequences for training and for validation."""
    data = shards.find_shards(s.data_dir, s.num_shards)
    train_stream = TokenStream(data["train"], s.sequence_length, s.seed, s.shuffle)
    return train_stream, TokenStream(data["val"], s.sequence_length)


def build_model(s: Settings, device: torch.device) -> GPT:
    """The model with its initial weights, on the device, to be trained; the same weights on every device."""
    padded = hardware.padded_vocab_size(tokenizer.VOCAB_SIZE, device)
    if s.init_from == "scratch":
        torch.manual_seed(s.seed)
        model = GPT(scratch_config(s, padded))
    else:
        # A resumed run starts from its own checkpoint, restored later: --init-from may be gone by then.
        begun = checkpoint.latest_intact(s.out_dir)[0] if s.resume else None
        model = GPT.from_pretrained(begun or run_folder.find_model(s.init_from), padded, s.dropout)
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
    if s.recompute and s.dropout and device.type == "mps":  # torch would drop something else the second time
        raise UserError("--recompute --dropout: not together on Apple's GPUs: drop one of them")
    model.recompute = s.recompute
    return model.train().to(device)


# ---------------------------------------------------------------- training


def train(s: Settings) -> int:
    """Train as the settings say. Returns the exit status: 0, or 128 + signal if one ended the run."""
    check_settings(s, runtime.world_size())
    with runtime.start(s.device, s.dtype) as rt:
        run = set_up(s, rt)
        status = run_steps(run)
        run.pusher.close(run.metrics)
    run.metrics.close()
    return status


def run_steps(run: Run) -> int:
    """All optimizer steps that are left, and what is due between them. Returns the exit status."""
    s, rt, trainer = run.settings, run.rt, run.trainer
    rt.stop.listen(announce=rt.is_main, agent=rt.agent)
    batches = dataloader.train_batches(
        run.train_stream, run.steps_done, s.total_batch_size // s.sequence_length, trainer.micro_batch_size,
        rt.rank, rt.world_size, rt.device,
    )  # fmt: skip
    step = run.steps_done
    stopped = evaluate(run, step)  # at a resume only what the record of this step lacks
    flops_per_token = trainer.model.config.flops_per_token(s.sequence_length)
    peak_flops = hardware.peak_flops(rt.device, rt.dtype)
    progress = Progress(s, rt, run.metrics, run.writer, flops_per_token, peak_flops, run.attempt.seconds)
    with contextlib.closing(batches), run.clock("training"):
        while step < run.last_step and not stopped:
            step += 1
            progress.begin()
            lr = optim.set_learning_rates(trainer.optimizers, step, s)
            rt.stop.wants_checkpoint = rt.is_main and run.writer.is_overdue(s.checkpoint_minutes)
            progress.add(step, lr, trainer.step(batches))  # nothing waits for the device
            last = step == run.last_step
            to_save = last or is_due(step, s.checkpoint_interval, s.val_interval if s.keep_best else 0)
            pause = to_save or is_due(step, s.val_interval, s.hellaswag_interval, s.sample_interval)
            stopped, overdue = progress.report(catch_up=pause)  # of any process, read with the step's numbers
            if stopped:
                break
            healthy = progress.bad_steps == 0  # weights that no longer give a finite loss are not kept
            if last or (healthy and (to_save or overdue)):
                save(run, step, wait=last)
            if pause:
                stopped = evaluate(run, step)
    if step < s.max_steps and not stopped:  # --patience has run out
        save(run, step, wait=True)
        stopped = evaluate(run, step)  # what only the last step has
    if stopped:
        if step > run.steps_done and rt.on_any(rt.is_main and not run.writer.has_written(step)):
            save(run, step, wait=True)
        how = run_folder.how_to_continue(s.out_dir, s.overwrite, rt.world_size)
        rt.say(f"stopped by {signal.Signals(stopped).name} after step {step}: {how}")
        return 128 + stopped
    finish(run, step)
    return 0


def is_due(step: int, *intervals: int) -> bool:
    """Whether anything that happens every so many steps (0: never) happens after `step`."""
    return any(interval > 0 and step % interval == 0 for interval in intervals)


# ---------------------------------------------------------------- between steps


def evaluate(run: Run, step: int) -> int:
    """Validation and HellaSwag if due after `step`, or if it is the last; samples if due (not the last).

    What the record of the step has already is not repeated. With --patience this may become the last step.
    Returns the number of the signal that has cut it off, or 0.
    """
    s, rt, examples = run.settings, run.rt, run.hellaswag_examples
    last = step == run.last_step
    with run.clock("evaluation"):
        if s.val_interval and (is_due(step, s.val_interval) or last):
            share = run.attempt(step, "validation", lambda: validate(run))
            if share is not None:
                val_loss = float(rt.all_reduce(share))
                run.say(step, f"validation loss {val_loss:.4f}")
                run.metrics.log(step, "val", loss=val_loss)
            if s.patience and not last and not run.attempt.stopped_by and out_of_patience(run, step):
                run.last_step = step
        if examples and (is_due(step, s.hellaswag_interval) or last):
            # On the module itself: its batches have many shapes, and each would be compiled anew.
            correct = run.attempt(
                step, "HellaSwag", lambda: hellaswag.count_correct(run.trainer.model, examples, rt)
            )
            if correct is not None:
                score = hellaswag.total_score(correct, len(examples), rt)
                run.say(step, f"HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}")
                run.metrics.log(step, "hellaswag", acc=score.acc, acc_norm=score.acc_norm, n=score.n)
        if step and is_due(step, s.sample_interval) and not last:
            samples = draw_samples(run, step, "samples") or []
            for text in samples[:: sampling.SAMPLES_PER_PROMPT]:
                run.say(step, f"sample: {text!r}")
                run.metrics.log(step, "event", name="sample", text=text)
    return run.attempt.stopped_by


def draw_samples(run: Run, step: int, what: str) -> list[str] | None:
    """Samples of the model on rank 0; None elsewhere, and where they fail. what: their name in messages."""
    work = functools.partial(sampling.draw_samples, run.trainer.model, run.settings.seed)
    return run.attempt(step, what, work, here=run.rt.is_main)


def out_of_patience(run: Run, step: int) -> bool:
    """Whether the last --patience validations brought no lower loss. Every process has to call it."""
    s, rt = run.settings, run.rt
    stale, best = run_folder.stale_validations(s.out_dir) if rt.is_main else (0, None)
    if not rt.on_any(stale >= s.patience):
        return False
    run.say(step, f"--patience {s.patience}: ending, as no loss is below that of step {best}")
    run.metrics.log(step, "event", name="patience ran out", validations=stale, best_step=best)
    return True


def validate(run: Run) -> Tensor:
    """This process's share of the mean loss over the first --val-tokens of validation data: float64 ()."""
    s, rt, stream, trainer = run.settings, run.rt, run.val_stream, run.trainer
    n_sequences = max(1, min(s.val_tokens // s.sequence_length, len(stream)))
    batches = dataloader.val_batches(
        stream, n_sequences, trainer.micro_batch_size, rt.rank, rt.world_size, rt.device
    )
    return trainer.validate(rt.stop.interrupting(batches), n_sequences * s.sequence_length)


def save(run: Run, step: int, wait: bool) -> None:
    """Write the checkpoint of `step` in the background, or, with `wait`, before returning.

    With --reload-checkpoints, also load it and continue from what was read. A write that failed is recorded,
    and this one awaited: if it fails too, it raises UserError.
    """
    s, rt, trainer = run.settings, run.rt, run.trainer
    folder = checkpoint.folder_of(s.out_dir, step)
    with run.clock("checkpoints"):
        optimizer_state = checkpoint.optimizer_state(trainer.model, trainer.optimizers)  # on every process
        if rt.is_main:
            if failure := run.writer.wait():
                run.say(step, f"warning: {failure}")
                run.metrics.log(step, "event", name="checkpoint failed", reason=str(failure))
            run.metrics.sync()
            state = {"step": step, "identity": run.identity, "optimizer": optimizer_state}
            state |= {"scaler": trainer.scaler.state_dict(), "seconds": run.clock.seconds()}
            message = f"step {step}/{s.max_steps} | checkpoint {folder}"
            snapshot = checkpoint.snapshot(trainer.model, state)
            best = run_folder.by_validation_loss(s.out_dir)[:1] if s.keep_best else ()
            run.writer.start(s.out_dir, step, snapshot, s.keep_checkpoints, message, spared=best)
            run.pusher.send(run.metrics, step, folder, run.writer.writing)
            if (wait or failure or s.reload_checkpoints) and (failure := run.writer.wait()):
                raise failure
        if s.reload_checkpoints:
            rt.barrier()
            checkpoint.restore(folder, trainer.model, trainer.optimizers, trainer.scaler, run.identity)
            run.say(step, "checkpoint loaded back")


def finish(run: Run, step: int) -> None:
    """Write samples.txt, summary.json and loss_curves.png, and say where they are."""
    s, rt, folder = run.settings, run.rt, run.settings.out_dir
    samples = draw_samples(run, step, run_folder.SAMPLES)
    figure = run.attempt(step, run_folder.FIGURE, lambda: plot_loss.plot_run(folder), here=rt.is_main)
    if rt.is_main:
        if samples:
            files.write_atomically(folder / run_folder.SAMPLES, "\n\n---\n\n".join(samples) + "\n")
        records, n_parameters = metrics.read(run.metrics.path), run.trainer.model.config.n_parameters
        tokens, seconds, machine = step * s.total_batch_size, run.clock.seconds(), hardware.describe(rt)
        run_folder.write_summary(folder, records, n_parameters, step, tokens, seconds, machine)
        report.at_end(folder, records, samples, figure)
    rt.barrier()


def main() -> int:
    settings = read_settings()
    try:
        return train(settings)
    except torch.OutOfMemoryError as error:
        record = settings.out_dir / run_folder.CONFIG
        raise UserError(f"out of GPU memory: lower --micro-batch-size (its value is in {record})") from error


if __name__ == "__main__":
    cli.run(main, must_finish=True)
