"""Nothing between steps ends a run: evaluations that fail or kill, checkpoints by time, the best one kept."""

import contextlib
import dataclasses
import gc
import itertools
import json
import signal
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, history

import evaluation
import hellaswag
import plot_loss
import train_gpt2
import upload_hf
from model import GPT
from settings import PRESETS, check_settings, settings_from_config
from support import checkpoint, metrics, run_files, sampling
from support.attempts import MAX_DEATHS, UNDER_WAY, Attempts
from support.cli import UserError
from support.metrics import Metrics
from support.run_folder import RunFolder

Train = Callable[..., Path]
COUNT_CORRECT = hellaswag.count_correct  # where with_hellaswag replaces it


def steps_kept(run: Path) -> list[int]:
    return sorted(map(checkpoint.step_of, checkpoint.folders(run)))


def events(run: Path, name: str) -> list[dict[str, object]]:
    return [r for r in metrics.read(run / "metrics.jsonl") if r.get("name") == name]


def set_losses(monkeypatch: pytest.MonkeyPatch, losses: Iterable[float]) -> None:
    """Make the validations find these losses, one after another."""
    coming = iter(losses)
    share = lambda run: torch.tensor(next(coming), dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(evaluation, "validate", share)


def damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def snapshot_of(folder: Path) -> checkpoint.Snapshot:
    return checkpoint.snapshot(GPT.from_pretrained(folder), checkpoint.load_training_state(folder))


@pytest.fixture
def with_hellaswag(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Settings with a HellaSwag of one example, whose score costs nothing."""
    example = hellaswag.Example([1, 2], [[3], [4], [5], [6]], [1] * 4, 0)
    monkeypatch.setattr(hellaswag, "prepare", lambda *args, **kwargs: ([example], ""))
    monkeypatch.setattr(hellaswag, "count_correct", lambda *args: torch.tensor([1, 0]))
    return {"hellaswag_interval": 2}


# ---------------------------------------------------------------- evaluations that fail


def test_the_checkpoint_comes_before_the_evaluation(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for owner, name in ((checkpoint, "snapshot"), (evaluation, "validate")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, f=original, name=name: calls.append(name) or f(*args))
    train()
    assert calls == ["validate", *["snapshot", "validate"] * 3]


FAILURES = {
    "validation": (evaluation, "validate", [0, 2, 4, 6]),
    "HellaSwag": (hellaswag, "count_correct", [0, 2, 4, 6]),
    "samples": (sampling, "draw_samples", [3]),
    "loss_curves.png": (plot_loss, "plot_run", [6]),
}


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), IndexError("a bug")])
def test_a_failed_evaluation_is_an_event(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    with_hellaswag: dict[str, object], what: str, error: Exception,
) -> None:  # fmt: skip
    settings = {**with_hellaswag, "sample_interval": 3, "max_steps": 6}
    whole = train("whole", **settings)
    owner, name, steps = FAILURES[what]

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)
    capsys.readouterr()
    run = train("failing", **settings)
    shown = capsys.readouterr().err
    assert history(run, kinds=("train",)) == history(whole, kinds=("train",))
    assert steps_kept(run) == steps_kept(whole) and (run / "summary.json").exists()
    failed = events(run, "evaluation failed")
    assert [(r["step"], r["what"]) for r in failed if r["what"] == what] == [(s, what) for s in steps]
    bug = isinstance(error, IndexError)
    reason = "IndexError: a bug" if bug else "CUDA out of memory."
    for record in failed:
        assert record["reason"] == reason and ("traceback" in record) == bug
        assert f"step {record['step']}: {record['what']} failed, training continues: {reason}\n" in shown
    assert shown.count("\n") == len(failed)
    kinds = {"validation": "val", "HellaSwag": "hellaswag"}
    others = [kind for name, kind in kinds.items() if name != what]
    assert history(run, kinds=others) == history(whole, kinds=others)


def test_metrics_that_cannot_be_written_end_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Metrics.log

    def full(self: Metrics, step: int, kind: str, **values: object) -> None:
        if kind == "val":
            raise UserError("no space")
        log(self, step, kind, **values)

    monkeypatch.setattr(Metrics, "log", full)
    with pytest.raises(UserError, match="no space"):
        train()


def test_a_failed_evaluation_frees_its_memory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the cache is emptied, the tensors of the failed work are gone: the error had held them."""
    held, emptied = [], []
    rt = SimpleNamespace(
        is_main=True, rank=0, device=torch.device("cuda"), autocast=nullcontext, synchronize=lambda: None,
        on_any=bool, max_over_ranks=lambda *numbers: numbers,
    )  # fmt: skip
    attempt = Attempts(rt, Metrics(tmp_path / "metrics.jsonl"), 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))

    def work() -> None:
        activations = torch.zeros(10)
        activations.itself = activations  # a cycle, which only the collector finds
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        assert attempt(1, "validation", work) is None
    finally:
        gc.enable()
    assert emptied == [True]


def until_done(train: Train, monkeypatch: pytest.MonkeyPatch, **settings: object) -> int:
    """Start the run anew whenever it dies, as a restart loop does; returns the number of starts."""
    start = checkpoint.Writer.start

    def write_at_once(self: checkpoint.Writer, *args: object, **kwargs: object) -> None:
        start(self, *args, **kwargs)
        self.writing.exception()  # no thread of a run that has died writes beside its successor

    monkeypatch.setattr(checkpoint.Writer, "start", write_at_once)
    for starts in range(1, 40):
        with contextlib.suppress(SystemExit):
            train("run", resume=True, **settings)
            return starts
        gc.collect()  # a process that dies lets go of the run folder
    raise AssertionError("trapped")


def test_a_resumed_run_repeats_an_evaluation_after_a_kill(
    train: Train, monkeypatch: pytest.MonkeyPatch, with_hellaswag: dict[str, object]
) -> None:
    """Killed in it, with its checkpoint written: the record is that of a run without the kill."""
    whole, validate, count = train("whole", **with_hellaswag), evaluation.validate, hellaswag.count_correct
    validations, counts = itertools.count(), itertools.count()

    def die_in_the_third(*args: object) -> torch.Tensor:
        if next(validations) == 2:
            raise SystemExit
        return validate(*args)

    def die_in_the_fourth(*args: object) -> torch.Tensor:
        if next(counts) == 3:
            raise SystemExit
        return count(*args)

    monkeypatch.setattr(evaluation, "validate", die_in_the_third)
    monkeypatch.setattr(hellaswag, "count_correct", die_in_the_fourth)
    assert until_done(train, monkeypatch, **with_hellaswag) == 3
    kinds = ("train", "val", "hellaswag")
    assert history(whole.parent / "run", kinds) == history(whole, kinds)
    assert (next(validations), next(counts)) == (5, 5)  # 4 of each in all, and once more what was cut off


@pytest.mark.parametrize("what", ["validation", "HellaSwag"])
@pytest.mark.parametrize(("step", "interval"), [(0, 100), (2, 2), (4, 100), (6, 100)])
def test_a_signal_interrupts_an_evaluation(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    with_hellaswag: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    what: str,
    step: int,
    interval: int,
) -> None:
    """The run saves, and does the evaluation when it is resumed: the record is that of an undisturbed run."""
    monkeypatch.setattr(hellaswag, "count_correct", COUNT_CORRECT)
    settings = {**with_hellaswag, "checkpoint_interval": interval}
    whole = train("whole", **settings)
    owner, name = {"validation": (evaluation, "validate"), "HellaSwag": (hellaswag, "count_correct")}[what]
    work, calls = getattr(owner, name), itertools.count()

    def signalled(*args: object) -> torch.Tensor:
        rt = args[0].rt if what == "validation" else args[2]
        if next(calls) == step // 2:
            rt.stop.number = signal.SIGTERM
        return work(*args)

    monkeypatch.setattr(owner, name, signalled)
    run = train("run", **settings)
    assert f"stopped by SIGTERM after step {step}" in capsys.readouterr().out
    assert steps_kept(run)[-1:] == [step][: step > 0]
    assert (run / UNDER_WAY).exists()  # counts as a death: what ends every run is left out in the end
    monkeypatch.setattr(owner, name, work)
    kinds = ("train", "val", "hellaswag")
    expected = history(whole, kinds)
    kind = {"validation": "val", "HellaSwag": "hellaswag"}[what]
    first_left_out = [(r["kind"], r["step"]) for r in expected].index((kind, step))
    assert history(run, kinds) == expected[:first_left_out] and not events(run, "evaluation failed")
    train("run", **settings, resume=True)
    assert history(run, kinds) == expected
    assert not (run / UNDER_WAY).exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let SIGTERM come as the validation with this number, from 0, begins."""
    validate, calls = evaluation.validate, itertools.count()

    def signalled(run: train_gpt2.Run) -> torch.Tensor:
        if next(calls) == number:
            run.rt.stop.number = signal.SIGTERM
        return validate(run)

    monkeypatch.setattr(evaluation, "validate", signalled)


def test_a_failed_checkpoint_is_retried_before_a_stop(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of step 2, on its way in the background when a signal cuts the step's validation off."""
    stop_at(monkeypatch, 1)
    write, calls = checkpoint._write, itertools.count()

    def fail_at_first(folder: Path, state: checkpoint.Snapshot) -> None:
        if next(calls) == 0:
            raise UserError("no space")
        write(folder, state)

    monkeypatch.setattr(checkpoint, "_write", fail_at_first)
    run = train(checkpoint_interval=2)
    assert steps_kept(run) == [2]
    assert [event["reason"] for event in events(run, "checkpoint failed")] == ["no space"]


def test_an_interrupted_validation_does_not_end_patience(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed with less patience than the record has bad validations, and stopped again at once."""

    def constant(run: train_gpt2.Run) -> torch.Tensor:
        run.rt.stop.check()
        return torch.tensor(5.0, dtype=torch.float64)

    monkeypatch.setattr(evaluation, "validate", constant)
    stop_at(monkeypatch, 3)
    run = train(val_interval=1, patience=9)
    assert steps_kept(run)[-1] == 3
    stop_at(monkeypatch, 0)
    train(val_interval=1, patience=1, resume=True)
    assert not events(run, "patience ran out")
    train(val_interval=1, patience=1, resume=True)
    assert [event["step"] for event in events(run, "patience ran out")][:1] == [3]


@pytest.mark.parametrize("interval", [1, 100])
def test_an_evaluation_that_kills_does_not_trap_a_restart_loop(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interval: int
) -> None:
    whole = train("whole")

    def die(*args: object) -> None:
        raise SystemExit

    monkeypatch.setattr(evaluation, "validate", die)
    starts = until_done(train, monkeypatch, checkpoint_interval=interval)
    assert starts == MAX_DEATHS + 1
    run = tmp_path / "run"
    assert history(run, kinds=("train",)) == history(whole, kinds=("train",))
    assert steps_kept(run)[-1] == 6 and (run / "summary.json").exists()
    assert "has ended in it" in events(run, "evaluation failed")[-1]["reason"]
    monkeypatch.undo()
    (run / UNDER_WAY).unlink()  # as the message says
    train(resume=True)
    assert history(run, kinds=("val",)) == history(whole, kinds=("val",))[-1:]


def test_overwrite_forgets_earlier_deaths(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / UNDER_WAY).write_text(json.dumps({"validation": MAX_DEATHS}))
    train(overwrite=True)
    assert [r["step"] for r in history(run, kinds=("val",))] == [0, 2, 4, 6]


def test_a_hellaswag_file_damaged_during_the_run_does_not_end_it(train: Train, tmp_path: Path) -> None:
    """At the first start it is the user's mistake; later the run continues without it."""
    file = tmp_path / "hellaswag.jsonl"
    settings = {"hellaswag_interval": 100, "hellaswag_data": str(file), "resume": True, "block_size": 64}
    file.write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is not a HellaSwag example"):
        train(**settings)
    assert not (tmp_path / "run").exists()
    record = {"ctx": "A man", "endings": [" runs", " walks", " sits", " eats"], "label": 0}
    file.write_text(json.dumps(record) + "\n")
    train(**settings, max_steps=2)
    file.write_text("nonsense\n")
    run = train(**settings, max_steps=4)
    assert [r["step"] for r in history(run, kinds=("train",))] == [1, 2, 3, 4]
    [event] = events(run, "evaluation failed")
    assert event["what"] == "HellaSwag" and "line 1 is not" in event["reason"]


# ---------------------------------------------------------------- numbers that come a step late


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, a step is reported when the next has been enqueued."""
    start = train_gpt2.Progress.__init__

    def begin(progress: train_gpt2.Progress, *args: object) -> None:
        start(progress, *args)
        progress.lag = 1

    monkeypatch.setattr(train_gpt2.Progress, "__init__", begin)


@pytest.mark.parametrize("way", ["a signal", "an overdue checkpoint", "patience", "nothing"])
def test_resumed_metrics_end_at_the_checkpoint(
    train: Train, late: None, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whatever ends the run, or has it saved, in the middle: all steps of each checkpoint are on record."""
    settings = {"val_interval": 3, "checkpoint_interval": 0, "keep_checkpoints": 9}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 0.0))
        whole = train("whole", **settings)
    kept, save, step, calls = {}, RunFolder.save, train_gpt2.Trainer.step, iter(range(100))

    def spied(folder: RunFolder, step: int, trainer: train_gpt2.Trainer, wait: bool) -> None:
        if step > 0:
            kept[step] = [r["step"] for r in history(folder.settings.out_dir, kinds=("train",))]
        save(folder, step, trainer, wait)

    def signalled(trainer: train_gpt2.Trainer, *args: object) -> train_gpt2.StepResult:
        if next(calls) == 3 and way == "a signal":
            trainer.rt.stop.number = signal.SIGTERM
        return step(trainer, *args)

    monkeypatch.setattr(RunFolder, "save", spied)
    monkeypatch.setattr(train_gpt2.Trainer, "step", signalled)
    if way == "an overdue checkpoint":
        settings |= {"checkpoint_minutes": 1e-9}
    if way == "patience":
        set_losses(monkeypatch, [1.0, 2.0, 3.0])
        settings |= {"patience": 1}
    run = train(**settings)
    assert kept == {step: list(range(1, step + 1)) for step in kept}
    assert steps_kept(run) == sorted(kept)
    ends = {"a signal": [5], "patience": [3], "nothing": [6]}
    assert way not in ends or sorted(kept) == ends[way]
    assert way != "an overdue checkpoint" or len(kept) >= 3
    if way in ("a signal", "an overdue checkpoint"):
        train(**{**settings, "checkpoint_minutes": 0}, resume=True)
        assert history(run) == history(whole)


