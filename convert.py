"""Convert a .pt checkpoint of build-nanogpt or nanoGPT to a model folder in the Hugging Face format.

python convert.py --file model_19072.pt --out gpt2-124m
python generate.py --model gpt2-124m
"""

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from support import cli, pretrained, tokenizer
from support.cli import UserError

PADDED_VOCAB_SIZE = 50304  # rows of the embedding in build-nanogpt and nanoGPT


@dataclass
class Settings:
    file: Path
    """Checkpoint written by build-nanogpt or nanoGPT."""
    out: Path
    """Folder to write."""


class _SavedConfig:
    """Stand-in for the settings class of another program: keeps the values, runs no code."""


def read_pt(file: Path) -> dict[str, object]:
    """Read a .pt checkpoint without running code: its tensors under "model", its sizes under "config".

    Raises UserError if it cannot be read, or needs more than tensors, plain values and a settings object.
    """
    if not file.is_file():
        raise UserError(f"--file {file}: {'a folder, not a' if file.is_dir() else 'no such'} file")
    if file.suffix == ".safetensors":
        raise UserError(f"--file {file}: needs no conversion: --model takes its folder, {file.parent}")
    try:
        needed = (
            torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else []
        )
        foreign = [name for name in needed if name.rpartition(".")[2] not in ("GPTConfig", "Namespace")]
        if foreign:
            raise UserError(
                f"--file {file}: refused: loading it would run code ({', '.join(foreign)}): save the "
                "model's state_dict and its settings as plain values"
            )
        with torch.serialization.safe_globals([(_SavedConfig, name) for name in needed]):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        pretrained.refuse_lfs_pointer(file)
        # Take only the name out of torch's long message, which explains how to load the file unsafely.
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run code, {code[1]}" if code else "damaged, or not written by torch.save"
        raise UserError(f"--file {file}: refused: {reason}: save tensors and plain values") from error
    saved = saved if isinstance(saved, dict) else {}
    # nanoGPT's "config" holds the defaults of its script, not the sizes of a fine-tuned model.
    settings = saved.get("model_args") or saved.get("config")
    settings = vars(settings) if isinstance(settings, _SavedConfig) else settings
    if not isinstance(saved.get("model"), dict) or not isinstance(settings, dict):
        # A state_dict alone is not enough, because it does not contain the number of heads.
        raise UserError(
            f"--file {file}: not a checkpoint of the form {{'model': …, 'config': {{'n_layer': …, "
            "'n_head': …, 'n_embd': …, 'block_size': …}}: save it so, or if transformers saved it, name its "
            "folder with --model"
        )
    tensors = {
        str(name).removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module."): tensor
        for name, tensor in saved["model"].items()
        if isinstance(tensor, Tensor)
    }
    return {"step": saved.get("iter_num", "unknown"), **saved, "model": tensors, "config": settings}


def convert(file: Path, out: Path) -> None:
    """Convert the checkpoint `file` to the folder `out`.

    Raises UserError if the checkpoint holds another model, or if `out` already contains files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already exists: name a new folder")
    saved = read_pt(file)
    tensors: dict[str, Tensor] = saved["model"]
    try:
        shape = {name: int(saved["config"][name]) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--file {file}: its config is not a GPT-2's ({error!r})") from error
    if min(shape.values()) < 1 or shape["n_embd"] % shape["n_head"] or shape["n_layer"] > len(tensors):
        raise UserError(f"--file {file}: its config does not describe its weights: {shape}")
    model = GPT(GPTConfig(vocab_size=tokenizer.VOCAB_SIZE, **shape))
    wte, head = (tensors.get(name) for name in ("transformer.wte.weight", "lm_head.weight"))
    if wte is not None and head is not None and not torch.equal(wte, head):
        raise UserError(f"--file {file}: its head is not tied to its embedding: this is not GPT-2")
    if wte is not None and wte.dim() == 2 and len(wte) not in (tokenizer.VOCAB_SIZE, PADDED_VOCAB_SIZE):
        raise UserError(
            f"--file {file}: has {len(wte):,} token ids: only a model with GPT-2's vocabulary of "
            f"{tokenizer.VOCAB_SIZE:,} can be converted: train one on GPT-2's tokens"
        )
    parameters = dict(model.named_parameters())
    biases = {name for name in parameters if name.endswith(".bias")}
    if not biases & set(tensors):  # nanoGPT's bias=False
        tensors |= {name: torch.zeros_like(parameters[name]) for name in biases}
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = tensors.get(name)
            if tensor is not None:
                tensor = pretrained.without_padding(name, tensor, tokenizer.VOCAB_SIZE)
            own = pretrained.without_padding(name, parameter, tokenizer.VOCAB_SIZE)
            if tensor is None or tensor.shape != own.shape:
                have = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise UserError(f"--file {file}: {name} is {have}, not {tuple(own.shape)}")
            own.copy_(tensor)
    unfinished = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished, model.config.block_size)
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
    print(f"{out}: {model.config.n_parameters:,} parameters, step {saved['step']}")
    if "model_args" in saved:
        print("note: GPT-2 approximates GELU, nanoGPT since June 2023 does not: losses differ slightly")


def main() -> None:
    s = cli.parse(Settings, "Convert a checkpoint of build-nanogpt or nanoGPT.")
    convert(s.file, s.out)


if __name__ == "__main__":
    cli.run(main, must_finish=True)
