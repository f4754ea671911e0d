"""Evaluations between training steps: validation loss, HellaSwag and samples.

An evaluation that fails, or that a signal interrupts, does the run no harm: see support/attempts.py.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

from torch import Tensor

import dataloader
import hellaswag
from support import run_files, sampling

if TYPE_CHECKING:
    from train_gpt2 import Run


def is_due(step: int, *intervals: int) -> bool:
    """True if any interval divides `step`; 0 means never."""
    return any(interval > 0 and step % interval == 0 for interval in intervals)


def evaluate(run: "Run", step: int, last: bool) -> int:
    """Run the evaluations that are due after `step`; after the last step, all but the samples.

    Skips whatever this step has already recorded. Returns the number of the signal that interrupted it, or 0.
    """
    s, attempt = run.settings, run.folder.attempt
    with run.folder.clock("evaluation"):
        if s.val_interval and (last or is_due(step, s.val_interval)):
            share = attempt(step, "validation", lambda: validate(run))
            if share is not None:
                loss = float(run.rt.all_reduce(share))
                run.log(step, f"validation loss {loss:.4f}", "val", loss=loss)
        if run.data.hellaswag and (last or is_due(step, s.hellaswag_interval)):
            # Not compiled, because the batches have many shapes and each would be compiled anew.
            work = functools.partial(hellaswag.count_correct, run.trainer.model, run.data.hellaswag, run.rt)
            correct = attempt(step, "HellaSwag", work)
            if correct is not None:
                score = hellaswag.total_score(correct, len(run.data.hellaswag), run.rt)
                text = f"HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}"
                run.log(step, text, "hellaswag", **dataclasses.asdict(score))
        if step and not last and is_due(step, s.sample_interval):
            samples = draw_samples(run, step, "samples") or []
            for text in samples[:: sampling.SAMPLES_PER_PROMPT]:
                run.log(step, f"sample: {text!r}", "event", name="sample", text=text)
    return attempt.stopped_by


def validate(run: "Run") -> Tensor:
    """Return this rank's share of the mean loss over the first --val-tokens tokens: float64 ()."""
    s, rt, stream, trainer = run.settings, run.rt, run.data.val, run.trainer
    n_sequences = max(1, min(s.val_tokens // s.sequence_length, len(stream)))
    batches = dataloader.val_batches(
        stream, n_sequences, trainer.micro_batch_size, rt.rank, rt.world_size, rt.device
    )
    return trainer.validate(rt.stop.interrupting(batches), n_sequences * s.sequence_length)


def draw_samples(run: "Run", step: int, name: str) -> list[str] | None:
    """Sample text from the fixed prompts on rank 0. Returns None on other ranks, or if sampling failed."""
    work = functools.partial(sampling.draw_samples, run.trainer.model, run.settings.seed)
    return run.folder.attempt(step, name, work, on_this_rank=run.rt.is_main)


def out_of_patience(run: "Run", step: int) -> bool:
    """True if the last --patience validations brought no lower loss. Every rank must call it."""
    s, rt = run.settings, run.rt
    if not s.patience or not is_due(step, s.val_interval):
        return False
    stale, best = run_files.stale_validations(s.out_dir) if rt.is_main else (0, None)
    if not rt.on_any(stale >= s.patience):
        return False
    text = f"--patience {s.patience}: stopping early: the best validation loss was at step {best}"
    run.log(step, text, "event", name="patience ran out", validations=stale, best_step=best)
    return True
