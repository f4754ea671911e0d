"""The training script: what a run leaves, that it can be killed and resumed, that processes do not matter."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import ROOT, TINY, T, as_flags, command, environment, history, posix, run_script

import evaluation
import train_gpt2
from dataloader import TokenStream
from model import GPT, GPTConfig
from optim import learning_rate_factor
from pre_tokens import shards, transfer_tokens_hf
from pre_tokens.shards import find_shards
from settings import PRESETS, settings_from_config
from support import checkpoint, files, hardware, metrics
from support.cli import UserError
from support.progress import Progress
from support.runtime import Runtime

Train = Callable[..., Path]


def folder_in(path: Path, seconds: dict[str, float] | None = None) -> SimpleNamespace:
    """The parts of a run folder that `Progress` uses."""
    written = metrics.Metrics(path / "metrics.jsonl")
    attempt = SimpleNamespace(seconds=seconds or {})
    return SimpleNamespace(metrics=written, writer=checkpoint.Writer(), attempt=attempt)


def test_loss_curve_equals_a_textbook_loop(train: Train, data_dir: Path) -> None:
    """Plain full-batch steps over the stream in order: no micro-batches, no background, no chunks."""
    run = train(micro_batch_size=2, shuffle=True, seed=3, max_steps=8, adam_beta2=0.8)
    torch.manual_seed(3)
    model = GPT(GPTConfig(T, 50257, 2, 2, 16))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": matrices}, vectors], betas=(0.9, 0.8), weight_decay=0.1)
    stream = TokenStream(find_shards(data_dir)["train"], T, 3, True)
    for record in history(run, kinds=("train",)):
        step = record["step"]
        tokens = torch.from_numpy(stream.read(np.arange(8 * (step - 1), 8 * step)).astype(np.int64))
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-3)
        assert record["lr"] == pytest.approx(1e-2 * learning_rate_factor(step - 1, 8, 2, 0.1, "cosine", 0.3))
        assert record["tokens"] == step * 8 * T
    assert history(run, kinds=("train",))[-1]["step"] == 8
    # The first 10 sequences of the validation shard, with the weights after the last step.
    tokens = torch.from_numpy(np.load(find_shards(data_dir)["val"][0].path).astype(np.int64))
    x, y = tokens[: 10 * T].view(10, T), tokens[1 : 10 * T + 1]
    expected = F.cross_entropy(model(x)[0].flatten(0, 1), y)
    assert history(run, kinds=("val",))[-1]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_run_leaves_the_documented_files(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run = train()
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "loss_curves.png", "samples.txt", "summary.json",
        ".lock",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step_000002", "step_000004", "step_000006",
    ]  # fmt: skip
    records = metrics.read(run / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "val"] == [0, 2, 4, 6]
    assert set(records[2]) == {
        "step", "kind", "loss", "lr", "grad_norm", "step_ms", "tokens_per_sec", "mfu", "tokens",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    val = [r["loss"] for r in records if r["kind"] == "val"]
    assert summary["last_val_loss"] == val[-1]
    assert summary["best_val_loss"] == min(val) < val[0]
    assert summary["tokens"] == 6 * 8 * T
    assert summary["parameters"] == GPTConfig(T, 50257, 2, 2, 16).n_parameters
    assert set(summary["seconds"]) == {"data", "training", "evaluation", "checkpoints"}
    samples = (run / "samples.txt").read_text()
    for prompt in ("Hello, I'm a language model,", "Hello, I'm a computer science student,"):
        assert samples.count(prompt) == 3
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["n_embd"] == 16
    assert config["versions"]["torch"] == torch.__version__
    assert (run / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_loads_in_transformers(train: Train) -> None:
    run = train()
    folder = run / "checkpoints" / "step_000006"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    idx = torch.tensor([tokenizer("Hello, I'm a language model")["input_ids"]])
    ours = GPT.from_pretrained(folder)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_validation_does_not_depend_on_the_micro_batch(train: Train) -> None:
    losses = [
        [r["loss"] for r in history(train(f"run{B}", micro_batch_size=B), kinds=("val",))] for B in (1, 4, 8)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)


def test_validation_uses_at_least_one_sequence(train: Train) -> None:
    losses = [
        [r["loss"] for r in history(train(str(n), val_tokens=n, max_steps=2), ("val",))] for n in (1, T)
    ]
    assert losses[0] == losses[1] and None not in losses[0]


@pytest.mark.parametrize("max_steps", [20, 21])
def test_the_time_left_includes_evaluations(tmp_path: Path, max_steps: int) -> None:
    """Compared with a walk through the steps, in which each evaluation is also due after the last one."""
    s = dataclasses.replace(
        PRESETS["demo"], max_steps=max_steps, val_interval=5, hellaswag_interval=0, sample_interval=8
    )
    seconds = {"validation": 100.0, "HellaSwag": 1000.0, "samples": 7.0}
    progress = Progress(s, Runtime(torch.device("cpu"), torch.float32), folder_in(tmp_path, seconds), 1.0)
    progress.durations.extend([2.0, 4.0])
    for done in range(max_steps):
        left = 0.0
        for step in range(done + 1, max_steps + 1):
            last = step == max_steps
            left += 3 + 100 * (step % 5 == 0 or last) + 7 * (step % 8 == 0 or last)
        assert progress.seconds_left(done) == left


@pytest.mark.parametrize("processes", [1, 8])
def test_mfu_counts_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """6N + 12·L·d·T FLOPs per token, over the data sheet's rate of all GPUs that shared the tokens."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: 312e12)
    rt = Runtime(torch.device("cpu"), torch.float32, world_size=processes)
    progress = Progress(PRESETS["gpt2-124m"], rt, folder_in(tmp_path), 855.166464e6)
    progress.begin()
    progress.add(1, 6e-4, train_gpt2.StepResult(*torch.tensor([4.0, 1.0, 1.0]), votes=torch.zeros(3)))
    progress.report(catch_up=True)
    [step] = metrics.read(tmp_path / "metrics.jsonl")
    assert step["mfu"] == pytest.approx(855.166464e6 * step["tokens_per_sec"] / (312e12 * processes))
    assert step["tokens_per_sec"] == pytest.approx(524_288 / step["step_ms"] * 1000)


