"""Models and steps of other trainers, to time and compare with ours: build-nanogpt's, nanoGPT's.

A peer's own file provides the model and its optimizer. Only the imports, classes and functions at its top
level are run. The rest of a step is as in its script: one loss over all logits, gradients clipped to norm 1,
a wait for the device. See gpu_report.py --peer.
"""

import ast
import concurrent.futures
import dataclasses
import inspect
import multiprocessing
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import bench
import dataloader
import optim
import train_gpt2
from dataloader import TokenStream
from model import GPTConfig
from pre_tokens.shards import find_shards
from settings import PRESETS, settings_from_config
from support import hardware, runtime
from support.cli import UserError
from support.runtime import Runtime

T = TypeVar("T")
FILES = ("train_gpt2.py", "model.py")  # build-nanogpt's, nanoGPT's
PADDED_VOCAB_SIZE = 50304  # with which both train


def load(folder: Path) -> types.ModuleType:
    """Load the classes and functions of a peer's file. Raises UserError if the folder holds no such file."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"--peer {folder}: has neither {' nor '.join(FILES)}: name a peer's folder")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    # Not the training loop, and no modules of its own, in whose place Python would find ours.
    definitions = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    own = {file.stem for file in folder.glob("*.py")} | {"hellaswag"}
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, definitions) and not (isinstance(node, ast.ImportFrom) and node.module in own)
    ]
    module = types.ModuleType(f"peer_{path.stem}")
    module.master_process = True  # its optimizer's factory asks
    sys.modules[module.__name__] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def build(peer: types.ModuleType, config: GPTConfig, vocab_size: int) -> nn.Module:
    """Build the peer's model in our size."""
    sizes = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    return peer.GPT(peer.GPTConfig(vocab_size=vocab_size, **sizes))


def optimizer_of(model: nn.Module, learning_rate: float, device: torch.device) -> torch.optim.Optimizer:
    """Build the peer's own optimizer, with the recipe's weight decay and betas."""
    known = {
        "weight_decay": 0.1, "learning_rate": learning_rate, "betas": (0.9, 0.95),
        "device_type": device.type, "device": device.type,
    }  # fmt: skip
    taken = inspect.signature(model.configure_optimizers).parameters
    return model.configure_optimizers(**{name: value for name, value in known.items() if name in taken})


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    accumulation_steps: int,
    rt: Runtime,
) -> float:
    """Do one optimizer step over all micro-batches, and wait for it. Returns the mean loss."""
    optimizer.zero_grad()
    loss_sum = torch.zeros((), device=rt.device)
    for _ in range(accumulation_steps):
        x, y = next(batches)
        with rt.autocast():
            _, loss = model(x, y)
        loss = loss / accumulation_steps
        loss_sum += loss.detach()
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    rt.synchronize()
    return loss_sum.item()


def speed(folder: Path, s: bench.Settings) -> dict[str, float | None]:
    """Measure tokens/s, memory and milliseconds of the peer's step, with the tokens of bench.py's settings.

    Its batches are made as in its script: an int64 shard in memory, sliced while the step waits.
    """
    rt = runtime.start(s.device, s.dtype)
    config, length, _ = bench.model_config(s)
    model = build(load(folder), config, PADDED_VOCAB_SIZE).to(rt.device)
    optimizer = optimizer_of(model, PRESETS[s.preset].learning_rate, rt.device)
    if s.compile:
        model = torch.compile(model)
    batches = bench.micro_batches(
        dataclasses.replace(s, loader="int64"), s.micro_batch_size, length, rt.device
    )
    seconds = []
    for _ in range(s.warmup + s.steps):
        begin = time.perf_counter()
        bench.check_finite(step(model, optimizer, batches, s.accumulation_steps, rt))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[s.warmup :])
    memory = hardware.peak_memory(rt.device)
    return {
        "tokens_per_sec": s.accumulation_steps * s.micro_batch_size * length / median,
        "step_ms": 1000 * median,
        "memory_gb": memory and memory / 1e9,
    }


def losses(folder: Path, config: Path) -> list[float]:
    """Compute the losses of a peer's model at each step of one of our runs, repeated from its config.json.

    Initial weights, batches, learning rates and precision are the same. The peer has no padding of the
    vocabulary.
    """
    s = settings_from_config(config)
    rt = runtime.start(s.device, s.dtype)
    ours = train_gpt2.build_model(s, torch.device("cpu"))
    model = build(load(folder), ours.config, ours.config.vocab_size)
    missing = model.load_state_dict(ours.state_dict(), strict=False).missing_keys
    if any(not name.endswith(".attn.bias") for name in missing):  # a causal mask
        raise UserError(f"--peer {folder}: its model lacks our names: {', '.join(missing[:3])}")
    model.to(rt.device)
    optimizer = optimizer_of(model, s.learning_rate, rt.device)
    if s.compile:
        model = torch.compile(model)
    for group in optimizer.param_groups:
        group["peak_lr"] = s.learning_rate
    stream = TokenStream(find_shards(s.data_dir)["train"], s.sequence_length, s.seed, s.shuffle)
    B = s.micro_batch_size
    sequences = s.total_batch_size // s.sequence_length
    batches = dataloader.train_batches(stream, 0, sequences, B, 0, 1, rt.device)
    found = []
    for number in range(1, s.max_steps + 1):
        optim.set_learning_rates([optimizer], number, s)
        found.append(step(model, optimizer, batches, sequences // B, rt))
    batches.close()
    return found


def fits(folder: Path, s: bench.Settings) -> bool:
    """True if a step of the peer's model fits into the GPU's memory."""
    try:
        speed(folder, dataclasses.replace(s, steps=1, warmup=0, accumulation_steps=1, compile=False))
        return True
    except RuntimeError as error:
        if not any(text in str(error) for text in hardware.OUT_OF_MEMORY):
            raise
        return False


def shared_micro_batch(s: bench.Settings, folders: list[Path], largest: int) -> int:
    """Find the largest micro-batch, at most `largest`, that fits for every peer. All sides use it.

    Raises UserError if not even one sequence fits.
    """
    B = largest
    for folder in folders:
        while not apart(fits, folder, dataclasses.replace(s, micro_batch_size=B)):
            B //= 2
            if B == 0:
                raise UserError(f"--peer {folder}: not one sequence fits into GPU memory")
    return B


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a separate process, with its own memory and compiled code."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def medians(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return for each side the median tokens/s over the rounds, its memory, and our relative speed."""
    table = []
    rates = {
        side: [row["tokens_per_sec"] for row in rows if row["side"] == side and "tokens_per_sec" in row]
        for side in dict.fromkeys(row["side"] for row in rows)
    }
    for side, own in rates.items():
        first = next(row for row in rows if row["side"] == side)
        if not own:
            table.append({"side": side, "failed": first["failed"]})
            continue
        ratios = [a / b for a, b in zip(rates["ours"], own, strict=False)]
        table.append(
            {
                "side": side,
                "tokens_per_sec": statistics.median(own),
                "memory_gb": first.get("memory_gb"),
                "ours_relative": statistics.median(ratios) if ratios else None,
                "rounds": len(own),
            }
        )
    return table
