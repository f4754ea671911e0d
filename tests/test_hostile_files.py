"""Files from elsewhere, damaged at random or made to do harm: one line of error, or a value as it should be.

python -m pytest tests/test_hostile_files.py --hypothesis-profile=long      # minutes instead of seconds
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import plot_loss
import upload_hf
from model import GPT, GPTConfig
from pre_tokens import shards
from support import metrics
from support.cli import UserError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with a few bytes changed, put in, taken out, or its end cut off; the first 400 more often."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        within = min(len(content), 400) if draw(st.booleans()) else len(content)
        position = draw(st.integers(0, within))
        new = draw(st.binary(max_size=8))
        match draw(st.sampled_from(["change", "insert", "remove", "cut"])):
            case "change":
                content[position : position + len(new)] = new
            case "insert":
                content[position:position] = new
            case "remove":
                del content[position : position + draw(st.integers(1, 50))]
            case "cut":
                del content[position:]
    return bytes(content)


def npy(header: str, tokens: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1", "replace") + tokens


TOKENS = np.arange(300, dtype="<u2").tobytes()
HEADER = "{'descr': '<u2', 'fortran_order': False, 'shape': (300,), }\n"
SHARDS = damaged(npy(HEADER, TOKENS)) | st.builds(
    lambda descr, order, shape: npy(
        f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}", TOKENS
    ),
    st.sampled_from(["'<u2'", "'>u2'", "'O'", "[('a', '<u2')]", "'<u2' * 9**9", "__import__('os')"]),
    st.sampled_from(["True", "False", "0"]),
    st.sampled_from(
        ["(300,)", "(-300,)", "(10**18,)", "(1, 300)", "300", "()", "(300.0,)", "((((", "(2**63,)"]
    ),
)


@given(content=SHARDS)
def test_hostile_shards_raise_only_user_errors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x_train_000001.npy"
    path.write_bytes(content)
    try:
        shard = shards.open_shard(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    tokens = shard.map()
    assert len(tokens) * 2 + shard.offset == len(content)
    assert tokens.max() <= 50256


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=1, n_embd=2)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_model(folder: Path, config: bytes, weights: bytes) -> None:
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    try:
        model = GPT.from_pretrained(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    # No more than what the file holds; a byte there may be a number of four bytes here.
    assert 4 * model.config.n_parameters <= 4 * len(weights)
    model(torch.zeros(1, 1, dtype=torch.int64))


@given(data=st.data())
def test_hostile_safetensors_raise_only_user_errors(
    data: st.DataObject, whole_model: dict[str, bytes], tmp_path: Path
) -> None:
    weights = data.draw(damaged(whole_model["model.safetensors"]))
    load_model(tmp_path, whole_model["config.json"], weights)


@given(data=st.data())
def test_hostile_model_configs_raise_only_user_errors(
    data: st.DataObject, whole_model: dict[str, bytes], tmp_path: Path
) -> None:
    config = json.loads(whole_model["config.json"])
    key = st.sampled_from(sorted(config))
    value = JSON_VALUES | st.sampled_from([0, -1, 2, 4, 10**9, 2**62, 1e308])
    changed = config | data.draw(st.dictionaries(key, value, min_size=1, max_size=3))
    content = data.draw(st.just(json.dumps(changed).encode()) | damaged(whole_model["config.json"]))
    load_model(tmp_path, content, whole_model["model.safetensors"])


@pytest.mark.parametrize("content", ["[" * 100_000, '{"n_layer": 1e999}', '{"n_layer": ' + "9" * 5000 + "}"])
def test_overflowing_json_raises_only_user_errors(
    content: str, whole_model: dict[str, bytes], tmp_path: Path
) -> None:
    config = (
        content
        if content[0] == "["
        else whole_model["config.json"].decode().rstrip()[:-1] + "," + content[1:]
    )
    load_model(tmp_path, config.encode(), whole_model["model.safetensors"])
    (tmp_path / "metrics.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match="line 1"):
        metrics.read(tmp_path / "metrics.jsonl")


def check_curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    try:
        curves = plot_loss.read_run(path)
    except UserError as error:
        assert "\n" not in str(error)
        return None
    for steps, values in curves.values():
        assert steps.dtype == np.int64
        assert values.dtype == np.float64
        assert not np.isinf(values).any()
    return curves


KINDS = st.sampled_from(["train", "val", "hellaswag", "event"])
RECORDS = st.fixed_dictionaries(
    {"step": st.integers(0, 20) | JSON_VALUES, "kind": KINDS | JSON_VALUES},
    optional={key: st.floats() | JSON_VALUES for key in ("loss", "lr", "tokens_per_sec", "acc", "acc_norm")},
)
LINES = st.lists(RECORDS, max_size=5).map(
    lambda records: "".join(json.dumps(r) + "\n" for r in records).encode()
)
RUN = "".join(
    json.dumps({"step": step, "kind": "train", "loss": 4.5, "lr": 6e-4, "tokens_per_sec": 100.0}) + "\n"
    for step in range(9)
).encode()


@given(content=LINES | damaged(RUN) | st.binary(max_size=50))
def test_hostile_metrics_raise_only_user_errors(
    content: bytes, whole_model: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    if check_curves(tmp_path):
        (tmp_path / "model.json").write_bytes(whole_model["config.json"])
        settings = upload_hf.Settings(tmp_path, "ann/x")
        upload_hf.model_card(settings, 9, {"config.json": tmp_path / "model.json"})


@given(content=damaged(b"10 train 5.25\n20 val 4.5\n20 hella 0.25\n") | st.text(max_size=50).map(str.encode))
def test_hostile_plain_logs_raise_only_user_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(content)
    check_curves(tmp_path / "log.txt")


@pytest.mark.parametrize("loss", [None, 0.0, -1e299, 1e299])
@pytest.mark.parametrize("step", [0, 2**53 - 1])
def test_curves_at_the_edge_are_drawn(loss: float | None, step: int, tmp_path: Path) -> None:
    record = {"step": step, "kind": "train", "loss": loss, "lr": 0.0, "tokens_per_sec": None}
    (tmp_path / "metrics.jsonl").write_text((json.dumps(record) + "\n") * 2)
    assert plot_loss.plot_run(tmp_path).stat().st_size > 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by way of Linux")
def test_false_sizes_take_no_memory(whole_model: dict[str, bytes], tmp_path: Path) -> None:
    """A config or header that speaks of terabytes ends in an error while only megabytes are allowed."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, before[1]))
    try:
        for changes in ({"n_layer": 10**9}, {"n_embd": 2**20}, {"vocab_size": 2**40}, {"n_positions": 2**40}):
            config = json.dumps(json.loads(whole_model["config.json"]) | changes).encode()
            load_model(tmp_path, config, whole_model["model.safetensors"])
        wide = {"wte.weight": torch.zeros(1, 2**17), "wpe.weight": torch.zeros(1, 2**17)}
        far = {"wte.weight": torch.zeros(11, 2), "wpe.weight": torch.zeros(4, 2)}
        far[f"h.{10**9 - 1}.ln_1.weight"] = torch.zeros(2)
        lies = ((wide, {"vocab_size": 1, "n_positions": 1, "n_embd": 2**17}), (far, {"n_layer": 10**9}))
        for tensors, changes in lies:
            config = json.dumps(json.loads(whole_model["config.json"]) | changes).encode()
            load_model(tmp_path, config, safetensors.torch.save(tensors))
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        for length in (len(header), 2**62):
            weights = struct.pack("<Q", length) + header
            load_model(tmp_path, whole_model["config.json"], weights)
        huge = npy(HEADER.replace("300", str(2**45)), TOKENS)
        (tmp_path / "x_train_000001.npy").write_bytes(huge)
        with pytest.raises(UserError, match="bytes, but its header says"):
            shards.open_shard(tmp_path / "x_train_000001.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
