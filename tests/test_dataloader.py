"""The order of data: one global stream, whatever shares it out, and how little memory it takes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, T, environment, write_shard

from dataloader import TokenStream, permute, train_batches, val_batches
from pre_tokens import shards
from pre_tokens.shards import find_shards
from support.cli import UserError

CPU = torch.device("cpu")


def take(batches: object, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    taken = [next(batches) for _ in range(n)]
    batches.close()
    return taken


def train_stream(data_dir: Path, seed: int = 1, shuffle: bool = True, num_shards: int = 0) -> TokenStream:
    return TokenStream(find_shards(data_dir, num_shards)["train"], T, seed, shuffle)


def test_without_shuffling_the_shards_are_read_from_start_to_end(data_dir: Path) -> None:
    """Brute force: every whole sequence of every shard in turn, then the same again."""
    expected = []
    for path in sorted(data_dir.glob("*_train_*.npy")):
        tokens = np.load(path)
        expected += [tokens[i : i + T + 1] for i in range(0, len(tokens) - T, T)]
    stream = train_stream(data_dir, shuffle=False)
    assert len(stream) == len(expected) == 40 + 23 + 30
    read = stream.read(np.arange(2 * len(expected)))
    np.testing.assert_array_equal(read, expected + expected)


def test_an_epoch_visits_each_sequence_once(data_dir: Path) -> None:
    plain, shuffled = train_stream(data_dir, shuffle=False), train_stream(data_dir)
    n = len(plain)
    everything = sorted(map(bytes, plain.read(np.arange(n))))
    for epoch in range(3):
        numbers = np.arange(epoch * n, (epoch + 1) * n)
        assert sorted(map(bytes, shuffled.read(numbers))) == everything


@pytest.mark.parametrize("name", ["tiny_train_000000.npy", "tiny_train_000009.npy"])
def test_a_shard_too_short_for_a_sequence_is_skipped(data_dir: Path, name: str) -> None:
    n = len(train_stream(data_dir))
    before = train_stream(data_dir, shuffle=False).read(np.arange(2 * n))
    write_shard(data_dir / name, T)
    after = train_stream(data_dir, shuffle=False)
    assert len(after) == n
    np.testing.assert_array_equal(after.read(np.arange(2 * n)), before)
    shuffled = train_stream(data_dir).read(np.arange(n))
    assert sorted(map(bytes, shuffled)) == sorted(map(bytes, before[:n]))


def test_order_depends_only_on_seed_and_epoch(data_dir: Path) -> None:
    n = len(train_stream(data_dir))
    epochs = {
        (seed, epoch): train_stream(data_dir, seed).read(np.arange(epoch * n, (epoch + 1) * n)).tobytes()
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(set(epochs.values())) == 9
    torch.manual_seed(99)
    np.random.seed(99)
    again = train_stream(data_dir, 2).read(np.arange(n, 2 * n)).tobytes()
    assert again == epochs[2, 1]


def test_order_matches_recorded_values(data_dir: Path) -> None:
    """A run can be resumed with another numpy, or years later, only while these numbers stay."""
    assert permute(np.arange(10), 10, (1, 2, 3)).tolist() == [6, 1, 8, 5, 4, 7, 0, 2, 9, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_together_read_the_stream_of_one_process(
    data_dir: Path, world_size: int, micro_batch_size: int
) -> None:
    steps, sequences_per_step = 5, 48
    stream = train_stream(data_dir)
    rounds = steps * sequences_per_step // (world_size * micro_batch_size)
    ranks = [
        take(train_batches(stream, 0, sequences_per_step, micro_batch_size, r, world_size, CPU), rounds)
        for r in range(world_size)
    ]
    together = torch.cat([ranks[r][i][0] for i in range(rounds) for r in range(world_size)])
    expected = stream.read(np.arange(steps * sequences_per_step)).astype(np.int64)
    np.testing.assert_array_equal(together.numpy(), expected[:, :-1])
    targets = torch.cat([ranks[r][i][1] for i in range(rounds) for r in range(world_size)])
    np.testing.assert_array_equal(targets.numpy(), expected[:, 1:])


@pytest.mark.parametrize("step", [1, 7, 40])
def test_jumping_to_a_step_equals_reading_up_to_it(data_dir: Path, step: int) -> None:
    """Step 40 of 6 sequences is well into the third epoch; ranks reach a shard's end at one step."""
    stream = train_stream(data_dir)
    read = take(train_batches(stream, 0, 6, 3, 1, 2, CPU), step + 2)[step:]
    jumped = take(train_batches(stream, step, 6, 3, 1, 2, CPU), 2)
    for (x, y), (expected_x, expected_y) in zip(jumped, read, strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_permute_is_a_permutation(n: int) -> None:
    for key in range(20):
        assert sorted(permute(np.arange(n), n, (key,))) == list(range(n))


def test_permute_is_uniform_and_leaves_no_pattern() -> None:
    """Each number lands everywhere equally often, and neighbours end up unrelated."""
    counts = np.zeros((5, 5))
    for key in range(5000):
        counts[np.arange(5), permute(np.arange(5), 5, (key,))] += 1
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 40  # 16 degrees of freedom: 0.08 % of fair shuffles exceed it
    large = permute(np.arange(97_656), 97_656, (1,))
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(large, np.arange(97_656))[0, 1]) < 0.01


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
def test_validation_tokens_do_not_depend_on_the_world_size(
    data_dir: Path, world_size: int, micro_batch_size: int
) -> None:
    stream = TokenStream(find_shards(data_dir)["val"], T)
    n = 11
    seen = []
    for rank in range(world_size):
        for x, y in val_batches(stream, n, micro_batch_size, rank, world_size, CPU):
            assert x.shape == y.shape == (micro_batch_size, T)
            seen += [bytes(row) for row, target in zip(x.numpy(), y, strict=True) if (target >= 0).all()]
            assert ((y >= 0).all(1) | (y == -100).all(1)).all()
    assert sorted(seen) == sorted(bytes(row) for row in stream.read(np.arange(n))[:, :-1].astype(np.int64))


