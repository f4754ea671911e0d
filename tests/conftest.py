"""Fixtures of all tests: tiny shards and tiny training runs."""

import os

# One worker per core already: more threads in each would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import TINY, T, write_shard
from hypothesis import HealthCheck, settings

import plot_loss
import train_gpt2
from settings import PRESETS
from support import tokenizer

if TYPE_CHECKING:
    import transformers

# Machines are shared: no deadlines. One temporary folder for all examples of a test is meant.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")  # rather than the one that hypothesis takes where CI is set
settings.register_profile("long", settings.get_profile("default"), max_examples=5_000)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder of one validation and three training shards, none a multiple of a sequence."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder / "tiny_val_000000.npy", 13 * T + 5)
    for number, length in ((1, 40 * T + 7), (2, 23 * T + 1), (3, 31 * T)):
        write_shard(folder / f"tiny_train_{number:06d}.npy", length, number)
    return folder


@pytest.fixture
def train(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """train(out="name", **settings) trains a tiny model in this process and returns its run folder.

    Without the figure, which takes as long as the training: `monkeypatch.undo()` brings it back.
    """
    monkeypatch.setattr(plot_loss, "plot_run", lambda folder: folder / "loss_curves.png")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(out: str = "run", **settings: object) -> Path:
        values = {**TINY, "data_dir": data_dir, "out_dir": tmp_path / out, **settings}
        train_gpt2.train(dataclasses.replace(PRESETS["demo"], **values))
        return tmp_path / out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer that transformers loads from the files beside a checkpoint."""
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder, model_max_length=1024)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
