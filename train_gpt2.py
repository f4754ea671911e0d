"""Train GPT-2 from scratch.

    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the reference recipe on 8 GPUs
    python train_gpt2.py --preset rehearsal                    # 50 steps that exercise every stage of it
    python train_gpt2.py --preset demo                         # a small model on any CPU, no network
    python train_gpt2.py --preset log/config.json --out-dir log2     # repeat a run

Read Trainer.step, one optimizer step, then run_steps, the loop around it. Steps count from 1. The training
loss of step s is that of its batch before the update; its validation loss is that of the weights after it.
"""

if __name__ == "__main__":
    from support import launch

    launch.prepare()

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dataloader
import evaluation
import hellaswag
import optim
import plot_loss
from dataloader import TokenStream
from evaluation import is_due
from model import GPT, GPTConfig
from pre_tokens import builtin_corpus, fetch_tokens_hf, shards
from settings import PRESETS, SHAPE, Settings, check_settings, read_settings
from support import (
    checkpoint,
    cli,
    compiler,
    hardware,
    push,
    report,
    run_files,
    run_folder,
    runtime,
)
from support.cli import UserError
from support.loss import default_chunks
from support.progress import Clock, Progress
from support.run_folder import RunFolder
from support.runtime import Runtime

# ---------------------------------------------------------------- one step


class StepResult(NamedTuple):
    """Numbers of one optimizer step: fp32 tensors on the device, which may not have been computed yet."""

    loss: Tensor  # of the batch before the update, mean over all processes
    grad_norm: Tensor  # before clipping
    scale: Tensor  # loss scale in fp16, else 1
    votes: Tensor  # (3,): processes that want to stop or to save, see Runtime.mean_and_votes


