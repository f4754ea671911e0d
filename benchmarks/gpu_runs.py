"""Parts of gpu_report.py that train: rehearsal, peers, recipes, and the work between steps."""

import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import numpy as np
import peers
import torch
from gpu_parts import RECIPE, ROOT, TINY, Part, figures, recipe_step
from ladder import Recipe

import bench
import dataloader
import evaluation
import hellaswag
import train_gpt2
from settings import PRESETS, read_settings
from support import checkpoint, cli, metrics, runtime
from support.cli import UserError
from support.runtime import Runtime

# ---------------------------------------------------------------- 3: the rehearsal


def rehearsal(part: Part) -> None:
    """Run the rehearsal on the given shards, SIGKILL it some steps after a checkpoint, and resume it."""
    run = part.s.out.resolve() / "rehearsal"
    interval, kill_after, last = (6, 8, 18) if part.s.tiny else (25, 37, 50)
    every = dict.fromkeys(("val", "hellaswag", "sample", "checkpoint"), interval)
    intervals = {f"{name}_interval": value for name, value in every.items()}
    command = ["train_gpt2.py", "--preset", "rehearsal", "--resume"]
    command += part.training_flags(out_dir=run, max_steps=last, **intervals)
    shutil.rmtree(run, ignore_errors=True)
    if part.measure("killed", lambda: killed_run(part, command, run / "metrics.jsonl", kill_after)):
        part.measure("resumed", lambda: resumed_run(part, command, run))


def killed_run(part: Part, command: list[str], record: Path, kill_after: int) -> dict[str, object]:
    """Start a training run, kill it once its metrics contain a certain step, and copy the metrics."""
    log, begin = part.s.out / "logs" / "killed_run.txt", time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, cwd=ROOT)
    first_step = None
    while process.poll() is None:
        steps = train_records(record)
        if steps and first_step is None:
            first_step = time.monotonic() - begin
        if max(steps, default=0) >= kill_after:
            process.kill()
            process.wait()
        elif part.left < 1:
            process.kill()
            raise UserError(f"out of time after step {max(steps, default=0)}")
        time.sleep(0.02)
    steps = train_records(record)
    if process.returncode >= 0:
        message = cli.last_error(log.read_text(encoding="utf-8"))
        raise UserError(f"the run ended at step {max(steps, default=0)} before it was killed: {message}")
    (part.s.out / "killed_metrics.jsonl").write_bytes(record.read_bytes())
    return {"killed_after_step": max(steps), "seconds_to_first_step": first_step}


def resumed_run(part: Part, command: list[str], run: Path) -> dict[str, object]:
    """Continue the killed run, and compare the losses of repeated steps."""
    before = train_records(part.s.out / "killed_metrics.jsonl")
    part.script(*command)
    after, records = train_records(run / "metrics.jsonl"), metrics.read(run / "metrics.jsonl")
    resumed_from = max(r["step"] for r in records if r.get("name") == "resume")
    repeated = sorted(step for step in before if step > resumed_from)
    rates = [after[step]["tokens_per_sec"] for step in sorted(after)[2:]]
    mfus = [after[step]["mfu"] for step in sorted(after)[2:]]
    bench.check_finite(*(r["loss"] for r in records if r["kind"] in ("train", "val")))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    losses = {f"val_loss_at_{r['step']}": r["loss"] for r in records if r["kind"] == "val"}
    scores = {
        f"hellaswag_acc_norm_at_{r['step']}": r["acc_norm"] for r in records if r["kind"] == "hellaswag"
    }
    failures = [
        f"{r['step']}: {r['what']}: {r['reason']}" for r in records if r.get("name") == "evaluation failed"
    ]
    return {
        "resumed_from_step": resumed_from,
        "repeated_steps": len(repeated),
        "largest_loss_difference": max(abs(before[n]["loss"] - after[n]["loss"]) for n in repeated),
        "tokens_per_sec": statistics.median(rates),
        "mfu": None if None in mfus else statistics.median(mfus),
        **losses,
        **scores,
        **{f"seconds_of_{name}": value for name, value in summary["seconds"].items()},
        "checkpoints": len(checkpoint.folders(run)),
        "evaluations_failed": "; ".join(failures) or "none",
    }