def test_find_shards_matches_the_whole_name(data_dir: Path) -> None:
    """A training shard of a data set called "val…", a copy and a half download are not validation shards."""
    tokens = np.load(data_dir / "tiny_train_000001.npy")
    for name in (
        "interval_train_000009.npy",
        "tiny_val_000000.npy.tmp",
        "tiny_val_1.npy",
        "x_val_000000 2.npy",
    ):
        with open(data_dir / name, "wb") as file:
            np.save(file, tokens)
    found = find_shards(data_dir)
    assert [shard.path.name for shard in found["val"]] == ["tiny_val_000000.npy"]
    tiny = [f"tiny_train_00000{number}.npy" for number in (1, 2, 3)]
    assert [shard.path.name for shard in found["train"]] == ["interval_train_000009.npy", *tiny]
    assert [shard.path.name for shard in find_shards(data_dir, 2)["train"]] == ["tiny_train_000001.npy"]


MEASURE_MEMORY = """
import re, sys, torch, numpy as np
from pathlib import Path
import dataloader
from pre_tokens import shards
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
stream = dataloader.TokenStream(shards.find_shards(Path(sys.argv[1]))["train"], 1024, 1, True)
before = resident()
most = 0
for number, (x, y) in enumerate(dataloader.train_batches(stream, 0, 32, 8, 0, 1, torch.device("cpu"))):
    most = max(most, resident() - before)
    if number == len(stream) // 8: break
print(most)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """An epoch over a shard of 120 MB, in random order, stays within the 50 MB that are ours."""
    np.save(tmp_path / "x_val_000000.npy", np.zeros(2000, np.uint16))
    np.save(tmp_path / "x_train_000001.npy", np.ones(60_000_000, np.uint16))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    assert int(measured.stdout) < 50e6


def test_an_id_beyond_gpt2s_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """At both ends when the shard is opened, in between when the batch is read."""
    tokens = np.zeros(3 * shards.SPOT_CHECK_TOKENS, np.uint16)
    for place in (5, len(tokens) - 5):
        bad = tokens.copy()
        bad[place] = 50257
        np.save(tmp_path / "x_train_000001.npy", bad)
        with pytest.raises(UserError, match="50257"):
            shards.open_shard(tmp_path / "x_train_000001.npy")
    tokens[len(tokens) // 2] = 60000
    np.save(tmp_path / "x_train_000001.npy", tokens)
    stream = TokenStream([shards.open_shard(tmp_path / "x_train_000001.npy")], 1024)
    stream.read(np.arange(10))
    with pytest.raises(UserError, match="60000"):
        stream.read(np.array([len(tokens) // 2 // 1024]))


def test_an_error_in_the_background_reaches_the_loop(data_dir: Path) -> None:
    stream = train_stream(data_dir)
    batches = train_batches(stream, 0, 4, 4, 0, 1, CPU)
    next(batches)
    for path in data_dir.glob("*_train_*"):
        path.unlink()
    with pytest.raises(UserError, match="deleted or cut short"):
        for _ in range(3):
            next(batches)
