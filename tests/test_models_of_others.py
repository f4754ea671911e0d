"""Models that other programs saved: the weights transformers would load, or one line with the way out."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from loopback_hub import LoopbackHub
from torch import Tensor

import convert
from model import GPT
from support import pretrained, run_files
from support.cli import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
MODEL_SIZES = {"n_positions": 24, "n_layer": 2, "n_head": 12, "n_embd": 24}  # n_head: transformers' default
IDX = torch.arange(24)[None]


def random_model(seed: int = 0, vocab_size: int = 101) -> transformers.GPT2LMHeadModel:
    """A GPT-2 of transformers with random weights everywhere, biases and gains included."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**MODEL_SIZES, vocab_size=vocab_size, bos_token_id=0, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def load(name: str | Path) -> GPT:
    """As the scripts load a `--model`."""
    return GPT.from_pretrained(run_files.find_model(str(name)))


def error(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub for this process, whose working folder is a new one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path)
        yield hub


# ---------------------------------------------------------------- the file that transformers loads


def change_config(folder: Path, without: tuple[str, ...] = (), **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in without} | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder: Path, seed: int = 0) -> None:
    """Write the model of that seed in several files, beside what is there."""
    random_model(seed).save_pretrained(folder / "shards", max_shard_size="20KB")
    for path in (folder / "shards").glob("model*"):
        path.rename(folder / path.name)


