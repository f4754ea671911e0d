"""A run's way to the Hub and back into transformers, and older checkpoints made into folders."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from helpers import T, posix, run_script
from loopback_hub import TOKEN, LoopbackHub

import convert
import plot_loss
import upload_hf
from model import GPT, GPTConfig
from support import run_files
from support.cli import UserError
from upload_hf import Settings

Train = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path)
        yield hub


def test_transformers_loads_every_part_of_a_checkpoint(train: Train) -> None:
    """Model, tokenizer and pipeline from the folder as it is: our logits, and our greedy text."""
    folder = train(block_size=64, max_steps=2) / "checkpoints" / "step_000002"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = GPT.from_pretrained(folder)
    idx = torch.randint(50257, (2, 64))
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert theirs.lm_head.weight.shape[0] == 50257
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)
    prompt = "Hello, I'm a language model,"
    generate = transformers.pipeline("text-generation", model=str(folder))
    text = generate(prompt, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    ids = tokenizer(prompt)["input_ids"]
    row = ours.generate([ids], 12, temperature=0, eos_token_id=50256)[0]
    assert text == tokenizer.decode(row, skip_special_tokens=True)
    assert text.startswith(prompt)
    assert len(row) > len(ids)


def test_a_run_goes_to_the_hub_and_back(
    train: Train, hub: LoopbackHub, capsys: pytest.CaptureFixture
) -> None:
    run = train(hellaswag_interval=0)
    plot_loss.plot([run], run / "loss_curves.png")
    (run / "notes.txt").write_text("private")
    upload_hf.upload(Settings(run, "ann/tiny", private=True, revision="step-6"))
    repo = hub.repo("ann/tiny")
    assert repo.private
    assert set(repo.files) == {
        *upload_hf.MODEL_FILES, *upload_hf.RUN_FILES.values(), "README.md",
    }  # fmt: skip
    newest = run / "checkpoints" / "step_000006"
    assert repo.files["model.safetensors"] == (newest / "model.safetensors").read_bytes()
    assert repo.files["config.json"] == (newest / "config.json").read_bytes()
    assert repo.files["training_config.json"] == (run / "config.json").read_bytes()
    assert repo.tags == {"step-6": repo.sha}
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    assert TOKEN.encode() not in b"".join(repo.files.values())

    idx = torch.randint(50257, (2, T))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("ann/tiny", revision="step-6", token=TOKEN)
    torch.testing.assert_close(theirs(idx).logits, GPT.from_pretrained(newest)(idx)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(GPT.from_pretrained("ann/tiny")(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)

    # A second time, another step: an update of what is there.
    upload_hf.upload(Settings(run, "ann/tiny", checkpoint=4, revision="step-4"))
    older = run / "checkpoints" / "step_000004" / "model.safetensors"
    assert hub.repo("ann/tiny").files["model.safetensors"] == older.read_bytes()
    assert set(hub.repo("ann/tiny").tags) == {"step-6", "step-4"}
    with pytest.raises(UserError, match="--revision step-4"):
        upload_hf.upload(Settings(run, "ann/tiny", revision="step-4"))


def test_the_model_card_describes_the_run(train: Train, hub: LoopbackHub) -> None:
    run = train()
    plot_loss.plot([run], run / "loss_curves.png")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "kind": "hellaswag", "acc": 0.2512, "acc_norm": 0.2634, "n": 10042}\n')
    (run / "samples.txt").write_text("Hello, ```\n\n# not a heading\n")
    upload_hf.upload(Settings(run, "ann/tiny"))
    card = hub.repo("ann/tiny").files["README.md"].decode()
    summary = json.loads((run / "summary.json").read_text())
    for said in (
        "library_name: transformers", "pipeline_tag: text-generation", "# tiny", 'model="ann/tiny"',
        f"| tokens | {6 * 8 * T} |", "| data | token shards tiny in data/ |",
        f"| validation loss | {summary['last_val_loss']:.4f} |",
        f"| training loss, last step | {summary['last_train_loss']:.4f} |", "0.2512 / 0.2634 of 10,042",
        "0.2859 / 0.2955", "GPT-2, trained from scratch.", "| learning rate | 0.01 |",
        "![loss curves](loss_curves.png)",
        "\n    # not a heading",
        "float32 |", "minutes |", f"| parameters | {summary['parameters']:,} |",
    ):  # fmt: skip
        assert said in card, said


def test_the_card_of_an_older_checkpoint_has_its_numbers(
    train: Train, hub: LoopbackHub, tmp_path: Path
) -> None:
    """Samples and summary are of the last step; what a fine-tuned model began with is named."""
    base = train("base", max_steps=2)
    run = train("run", init_from=str(base), max_steps=4)
    upload_hf.upload(Settings(run, "ann/tiny", checkpoint=2))
    sent = hub.repo("ann/tiny").files
    assert "samples.txt" not in sent and "summary.json" not in sent and "metrics.jsonl" in sent
    assert (
        "fine-tuned from base." in sent["README.md"].decode()
        and "## Samples" not in sent["README.md"].decode()
    )
    config = json.loads((run / "config.json").read_text())
    config["settings"]["init_from"] = "gpt2"
    (run / "config.json").write_text(json.dumps(config))
    upload_hf.upload(Settings(run, "ann/tiny"))
    sent = hub.repo("ann/tiny").files
    assert "samples.txt" in sent and "summary.json" in sent
    card = sent["README.md"].decode()
    assert "base_model: openai-community/gpt2" in card and "fine-tuned from gpt2." in card
    upload_hf.upload(Settings(run, "ann/tiny", checkpoint=2))
    sent = hub.repo("ann/tiny").files
    assert "samples.txt" not in sent and "summary.json" not in sent and "training_config.json" in sent


@pytest.mark.parametrize(
    ("source", "row", "dataset"),
    [
        ({"kind": "builtin", "python": "3.11.7"}, "documentation that Python 3.11.7 carries", ""),
        ({"kind": "files", "files": [{"name": f"{c}.txt"} for c in "abcde"]},
         "a.txt, b.txt, c.txt and 2 more files", ""),
        ({"kind": "hub", "repo_id": "ann/words", "subset": "small"}, "ann/words, small", "ann/words"),
        ({"kind": "shards", "repo_id": "ann/words", "revision": "1"}, "ann/words", "ann/words"),
    ],
)  # fmt: skip
def test_the_card_names_the_data(
    source: dict, row: str, dataset: str, train: Train, hub: LoopbackHub, data_dir: Path
) -> None:
    """Licence and language only where the data set's card or the user gave them."""
    hub.put("ann/words", {"README.md": b"---\nlicense: odc-by\nlanguage: [en, de]\n---\n"}, "dataset")
    (data_dir / "manifest.json").write_text(json.dumps({"shards": [], "source": source}))
    run = train(max_steps=2)

    def head(*flags: str) -> list[str]:
        upload_hf.upload(Settings(run, "ann/tiny", **dict(zip(flags[::2], flags[1::2], strict=True))))
        card = hub.repo("ann/tiny").files["README.md"].decode()
        assert f"| data | {row} |" in card
        return card.split("---")[1].splitlines()

    plain = head()
    assert ('license: "odc-by"' in plain) == ('language: ["en", "de"]' in plain) == bool(dataset)
    assert (f"datasets: {dataset}" in plain) == bool(dataset)
    assert bool(dataset) or not any(line.startswith(("license", "language", "datasets")) for line in plain)
    told = head("license", "mit", "language", "fr")
    assert 'license: "mit"' in told and 'language: "fr"' in told