def test_step_times_exclude_evaluations(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = evaluation.validate
    monkeypatch.setattr(evaluation, "validate", lambda *args: time.sleep(0.7) or validate(*args))
    run = train(val_interval=1)
    steps = [r["step_ms"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"]
    assert max(steps[1:]) < 700
    assert json.loads((run / "summary.json").read_text())["seconds"]["evaluation"] > 7 * 0.7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(train: Train, optimizer: str) -> None:
    """Bit for bit, from any checkpoint, with records beyond the checkpoint and a broken last line."""
    whole = train("whole", optimizer=optimizer)
    part = train("part", optimizer=optimizer)
    for path in (part / "checkpoints").glob("step_00000[46]"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "kind": "tra')
    train("part", optimizer=optimizer, resume=True)
    assert history(part) == history(whole)
    for name in ("model.safetensors", "training_state.pt"):
        a, b = (run / "checkpoints" / "step_000006" / name for run in (whole, part))
        if name.endswith(".pt"):
            a, b = (torch.load(path, weights_only=True)["optimizer"] for path in (a, b))
            for parameter, state in a.items():
                assert all(torch.equal(state[key], b[parameter][key]) for key in state)
        else:
            assert a.read_bytes() == b.read_bytes()


def test_times_include_the_run_before_its_resume(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = evaluation.validate
    monkeypatch.setattr(evaluation, "validate", lambda *args: time.sleep(1) or validate(*args))
    run = train(max_steps=2)  # its checkpoint has the time of step 0's validation
    monkeypatch.setattr(evaluation, "validate", validate)
    train(max_steps=4, resume=True)
    assert json.loads((run / "summary.json").read_text())["seconds"]["evaluation"] >= 1  # rounded


def test_the_manifest_sets_the_vocabulary_size(train: Train, data_dir: Path) -> None:
    manifest = {**transfer_tokens_hf.manifest_of(data_dir), "vocab_size": 300}
    shards.write_manifest(data_dir, manifest)
    run = train(max_steps=1)
    assert transformers.AutoConfig.from_pretrained(run / "checkpoints" / "step_000001").vocab_size == 300
    shards.write_manifest(data_dir, {**manifest, "vocab_size": "300"})
    with pytest.raises(UserError, match=r"manifest.json: not a manifest of shards"):
        train("other", max_steps=1)


def test_a_vocabulary_that_arrives_with_the_shards_asks_for_a_second_start(
    train: Train, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is built before a download, with GPT-2's vocabulary as long as there is no manifest."""
    manifest = {**transfer_tokens_hf.manifest_of(data_dir), "vocab_size": 300}
    monkeypatch.setattr(train_gpt2, "fetch_shards", lambda s: shards.write_manifest(s.data_dir, manifest))
    with pytest.raises(UserError, match="has 300 token ids: run the same command again"):
        train(max_steps=1)
    run = train(max_steps=1)
    assert transformers.AutoConfig.from_pretrained(run / "checkpoints" / "step_000001").vocab_size == 300


def test_resume_starts_afresh_without_a_checkpoint(train: Train, capsys: pytest.CaptureFixture) -> None:
    run = train("a", resume=True)
    assert f"{run}: no checkpoint to resume from: starting at step 0" in capsys.readouterr().out
    assert history(run) == history(train("b"))


def test_records_before_the_first_checkpoint_are_dropped(train: Train) -> None:
    """Not of step 0 either, whose evaluation is made again."""
    whole = train("whole")
    run = train(max_steps=2, checkpoint_interval=0)
    shutil.rmtree(run / "checkpoints")
    train(resume=True)
    assert history(run, ("train", "val", "event")) == history(whole, ("train", "val", "event"))


def test_resume_passes_over_a_damaged_checkpoint(train: Train, capsys: pytest.CaptureFixture) -> None:
    whole, part = train("whole"), train("part")
    weights = part / "checkpoints" / "step_000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    train("part", resume=True)
    errors = capsys.readouterr().err
    assert "model.safetensors: damaged" in errors
    assert f"using {part / 'checkpoints' / 'step_000004'} instead" in errors
    assert history(part) == history(whole)


def test_a_resume_prints_and_records_changed_settings(train: Train, capsys: pytest.CaptureFixture) -> None:
    train(max_steps=4)
    capsys.readouterr()
    run = train(max_steps=6, learning_rate=2e-2, resume=True)
    shown = capsys.readouterr().out
    assert "--learning-rate was 0.01, is now 0.02" in shown
    assert "--max-steps was 4, is now 6" in shown
    [event] = [r for r in metrics.read(run / "metrics.jsonl") if r.get("name") == "settings changed"]
    assert event == {
        "step": 4, "kind": "event", "name": "settings changed",
        "learning_rate": [0.01, 0.02], "max_steps": [4, 6],
    }  # fmt: skip
    train(max_steps=6, learning_rate=2e-2, resume=True)
    assert "is now" not in capsys.readouterr().out


def test_a_fine_tuning_run_resumes_without_its_initial_weights(train: Train) -> None:
    base = train("base", max_steps=2, n_layer=1)
    constant = {"schedule": "wsd", "cooldown_fraction": 0.0, "init_from": str(base)}
    whole = train("whole", **constant)
    begun = train("begun", **constant, max_steps=4, n_layer=7)
    shape = json.loads((begun / "config.json").read_text())["settings"]
    assert shape["n_layer"] == 1  # as trained
    shutil.rmtree(base)
    other = train("other", max_steps=2)
    with pytest.raises(UserError, match=r"--init-from .*other: the run in .*begun began with .*base"):
        train("begun", **{**constant, "init_from": str(other)}, resume=True)
    config = json.loads((begun / "config.json").read_text())
    config["settings"]["n_layer"] = 12  # as earlier versions recorded it
    (begun / "config.json").write_text(json.dumps(config))
    train("begun", **constant, resume=True)
    [changed] = [r for r in history(begun, kinds=("event",)) if r["name"] == "settings changed"]
    assert "max_steps" in changed and "n_layer" not in changed
    assert history(begun, kinds=("train",)) == history(whole, kinds=("train",))


def test_reload_checkpoints_restores_what_was_saved(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are lost between saving and loading make no difference."""
    whole = train("whole")
    models: list[GPT] = []
    build, barrier = train_gpt2.build_model, Runtime.barrier

    def lose(rt: Runtime) -> None:
        barrier(rt)
        with torch.no_grad():
            models[0].transformer.wte.weight.zero_()

    monkeypatch.setattr(train_gpt2, "build_model", lambda *args: models.append(build(*args)) or models[0])
    monkeypatch.setattr(Runtime, "barrier", lose)
    assert history(train("reloaded", reload_checkpoints=True)) == history(whole)


def test_keep_checkpoints_keeps_the_newest(train: Train) -> None:
    run = train(checkpoint_interval=1, keep_checkpoints=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000005", "step_000006"]


def test_a_run_is_repeated_from_its_config(train: Train, tmp_path: Path) -> None:
    run = train(seed=5)
    settings = settings_from_config(run / "config.json")
    train_gpt2.train(dataclasses.replace(settings, out_dir=tmp_path / "again"))
    assert history(tmp_path / "again") == history(run)


def test_overwrite_replaces_a_run_and_spares_other_files(train: Train) -> None:
    run = train(max_steps=4)
    (run / "notes.txt").write_text("mine")
    train(max_steps=2, overwrite=True)
    assert [r["step"] for r in history(run, kinds=("train",))] == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    assert (run / "notes.txt").read_text() == "mine"


def test_zero_steps_evaluate_given_weights(train: Train) -> None:
    run = train("run")
    baseline = train("baseline", init_from=str(run), max_steps=0)
    last = [r for r in history(run, kinds=("val",))][-1]["loss"]
    assert history(baseline) == [{"step": 0, "kind": "val", "loss": pytest.approx(last, abs=1e-5)}]


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps NaN, as an overflow would."""
    forward, calls = GPT.forward, iter(range(1, 1000))

    def spoiled(self: GPT, *args: object) -> tuple[None, torch.Tensor]:
        logits, loss = forward(self, *args)
        if loss.requires_grad and next(calls) in steps:
            loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr(GPT, "forward", spoiled)


def test_a_bad_step_is_skipped_and_recorded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3})
    run = train(micro_batch_size=8)
    events = [(r["step"], r["name"]) for r in history(run, kinds=("event",))]
    assert events == [(0, "start"), (3, "bad step")]
    losses = [r["loss"] for r in history(run, kinds=("train",))]
    assert losses[2] is None
    assert all(math.isfinite(loss) for loss in losses[:2] + losses[3:])


def test_bad_steps_in_a_row_end_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3, 4, 5, 6})
    save = checkpoint.save
    # A checkpoint that takes longer to write than the bad steps is waited for.
    monkeypatch.setattr(checkpoint, "save", lambda *args, **options: time.sleep(1) or save(*args, **options))
    with pytest.raises(UserError, match=r"step 5: .*--max-bad-steps 3 .*step_000002; lower --learning-rate$"):
        train(micro_batch_size=8, max_bad_steps=3)


@pytest.mark.parametrize(
    ("capability", "version", "told"),
    [
        ((9, 0), "2.13.0", ", or set TORCH_CUDNN_SDPA_DEPRIORITIZED=1"),
        ((10, 0), "2.9.1+cu128", ", or set TORCH_CUDNN_SDPA_PREFERRED=0"),
        ((8, 0), "2.13.0", ""),
    ],
)
def test_bad_steps_suggest_avoiding_cudnn_where_torch_prefers_it(
    tmp_path: Path, capability: tuple[int, int], version: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: None)
    monkeypatch.setattr(Runtime, "barrier", lambda rt: None)
    s = dataclasses.replace(PRESETS["demo"], max_bad_steps=1, out_dir=tmp_path)
    rt = Runtime(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(UserError) as error:
        Progress(s, rt, folder_in(tmp_path), 1.0)._watch(3, math.nan, 1.0, 1.0)
    assert str(error.value).endswith("lower --learning-rate" + told)


def test_a_diverged_run_continues_at_a_lower_rate(train: Train) -> None:
    """Weights after which no loss is finite are in no checkpoint."""
    with pytest.raises(UserError, match="continues from the start; lower --learning-rate"):
        train(learning_rate=1e30, warmup_steps=0, max_steps=20)
    run = train(learning_rate=1e-3, warmup_steps=0, resume=True)
    losses = [r["loss"] for r in history(run, kinds=("train",))[-6:]]
    assert None not in losses and losses[-1] < losses[0]


def test_a_loss_spike_is_six_deviations_above_the_last_hundred() -> None:
    recent = [4.0, 4.2] * 50
    assert metrics.is_spike(4.1 + 6 * 0.1 + 0.01, recent)
    assert not metrics.is_spike(4.1 + 6 * 0.1 - 0.01, recent)
    assert not metrics.is_spike(100.0, recent[:99])


@pytest.mark.parametrize("failures", [1, 2])
def test_two_failed_checkpoints_in_a_row_end_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Once: the run records it and continues. Twice in a row: it ends, as nothing is safe any more."""
    real_save, failing = checkpoint.save, [4, 6][:failures]

    def save(out_dir: Path, step: int, *args: object) -> Path:
        if step in failing:
            raise UserError(f"step {step}: no space")
        return real_save(out_dir, step, *args)

    monkeypatch.setattr(checkpoint, "save", save)
    if failures == 1:
        train(max_steps=8)
        assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path / "run")] == [8, 6, 2]
    else:
        with pytest.raises(UserError, match="step 6: no space"):
            train(max_steps=8)
        assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path / "run")] == [2]
    events = [r for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "event"]
    failed = {"step": 6, "kind": "event", "name": "checkpoint failed", "reason": "step 4: no space"}
    assert failed in events


@pytest.mark.parametrize(("warmup_steps", "warned"), [(1, False), (2, True)])
def test_a_run_that_is_mostly_warmup_warns(
    train: Train, capsys: pytest.CaptureFixture, warmup_steps: int, warned: bool
) -> None:
    train(max_steps=3, warmup_steps=warmup_steps)
    assert ("most of the 3 steps are warm-up" in capsys.readouterr().out) == warned


def test_two_runs_do_not_share_a_folder(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with files.lock_folder(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        train()
    train()


# ---------------------------------------------------------------- real processes

QUICK = {**TINY, "val_interval": 0, "checkpoint_interval": 2, "max_steps": 30}


def start(data_dir: Path, out: Path, nproc: int = 0, **settings: object) -> subprocess.Popen:
    flags = as_flags({**QUICK, "data_dir": data_dir, "out_dir": out, "resume": True, **settings})
    return subprocess.Popen(
        command("train_gpt2.py", "--preset", "demo", *flags, nproc=nproc),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_step(out: Path, step: int, timeout: float = 60) -> None:
    deadline = time.time() + timeout
    while time.time() < deadline:
        if any(r["step"] >= step for r in metrics.read(out / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{out} did not reach step {step}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    """A data folder and the metrics of a run over it that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rng = np.random.default_rng(0)
    for name in ("x_val_000000.npy", "x_train_000001.npy"):
        np.save(folder / name, (rng.integers(0, 40, 300 * T).cumsum() % 300).astype(np.uint16))
    _, errors = start(folder, folder / "run").communicate(timeout=120)
    assert not errors, errors
    return folder, history(folder / "run")


def test_a_killed_run_resumes_bit_for_bit(undisturbed: tuple[Path, list], tmp_path: Path) -> None:
    data_dir, expected = undisturbed
    process = start(data_dir, tmp_path)
    wait_for_step(tmp_path, random.randint(1, 25))
    process.kill()
    process.wait(timeout=60)
    _, errors = start(data_dir, tmp_path).communicate(timeout=120)
    assert not errors, errors
    assert history(tmp_path) == expected


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_and_saves(
    undisturbed: tuple[Path, list], tmp_path: Path, number: signal.Signals
) -> None:
    data_dir, expected = undisturbed
    process = start(data_dir, tmp_path, checkpoint_interval=0)
    wait_for_step(tmp_path, 5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    last = history(tmp_path)[-1]["step"]
    assert f"stopped by {number.name} after step {last}" in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    start(data_dir, tmp_path).communicate(timeout=120)
    assert history(tmp_path) == expected


def test_output_is_flushed_line_by_line(undisturbed: tuple[Path, list], tmp_path: Path) -> None:
    """Into a pipe, as `| tee` and `> run.log` are, during the run."""
    data_dir, _ = undisturbed
    process = start(data_dir, tmp_path, max_steps=100_000, warmup_steps=0)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step 3/100000 ") for line in lines)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.slow
@posix
def test_ctrl_c_gets_an_answer_during_a_long_step(undisturbed: tuple[Path, list], tmp_path: Path) -> None:
    """The step ends seconds later; the demo says how to continue, as the same command would start over."""
    data_dir, _ = undisturbed
    settings = {**QUICK, "data_dir": data_dir, "out_dir": tmp_path, "overwrite": True}
    long = {"total_batch_size": 400 * T, "micro_batch_size": 400, "max_steps": 100}
    process = subprocess.Popen(
        command("train_gpt2.py", "--preset", "demo", *as_flags({**settings, **long})),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not process.stdout.readline().startswith("step 1/"):
        assert process.poll() is None, process.stderr.read()
    begin = time.time()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "SIGINT: stopping after this step; twice more to quit now\n"
    answered = time.time() - begin
    output, errors = process.communicate(timeout=100)
    assert answered < (time.time() - begin) / 2
    assert (process.returncode, errors) == (130, "")
    assert "--resume" in output and "the same command" not in output
    words = output.split("continue with ", 1)[1].split("\n", 1)[0].split()
    done = subprocess.run(
        [*words, "--max-steps", "3"], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in history(tmp_path, kinds=("train",))] == [1, 2, 3]


@posix
def test_ctrl_c_during_imports_leaves_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command("train_gpt2.py")[1:]],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "torch" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode in (-signal.SIGINT, 130)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_two_processes_train_like_one(undisturbed: tuple[Path, list], tmp_path: Path) -> None:
    """The same curve, a log that each step is in once, and after a kill the same end."""
    data_dir, expected = undisturbed
    process = start(data_dir, tmp_path / "two", nproc=2, val_interval=10)
    wait_for_step(tmp_path / "two", random.randint(3, 20))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    for child in workers(tmp_path / "two"):
        os.kill(child, signal.SIGKILL)
    _, errors = start(data_dir, tmp_path / "two", nproc=2, val_interval=10).communicate(timeout=120)
    records = history(tmp_path / "two", kinds=("train",))
    assert [r["step"] for r in records] == [r["step"] for r in expected], errors
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], abs=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-3)
    start(data_dir, tmp_path / "one", val_interval=10).communicate(timeout=120)
    val = [[r["loss"] for r in history(tmp_path / name, kinds=("val",))] for name in ("one", "two")]
    assert val[0] == pytest.approx(val[1], abs=1e-5)


def workers(out: Path) -> list[int]:
    """Processes that still train into `out`: torchrun's children are in sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@posix
def test_a_signal_to_two_processes_stops_both_after_one_step(
    undisturbed: tuple[Path, list], tmp_path: Path
) -> None:
    data_dir, expected = undisturbed
    process = start(data_dir, tmp_path, nproc=2, checkpoint_interval=0)
    wait_for_step(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = history(tmp_path)[-1]["step"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    start(data_dir, tmp_path).communicate(timeout=120)
    assert [r["loss"] for r in history(tmp_path)] == pytest.approx([r["loss"] for r in expected], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_two_compiled_processes_finish(train: Train, data_dir: Path, tmp_path: Path) -> None:
    """As on GPUs, DDP around a compiled model. One still alive when its group is left hangs now and then."""
    small = {"n_layer": 1, "val_interval": 0, "sample_interval": 0, "checkpoint_interval": 0, "max_steps": 4}
    process = start(data_dir, tmp_path / "two", nproc=2, compile=True, **small)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    one, two = history(train(**small), kinds=("train",)), history(tmp_path / "two", kinds=("train",))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=1e-5)


def test_the_demo_preset_builds_its_own_data(tmp_path: Path) -> None:
    flags = as_flags({**QUICK, "out_dir": tmp_path / "run", "max_steps": 1})
    done = run_script("train_gpt2.py", "--preset", "demo", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = sum(len(np.load(path)) for path in (tmp_path / "data" / "builtin").glob("*.npy"))
    assert 400_000 < tokens < 1_500_000
    last_lines = "\n".join(done.stdout.splitlines()[-6:])
    assert "loss_curves.png" in last_lines
    assert "samples.txt" in last_lines


def test_help_explains_every_setting() -> None:
    shown = run_script("train_gpt2.py", "--help")
    assert shown.returncode == 0
    for field in dataclasses.fields(PRESETS["demo"]):
        assert f"--{field.name.replace('_', '-')}" in shown.stdout
    assert shown.stdout.count("default:") + shown.stdout.count("(positional") >= len(
        dataclasses.fields(PRESETS["demo"])
    )


def test_importing_any_file_starts_nothing() -> None:
    files = [path.stem for path in ROOT.glob("*.py")]
    for folder in ("pre_tokens", "support"):
        files += [f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py")]
    code = f"import sys, os\nbefore = set(os.listdir())\nimport {', '.join(files)}\n"
    code += "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules\n"
    code += "assert set(os.listdir()) - before <= {'__pycache__'}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