def stale_shard(folder: Path) -> None:
    """The sharded model with a shard that its index does not list, and a run in a folder below."""
    (folder / "model.safetensors").rename(folder / "model-00009-of-00009.safetensors")
    in_shards(folder, seed=1)
    (folder / "log").mkdir()
    (folder / "log" / "metrics.jsonl").touch()


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in OpenAI's own upload, and with a head."""
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24).tril() for layer in range(2)}
    return old | {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": old["wte.weight"].clone()}


def head_for_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors.torch.save_model keeps one name of a shared tensor: the first of the alphabet."""
    return tensors | {"lm_head.weight": tensors.pop("transformer.wte.weight")}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: random_model(1).save_pretrained(folder, variant="fp16"),
        lambda folder: in_shards(folder, seed=1),
        stale_shard,
        lambda folder: (folder / "._model.safetensors").write_bytes(b"\0\5\26\7Mac OS X"),
        lambda folder: change_weights(folder, without_prefix),
        lambda folder: change_weights(folder, head_for_embedding),
        lambda folder: change_weights(folder, lambda w: {k: v.bfloat16() for k, v in w.items()}),
        lambda folder: change_config(folder, ("n_head", "attn_pdrop", "n_inner")),
        lambda folder: change_config(
            folder, tuple(MODEL_SIZES), hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
            max_position_embeddings=24,
        ),
        lambda folder: change_config(folder, n_head=3, num_attention_heads=6),
    ],
    ids=[
        "variant", "index beside the whole", "unlisted shard", "Mac's hidden file", "old names",
        "only the head", "bf16", "defaults", "other names", "two names",
    ],
)  # fmt: skip
def test_a_folder_loads_like_in_transformers(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load(folder)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours(IDX)[0], theirs(IDX).logits, atol=1e-4, rtol=0)


def test_a_config_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    expected = load(folder)(IDX)[0]
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert torch.equal(load(folder)(IDX)[0], expected)


def test_defaults_do_not_make_a_gpt2_of_another_config(folder: Path) -> None:
    change_config(folder, ("model_type", "n_head"))
    assert "not the configuration of a GPT-2 (KeyError('n_head'))" in error(folder)
    (folder / "config.json").write_text("[]")
    assert "not the configuration of a GPT-2" in error(folder)


def test_an_untied_head_is_refused(folder: Path) -> None:
    change_weights(folder, lambda w: w | {"lm_head.weight": w["transformer.wte.weight"].flip(0)})
    assert "lm_head.weight is not tied" in error(folder)


def test_every_listed_shard_must_lie_in_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    in_shards(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["transformer.ln_f.bias"]
    (folder / shard).rename(folder.parent / shard)
    assert f"{folder / shard}: missing" in error(folder)
    for outside in f"../{shard}", str(folder.parent / shard):
        content["weight_map"]["transformer.ln_f.bias"] = outside
        index.write_text(json.dumps(content))
        assert f"{index}: lists {Path(outside)}, outside" in error(folder)
    for damaged in "{", "[]", '{"weight_map": {"a": 3}}':
        index.write_text(damaged)
        assert f"{index}: damaged" in error(folder)


# ---------------------------------------------------------------- no folder with weights


def test_a_file_in_place_of_a_folder_names_the_folder(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("r", max_steps=2, val_interval=0)
    monkeypatch.chdir(tmp_path)
    folder = Path("r", "checkpoints", "step_000002")
    expected = load(run)(IDX[:, :16])[0]
    for file in (
        folder / "model.safetensors", folder / "config.json", folder / "training_state.pt",
        Path("r", "metrics.jsonl"), Path("r", "config.json"),
    ):  # fmt: skip
        found = re.fullmatch(rf"{re.escape(str(file))}: a file: name its folder, (\S+)", error(file))
        assert Path(found[1]) == file.parent
        assert torch.equal(load(found[1])(IDX[:, :16])[0], expected)
    # The folder above the checkpoints names them.
    assert f"models there: {folder})" in error(Path("r", "checkpoints"))


def test_a_torch_file_comes_with_the_command_that_converts_it(hub: LoopbackHub, folder: Path) -> None:
    for name in "ckpt.pt", "a.pth", "b.ckpt", "c.bin":
        Path(name).touch()
        assert f"{name}: a file: `python convert.py --file {name} --out FOLDER`" in error(name)
    for name in "gpt2.gguf", "shard.npy", "gpt2.safetensors", "notes.txt":
        Path(name).touch()
        assert f"{name}: a file: name a run, or a folder with config.json and model.safetensors" in error(
            name
        )
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert f"a file: name its folder, {folder}" in error(folder / "pytorch_model.bin")
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["./x", "../x", "/no/such/x", "a/b/c", "x/", "ann/x/", r"C:\x", r".\x", "~/x", "r/ckpt.pt",
             "model.safetensors", "a:best.pt", "r/config.json"],
)  # fmt: skip
def test_a_missing_path_does_not_ask_the_hub(name: str, hub: LoopbackHub) -> None:
    assert error(name).startswith(f"{name}: no such folder: name a run, a checkpoint")
    assert not hub.requests


def test_other_weights_come_with_the_command_that_converts_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load(folder)(IDX)[0]
    (folder / "model.safetensors").unlink()
    torch.save(random_model().state_dict(), folder / "pytorch_model.bin")
    command = re.search(r'python -c "([^"]+)"', error("model"))[1]
    exec(command)  # as the user would, without a second import of transformers
    assert torch.equal(load("model-safetensors")(IDX)[0], expected)
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    assert "pytorch_model.bin: a Git LFS pointer" in error("model")
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    for name, part in (
        ("pytorch_model-00001-of-00002.bin", "from_pretrained('model')"), ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"), ("gpt2.gguf", "('model', gguf_file='gpt2.gguf')"),
        ("adapter_model.safetensors", "import peft; peft.Auto"),
    ):  # fmt: skip
        (folder / name).write_bytes(b"other")
        assert f"model: contains {name}, not model.safetensors" in error("model")
        assert part in error("model")
        compile(re.search(r'python -c "([^"]+)"', error("model"))[1], "command", "exec")
        (folder / name).unlink()
    assert error("model").startswith("model: contains no model.safetensors")


def test_a_model_of_the_hub_without_safetensors_comes_with_the_command(
    folder: Path, hub: LoopbackHub
) -> None:
    hub.put("ann/old", {"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b"x"})
    assert "from_pretrained('ann/old').save_pretrained('old-safetensors')" in error("ann/old")
    hub.put("ann/none", {"README.md": b"x"})
    assert error("ann/none").startswith("ann/none: contains no model.safetensors")


def test_a_git_lfs_pointer_is_recognised(folder: Path, tmp_path: Path) -> None:
    pull = f"a Git LFS pointer, not the file: run `git lfs pull` in {folder}"
    in_shards(folder)
    content = {path: path.read_bytes() for path in folder.glob("*.*")}
    whole = folder / "model.safetensors"
    shard = next(folder.glob("model-00001-of-*"))
    index = folder / "model.safetensors.index.json"
    for path in folder / "config.json", whole, index, shard:
        if path == index:
            whole.unlink()
        path.write_bytes(POINTER)
        assert error(folder) == f"{path}: {pull}"
        path.write_bytes(content[path])
    (folder / "ckpt.pt").write_bytes(POINTER)
    with pytest.raises(UserError, match=re.escape(f"ckpt.pt: {pull}")):
        convert.convert(folder / "ckpt.pt", tmp_path / "out")


def test_a_folder_that_hides_a_hub_model_is_mentioned(folder: Path, hub: LoopbackHub) -> None:
    hides = "; it hides the Hub's gpt2: to use that, name openai-community/gpt2"
    Path("gpt2").mkdir()
    assert error("gpt2").startswith("gpt2: contains no model.safetensors")
    assert error("gpt2").endswith(hides)
    assert "Hub" not in error("./gpt2")
    Path("gpt2", "model.safetensors").write_bytes(POINTER)
    Path("gpt2", "config.json").write_text('{"model_type": "llama"}')
    assert error("gpt2").endswith(f"model_type is 'llama': not GPT-2's architecture{hides}")
    Path("gpt2", "model.safetensors").unlink()
    Path("gpt2", "log").mkdir()
    Path("gpt2", "log", "metrics.jsonl").touch()
    assert error("gpt2").endswith(f"not a run (runs there: {Path('gpt2', 'log')}){hides}")
    Path("gpt2-xl").touch()
    assert error("gpt2-xl").endswith("name openai-community/gpt2-xl")
    Path("ann", "tiny").mkdir(parents=True)
    assert error("ann/tiny").endswith("; if you mean the Hub's ann/tiny, run the command from another folder")
    assert not hub.requests
    folder.rename("gpt2-medium")  # a GPT-2 is what transformers takes there, too
    assert load("gpt2-medium").config.vocab_size == 101


# ---------------------------------------------------------------- checkpoints of other trainers


def nanogpt_state(model: transformers.GPT2LMHeadModel, rows: int = 50257) -> dict[str, Tensor]:
    """The state_dict that nanoGPT saves of this model: nn.Linear's layout, a mask, padding."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name if name.startswith("lm_head") else f"transformer.{name.removeprefix('transformer.')}"
        state[name] = tensor.t().contiguous() if name.endswith(pretrained.CONV1D_WEIGHTS) else tensor.clone()
    for name in "transformer.wte.weight", "lm_head.weight":
        state[name] = torch.cat([state[name], torch.randn(rows - 50257, 24, generator=torch.manual_seed(3))])
    return state | {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}


SIZES = {"block_size": 24, "n_layer": 2, "n_head": 12, "n_embd": 24}
NANOGPT = {**SIZES, "bias": True, "vocab_size": 50257, "dropout": 0.1}
DEFAULTS = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 1024,
    "init_from": "gpt2",
    "compile": True,
}