def train_records(record: Path) -> dict[int, metrics.Record]:
    """Read the records of training steps in a metrics.jsonl, by step."""
    return {r["step"]: r for r in metrics.read(record) if r["kind"] == "train"}


# ---------------------------------------------------------------- 4: peers


def compare_trainers(part: Part) -> None:
    """Compare speed, memory and 50 losses with other trainers, in turn, on equal batches."""
    if not part.s.peer:
        part.note("note", "no --peer FOLDER was given")
        return
    found = {folder.resolve().name: folder.resolve() for folder in part.s.peer}
    largest = 4 if part.s.tiny else 64  # build-nanogpt's
    folders = list(found.values())
    B = part.measure("micro_batch_size", lambda: peers.shared_micro_batch(part.bench(), folders, largest))
    if B is None:
        return
    rows: list[dict[str, object]] = []
    for number in (1,) if part.s.tiny else (1, 2):
        rows += [{**row, "round": number} for row in one_round(part, found, B)]
        part.note("rounds", rows)
        part.note("speed", peers.medians(rows))
        if number == 1:
            part.measure("losses", lambda: compare_losses(part, found, B))


def one_round(part: Part, found: dict[str, Path], B: int) -> Iterator[dict[str, object]]:
    """Measure a row for ours, and two for each peer: as it is, and compiled. A row may be a failure."""
    ours = recipe_step(part, B, steps=2 if part.s.tiny else 5)
    sides: dict[str, Callable[[], dict[str, object]]] = {"ours": lambda: bench.measure_apart(ours)}
    for name, folder in found.items():
        sides[name] = functools.partial(
            peers.apart, peers.speed, folder, dataclasses.replace(ours, compile=False)
        )
        if ours.compile:
            sides[f"{name}, compiled"] = functools.partial(peers.apart, peers.speed, folder, ours)
    for name, work in sides.items():
        row: dict[str, object] = {"side": name}
        try:
            result = work()
            row |= {key: result[key] for key in ("tokens_per_sec", "memory_gb", "step_ms")}
        except Exception as error:  # of another's program, or out of memory
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def compare_losses(part: Part, found: dict[str, Path], B: int) -> dict[str, object]:
    """Compare the first losses of ours and of each peer, from equal weights and batches."""
    run = part.s.out.resolve() / "peers"
    steps = 5 if part.s.tiny else 50
    length = TINY["sequence_length"] if part.s.tiny else RECIPE.sequence_length
    flags = part.training_flags(
        out_dir=run, overwrite=True, max_steps=steps, warmup_steps=10, total_batch_size=B * length,
        micro_batch_size=B, val_interval=0, hellaswag_interval=0, sample_interval=0, checkpoint_interval=0,
        compile=False,
    )  # fmt: skip
    part.script("train_gpt2.py", *flags)
    ours = [record["loss"] for _, record in sorted(train_records(run / "metrics.jsonl").items())]
    curves = {"ours": ours}
    part.note("curves", curves)
    bench.check_finite(*ours)
    found_so_far: dict[str, object] = {"steps": steps, "ours_last": ours[-1]}
    for name, folder in found.items():
        theirs = peers.apart(peers.losses, folder, run / "config.json")
        curves[name] = theirs
        part.note("curves", curves)
        bench.check_finite(*theirs)
        found_so_far[f"{name}_last"] = theirs[-1]
        apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        found_so_far |= {f"{name}_first_difference": apart[0], f"{name}_largest_difference": max(apart)}
    return found_so_far


# ---------------------------------------------------------------- 5: recipes

CANDIDATES = {"recipe's AdamW": "gpt2-124m", "tuned AdamW": "gpt2-124m-tuned", "Muon": "gpt2-124m-muon"}
SHAPE = {"total_batch_size": 65_536, "val_tokens": 524_288, "val_interval": 25}
STARTING_SECONDS = 60  # of a run, its compilation and validations


