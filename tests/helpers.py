"""Shared by several tests: tiny shards, tiny settings, scripts run like a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from support import checkpoint
from support.cli import flags as as_flags  # noqa: F401

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals, terminals, links or pipes of POSIX")
T = 16
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "sequence_length": T,
    "block_size": T,
    "total_batch_size": 8 * T,
    "max_steps": 6,
    "warmup_steps": 2,
    "optimizer": "adamw",
    "learning_rate": 1e-2,
    "embedding_lr_ratio": 1.0,
    "adam_beta2": 0.95,
    "schedule": "cosine",
    "min_lr_ratio": 0.1,
    "val_interval": 2,
    "val_tokens": 10 * T,
    "checkpoint_interval": 2,
    "device": "cpu",
    "dtype": "float32",
}


def torchruns_variables(world_size: int) -> dict[str, str]:
    """The variables that torchrun sets for the first of `world_size` processes on one machine."""
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    return {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def write_shard(path: Path, n_tokens: int, seed: int = 0) -> Path:
    """A shard of `n_tokens` with structure to learn: each id is followed by one of few others."""
    rng = np.random.default_rng(seed)
    np.save(path, (rng.integers(0, 40, n_tokens).cumsum() % 300).astype(np.uint16))
    return path


def command(
    script: str, *args: str, nproc: int = 0, torchrun: Sequence[str] = ("--standalone",)
) -> list[str]:
    """The command line of a script, under torchrun if `nproc` is given."""
    launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={nproc}"] if nproc else []
    return [sys.executable, *launcher, str(ROOT / script), *args]


def environment() -> dict[str, str]:
    """One thread a process, as torchrun sets it: runs with and without it add in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def run_script(
    script: str, *args: str, nproc: int = 0, timeout: float = 120, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run a script to its end as a user would."""
    return subprocess.run(
        command(script, *args, nproc=nproc),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
    )


def history(run: Path, kinds: tuple[str, ...] = ("train", "val")) -> list[dict[str, object]]:
    """A run's metrics without its times: what must not depend on interruptions."""
    times = {"step_ms", "tokens_per_sec", "mfu"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in times} for r in records if r["kind"] in kinds]


def check_complete(files: dict[str, bytes], tmp_path: Path) -> list[int]:
    """Write a commit's files to a folder and verify every checkpoint in it; returns their steps."""
    folder = tmp_path / "commit"
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    found = checkpoint.folders(folder)
    for path in found:
        assert (path / "training_state.pt").exists()
        checkpoint.verify(path)
    return [checkpoint.step_of(path) for path in found]
