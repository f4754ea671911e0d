"""benchmarks/gpu_report.py without a GPU: its parts with a tiny model, and parts that crash, hang or fail."""

import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script, write_shard

sys.path.append(str(ROOT / "benchmarks"))

import gpu_parts
import gpu_report
import gpu_runs
import peers
from gpu_parts import Part, Settings

import bench
import evaluation
import train_gpt2
from pre_tokens.shards import write_manifest
from settings import PRESETS, read_settings
from support.cli import UserError
from support.runtime import Runtime

SMALL = {"n_layer": 1, "n_head": 1, "n_embd": 16, "sequence_length": 16}
PEER = """
import torch
from torch.optim import AdamW

from hellaswag import render_example, iterate_examples  # of the peer's own folder: not to be found
from model import GPT as Ours, GPTConfig

print("a line of the training loop")
raise SystemExit


class GPT(Ours):
    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        matrices, vectors = ([p for p in self.parameters() if (p.dim() < 2) == flat] for flat in (0, 1))
        groups = [
            {"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}
        ]
        return AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The first two shards of three, as the rehearsal downloads them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    names = [f"tiny_{name}.npy" for name in ("val_000000", "train_000001", "train_000002")]
    write_shard(folder / names[0], 40 * 64)
    write_shard(folder / names[1], 400 * 64, 1)
    sizes = [(folder / name).stat().st_size for name in names[:2]]
    entries = [
        {"file": name, "bytes": size, "sha256": None} for name, size in zip(names, [*sizes, 1], strict=True)
    ]
    write_manifest(folder, {"shards": entries})
    return folder


@pytest.fixture
def part(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """A part of a tiny report, whose measurements and training runs stay in this process."""
    monkeypatch.setattr(gpu_parts, "TINY", SMALL)
    monkeypatch.setattr(gpu_runs, "TINY", SMALL)
    monkeypatch.setattr(bench, "measure_apart", lambda s, environment=None: bench.measure(s))
    monkeypatch.setattr(peers, "apart", lambda function, *arguments: function(*arguments))
    train = lambda part, script, *flags: train_gpt2.train(read_settings(list(flags)))  # noqa: E731
    monkeypatch.setattr(Part, "script", train)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    s = Settings(data_dir=shards, out=tmp_path / "report", tiny=True)
    for folder in (s.results, s.out / "logs"):
        folder.mkdir(parents=True)
    yield Part(s, "test", time.monotonic() + 300)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def noted(part: Part) -> dict[str, object]:
    """Read the results of the part from the disk, and check that none failed."""
    results = json.loads((part.s.results / "test.json").read_text())
    assert "failed" not in json.dumps(results), results
    return results


# ---------------------------------------------------------------- the parts


def test_speed_notes_a_measured_step(part: Part) -> None:
    gpu_parts.speed(part)
    results = noted(part)
    step = results["recipe_step"]
    parts = sum(step[f"{name}_ms"] for name in ("data", "forward", "backward", "optimizer"))
    assert parts == pytest.approx(step["step_ms"], rel=0.5)
    (row,) = results["sweep"]
    assert row["micro_batch"] == results["one_micro_batch"]["micro_batch_size"] and row["tokens_per_sec"] > 0
    plan = {row["what"]: row["plan for 1xA100-80GB"] for row in results["forecast"]}
    assert plan["mfu"] == bench.Settings.mfu and plan["tokens_per_sec"] > 0


def test_peak_rates_match_the_counted_work(part: Part) -> None:
    rt = gpu_parts.runtime.start("cpu", "float32")
    found = gpu_parts.peak_rates(rt, tiny=True)
    assert 0 < found["product_tflops"] < 100 and 0 < found["copy_gb_per_sec"] < 10_000


def test_the_peak_is_that_of_the_training_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a T4, which has no bf16."""
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.dtype) or mm(a, b, out=out))
    for dtype in (torch.float16, torch.bfloat16):
        found = gpu_parts.peak_rates(Runtime(torch.device("cpu"), dtype), tiny=True)
        assert set(seen) == {dtype} and found["product_dtype"] == str(dtype)[6:]
        seen.clear()