def recipes(part: Part) -> None:
    """Train three recipes, their schedules scaled to the steps that fit: loss against tokens and seconds."""
    if part.s.tiny:
        steps, shape = 4, {"val_interval": 2}
    else:
        measured = part.earlier("speed").get("one_micro_batch", {})
        rate = measured.get("tokens_per_sec") or bench.measure_apart(part.bench())["tokens_per_sec"]
        fitting = (part.left / len(CANDIDATES) - STARTING_SECONDS) * rate / SHAPE["total_batch_size"]
        steps, shape = min(1000, int(fitting)) // 25 * 25, SHAPE
        if steps <= 0:
            raise UserError(f"--minutes: {part.left:.0f} s are too few for three runs: raise it")
    curves: dict[str, dict[str, list[float]]] = {}
    rows = []
    for name, preset in CANDIDATES.items():
        run, peak = part.s.out.resolve() / "recipes" / preset, PRESETS[preset].learning_rate
        settings = {**Recipe.of_preset(preset).flags(steps), "learning_rate": peak, "max_steps": steps}
        flags = part.training_flags(
            out_dir=run, overwrite=True, hellaswag_interval=0, sample_interval=0, keep_checkpoints=1,
            **settings, **shape,
        )  # fmt: skip
        part.script("train_gpt2.py", *flags)
        curve = loss_curve(run)
        curves[name] = curve
        last = {"tokens": curve["tokens"][-1], "seconds": curve["seconds"][-1], "val_loss": curve["loss"][-1]}
        rows.append({"recipe": name, "learning_rate": peak, "steps": steps, **last})
        part.note("curves", curves)
        part.note("runs", rows)


def loss_curve(run: Path) -> dict[str, list[float]]:
    """Return the validation losses of a run, with tokens and seconds of training."""
    tokens, seconds, curve = 0, 0.0, {"tokens": [], "seconds": [], "loss": []}
    for record in metrics.read(run / "metrics.jsonl"):
        if record["kind"] == "train":
            tokens, seconds = record["tokens"], seconds + record["step_ms"] / 1000
        elif record["kind"] == "val":
            loss = np.inf if record["loss"] is None else record["loss"]
            for values, value in zip(curve.values(), (tokens, seconds, loss), strict=True):
                values.append(value)
    return curve


# ---------------------------------------------------------------- 6: between steps


