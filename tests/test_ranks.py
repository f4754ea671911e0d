"""Where one process of several differs from the others, all must come to the same decision."""

import collections
import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, T, history, write_shard
from ranks import Rank, together
from test_runtime import Machine

import train_gpt2
from model import GPT, GPTConfig
from settings import PRESETS
from support import checkpoint, compiler, hardware, push, runtime, sampling, stop_signal
from support.cli import UserError
from train_gpt2 import StepResult, Trainer

Train = Callable[..., Path]
EXAMPLE = {
    "ctx": "a b",
    "endings": ["c", "d", "e", "f"],
    "label": 0,
    "activity_label": "",
    "ctx_a": "",
    "ctx_b": "",
}


@pytest.fixture
def train_together(
    tmp_path: Path, data_dir: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[object]]:
    """train_together(differs, **settings) trains with two ranks into tmp_path / "two"; how each ended.

    differs(rank, settings): the settings of a rank.
    """
    own = threading.local()
    values = {**TINY, "data_dir": data_dir, "out_dir": tmp_path / "two", "micro_batch_size": 1}

    def run(differs: Callable[..., train_gpt2.Settings] | None = None, **changes: object) -> list[object]:
        s = dataclasses.replace(PRESETS["demo"], **{**values, **changes})

        def one(rank: Rank) -> int:
            own.rank = rank
            return train_gpt2.train(differs(rank.rank, s) if differs else s)

        build, one_at_a_time = train_gpt2.build_model, threading.Lock()  # they share torch's generator

        def build_model(*args: object) -> train_gpt2.GPT:
            with one_at_a_time:
                return build(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train_gpt2, "build_model", build_model)
            patch.setattr(runtime, "world_size", lambda: 2)
            patch.setattr(runtime, "start", lambda device, dtype: own.rank)
            patch.setattr(stop_signal.StopSignal, "listen", lambda stop, announce, agent: None)
            patch.setattr(dist, "new_group", lambda timeout: None)
            return together(one)

    return run


def on_rank_1(monkeypatch: pytest.MonkeyPatch, room: object, name: str, call: int, work: Callable) -> None:
    """Do something on rank 1 before the given call (0: the first) there of the method `room.name`."""
    real, calls = getattr(room, name), iter(range(1000))

    def spied(trainer: Trainer, *args: object) -> object:
        if trainer.rt.rank == 1 and next(calls) == call:
            work(trainer)
        return real(trainer, *args)

    monkeypatch.setattr(room, name, spied)


def losses(run: Path) -> dict[tuple[int, str], object]:
    """By step and kind, each of which is on record once."""
    records = history(run, kinds=("train", "val"))
    found = {(r["step"], r["kind"]): r["loss"] for r in records}
    assert len(found) == len(records)
    return found


def names_of_steps(run: Path) -> list[int]:
    return sorted(map(checkpoint.step_of, checkpoint.folders(run)))


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_train_like_one(
    train: Train, train_together: Callable, tmp_path: Path, optimizer: str
) -> None:
    whole = train(optimizer=optimizer)
    assert train_together(optimizer=optimizer) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-5)
    assert names_of_steps(tmp_path / "two") == names_of_steps(whole)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["hardware"]["processes"] == 2


def test_ranks_agree_on_failures_and_overdue_checkpoints(
    train: Train, train_together: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Only rank 0 knows when a checkpoint is overdue: here after each step."""
    expected = losses(train())

    def fail(trainer: Trainer) -> None:
        raise MemoryError("too much")

    on_rank_1(monkeypatch, Trainer, "validate", 1, fail)
    often = {"checkpoint_interval": 0, "checkpoint_minutes": 1e-9, "keep_checkpoints": 9}
    assert train_together(**often) == [0, 0]
    run = tmp_path / "two"
    assert "step 2, process 1: validation: MemoryError: too much" in capsys.readouterr().err
    [event] = [r for r in history(run, kinds=("event",)) if r["name"] == "evaluation failed"]
    assert (event["step"], event["what"], event["reason"]) == (2, "validation", "on another process")
    del expected[2, "val"]
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert names_of_steps(run) == [1, 2, 3, 4, 5, 6]


def test_only_rank_0_decides_that_a_checkpoint_is_overdue(
    train_together: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step of rank 0 takes a minute."""
    minutes, step = [0], Trainer.step

    def timed(trainer: Trainer, *args: object) -> StepResult:
        minutes[0] += trainer.rt.is_main
        return step(trainer, *args)

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 60.0 * minutes[0]))
    assert train_together(checkpoint_interval=0, checkpoint_minutes=1.5, keep_checkpoints=9) == [0, 0]
    assert names_of_steps(tmp_path / "two") == [3, 6]