def test_a_dry_run_sends_nothing(train: Train, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a token or a login, too; what is missing is named."""
    run = train()
    (run / "summary.json").unlink()
    done = run_script("upload_hf.py", "--run", str(run), "--repo-id", "ann/tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"missing: {run / 'summary.json'}" in done.stdout
    assert "model.safetensors  <- " in done.stdout
    assert "# tiny" in done.stdout and "everyone may see it" in done.stdout
    upload_hf.upload(Settings(run, "ann/tiny", private=True, dry_run=True))
    assert "everyone may see it" not in capsys.readouterr().out
    assert not hub.requests


@posix
def test_a_run_with_linked_checkpoints_is_sent(train: Train, tmp_path: Path) -> None:
    """Sent as any other, without the hidden files that a Mac leaves."""
    run = train()
    (run / "checkpoints").rename(tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    (run / "loss_curves.png").write_bytes(b"a figure")
    (run / "._loss_curves.png").write_bytes(b"Mac OS X")
    files, _ = upload_hf.collect(run, upload_hf.pick_checkpoint(run, None))
    assert {"model.safetensors", "loss_curves.png"} <= files.keys()
    assert not any(name.startswith(".") for name in files)


@posix
def test_nothing_outside_the_run_is_sent(train: Train, hub: LoopbackHub, tmp_path: Path) -> None:
    run = train()
    (tmp_path / "secret.png").write_text("secret")
    (run / "figure.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"figure\.png: leads out of"):
        upload_hf.upload(Settings(run, "ann/tiny"))
    (run / "figure.png").unlink()
    (run / "samples.txt").write_text(f"my token is {TOKEN}")
    with pytest.raises(UserError, match=r"samples\.txt: contains your Hub token"):
        upload_hf.upload(Settings(run, "ann/tiny"))
    assert not hub.repos


def test_problems_with_an_upload_are_one_line(
    train: Train, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = train()
    with pytest.raises(UserError, match="--repo-id: required"):
        upload_hf.upload(Settings(run))
    with pytest.raises(UserError, match=r"--checkpoint 5: not in .*6, 4, 2"):
        upload_hf.upload(Settings(run, "ann/tiny", checkpoint=5))
    with pytest.raises(UserError, match="contains no checkpoint"):
        upload_hf.upload(Settings(tmp_path, "ann/tiny"))
    with pytest.raises(UserError, match="HTTP 403"):
        upload_hf.upload(Settings(run, "bob/tiny"))
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match="no token: set HF_TOKEN"):
        upload_hf.upload(Settings(run, "ann/tiny"))
    weights = run / "checkpoints" / "step_000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        upload_hf.upload(Settings(run, "ann/tiny"))
    assert not hub.repos


# ---------------------------------------------------------------- older checkpoints

SHAPE = {"block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}


def old_state(prefix: str = "") -> tuple[dict[str, torch.Tensor], GPT]:
    """A padded, tied state_dict with linear layers' own layout, and the model it is of."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, vocab_size=50304))
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    return state, model


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_build_nanogpt_checkpoint_becomes_a_folder(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its settings as an object of a class that is not there any more."""

    @dataclass
    class OldConfig:
        block_size: int = 24
        vocab_size: int = 50304
        n_layer: int = 2
        n_head: int = 2
        n_embd: int = 16

    OldConfig.__module__, OldConfig.__qualname__, OldConfig.__name__ = "old_trainer", "GPTConfig", "GPTConfig"
    monkeypatch.setitem(sys.modules, "old_trainer", type(sys)("old_trainer"))
    sys.modules["old_trainer"].GPTConfig = OldConfig
    state, old = old_state(prefix)
    torch.save({"model": state, "config": OldConfig(), "step": 99, "val_loss": 3.0}, tmp_path / "old.pt")
    monkeypatch.delitem(sys.modules, "old_trainer")
    convert.convert(tmp_path / "old.pt", tmp_path / "out")
    idx = torch.randint(50257, (2, 24))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(idx).logits, old(idx)[0][..., :50257], atol=1e-5, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Hello")["input_ids"] == [15496]
    assert run_files.find_model(str(tmp_path / "out")) == str(tmp_path / "out")


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("exploded",))


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol_file, zipped in (("new.pt", True), ("legacy.pt", False)):
        torch.save(
            {"model": old_state()[0], "config": Bomb()}, protocol_file, _use_new_zipfile_serialization=zipped
        )
        done = run_script("convert.py", "--file", protocol_file, "--out", "out")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "mkdir" in done.stderr
        assert "weights_only" not in done.stderr  # torch's own message says how to run it all the same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["legacy.pt", "new.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("config"), "not a checkpoint of the form"),
        (lambda saved: saved["config"].pop("n_head"), "its config is not"),
        (lambda saved: saved["config"].update(n_layer=3), "missing"),
        (lambda saved: saved["config"].update(n_embd=32), "of shape"),
        (lambda saved: saved["model"]["lm_head.weight"].add_(1), "not tied"),
    ],
)
def test_convert_rejects_other_models(tmp_path: Path, change: Callable, message: str) -> None:
    saved = {"model": old_state()[0], "config": dict(SHAPE), "step": 1}
    change(saved)
    torch.save(saved, tmp_path / "old.pt")
    with pytest.raises(UserError, match=message):
        convert.convert(tmp_path / "old.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


def test_conversion_overwrites_nothing(tmp_path: Path) -> None:
    torch.save({"model": old_state()[0], "config": SHAPE}, tmp_path / "old.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match="exists: name a new folder"):
        convert.convert(tmp_path / "old.pt", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        convert.convert(tmp_path / "none.pt", tmp_path / "new")