def test_a_diverged_run_is_reported_as_a_failure(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its times, nor a comparison with its losses."""
    validate = evaluation.validate
    monkeypatch.setattr(evaluation, "validate", lambda run: validate(run) * math.nan)
    with pytest.raises(UserError, match="not finite"):
        gpu_runs.costs(part)
    monkeypatch.setattr(evaluation, "validate", lambda run: (_ for _ in ()).throw(UserError("no memory")))
    with pytest.raises(UserError, match="validation: no memory"):
        gpu_runs.costs(part)
    monkeypatch.setattr(evaluation, "validate", validate)
    monkeypatch.setattr(gpu_runs, "train_records", lambda path: {1: {"loss": None}})
    with pytest.raises(UserError, match="not finite"):
        gpu_runs.compare_losses(part, {}, 1)
    monkeypatch.setattr(peers, "step", lambda *_: math.nan)
    monkeypatch.setattr(peers, "load", lambda folder: None)
    monkeypatch.setattr(peers, "build", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(peers, "optimizer_of", lambda *_: None)
    with pytest.raises(UserError, match="not finite"):
        peers.speed(Path("peer"), part.bench(micro_batch_size=1))


def test_a_peer_trains_from_the_same_weights_on_the_same_batches(part: Part, tmp_path: Path) -> None:
    """A peer that is our own model: its losses are ours, and only its definitions have been run."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "train_gpt2.py").write_text(PEER)
    part.s.peer = [folder]
    gpu_runs.compare_trainers(part)
    results = noted(part)
    assert [row["side"] for row in results["speed"]] == ["ours", "peer"]
    assert all(row["tokens_per_sec"] > 0 for row in results["rounds"])
    ours, theirs = results["curves"].values()
    assert len(ours) == 5 and len(set(ours)) == 5
    assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.slow
def test_three_recipes_train_on_the_same_tokens(part: Part) -> None:
    gpu_runs.recipes(part)
    results = noted(part)
    assert [row["learning_rate"] for row in results["runs"]] == [
        PRESETS[name].learning_rate for name in ("gpt2-124m", "gpt2-124m-tuned", "gpt2-124m-muon")
    ]
    assert {row["tokens"] for row in results["runs"]} == {4 * 512}
    assert all(len(curve["loss"]) == 3 for curve in results["curves"].values())
    gpu_report.write(part.s, {"date": "", "command": "", "git_commit": ""}, {})
    path = part.s.results / "test.json"
    path.rename(path.with_name("recipes.json"))
    gpu_report.write(part.s, {"date": "", "command": "", "git_commit": ""}, {})
    assert (part.s.out / "recipes.png").exists()
    assert "recipes.png" in (part.s.out / "report.md").read_text()


def test_costs_time_each_evaluation_and_the_checkpoint(part: Part) -> None:
    found = gpu_runs.costs(part)
    assert found["val_tokens"] == 2048 and found["hellaswag_examples"] == 0
    assert all(found[f"{kind}_seconds"] > 0 for kind in ("val", "sample", "checkpoint", "checkpoint_written"))


def test_shares_scale_to_a_full_run() -> None:
    costs = {
        "val_seconds": 1.0, "val_tokens": 1_048_576, "sample_seconds": 2.0, "checkpoint_seconds": 3.0,
        "hellaswag_seconds": 4.0, "hellaswag_examples": 1004.2,
    }  # fmt: skip
    rows = {row["what"]: row for row in gpu_runs.shares_of_full_run(costs, 1e6)}
    seconds = {"validation": 40 * 10.0, "samples": 19 * 2.0, "checkpoint": 39 * 3.0, "HellaSwag": 21 * 40.0}
    whole = 19_073 * 524_288 / 1e6 + sum(seconds.values())
    for name, expected in seconds.items():
        assert rows[name]["share"] == pytest.approx(expected / whole)
    assert rows["together"]["share"] == pytest.approx(sum(seconds.values()) / whole)


def test_outcomes_are_read_from_pytests_output(part: Part) -> None:
    outcomes = gpu_parts.read_outcomes(
        "tests/test_gpu.py::test_a[torch.float32] PASSED            [ 10%]\n"
        "tests/test_gpu.py::test_b SKIPPED (no CUDA device)         [ 20%]\n"
        "tests/test_gpu.py::test_c[x y] a line of its output\nFAILED [ 30%]\n"
        "tests/test_gpu.py::test_d FAILED                           [ 40%]\n"
        "FAILED tests/test_gpu.py::test_d - AssertionError: 1 != 2\n"
    )
    assert [(row["test"], row["outcome"], row["reason"]) for row in outcomes] == [
        ("test_a[torch.float32]", "passed", ""), ("test_b", "skipped", ""),
        ("test_d", "failed", "AssertionError: 1 != 2"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="no test"):
        gpu_parts.read_outcomes("ERROR: file not found: tests/test_gpu.py\n")


# ---------------------------------------------------------------- the report


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_script_kills_and_resumes_the_rehearsal(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    flags = ["--tiny", "--only", "rehearsal", "--data-dir", str(shards), "--out", str(out), "--minutes", "5"]
    done = run_script("benchmarks/gpu_report.py", *flags, timeout=300)
    assert done.returncode == 0, done.stderr
    part = json.loads((out / "report.json").read_text())["parts"]["rehearsal"]
    assert part["state"] == "done", part
    killed, resumed = part["results"]["killed"], part["results"]["resumed"]
    assert resumed["resumed_from_step"] == 6 < killed["killed_after_step"] < 18
    assert resumed["repeated_steps"] == killed["killed_after_step"] - 6
    assert resumed["largest_loss_difference"] < 1e-5
    assert "largest loss difference" in (out / "report.md").read_text()


def crash(part: Part) -> None:
    part.note("first", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(part: Part) -> None:
    part.note("first", 1)
    os.fork()  # both live for a while
    with open(part.s.out / "alive", "a", buffering=1) as file:
        while True:
            file.write("still alive\n")
            time.sleep(0.05)


def fail(part: Part) -> None:
    part.measure("first", lambda: 1 / 0)
    part.note("second", 2)
    raise UserError("something is missing")


def test_a_failed_measurement_keeps_its_earlier_notes(part: Part) -> None:
    def work() -> None:
        part.note("roofline", {"floor_by_flops_ms": 1.5})
        raise UserError("no triton")

    part.measure("roofline", work)
    assert part.results["roofline"] == {"floor_by_flops_ms": 1.5, "failed": "no triton"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals and process groups")
def test_a_part_that_crashes_hangs_or_fails_costs_only_its_share(part: Part) -> None:
    assert gpu_report.run_part(crash, part.s, "crash", 60).startswith("SIGKILL")
    assert "something is missing" in gpu_report.run_part(fail, part.s, "fail", 60)
    begin = time.monotonic()
    assert "were over" in gpu_report.run_part(hang, part.s, "hang", 12)
    assert 12 <= time.monotonic() - begin < 30
    written = (part.s.out / "alive").stat().st_size
    time.sleep(1)
    assert (part.s.out / "alive").stat().st_size - written < 100  # one more line, at the moment of its end
    files = {name: part.s.results / f"{name}.json" for name in ("crash", "hang", "fail")}
    read = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert read["crash"] == read["hang"] == {"first": 1}
    assert read["fail"]["second"] == 2 and "ZeroDivisionError" in read["fail"]["first"]["failed"]


def test_tables_show_dicts_and_lists() -> None:
    assert gpu_report.table({"tokens_per_sec": 123456.7, "name": "a|b"}) == [
        "|  |   |", "| --- | --- |", "| tokens per sec | 123,457 |", "| name | a\\|b |",
    ]  # fmt: skip
    rows = [{"side": "ours", "mfu": 0.51234}, {"side": "theirs", "failed": "out of memory"}]
    assert gpu_report.table(rows) == [
        "| side | mfu | failed |", "| --- | --- | --- |", "| ours | 0.5123 |  |",
        "| theirs |  | out of memory |",
    ]  # fmt: skip
    assert [gpu_report.shown(v) for v in (None, True, 1234567, 3)] == ["", "yes", "1,234,567", "3"]


def test_a_peer_is_compared_round_by_round() -> None:
    rows = [
        {"side": side, "tokens_per_sec": rate, "memory_gb": 1.0}
        for side, rate in (("ours", 200.0), ("theirs", 100.0), ("ours", 330.0), ("theirs", 110.0))
    ]
    ours, theirs = peers.medians(rows)
    assert ours["ours_relative"] == 1 and theirs["ours_relative"] == np.median([2.0, 3.0])


def test_a_report_without_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--tiny", "--minutes", "0"])
    with pytest.raises(UserError, match=r"--minutes 0.0: must be above 0"):
        gpu_report.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "speed,sleep"}, "--only sleep"),
        ({"tiny": False}, "--tiny"),
        ({"peer": [Path("nowhere")]}, "--peer nowhere"),
        ({"hellaswag_data": Path("nowhere")}, "--hellaswag-data nowhere"),
        ({"data_dir": Path("nowhere")}, "nowhere"),
    ],
)
def test_mistakes_in_flags_are_one_line(
    shards: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        gpu_report.check(Settings(**{"data_dir": shards, "tiny": True, **changes}))


def test_parts_run_in_their_order(shards: Path) -> None:
    check = functools.partial(Settings, data_dir=shards, tiny=True)
    assert gpu_report.check(check()) == list(gpu_report.PARTS)
    assert gpu_report.check(check(only="recipes, device")) == ["device", "recipes"]
