"""How fast this machine trains the recipe, and which settings are best.

    python bench.py                                              # tokens/s, MFU, memory, parts of a step
    python bench.py --compare "compile=False" "compile=True"     # two settings in turn, A B A B
    python bench.py --sweep                                      # micro-batches, compilation, attention
    python bench.py --plan 8xA100-80GB --price 1.5               # a run on GPUs that are not here

MFU is the share of the device's peak that 6N + 12·L·d·T FLOPs a token come to: GPT.flops_per_token.
"""

if __name__ == "__main__":  # Ctrl-C during the imports below: end without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import dataloader
import optim
import planning
import runtime
import tokenizer
from cli import UserError
from model import GPT, GPTConfig, default_loss_chunks
from settings import PRESETS

BACKENDS = {
    "default": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}


@dataclass
class Settings:
    preset: str = "gpt2-124m"
    """Preset whose model, sequence length, batch and optimizer are timed or planned."""
    n_layer: int = 0
    """Blocks. 0: the preset's; so for the next three."""
    n_head: int = 0
    """Attention heads."""
    n_embd: int = 0
    """Width."""
    sequence_length: int = 0
    """Tokens a sequence."""
    micro_batch_size: int = 0
    """Sequences at once. 0: the largest that fits on a GPU, 1 on a CPU."""
    loss_chunks: int = 0
    """Parts that the loss is computed in. 0: one on a GPU, of 512 tokens on a CPU."""
    accumulation_steps: int = 1
    """Micro-batches a step."""
    optimizer: Literal["preset", "adamw", "muon"] = "preset"
    """preset: the one that the preset trains with."""
    attention: Literal["default", "cudnn", "flash", "efficient", "math"] = "default"
    """Kernel of scaled_dot_product_attention."""
    loader: Literal["memmap", "int64"] = "memmap"
    """Ours, or a shard held as int64 and cut into batches in the foreground, as older scripts do."""
    sync: bool = False
    """Wait for the device after each step, as older scripts do."""
    compile: bool = False
    """Compile the model. On by default on CUDA only."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: runtime.Dtype = "auto"
    """Precision of matrix products."""
    data_dir: Path | None = None
    """Shards to read, rather than random tokens."""
    steps: int = 3
    """Steps that are timed."""
    warmup: int = 1
    """Steps before them."""
    compare: tuple[str, str] | None = None
    """Two settings to time in turn: "NAME=VALUE NAME=VALUE …" each, with the names of these flags."""
    rounds: int = 3
    """Turns of --compare."""
    sweep: bool = False
    """Time many settings and say which flags are best."""
    plan: str | None = None
    """COUNTxGPU, as 8xA100-80GB: calculate the preset's run there instead of timing."""
    nodes: int = 1
    """Machines of --plan."""
    network: float = 12.5
    """GB/s between the machines of --plan."""
    mfu: float = 0.45
    """MFU that --plan assumes."""
    price: float = 0.0
    """Price of a GPU hour for --plan."""
    json: bool = False
    """Print one JSON object."""