def test_bad_steps_are_counted_when_reported(
    train: Train, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = GPT.forward, iter(range(1, 100))

    def spoilt(self: GPT, *args: object) -> tuple[None, torch.Tensor]:
        logits, loss = forward(self, *args)
        return logits, loss * float("nan") if loss.requires_grad and next(calls) in (3, 4) else loss

    monkeypatch.setattr(GPT, "forward", spoilt)
    settings = {"micro_batch_size": 8, "val_interval": 0, "checkpoint_interval": 0}
    assert [r["step"] for r in events(train("three", max_bad_steps=3, **settings), "bad step")] == [3, 4]
    calls = iter(range(1, 100))
    with pytest.raises(UserError, match=r"step 4: .*--max-bad-steps 2"):
        train("two", max_bad_steps=2, **settings)


# ---------------------------------------------------------------- checkpoints by time


def test_checkpoint_minutes_write_checkpoints_by_time(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances a minute whenever it is read: once before training, per step, per checkpoint."""
    whole = train("whole", checkpoint_interval=0, checkpoint_minutes=0)
    minutes = itertools.count()
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    run = train("by_time", checkpoint_interval=0, checkpoint_minutes=2.5, max_steps=6)
    assert steps_kept(run) == [3, 6] and steps_kept(whole) == [6]
    assert history(run) == history(whole)
    never = train("never", checkpoint_interval=0, checkpoint_minutes=0)
    assert steps_kept(never) == [6]


def test_a_run_resumes_from_a_checkpoint_by_time(train: Train) -> None:
    whole = train("whole")
    part = train("part", checkpoint_interval=0, checkpoint_minutes=1e-9, keep_checkpoints=9)
    for folder in checkpoint.folders(part)[:3]:
        damage(folder)
    train("part", checkpoint_interval=0, checkpoint_minutes=0, resume=True)
    assert history(part) == history(whole)


def test_damaged_checkpoints_of_later_steps_do_not_displace_new_ones(train: Train) -> None:
    """A run that resumes at step 2 and saves step 3: older than 4 and 6, yet the newest intact one."""
    run = train()
    for folder in checkpoint.folders(run)[:2]:
        damage(folder)
    checkpoint.save(run, 3, snapshot_of(checkpoint.folder_of(run, 2)), keep=1)
    assert steps_kept(run) == [3]


def test_an_intact_checkpoint_is_not_written_again(train: Train) -> None:
    run = train(max_steps=2)
    folder = checkpoint.folder_of(run, 2)
    before, snapshot = folder.stat().st_ino, snapshot_of(folder)
    checkpoint.save(run, 2, snapshot, keep=1)
    assert folder.stat().st_ino == before
    damage(folder)
    checkpoint.save(run, 2, snapshot, keep=1)
    checkpoint.verify(folder)


# ---------------------------------------------------------------- the best checkpoint


def test_keep_best_keeps_the_best_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    set_losses(
        monkeypatch, [1.0, 5.0, 3.0, 4.0, 3.0, 7.0, 8.0]
    )  # step 0 has no checkpoint; equals: the first
    settings = {"val_interval": 1, "checkpoint_interval": 0, "keep_checkpoints": 1, "keep_best": True}
    run = train(**settings)
    assert steps_kept(run) == [2, 6]
    assert run_files.find_model(f"{run}:best") == str(checkpoint.folder_of(run, 2))
    assert run_files.find_model(str(run)) == str(checkpoint.folder_of(run, 6))
    assert upload_hf.pick_checkpoint(run, "best") == checkpoint.folder_of(run, 2)
    damage(checkpoint.folder_of(run, 2))
    capsys.readouterr()
    assert run_files.find_model(f"{run}:best") == str(checkpoint.folder_of(run, 6))
    assert "step_000002/model.safetensors: damaged" in capsys.readouterr().err

    set_losses(monkeypatch, [9.0, 5.0, 3.0, float("nan"), 2.0, 7.0, 8.0])
    run = train("falling", **settings)
    assert steps_kept(run) == [4, 6]


def test_the_best_checkpoint_survives_a_resume(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"val_interval": 1, "checkpoint_interval": 0, "keep_checkpoints": 1, "keep_best": True}
    set_losses(monkeypatch, [9.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    train(max_steps=3, **settings)
    run = train(max_steps=6, resume=True, **settings)
    assert steps_kept(run) == [1, 6]


def test_model_names_may_contain_colons(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("c:runs", max_steps=2)
    newest = str(checkpoint.folder_of(run, 2))
    assert run_files.find_model(str(run)) == newest
    assert run_files.find_model(f"{run}:best") == newest
    run.rename(tmp_path / "is:best")
    assert run_files.find_model(str(tmp_path / "is:best")).startswith(str(tmp_path / "is:best"))
    with pytest.raises(UserError, match=r"none:best: no run there"):
        run_files.find_model(str(tmp_path / "none:best"))
    without = train("without", val_interval=0)
    with pytest.raises(UserError, match="no checkpoint there has a validation loss"):
        run_files.find_model(f"{without}:best")


# ---------------------------------------------------------------- patience


@pytest.mark.parametrize("keep_best", [False, True])
def test_patience_stops_the_run_early(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    with_hellaswag: dict[str, object], keep_best: bool,
) -> None:  # fmt: skip
    """The last step is that of the second validation without a new lowest loss, and like any last step."""
    losses = [9.0, 5.0, 6.0, 4.0, 4.0, 7.0, 1.0]
    settings = {
        "val_interval": 1, "hellaswag_interval": 3, "checkpoint_interval": 0, "keep_best": keep_best,
        "keep_checkpoints": 9,
    }  # fmt: skip
    set_losses(monkeypatch, losses)
    run = train(patience=2, **settings)
    assert [r["loss"] for r in history(run, kinds=("val",))] == losses[:6]
    assert [r["step"] for r in history(run, kinds=("train",))] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in history(run, kinds=("hellaswag",))] == [0, 3, 5]
    assert steps_kept(run) == ([1, 2, 3, 4, 5] if keep_best else [5])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (5, 5 * TINY["total_batch_size"])
    [event] = events(run, "patience ran out")
    assert (event["step"], event["validations"], event["best_step"]) == (5, 2, 3)
    assert "--patience 2" in capsys.readouterr().out

    before = history(run, kinds=("train", "val", "hellaswag"))
    train(patience=2, resume=True, **settings)
    assert history(run, kinds=("train", "val", "hellaswag")) == before
    set_losses(monkeypatch, losses[6:])
    train(patience=3, resume=True, **settings)
    assert [r["loss"] for r in history(run, kinds=("val",))] == losses


# ---------------------------------------------------------------- settings


def test_keep_best_and_patience_need_validations() -> None:
    for name, value in (("keep_best", True), ("patience", 3)):
        s = dataclasses.replace(PRESETS["demo"], val_interval=0, **{name: value})
        with pytest.raises(UserError, match="--val-interval 0: needs validations"):
            check_settings(s, 1)


def test_a_config_without_newer_settings_gets_their_defaults(train: Train) -> None:
    config = train(max_steps=1, seed=5) / "config.json"
    recorded = json.loads(config.read_text())
    for name in ("checkpoint_minutes", "keep_best", "patience"):
        del recorded["settings"][name]
    config.write_text(json.dumps(recorded))
    s = settings_from_config(config)
    assert (s.seed, s.checkpoint_minutes, s.keep_best, s.patience) == (5, 15.0, False, 0)