def test_only_rank_0_pushes_and_draws(
    train_together: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, drawn, draw = [], [], sampling.draw_samples
    monkeypatch.setattr(push.Pusher, "__init__", lambda *args: silent.append(args[-1]))
    monkeypatch.setattr(push.Pusher, "send", lambda *args: None)
    monkeypatch.setattr(push.Pusher, "close", lambda *args: None)
    monkeypatch.setattr(sampling, "draw_samples", lambda *args: drawn.append(1) or draw(*args))
    assert train_together(max_steps=2) == [0, 0]
    assert sorted(silent) == [False, True] and len(drawn) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("place", "last", "interval"), [("validate", 2, 0), ("validate", 2, 2), ("step", 5, 0)]
)
def test_a_signal_to_one_rank_stops_all(
    train: Train, train_together: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str,
    last: int, interval: int, number: int,
) -> None:  # fmt: skip
    """In the validation of step 2, or within step 5: both end there; a resume goes on as if undisturbed."""
    expected = losses(train())
    with monkeypatch.context() as patch:
        call = {"validate": 1, "step": 4}[place]
        on_rank_1(patch, Trainer, place, call, lambda own: setattr(own.rt.stop, "number", number))
        assert train_together(checkpoint_interval=interval, reload_checkpoints=True) == [128 + number] * 2
    run = tmp_path / "two"
    assert names_of_steps(run) == [last]
    assert [r["step"] for r in history(run, kinds=("train",))] == list(range(1, last + 1))
    assert train_together(resume=True) == [0, 0]
    assert losses(run) == pytest.approx(expected, abs=1e-5)