def between_steps(part: Part) -> None:
    """Measure HellaSwag, sampling, the cost of evaluations and checkpoints, and Muon's share of a step."""
    common = ["--json", "--rounds", "1" if part.s.tiny else "3"]
    if part.s.tiny:
        folder = part.s.out.resolve() / "tiny_model"
        model = train_gpt2.build_model(read_settings(part.training_flags()), torch.device("cpu"))
        model.save_pretrained(folder)
        common += ["--model", str(folder)]
    data = ["--data", str(part.s.hellaswag_data.resolve())] if part.s.hellaswag_data else []
    if data or not part.s.tiny:
        flags = ["benchmarks/hellaswag_speed.py", "--limit", "1000", *data, *common]
        part.measure("hellaswag_examples_per_sec", lambda: json.loads(part.script(*flags)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    script = ["benchmarks/generation.py", "--new-tokens", "4" if part.s.tiny else "64", "--device", device]
    part.measure("sampling_tokens_per_sec", lambda: json.loads(part.script(*script, *common)))
    overhead = part.measure("costs", lambda: peers.apart(costs, part))
    adamw = part.earlier("speed").get("recipe_step", {})
    if "tokens_per_sec" not in adamw:
        B = bench.measure_apart(part.bench())["micro_batch_size"]
        adamw = figures(bench.measure_apart(recipe_step(part, B)))
    if overhead:
        part.measure("full_run", lambda: shares_of_full_run(overhead, adamw["tokens_per_sec"]))
    part.measure("muon", lambda: optimizer_shares(part, adamw))


def costs(part: Part) -> dict[str, float]:
    """Measure the seconds of the second validation, HellaSwag, samples and checkpoint of a run."""
    flags = part.training_flags(out_dir=part.s.out.resolve() / "between_steps", overwrite=True)
    s = read_settings(flags)
    rt = runtime.start(s.device, s.dtype)
    run = train_gpt2.set_up(s, rt)
    s = run.settings
    B, sequences = run.trainer.micro_batch_size, s.total_batch_size // s.sequence_length
    batches = dataloader.train_batches(run.data.train, 0, sequences, B, 0, 1, rt.device)
    with contextlib.closing(batches):
        run.trainer.step(batches)  # there are checkpoints of optimizer states only after a step
    none = {"val_interval": 0, "hellaswag_interval": 0, "sample_interval": 0}
    found: dict[str, float] = {}
    for number, kind in enumerate(("val", "hellaswag", "sample")):
        run.settings = dataclasses.replace(s, **{**none, f"{kind}_interval": 1})
        for step in (2 * number + 1, 2 * number + 2):
            work = functools.partial(evaluation.evaluate, run, step, last=False)
            found[f"{kind}_seconds"] = seconds_of(work, rt)
    run.settings = s
    for step in (7, 8):
        work = functools.partial(run.folder.save, step, run.trainer, wait=False)
        found["checkpoint_seconds"] = seconds_of(work, rt)
        found["checkpoint_written_seconds"] = seconds_of(run.folder.writer.wait, rt)
    for record in metrics.read(run.folder.metrics.path):
        if record.get("name") == "evaluation failed" and record["step"]:  # and so took no time
            raise UserError(f"{record['what']}: {record['reason']}")
        if record["kind"] == "val":
            bench.check_finite(record["loss"])
    found["val_tokens"] = min(s.val_tokens, len(run.data.val) * s.sequence_length)
    found["hellaswag_examples"] = len(run.data.hellaswag)
    return found


def seconds_of(work: Callable[[], object], rt: Runtime) -> float:
    """Time one call until the device has finished its work."""
    rt.synchronize()
    begin = time.perf_counter()
    work()
    rt.synchronize()
    return time.perf_counter() - begin


def shares_of_full_run(costs: dict[str, float], tokens_per_sec: float) -> list[dict[str, object]]:
    """Estimate evaluations and checkpoints of a full run on this GPU: times, seconds each, share.

    Validation and HellaSwag are scaled to the recipe's validation tokens and the published 10,042 examples.
    """
    s = RECIPE
    training = s.max_steps * s.total_batch_size / tokens_per_sec
    checkpoints = max(s.max_steps / s.checkpoint_interval, training / (60 * s.checkpoint_minutes))
    validation = costs["val_seconds"] * s.val_tokens / costs["val_tokens"]
    rows = [
        ("validation", s.max_steps // s.val_interval + 2, validation),
        ("samples", s.max_steps // s.sample_interval, costs["sample_seconds"]),
        ("checkpoint", round(checkpoints) + 1, costs["checkpoint_seconds"]),
    ]
    if costs["hellaswag_examples"]:
        each = costs["hellaswag_seconds"] * hellaswag.N_EXAMPLES / costs["hellaswag_examples"]
        rows.append(("HellaSwag", s.max_steps // s.hellaswag_interval + 2, each))
    whole = training + sum(times * each for _, times, each in rows)
    table = [{"what": w, "times": n, "seconds_each": each, "share": n * each / whole} for w, n, each in rows]
    total = {"what": "together", "times": None, "seconds_each": None}
    return [*table, {**total, "share": sum(row["share"] for row in table)}]


def optimizer_shares(part: Part, adamw: dict[str, object]) -> list[dict[str, object]]:
    """Measure the optimizer's share of the recipe's step, with AdamW and with Muon."""
    muon = bench.measure_apart(recipe_step(part, adamw["micro_batch_size"], optimizer="muon"))
    return [
        {
            "optimizer": side["optimizer"],
            "optimizer_ms": side["optimizer_ms"],
            "step_ms": side["step_ms"],
            "share": side["optimizer_ms"] / side["step_ms"],
        }
        for side in (adamw, figures(muon))
    ]