@dataclass
class Trainer:
    """A model and everything that one training step needs. Knows no file and no signal."""

    rt: Runtime
    model: GPT  # the plain module: for checkpoints, samples and HellaSwag
    train_model: nn.Module  # the same, in DDP if there are several processes, and compiled
    eval_model: nn.Module  # the same, compiled
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # only active in fp16
    micro_batch_size: int
    accumulation_steps: int  # micro-batches per step
    loss_chunks: int
    grad_clip: float  # 0: no clipping

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> StepResult:
        """Do one optimizer step on the next micro-batches, without waiting for the device."""
        rt, n = self.rt, self.accumulation_steps
        loss_sum = torch.zeros((), device=rt.device)
        for micro_step in range(n):
            x, y = next(batches)
            # backward() adds gradients up, and the step needs the gradient of the mean loss: hence loss / n.
            # DDP averages gradients over the processes during backward(), which only the last micro-batch
            # needs: no_sync() skips it for the others.
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
        # The device itself skips the update if loss or gradient is not finite, so nothing waits for them.
        optim.step(self.optimizers, self.scaler, finite=(mean_loss + grad_norm).isfinite().float())
        return StepResult(mean_loss, grad_norm, scale, votes)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], n_tokens: int) -> Tensor:
        """Return the loss in nats, summed over `batches` and divided by `n_tokens`: float64 ().

        With the number of tokens of all processes, their results add up to the mean loss.
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
    """Build the trainer for a model that is already on the device."""
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
class Data:
    """Training, validation and HellaSwag data of a run."""

    train: TokenStream
    val: TokenStream
    hellaswag: list[hellaswag.Example]
    hellaswag_error: str  # why the examples are missing; empty if they are there or not asked for


@dataclass
class Run:
    """State that `set_up` builds for the training loop and the evaluations."""

    settings: Settings
    rt: Runtime
    trainer: Trainer
    data: Data
    folder: RunFolder

    def log(self, step: int, text: str, kind: str, /, **values: object) -> None:
        """Print a line about `step` on rank 0, and append a record to the metrics."""
        self.rt.say(f"step {step}/{self.settings.max_steps} | {text}")
        self.folder.metrics.log(step, kind, **values)


def set_up(s: Settings, rt: Runtime) -> Run:
    """Build everything a run needs, and resume it. Raises UserError on a mistake in settings or data."""
    clock = Clock()
    # Refuse what can be refused before a long download.
    rt.run_on(rt.is_main, lambda: run_folder.check(s))
    if s.init_from == "scratch":
        refuse_long_run(s, rt.run_on(True, lambda: scratch_config(s)), rt)
    s = dataclasses.replace(s, compile=not rt.on_any(not s.compile))  # all ranks or none
    if s.compile:
        compiler.try_out(rt)
    hub_head = rt.run_on(rt.is_main, lambda: push.prepare(s), fetches=s.push_to_hub != "")
    model = rt.run_on(True, lambda: build_model(s, rt.device))
    hardware.avoid_faulty_attention(s.sequence_length, s.dropout)
    s = dataclasses.replace(s, **{name: getattr(model.config, name) for name in SHAPE})  # for config.json
    if s.init_from != "scratch":  # only now do we know its size
        refuse_long_run(s, model.config, rt)
    with clock("data"):
        data = prepare_data(s, rt, model.config)
    trainer = build_trainer(s, rt, model)
    # Claim the folder last, so that bad settings leave nothing behind.
    folder = RunFolder(s, rt, clock, hub_head)
    facts = {"data": shards.describe(s.data_dir, data.train.shards)}
    folder.resume(trainer, data.train.fingerprint(), facts)
    if data.hellaswag_error:
        event = {"name": "evaluation failed", "what": "HellaSwag", "reason": data.hellaswag_error}
        folder.metrics.log(folder.steps_done, "event", **event)
    report.at_start(s, trainer, len(data.train) * s.sequence_length, folder.steps_done)
    return Run(s, rt, trainer, data, folder)


def scratch_config(s: Settings) -> GPTConfig:
    """Return the configuration of the model that the flags describe."""
    return GPTConfig(s.block_size, shards.vocab_size(s.data_dir), s.n_layer, s.n_head, s.n_embd, s.dropout)


def refuse_long_run(s: Settings, config: GPTConfig, rt: Runtime) -> None:
    """Raise UserError if the whole run would take more than 6 hours on a CPU that --device auto chose."""
    flops = s.max_steps * s.total_batch_size * config.flops_per_token(s.sequence_length)
    hardware.refuse_long_runs_on_cpu(s.device, flops, rt)


def prepare_data(s: Settings, rt: Runtime, config: GPTConfig) -> Data:
    """Fetch or build missing shards and HellaSwag examples, and open them on all ranks."""
    rt.run_on(rt.local_rank == 0, lambda: fetch_shards(s), fetches=True)
    train, val = rt.run_on(True, lambda: open_streams(s, config.vocab_size))
    if not all(rt.agree(int(each.fingerprint(), 16) >> 1) for each in (train, val)):
        raise UserError(f"--data-dir {s.data_dir}: not the same shards on every machine: copy them over")
    if not s.hellaswag_interval:
        return Data(train, val, [], "")
    # After the first checkpoint a damaged HellaSwag file must not end a restart loop.
    begun = rt.on_any(s.resume and len(checkpoint.folders(s.out_dir)) > 0)
    examples, error = hellaswag.prepare(s.hellaswag_data, rt, required=not begun)
    return Data(train, val, hellaswag.truncate_contexts(examples, config.block_size), error)


def fetch_shards(s: Settings) -> None:
    """Fetch or build missing shards. Raises UserError if one that the manifest lists is still missing."""
    if s.dataset_repo == "builtin" and s.data_dir == PRESETS["demo"].data_dir:
        builtin_corpus.complete(s.data_dir)
    elif s.dataset_repo not in ("builtin", "none"):
        fetch_tokens_hf.fetch(s.dataset_repo, s.data_dir, s.num_shards)
    shards.check_complete(s.data_dir, s.num_shards)


def open_streams(s: Settings, vocab_size: int) -> tuple[TokenStream, TokenStream]:
    """Open the training and the validation sequences, for a model with so many token ids."""
    if (n_ids := shards.vocab_size(s.data_dir)) != vocab_size:  # the manifest has only just arrived
        raise UserError(f"--data-dir {s.data_dir}: has {n_ids} token ids: run the same command again")
    data = shards.find_shards(s.data_dir, s.num_shards)
    train = TokenStream(data["train"], s.sequence_length, s.seed, s.shuffle)
    return train, TokenStream(data["val"], s.sequence_length)


def build_model(s: Settings, device: torch.device) -> GPT:
    """Build the model with its initial weights, which are the same for every device, on the device."""
    if s.init_from == "scratch":
        torch.manual_seed(s.seed)
        model = GPT(scratch_config(s))
    else:
        # A resumed run reads its own checkpoint instead, because --init-from may be gone by then.
        begun = checkpoint.latest_intact(s.out_dir)[0] if s.resume else None
        model = GPT.from_pretrained(begun or run_files.find_model(s.init_from), s.dropout)
        if model.config.vocab_size != (n_ids := shards.vocab_size(s.data_dir)):
            raise UserError(
                f"--init-from {s.init_from}: {model.config.vocab_size} token ids, the data has {n_ids}"
            )
    if s.sequence_length > model.config.block_size:
        fix = "--block-size" if s.init_from == "scratch" else "--init-from"
        raise UserError(
            f"--sequence-length {s.sequence_length}: the model has {model.config.block_size} positions: "
            f"lower it, or change {fix}"
        )
    if s.recompute and s.dropout and device.type == "mps":  # torch would draw other dropout masks
        raise UserError("--recompute --dropout: not together on Apple's GPUs: drop one of them")
    model.recompute = s.recompute
    return model.train().to(device)


# ---------------------------------------------------------------- training


def train(s: Settings) -> int:
    """Train with these settings. Returns the exit status: 0, or 128 + N if signal N stopped the run."""
    check_settings(s, runtime.world_size())
    with runtime.start(s.device, s.dtype) as rt:
        run = set_up(s, rt)
        status = run_steps(run)
        run.folder.close()
    return status


def run_steps(run: Run) -> int:
    """Do the remaining optimizer steps; save and evaluate between them. Returns the exit status."""
    s, rt, trainer, folder = run.settings, run.rt, run.trainer, run.folder
    step, last_step, stopped_by = folder.steps_done, s.max_steps, 0  # stopped_by: the number of a signal
    batches = dataloader.train_batches(
        run.data.train, step, s.total_batch_size // s.sequence_length, trainer.micro_batch_size,
        rt.rank, rt.world_size, rt.device,
    )  # fmt: skip
    progress = Progress(s, rt, folder, trainer.model.config.flops_per_token(s.sequence_length))
    rt.stop.listen(announce=rt.is_main, agent=rt.agent)
    with contextlib.closing(batches), folder.clock("training"):
        while True:
            last = step == last_step
            done = last or stopped_by > 0
            if done or (progress.healthy and (save_is_due(s, step) or progress.overdue)):
                folder.save(step, trainer, wait=done)
            if not stopped_by and (last or evaluation_is_due(s, step)):
                stopped_by = evaluation.evaluate(run, step, last)
                if not (last or stopped_by) and evaluation.out_of_patience(run, step):
                    last_step = step
            if done:
                break
            if stopped_by or step == last_step:
                continue  # the evaluation ended the run: save this step and leave
            step += 1
            progress.begin()
            lr = optim.set_learning_rates(trainer.optimizers, step, s)
            rt.stop.wants_checkpoint = folder.checkpoint_is_overdue()
            progress.add(step, lr, trainer.step(batches))
            # On a GPU this reports the previous step, so that the device always has work. Before a pause it
            # catches up.
            pause = step == last_step or save_is_due(s, step) or evaluation_is_due(s, step)
            stopped_by = progress.report(catch_up=pause)
    if stopped_by:
        how = run_folder.how_to_continue(s.out_dir, s.overwrite, rt.world_size)
        rt.say(f"stopped by {signal.Signals(stopped_by).name} after step {step}: {how}")
        return 128 + stopped_by
    finish(run, step)
    return 0


def save_is_due(s: Settings, step: int) -> bool:
    """True if an interval asks for a checkpoint after `step`; --checkpoint-minutes is separate."""
    return is_due(step, s.checkpoint_interval, s.val_interval if s.keep_best else 0)


def evaluation_is_due(s: Settings, step: int) -> bool:
    """True if an interval asks for an evaluation after `step`."""
    return is_due(step, s.val_interval, s.hellaswag_interval, s.sample_interval)


def finish(run: Run, step: int) -> None:
    """Write samples.txt, loss_curves.png and summary.json, and print where they are."""
    s, rt, attempt = run.settings, run.rt, run.folder.attempt
    samples = evaluation.draw_samples(run, step, run_files.SAMPLES)
    figure = attempt(step, run_files.FIGURE, lambda: plot_loss.plot_run(s.out_dir), on_this_rank=rt.is_main)
    if rt.is_main:
        report.at_end(s, run.trainer, step, run.folder.clock.seconds(), samples, figure)
    rt.barrier()


def main() -> int:
    settings = read_settings()
    try:
        return train(settings)
    except torch.OutOfMemoryError as error:
        config = settings.out_dir / run_files.CONFIG
        raise UserError(f"out of GPU memory: lower --micro-batch-size (its value is in {config})") from error


if __name__ == "__main__":
    cli.run(main, must_finish=True)