def test_patience_runs_out_on_all_ranks(
    train_together: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 0 has the record."""

    def validate(trainer: Trainer, *_: object) -> torch.Tensor:
        loss = [9.0, 5.0, 6.0, 7.0][trainer.rt.stop.times]
        trainer.rt.stop.times += 1  # counts the validations of this rank
        return torch.tensor(loss / 2, dtype=torch.float64)

    monkeypatch.setattr(Trainer, "validate", validate)
    assert train_together(patience=2, val_interval=1) == [0, 0]
    assert [r["loss"] for r in history(tmp_path / "two", kinds=("val",))] == [9, 5, 6, 7]
    assert names_of_steps(tmp_path / "two")[-1] == 3


@pytest.mark.parametrize("fault", ["missing", "damaged", "short", "other", "other validation"])
def test_a_machine_with_faulty_data_ends_the_run_on_all(
    train_together: Callable, data_dir: Path, tmp_path: Path, fault: str
) -> None:
    own = tmp_path / "own"
    if fault != "missing":
        shutil.copytree(data_dir, own)
        [shard] = own.glob("*_val_000000.npy" if fault == "other validation" else "*_train_000003.npy")
        shard.write_bytes(b"x") if fault == "damaged" else shard.unlink()
        if fault == "other validation":
            write_shard(shard, 3 * T + 1)
        if fault == "short":
            for path in own.glob("*_train_*"):
                write_shard(path, 3)

    def differs(rank: int, s: train_gpt2.Settings) -> train_gpt2.Settings:
        return s if rank == 0 else dataclasses.replace(s, data_dir=own)

    ends = train_together(differs)
    assert all(isinstance(end, UserError) for end in ends), ends
    told = {"missing": "no such folder", "damaged": "000003", "short": "own"}.get(
        fault, "not the same shards"
    )
    assert all(told in str(end) for end in ends), ends
    assert not (tmp_path / "two").exists()


def test_a_model_missing_on_one_machine_ends_both(train_together: Callable, tmp_path: Path) -> None:
    GPT(GPTConfig(16, 50257, 1, 1, 8)).save_pretrained(tmp_path / "model")

    def differs(rank: int, s: train_gpt2.Settings) -> train_gpt2.Settings:
        return dataclasses.replace(s, init_from=str(tmp_path / ("model" if rank == 0 else "missing")))

    ends = train_together(differs)
    assert all(isinstance(end, UserError) and "missing" in str(end) for end in ends), ends


def test_all_ranks_compile_or_none(train_together: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a P100 does not, and a V100 beside it does."""
    tried = []
    monkeypatch.setattr(compiler, "try_out", lambda rt: tried.append(rt.rank))
    own = lambda rank, s: dataclasses.replace(s, compile=rank == 0)  # noqa: E731
    assert train_together(own, max_steps=1) == [0, 0]
    assert not tried


def test_a_compile_failure_on_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_one(function: Callable) -> Callable:
        calls.append(1)
        return function if len(calls) == 1 else (lambda x: 1 / 0)

    monkeypatch.setattr(torch, "compile", compile_one)
    ends = together(compiler.try_out)
    assert all(isinstance(end, UserError) and "--compile: fails here" in str(end) for end in ends), ends


def test_bad_steps_name_the_same_checkpoint_on_all_ranks(
    train_together: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 writes it; the others' end would cut that short."""
    forward, save = GPT.forward, checkpoint.save
    calls = collections.Counter()

    def spoilt(self: GPT, *args: object) -> tuple[None, torch.Tensor]:
        logits, loss = forward(self, *args)
        if loss.requires_grad:
            calls[threading.get_ident()] += 1
        bad = calls[threading.get_ident()] > 2 * 4  # four micro-batches a step
        return logits, loss * float("nan") if bad else loss

    monkeypatch.setattr(GPT, "forward", spoilt)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **options: time.sleep(1) or save(*args, **options))
    ends = train_together(max_bad_steps=2, val_interval=0)
    assert all("step 4: " in str(end) and "step_000002" in str(end) for end in ends), ends


def test_each_machine_fetches_its_own_data(
    train_together: Callable, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(s: train_gpt2.Settings) -> None:
        shutil.copytree(data_dir, s.data_dir)

    monkeypatch.setattr(train_gpt2, "fetch_shards", fetch)
    own = lambda rank, s: dataclasses.replace(s, data_dir=tmp_path / f"data of {rank}")  # noqa: E731
    assert train_together(own, max_steps=1) == [0, 0]


def test_a_checkpoint_missing_on_one_machine_ends_the_resume_on_all(
    train: Train, train_together: Callable, tmp_path: Path
) -> None:
    train("two", max_steps=2)

    def differs(rank: int, s: train_gpt2.Settings) -> train_gpt2.Settings:
        return s if rank == 0 else dataclasses.replace(s, out_dir=tmp_path / "nowhere")

    # Nor does its lack make it ask for a HellaSwag file that the others do without.
    without = {"hellaswag_interval": 2, "hellaswag_data": str(tmp_path / "none")}
    first, second = train_together(differs, resume=True, **without)
    assert isinstance(second, UserError) and "nowhere" in str(second)
    assert str(first) == f"process 1: {second}"


# ---------------------------------------------------------------- HellaSwag


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("without", [0, 1])
def test_a_hellaswag_file_missing_on_one_rank_is_skipped_on_all(
    train: Train, train_together: Callable, tmp_path: Path, without: int, begun: bool
) -> None:
    """A new run ends with an error on both; one that has begun goes on without, on both."""
    file = tmp_path / "examples.jsonl"
    file.write_text(json.dumps(EXAMPLE) + "\n")
    if begun:
        train("two", max_steps=2)

    def differs(rank: int, s: train_gpt2.Settings) -> train_gpt2.Settings:
        return dataclasses.replace(s, hellaswag_data=str(file if rank != without else tmp_path / "none"))

    ends = train_together(differs, hellaswag_interval=2, resume=True)
    if begun:
        assert ends == [0, 0]
        assert not history(tmp_path / "two", kinds=("hellaswag",))
        return
    assert all(isinstance(end, UserError) for end in ends)
    assert all("none: cannot be read" in str(end) for end in ends)
    assert not (tmp_path / "two").exists()


def test_two_ranks_get_the_hellaswag_score_of_one(
    train: Train, train_together: Callable, tmp_path: Path
) -> None:
    file = tmp_path / "examples.jsonl"
    examples = [{**EXAMPLE, "ctx": "a b " + "c " * n, "label": n % 4} for n in range(9)]
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    with_scores = {"hellaswag_interval": 3, "hellaswag_data": str(file), "sequence_length": T}
    whole = train(**with_scores)
    assert train_together(**with_scores) == [0, 0]
    scores = [history(run, kinds=("hellaswag",)) for run in (whole, tmp_path / "two")]
    assert scores[0] == scores[1] and [r["step"] for r in scores[0]] == [0, 3, 6]


# ---------------------------------------------------------------- the start


def test_the_micro_batch_fits_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search finds 16 here: with 4, or 64, on another one the step has the smaller."""
    for others, expected in ((4, 4), (64, 16), (0, None)):

        def all_reduce(
            rt: runtime.Runtime, best: torch.Tensor, op: str, others: int = others
        ) -> torch.Tensor:
            return {"MIN": torch.minimum, "MAX": torch.maximum}[op](best, torch.tensor(others))

        with monkeypatch.context() as patch:
            machine = Machine(patch, 4400, torch.OutOfMemoryError("CUDA out of memory"))
            patch.setattr(runtime.Runtime, "all_reduce", all_reduce)
            rt = runtime.Runtime(torch.device("cuda", 0), torch.float32, world_size=2)
            if expected:
                assert hardware.largest_micro_batch(machine, 8, 64, 3, "adamw", rt) == expected
            else:
                with pytest.raises(UserError, match="not one sequence"):
                    hardware.largest_micro_batch(machine, 8, 64, 3, "adamw", rt)


def test_a_user_error_of_one_rank_is_raised_on_all() -> None:
    def work(rank: Rank) -> str | None:
        def fail() -> None:
            raise UserError(f"rank {rank.rank} is no naïve one")

        return rank.run_on(rank.rank == 1, fail)

    first, second, third = together(work, size=3)
    assert [str(error) for error in (first, third)] == ["process 1: rank 1 is no naïve one"] * 2
    assert str(second) == "rank 1 is no naïve one"


def test_on_any_and_max_over_ranks_agree_on_all_ranks() -> None:
    def work(rank: Rank) -> tuple[object, ...]:
        return rank.on_any(rank.rank == 1), rank.on_any(False), rank.max_over_ranks(rank.rank, 5 - rank.rank)

    assert together(work) == [(True, False, [1, 5])] * 2