def check_settings(s: Settings) -> None:
    """Raise UserError on values that cannot work."""
    if s.preset not in PRESETS:
        raise UserError(f"--preset {s.preset}: not one of {', '.join(PRESETS)}")
    for name in ("steps", "rounds", "nodes", "accumulation_steps"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    for name in (
        "n_layer", "n_head", "n_embd", "sequence_length", "micro_batch_size", "loss_chunks", "warmup",
        "price",
    ):  # fmt: skip
        if not 0 <= getattr(s, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 0")
    if not 0 < s.mfu <= 1:
        raise UserError(f"--mfu {s.mfu}: must be above 0 and at most 1 (0.45 is 45 %)")
    if not 0 < s.network < math.inf:
        raise UserError(f"--network {s.network}: must be above 0")


def model_config(s: Settings) -> tuple[GPTConfig, int]:
    """The model to time or plan and its sequence length."""
    p = PRESETS[s.preset]
    T = s.sequence_length or p.sequence_length
    sizes = (s.n_layer or p.n_layer, s.n_head or p.n_head, s.n_embd or p.n_embd)
    return GPTConfig(max(T, p.block_size), tokenizer.VOCAB_SIZE, *sizes), T


# ---------------------------------------------------------------- timing


def micro_batches(s: Settings, B: int, T: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: random tokens, or those of --data-dir, through our loader or an int64 shard."""
    if s.data_dir is None:
        x, y = torch.randint(tokenizer.VOCAB_SIZE, (2, B, T), device=device)
        while True:
            yield x, y
    shards = dataloader.find_shards(s.data_dir)["train"]
    if s.loader == "memmap":
        yield from dataloader.train_batches(dataloader.TokenStream(shards, T, 0, True), 0, B, B, 0, 1, device)
    tokens = torch.from_numpy(np.load(shards[0].path).astype(np.int64))
    position = 0
    while True:
        if position + B * T + 1 > len(tokens):
            position = 0
        part = tokens[position : position + B * T + 1]
        position += B * T
        yield part[:-1].view(B, T).to(device), part[1:].view(B, T).to(device)


class Stopwatch:
    """Times between marks, by the device's own events on CUDA, so that marking does not hold it up."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []

    def mark(self, part: str) -> None:
        """Note that what has run since the last mark was `part`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds by part; the first mark only starts the watch."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            duration = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            totals[part] = totals.get(part, 0.0) + duration
        return totals


def measure(s: Settings) -> dict[str, object]:
    """Time steps of training as the settings say."""
    rt = runtime.start(s.device, s.dtype)
    config, T = model_config(s)
    on_cuda = rt.device.type == "cuda"
    padded = dataclasses.replace(config, padded_vocab_size=50304 if on_cuda else 0)
    model = GPT(padded).to(rt.device)
    B = s.micro_batch_size or (runtime.largest_micro_batch(model, T, 64, rt) if on_cuda else 1)
    loss_chunks = s.loss_chunks or default_loss_chunks(B * T, rt.device)
    p = PRESETS[s.preset]
    name = p.optimizer if s.optimizer == "preset" else s.optimizer
    optimizers = optim.build_optimizers(model, name, p.learning_rate, p.embedding_lr_ratio, p.weight_decay)
    step_model = torch.compile(model) if s.compile else model
    batches = micro_batches(s, B, T, rt.device)
    tokens = s.accumulation_steps * B * T

    begin = time.perf_counter()
    durations, parts = [], []
    with sdpa_kernel(BACKENDS[s.attention]) if s.attention != "default" else contextlib.nullcontext():
        for step in range(s.warmup + s.steps):
            watch = Stopwatch(rt.device)
            watch.mark("start")
            for _ in range(s.accumulation_steps):
                x, y = next(batches)
                watch.mark("data")
                with rt.autocast():
                    _, loss = step_model(x, y, loss_chunks)
                watch.mark("forward")
                (loss / s.accumulation_steps).backward()
                watch.mark("backward")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            watch.mark("optimizer")
            if s.sync:
                rt.synchronize()
                loss.item()
            if step >= s.warmup:
                parts.append(watch)
            elif step == s.warmup - 1:
                rt.synchronize()
                warmup_seconds = time.perf_counter() - begin
    batches.close()
    seconds = [watch.seconds() for watch in parts]
    durations = [sum(part.values()) for part in seconds]
    median = statistics.median(durations)
    peak = runtime.peak_flops(rt.device, rt.dtype)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "tokens_per_sec": tokens / median,
        "step_ms": 1000 * median,
        "step_ms_min": 1000 * min(durations),
        "step_ms_max": 1000 * max(durations),
        "mfu": model.flops_per_token(T) * tokens / median / peak,
        "peak_tflops": peak / 1e12,
        "flops_per_token": model.flops_per_token(T),
        "memory_gb": (torch.cuda.max_memory_allocated() if on_cuda else rss) / 1e9,
        "parts_ms": {
            part: 1000 * statistics.median(s[part] for s in seconds)
            for part in ("data", "forward", "backward", "optimizer")
        },
        "warmup_s": warmup_seconds if s.warmup else 0.0,
        "micro_batch_size": B,
        "sequence_length": T,
        "loss_chunks": loss_chunks,
        "optimizer": name,
        "compiled": s.compile,
        "hardware": runtime.hardware(rt),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(result: dict[str, object]) -> str:
    """A measurement as a person reads it."""
    hardware, parts = result["hardware"], result["parts_ms"]
    share = {part: f"{part} {ms:,.1f}" for part, ms in parts.items()}
    return (
        f"{hardware['name']}, {hardware['dtype']}, torch {result['torch']}, "
        f"{'compiled' if result['compiled'] else 'eager'}\n"
        f"batch      {result['micro_batch_size']} x {result['sequence_length']} tokens, "
        f"loss in {result['loss_chunks']} chunks, {result['optimizer']}\n"
        f"speed      {result['tokens_per_sec']:,.0f} tokens/s\n"
        f"step       {result['step_ms']:,.1f} ms, from {result['step_ms_min']:,.1f} to "
        f"{result['step_ms_max']:,.1f}\n"
        f"parts      {', '.join(share.values())} ms\n"
        f"MFU        {100 * result['mfu']:.1f} % of {result['peak_tflops']:,.2f} TFLOP/s, at "
        f"{result['flops_per_token'] / 1e6:,.0f} MFLOP a token (6N + 12·L·d·T)\n"
        f"memory     {result['memory_gb']:.2f} GB at most\n"
        f"warm-up    {result['warmup_s']:.1f} s"
    )


# ---------------------------------------------------------------- comparing


def override(s: Settings, text: str) -> Settings:
    """Settings with "NAME=VALUE NAME=VALUE" put over them, by way of the command line's own parser."""
    flags = []
    for item in text.split():
        name, equals, value = item.partition("=")
        flag = "--" + name.replace("_", "-")
        if not equals or name not in {f.name for f in dataclasses.fields(s)}:
            raise UserError(f"--compare {text!r}: {item!r} is not NAME=VALUE with the name of a flag")
        known = {"True": [flag], "False": ["--no" + flag[1:]]}
        flags += known.get(value, [flag, value])
    side = cli.parse(Settings, "", default=s, args=flags)
    check_settings(side)
    return side


def measure_apart(s: Settings) -> dict[str, object]:
    """`measure` in a process of its own, whose memory and compiled code are its own."""
    single = dataclasses.replace(s, compare=None, sweep=False, json=True)
    command = [sys.executable, __file__]
    for field in dataclasses.fields(single):
        value, flag = getattr(single, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else "--no" + flag[1:])
        elif value is not None:
            command += [flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(last.removeprefix("error: "))
    return json.loads(done.stdout)


def compare(s: Settings) -> dict[str, object]:
    """Time two settings in turn, A B A B …, and set each pair against each other."""
    sides = [override(s, text) for text in s.compare]
    results: list[list[dict[str, object]]] = [[], []]
    for number in range(s.rounds):
        for side, own, name in zip(sides, results, "AB", strict=True):
            own.append(measure_apart(side))
            if not s.json:
                last = own[-1]
                speed = f"{last['tokens_per_sec']:,.0f} tokens/s, {last['memory_gb']:.2f} GB"
                print(f"round {number + 1} {name}: {speed}", flush=True)
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
                "memory_gb": statistics.median(r["memory_gb"] for r in own),
            }
            for text, own in zip(s.compare, results, strict=True)
        ],
    }


def sweep(s: Settings) -> list[dict[str, object]]:
    """Time combinations of micro-batch, compilation and attention; the fastest first."""
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


# ---------------------------------------------------------------- the script


def show_plan(s: Settings) -> None:
    """Print what the preset's run takes on the hardware of --plan."""
    config, T = model_config(s)
    p = PRESETS[s.preset]
    plan = planning.plan(
        s.plan, config, T, p.total_batch_size, p.max_steps, s.mfu, s.nodes, s.network, s.price
    )
    if s.json:
        print(json.dumps(dataclasses.asdict(plan)))
        return
    tokens = p.total_batch_size * p.max_steps
    waiting = 1000 * plan.exposed_seconds
    print(f"{s.preset} on {s.nodes} x {s.plan}: {tokens / 1e9:.1f}B tokens, MFU {100 * s.mfu:.0f} % assumed")
    print(f"batch      {plan.micro_batch_size} x {T} tokens a GPU, {plan.accumulation_steps} rounds a step")
    print(f"memory     {plan.memory_gb:.1f} GB a GPU")
    print(f"step       {1000 * plan.step_seconds:,.0f} ms, {waiting:,.1f} of them waiting for gradients")
    print(f"speed      {p.total_batch_size / plan.step_seconds:,.0f} tokens/s")
    print(f"scaling    {100 * plan.scaling_efficiency:.1f} % of the speed of as many GPUs apart")
    print(f"time       {plan.hours:.2f} hours, without validation and checkpoints")
    if plan.cost is not None:
        print(f"cost       {plan.cost:,.2f} at {s.price} a GPU hour")


def main() -> None:
    defaults = Settings(compile=torch.cuda.is_available())
    s = cli.parse(Settings, "Time this machine at the recipe, or plan a run on another.", default=defaults)
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
            print(f"{name}: {speed}, {side['memory_gb']:.2f} GB: {side['settings']}")
        print(f"A/B: {result['ratio']:.3f} (from {result['ratio_min']:.3f} to {result['ratio_max']:.3f})")
    elif s.sweep:
        rows = sweep(s)
        if s.json:
            print(json.dumps(rows))
            return
        best = rows[0]
        compiled = "--compile" if best["compile"] else "--no-compile"
        speed = f"{best['tokens_per_sec']:,.0f} tokens/s"
        print(f"best: --micro-batch-size {best['micro_batch_size']} {compiled}: {speed}")
    else:
        result = measure(s)
        print(json.dumps(result) if s.json else describe(result))


if __name__ == "__main__":
    cli.run(main)
