"""Faults between steps, in real processes: evaluations that fail or kill, kills of runs that save by time,
keep the best checkpoint and end by --patience.
"""

import random
import sys
from pathlib import Path

import pytest
from fault_runs import Run, tally
from helpers import ROOT, history

from support import attempts, checkpoint, metrics, run_files

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="breaks processes by way of Linux"),
]
Expected = list[dict[str, object]]

# The training script with a validation that does something else after step 40, and after every later step.
BROKEN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
import evaluation
import train_gpt2
from support import cli
validate = evaluation.validate
def broken(run):
    if run.folder.metrics.last_step {when}:
        {what}
    return validate(run)
evaluation.validate = broken
cli.run(train_gpt2.main)
"""


def broken_script(folder: Path, what: str, when: str) -> str:
    script = folder / "broken.py"
    script.write_text(BROKEN.format(root=str(ROOT), what=what, when=when))
    return str(script)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ('torch.OutOfMemoryError("CUDA out of memory.")', "CUDA out of memory."),
        ('IndexError("a bug")', "IndexError: a bug"),
    ],
)
def test_a_run_survives_a_failing_evaluation(
    fault_data: Path, tmp_path: Path, expected: Expected, error: str, reason: str
) -> None:
    row = tally("an evaluation fails")
    run = Run(fault_data, tmp_path / "run", script=broken_script(tmp_path, f"raise {error}", ">= 40"))
    done = run.finish()
    assert done.returncode == 0, done.stderr
    run.check([r for r in expected if r["kind"] == "train" or r["step"] < 40])
    failed = [r for r in metrics.read(run.out / "metrics.jsonl") if r.get("name") == "evaluation failed"]
    assert [(r["step"], r["what"], r["reason"]) for r in failed] == [
        (step, "validation", reason) for step in (40, 80, 120, 160)
    ]
    row.injected += 4
    row.survived += 4


def test_a_run_survives_an_evaluation_that_kills_it(
    fault_data: Path, tmp_path: Path, expected: Expected
) -> None:
    """After step 40, whenever it is tried: a restart loop gets past it, and leaves out all later ones."""
    row = tally("an evaluation kills the process")
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    run = Run(fault_data, tmp_path / "run", script=broken_script(tmp_path, kill, "== 40"))
    while (done := run.finish()).returncode == -9:
        row.injected += 1
        row.lost.append(run.lost())
        assert row.injected <= attempts.MAX_DEATHS
    assert done.returncode == 0, done.stderr
    assert row.injected == attempts.MAX_DEATHS
    assert f"has ended in it {attempts.MAX_DEATHS} times" in done.stderr
    run.check([r for r in expected if r["kind"] == "train" or r["step"] < 40])
    row.survived += row.injected


def test_a_kill_costs_only_the_steps_since_a_checkpoint_by_time(
    fault_data: Path, tmp_path: Path, expected: Expected
) -> None:
    """No checkpoint is due by its step: what a kill costs is what a second trains."""
    row = tally("SIGKILL with --checkpoint-minutes")
    run = Run(fault_data, tmp_path / "run", checkpoint_interval=0, checkpoint_minutes=1 / 60)
    for _ in range(3):
        before = run.last_checkpoint()
        process = run.start()
        run.wait_for_checkpoint(before + 1, process)
        run.wait_for_step(run.last_checkpoint() + random.randint(1, 4), process)
        run.kill(process)
        row.injected += 1
        row.lost.append(run.lost())
        assert checkpoint.step_of(checkpoint.latest_intact(run.out)[0]) > before
    done = run.finish()
    assert done.returncode == 0, done.stderr
    run.check(expected)
    row.survived += 3


def test_best_checkpoint_and_patience_survive_kills(fault_data: Path, tmp_path: Path) -> None:
    """Killed five times, the run keeps the same best checkpoint and runs out of patience at the same step."""
    row = tally("SIGKILL with --keep-best and --patience")
    values = {
        "learning_rate": 0.05, "min_lr_ratio": 1.0, "val_interval": 4, "checkpoint_interval": 6,
        "keep_checkpoints": 1, "keep_best": True, "patience": 4,
    }  # fmt: skip
    runs = [Run(fault_data, tmp_path / name, **values) for name in ("whole", "killed")]
    whole, run = runs
    assert whole.finish().returncode == 0
    last, best = whole.last_step(), run_files.best_checkpoint(whole.out)
    assert 40 < last < 160 and checkpoint.step_of(best) < last
    for until in [*sorted(random.sample(range(3, last - 3), 4)), last]:
        process = run.start()
        run.wait_for_step(until, process)
        run.kill(process)
        row.injected += 1
        row.lost.append(run.lost())
    done = run.finish()
    assert done.returncode == 0, done.stderr
    run.check(history(whole.out))
    kept = [[folder.name for folder in checkpoint.folders(each.out)] for each in runs]
    assert kept[0] == kept[1] == [f"step_{last:06d}", best.name]
    assert run_files.best_checkpoint(run.out).name == best.name
    weights = [(each.out / "checkpoints" / best.name / "model.safetensors").read_bytes() for each in runs]
    assert weights[0] == weights[1]
    row.survived += 5
