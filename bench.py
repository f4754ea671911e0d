"""Measure how fast this machine trains, and find the best settings.

    python bench.py                                              # tokens/s, MFU, memory, parts of a step
    python bench.py --compare "compile=False" "compile=True"     # two settings in turn, A B A B
    python bench.py --sweep                                      # micro-batches, compilation, attention
    python bench.py --plan 8xA100-80GB --price 1.5               # estimate a run on other GPUs

MFU: 6N + 12·L·d·T FLOPs per token (GPTConfig.flops_per_token) as a fraction of the device's peak rate.
"""

if __name__ == "__main__":
    from support import launch

    launch.prepare()

import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dataloader
import train_gpt2
from model import GPTConfig
from pre_tokens.shards import find_shards
from settings import PRESETS, SHAPE
from support import cli, compiler, hardware, planning, runtime, tokenizer
from support.cli import Above0, AtLeast1, Bounds, Dtype, UserError
from support.progress import Stopwatch
from support.runtime import Runtime

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class Settings:
    preset: str = "gpt2-124m"
    """Preset to time or plan: its model, sequence length, batch and optimizer."""
    n_layer: int = 0
    """Transformer blocks. 0: the preset's."""
    n_head: int = 0
    """Attention heads per block. 0: the preset's."""
    n_embd: int = 0
    """Width. 0: the preset's."""
    sequence_length: int = 0
    """Tokens per sequence. 0: the preset's."""
    micro_batch_size: int = 0
    """Sequences per forward pass. 0: the largest that fits on a GPU, 1 on a CPU."""
    loss_chunks: int = 0
    """Chunks of the loss. 0: chunks of 16,384 tokens on CUDA, of 512 on a CPU."""
    accumulation_steps: AtLeast1 = 1
    """Micro-batches per step."""
    optimizer: Literal["preset", "adamw", "muon"] = "preset"
    """preset: that of the preset."""
    attention: Literal["default", "cudnn", "flash", "efficient", "math"] = "default"
    """Attention kernel. default: PyTorch chooses."""
    loader: Literal["memmap", "int64"] = "memmap"
    """memmap: ours. int64: a whole shard in memory, sliced in the main thread, as in older scripts."""
    sync: bool = False
    """Wait for the device after each step, as older scripts do."""
    compile: bool = False
    """Compile the model. On by default on CUDA, with Triton and a V100 or newer."""
    recompute: bool = False
    """Activation checkpointing. --plan also uses it where nothing fits without."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Precision of matrix products."""
    data_dir: Path | None = None
    """Shards to read instead of random tokens."""
    steps: AtLeast1 = 3
    """Steps to time."""
    warmup: int = 1
    """Untimed steps before the timed ones."""
    compare: tuple[str, str] | None = None
    """Time two settings in turn, A B A B: two quoted lists "NAME=VALUE …" of these flags."""
    rounds: AtLeast1 = 3
    """Number of times --compare measures each setting."""
    sweep: bool = False
    """Time many settings and print the fastest flags."""
    plan: str | None = None
    """Estimate time, memory and cost of the preset's run on the GPUs of a machine, such as 8xA100-80GB."""
    nodes: AtLeast1 = 1
    """Number of machines in --plan."""
    network: Above0 = 12.5
    """Network bandwidth between the machines in --plan, in GB/s."""
    mfu: Annotated[float, Bounds(above=0, at_most=1)] = 0.45
    """Model FLOPs utilisation (MFU) that --plan assumes, 0 to 1."""
    price: float = 0.0
    """Price per GPU hour in --plan."""
    json: bool = False
    """Print one JSON object."""


def check_settings(s: Settings) -> None:
    """Raise UserError on settings that cannot work together."""
    if runtime.world_size() > 1:
        raise UserError("bench.py times one process: start it without torchrun; --plan is for several")
    if s.preset not in PRESETS:
        raise UserError(f"--preset {s.preset}: not one of {', '.join(PRESETS)}")
    compiler.check(s.compile, s.device)