def save_nanogpt(path: Path, state: dict[str, Tensor], **args: object) -> None:
    saved = {"model": state, "optimizer": {}, "iter_num": 7, "best_val_loss": torch.tensor(3.0)}
    torch.save({**saved, "model_args": {**NANOGPT, **args}, "config": DEFAULTS}, path)


@pytest.mark.parametrize(("bias", "rows", "prefix"), [(True, 50257, "_orig_mod."), (False, 50304, "")])
def test_a_checkpoint_of_nanogpt_converts(
    bias: bool, rows: int, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its sizes are in model_args, its config holds others; with bias=False nothing has a bias."""
    theirs = random_model(vocab_size=50257)
    state = nanogpt_state(theirs, rows)
    if not bias:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
                    del state[name]
    save_nanogpt(tmp_path / "ckpt.pt", {prefix + name: t for name, t in state.items()}, bias=bias)
    convert.convert(tmp_path / "ckpt.pt", tmp_path / "out")
    out = capsys.readouterr().out
    assert "step 7" in out and "GELU" in out
    torch.testing.assert_close(load(tmp_path / "out")(IDX)[0], theirs(IDX).logits, atol=1e-4, rtol=0)


def test_a_checkpoint_with_namespace_settings_converts(tmp_path: Path) -> None:
    theirs = random_model(vocab_size=50257)
    torch.save({"model": nanogpt_state(theirs), "config": argparse.Namespace(**SIZES)}, tmp_path / "args.pt")
    convert.convert(tmp_path / "args.pt", tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")(IDX)[0], theirs(IDX).logits, atol=1e-4, rtol=0)


def other_vocabulary(state: dict[str, Tensor]) -> None:
    state |= {name: torch.ones(65, 24) for name in ("transformer.wte.weight", "lm_head.weight")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_vocabulary, "has 65 token ids: only a model with GPT-2's vocabulary of 50,257"),
        (lambda state: state.pop("transformer.ln_f.bias"), "ln_f.bias is missing"),
        (lambda state: state["lm_head.weight"].add_(1), "not tied"),
        (lambda state: state.update({"transformer.wpe.weight": 3}), "wpe.weight is missing"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    state = nanogpt_state(random_model(vocab_size=50257))
    change(state)
    save_nanogpt(tmp_path / "ckpt.pt", state)
    with pytest.raises(UserError, match=re.escape(message)):
        convert.convert(tmp_path / "ckpt.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_files_of_other_programs_are_refused_in_one_line(tmp_path: Path) -> None:
    state = nanogpt_state(random_model(vocab_size=50257))
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "lightning.ckpt")
    torch.save([1], tmp_path / "list.pt")
    header = torch.tensor([20240326, 3, 1024, 50257, 12, 12, 768], dtype=torch.int32)
    (tmp_path / "llmc.bin").write_bytes(header.numpy().tobytes() + bytes(1000))
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for name, message in (
        ("bare.pt", "not a checkpoint of the form {'model': …, 'config': {'n_layer': …"),
        ("lightning.ckpt", "not a checkpoint of the form"), ("list.pt", "not a checkpoint of the form"),
        ("llmc.bin", "refused: damaged, or not written by torch.save"), (".", "a folder, not a file"),
        ("model.safetensors", f"needs no conversion: --model takes its folder, {tmp_path}"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            convert.convert(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sharded_model_of_the_hub_loads_without_its_variants(folder: Path, hub: LoopbackHub) -> None:
    expected = load(folder)(IDX)[0]
    (folder / "model.safetensors").unlink()
    in_shards(folder)
    (folder / "model.fp16.safetensors").write_bytes(b"x")
    hub.put("ann/shards", {path.name: path.read_bytes() for path in folder.glob("*.*")})
    assert torch.equal(load("ann/shards")(IDX)[0], expected)
    assert not any("fp16.safetensors" in path for _, path, _ in hub.requests)


def test_a_name_that_is_too_long_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^x{60}: File name too long: name a run"):
        run_files.find_model("x" * 300)


@pytest.mark.parametrize("changes", [{"n_head": 5}, {"n_head": 0}, {"n_layer": -1}])
def test_impossible_sizes_name_their_file(folder: Path, changes: dict[str, int]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=r"config\.json: not the configuration of a GPT-2"):
        load(folder)


def test_a_false_config_builds_nothing(tmp_path: Path) -> None:
    sizes = {"block_size": 8, "n_layer": 10**6, "n_head": 1, "n_embd": 8}
    torch.save({"model": {"x": torch.zeros(1)}, "config": sizes}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="its config does not describe its weights"):
        convert.convert(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