def model_config(s: Settings) -> tuple[GPTConfig, int, str]:
    """Return the model to time or plan, its sequence length and its optimizer."""
    p = PRESETS[s.preset]
    T = s.sequence_length or p.sequence_length
    name = p.optimizer if s.optimizer == "preset" else s.optimizer
    sizes = (s.n_layer or p.n_layer, s.n_head or p.n_head, s.n_embd or p.n_embd)
    return GPTConfig(max(T, p.block_size), tokenizer.VOCAB_SIZE, *sizes, dropout=p.dropout), T, name


# ---------------------------------------------------------------- timing


def micro_batches(s: Settings, B: int, T: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: random tokens, or those of --data-dir through the --loader."""
    if s.data_dir is None:
        x, y = torch.randint(tokenizer.VOCAB_SIZE, (2, B, T), device=device)
        while True:
            yield x, y
    shards = find_shards(s.data_dir)["train"]
    if s.loader == "memmap":
        stream = dataloader.TokenStream(shards, T, seed=0, shuffle=True)
        yield from dataloader.train_batches(stream, 0, B, B, 0, 1, device)
        return
    tokens = torch.from_numpy(np.load(shards[0].path).astype(np.int64))
    position = 0
    while True:
        if position + B * T + 1 > len(tokens):
            position = 0
        part = tokens[position : position + B * T + 1]
        position += B * T
        yield part[:-1].view(B, T).to(device), part[1:].view(B, T).to(device)


def timed(batches: Iterator[tuple[Tensor, Tensor]], watch: Stopwatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same batches, and mark the watch before and after each."""
    while True:
        watch.mark("backward")  # of the micro-batch before
        batch = next(batches)
        watch.mark("data")
        yield batch


def build_trainer(s: Settings, rt: Runtime) -> train_gpt2.Trainer:
    """Build the trainer as train_gpt2.py would with these settings."""
    config, T, name = model_config(s)
    hardware.avoid_faulty_attention(T, config.dropout)
    p = PRESETS[s.preset]
    B = s.micro_batch_size or (0 if rt.device.type == "cuda" else 1)
    # With B = 0, search what fits when a step has as many sequences as the preset's on one GPU.
    sequences = s.accumulation_steps * B or (64 if p.total_batch_size % T else p.total_batch_size // T)
    shape = {size: getattr(config, size) for size in SHAPE}
    training = dataclasses.replace(
        p, **shape, init_from="scratch", sequence_length=T, total_batch_size=sequences * T,
        micro_batch_size=B, loss_chunks=s.loss_chunks, optimizer=name, recompute=s.recompute,
        compile=s.compile,
    )  # fmt: skip
    model = train_gpt2.build_model(training, rt.device)
    if s.compile:
        compiler.try_out(rt)
    trainer = train_gpt2.build_trainer(training, rt, model)
    trainer.accumulation_steps = s.accumulation_steps
    return trainer


def measure(s: Settings) -> dict[str, object]:
    """Time training steps. Raises UserError if a loss or gradient is not finite."""
    rt = runtime.start(s.device, s.dtype)
    config, T, name = model_config(s)
    trainer = build_trainer(s, rt)
    B, watch = trainer.micro_batch_size, Stopwatch(rt.device)
    trainer.optimizers[0].register_step_pre_hook(lambda *_: watch.mark("backward"))
    trainer.train_model.register_forward_hook(lambda *_: watch.mark("forward"))
    batches = timed(micro_batches(s, B, T, rt.device), watch)
    tokens = s.accumulation_steps * B * T

    known = hardware.peak_flops(rt.device, rt.dtype)  # otherwise measured before and after the steps
    peak = known or hardware.measured_flops(rt.device, rt.dtype)
    begin, kernel = time.perf_counter(), KERNELS.get(s.attention)
    results: list[train_gpt2.StepResult] = []
    with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
        for step in range(s.warmup + s.steps):
            watch.start_lap()
            results.append(trainer.step(batches))
            watch.mark("optimizer")
            if s.sync:
                results[-1].loss.item()
            if step == s.warmup - 1:
                rt.synchronize()
                warmup_seconds = time.perf_counter() - begin
    batches.close()
    laps = watch.seconds()[s.warmup :]
    check_finite(*(result.loss.item() for result in results))
    norms = [result.grad_norm.item() for result in results]
    if rt.dtype == torch.float16:  # the first gradients may overflow, but not all of them
        norms = [norm for norm in norms if math.isfinite(norm)] or [math.nan]
    check_finite(*norms)
    durations = [sum(lap.values()) for lap in laps]
    median = statistics.median(durations)
    peak = known or max(peak, hardware.measured_flops(rt.device, rt.dtype))
    memory = hardware.peak_memory(rt.device)
    return {
        "tokens_per_sec": tokens / median,
        "step_ms": 1000 * median,
        "step_ms_min": 1000 * min(durations),
        "step_ms_max": 1000 * max(durations),
        "mfu": config.flops_per_token(T) * tokens / median / peak,
        "peak_tflops": peak / 1e12,
        "flops_per_token": config.flops_per_token(T),
        "memory_gb": memory and memory / 1e9,
        "parts_ms": {
            part: 1000 * statistics.median(lap[part] for lap in laps)
            for part in ("data", "forward", "backward", "optimizer")
        },
        "warmup_s": warmup_seconds if s.warmup else 0.0,
        "micro_batch_size": B,
        "sequence_length": T,
        "loss_chunks": trainer.loss_chunks,
        "optimizer": name,
        "compiled": s.compile,
        "hardware": hardware.describe(rt),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def check_finite(*numbers: float | None) -> None:
    """Raise UserError if a loss or gradient is not finite, because then times mean nothing."""
    if not all(number is not None and math.isfinite(number) for number in numbers):
        raise UserError("loss or gradient not finite: try another attention kernel, or no compilation")


def describe(result: dict[str, object]) -> str:
    """Format a measurement as text."""
    machine = result["hardware"]
    parts = ", ".join(f"{part} {ms:,.1f}" for part, ms in result["parts_ms"].items())
    return (
        f"{machine['name']}, {machine['dtype']}, torch {result['torch']}, "
        f"{'compiled' if result['compiled'] else 'eager'}\n"
        f"batch      {result['micro_batch_size']} x {result['sequence_length']} tokens, "
        f"loss in {result['loss_chunks']} chunks, {result['optimizer']}\n"
        f"speed      {result['tokens_per_sec']:,.0f} tokens/s\n"
        f"step       {result['step_ms']:,.1f} ms, from {result['step_ms_min']:,.1f} to "
        f"{result['step_ms_max']:,.1f}\n"
        f"parts      {parts} ms\n"
        f"MFU        {100 * result['mfu']:.1f} % of {result['peak_tflops']:,.2f} TFLOP/s, at "
        f"{result['flops_per_token'] / 1e6:,.0f} MFLOP per token (6N + 12·L·d·T)\n"
        f"memory     {hardware.gigabytes(result['memory_gb'])}\n"
        f"warm-up    {result['warmup_s']:.1f} s"
    )


# ---------------------------------------------------------------- comparing


def override(s: Settings, text: str) -> Settings:
    """Override settings by "NAME=VALUE NAME=VALUE", parsed like flags."""
    flags = []
    for item in text.split():
        name, equals, value = item.partition("=")
        own = "--" + name.replace("_", "-")
        if not equals or name not in {f.name for f in dataclasses.fields(s)}:
            raise UserError(f"--compare {text!r}: {item!r} is not NAME=VALUE with the name of a flag")
        flags += {"True": [own], "False": ["--no" + own[1:]]}.get(value, [own, value])
    side = cli.parse(Settings, "", default=s, args=flags)
    check_settings(side)
    return side


def measure_apart(s: Settings, environment: dict[str, str] | None = None) -> dict[str, object]:
    """Run `measure` in a separate process, with its own memory and compiled code.

    environment: variables to add to those of this process.
    """
    single = dataclasses.replace(s, compare=None, sweep=False, json=True)
    command = [sys.executable, __file__, *cli.flags(vars(single))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise UserError(cli.last_error(done.stderr))
    return json.loads(done.stdout)


def compare(s: Settings) -> dict[str, object]:
    """Time two settings in turn, A B A B …, and compare each pair."""
    sides = [override(s, text) for text in s.compare]
    results: list[list[dict[str, object]]] = [[], []]
    for number in range(s.rounds):
        for side, own, name in zip(sides, results, "AB", strict=True):
            own.append(measure_apart(side))
            if not s.json:
                memory = hardware.gigabytes(own[-1]["memory_gb"])
                print(f"round {number + 1} {name}: {own[-1]['tokens_per_sec']:,.0f} tokens/s, {memory}")
    ratios = [a["tokens_per_sec"] / b["tokens_per_sec"] for a, b in zip(*results, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "sides": [
            {
                "settings": text,
                "tokens_per_sec": statistics.median(r["tokens_per_sec"] for r in own),
                "mfu": statistics.median(r["mfu"] for r in own),
                "memory_gb": own[0]["memory_gb"] and statistics.median(r["memory_gb"] for r in own),
            }
            for text, own in zip(s.compare, results, strict=True)
        ],
    }


def sweep(s: Settings) -> list[dict[str, object]]:
    """Time combinations of micro-batch, compilation and attention. Returns the fastest first."""
    on_cuda = runtime.start(s.device, s.dtype).device.type == "cuda"
    sizes = (8, 16, 32, 64) if on_cuda else (1, 2, 4)
    attentions = ("default", "cudnn", "flash") if on_cuda else ("default",)
    rows = []
    for compiled in (False, True):
        for attention in attentions:
            for B in sizes:
                changed = dataclasses.replace(s, compile=compiled, attention=attention, micro_batch_size=B)
                row = {"micro_batch_size": B, "compile": compiled, "attention": attention}
                try:
                    result = measure_apart(changed)
                    row |= {key: result[key] for key in ("tokens_per_sec", "mfu", "memory_gb")}
                except UserError as error:
                    row["failed"] = str(error)
                rows.append(row)
                if not s.json:
                    speed = f"{row['tokens_per_sec']:,.0f} tokens/s" if "failed" not in row else row["failed"]
                    print(f"micro-batch {B:3} {'compiled' if compiled else 'eager':8} {attention:8} {speed}")
    if all("failed" in row for row in rows):
        raise UserError(str(rows[0]["failed"]))
    return sorted(rows, key=lambda row: -row.get("tokens_per_sec", 0.0))


def show_plan(s: Settings) -> None:
    """Print the estimate for the preset's run on the GPUs of --plan."""
    config, T, name = model_config(s)
    p = PRESETS[s.preset]
    machines = (s.mfu, s.nodes, s.network, s.price)
    plan = planning.plan(s.plan, config, T, p.total_batch_size, p.max_steps, *machines, name, s.recompute)
    if s.json:
        print(json.dumps(dataclasses.asdict(plan)))
        return
    tokens = p.total_batch_size * p.max_steps / 1e9
    print(f"{s.preset} on {s.nodes} x {s.plan}: {tokens:.1f}B tokens, MFU {100 * s.mfu:.0f} % assumed")
    print(planning.describe(plan, T, p.total_batch_size))


def main() -> None:
    defaults = Settings(compile=compiler.on_by_default(cli.given("device") or "auto"))
    s = cli.parse(Settings, "Time training on this machine, or plan a run on another.", default=defaults)
    check_settings(s)
    if s.plan:
        show_plan(s)
    elif s.compare:
        result = compare(s)
        if s.json:
            print(json.dumps(result))
            return
        for name, side in zip("AB", result["sides"], strict=True):
            speed = f"{side['tokens_per_sec']:,.0f} tokens/s, MFU {100 * side['mfu']:.1f} %"
            print(f"{name}: {speed}, {hardware.gigabytes(side['memory_gb'])}: {side['settings']}")
        print(f"A/B: {result['ratio']:.3f} (from {result['ratio_min']:.3f} to {result['ratio_max']:.3f})")
    elif s.sweep:
        rows = sweep(s)
        if s.json:
            print(json.dumps(rows))
            return
        best = next(row for row in rows if row["attention"] == "default")  # as train_gpt2.py has it
        flags = f"--micro-batch-size {best['micro_batch_size']} --{'no-' * (not best['compile'])}compile"
        print(f"best: {flags}: {best['tokens_per_sec']:,.0f} tokens/s")
    else:
        result = measure(s)
        print(json.dumps(result) if s.json else describe(result))


if __name__ == "__main__":
    cli.run(main)
