"""Models as folders in the Hugging Face format: config.json and model.safetensors.

A file stores the parameters under their own names, with two differences (`as_stored`). The embedding has no
padding rows. Four matrices per block are transposed, because GPT2LMHeadModel keeps them as `Conv1D`, (in,
out), and `nn.Linear` as (out, in).
"""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from support import hub
from support.cli import UserError
from support.files import is_lfs_pointer

if TYPE_CHECKING:
    from model import GPTConfig

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # lists the files of a model whose weights are in several
TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
LOAD = "transformers.AutoModelForCausalLM.from_pretrained({name!r}"
# Weights in other formats -> the packages that read them, and how.
OTHER_WEIGHTS = {
    "pytorch_model*.bin": ("transformers", LOAD + ")"),
    "[!.]*.gguf": ("transformers and gguf", LOAD + ", gguf_file={file!r})"),
    "tf_model.h5": ("transformers<5 and tensorflow", LOAD + ", from_tf=True)"),
    "flax_model.msgpack": ("transformers<5 and flax", LOAD + ", from_flax=True)"),
    "adapter_model.*": ("peft", "peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload()"),
}
EXPECTED = "name a run, a checkpoint or a GPT-2 folder"
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that a file may contain
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
# transformers' defaults, and their keys in config.json; of two keys the later one counts.
DEFAULT_SIZES = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
SIZE_KEYS = {
    "vocab_size": "vocab_size", "n_positions": "block_size", "max_position_embeddings": "block_size",
    "n_layer": "n_layer", "num_hidden_layers": "n_layer", "n_head": "n_head", "num_attention_heads": "n_head",
    "n_embd": "n_embd", "hidden_size": "n_embd",
}  # fmt: skip
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """True if this parameter is a matrix of a block, as opposed to an embedding, a bias or a LayerNorm."""
    return parameter.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight"))


def without_padding(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """View a parameter, or a tensor of its shape, without the padding rows of the embedding."""
    return tensor[:vocab_size] if name.endswith("wte.weight") and tensor.dim() == 2 else tensor


def as_stored(name: str, parameter: Tensor, vocab_size: int) -> Tensor:
    """View a parameter in the shape that files have: read it to save, write to it to load."""
    view = without_padding(name, parameter, vocab_size)
    return view.t() if name.endswith(CONV1D_WEIGHTS) else view


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters of a model as files store them: by name, fp32, in host memory."""
    copies = {}
    for name, parameter in model.named_parameters():
        view = as_stored(name, parameter.detach(), model.config.vocab_size)
        # Made contiguous on the device, where transposing is fast.
        copies[name] = view.float().contiguous().to("cpu", copy=True)
    return copies


def save(folder: Path, weights: dict[str, Tensor], config: "GPTConfig") -> None:
    """Write model.safetensors, config.json and generation_config.json, for transformers to read.

    weights: as `copy_weights` returns them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # disks of other systems have no modes
        (folder / WEIGHTS).chmod(0o644)  # the library makes it readable by its owner only
    for name, content in (
        (CONFIG, _huggingface_config(config)),
        ("generation_config.json", {"bos_token_id": 50256, "eos_token_id": 50256}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def _huggingface_config(config: "GPTConfig") -> dict[str, object]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "torch_dtype": "float32",
    }


def load(name_or_folder: str | Path, build: Callable[..., nn.Module]) -> nn.Module:
    """Load a model from a folder, or by its name on the Hub (`gpt2`, `USER/NAME`), in fp32 on the CPU.

    build: makes the model from block_size, vocab_size, n_layer, n_head, n_embd and dropout.
    Raises UserError on files that are missing, damaged or not a GPT-2.
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    if not folder.is_dir():
        _check_hub_name(name)
        folder = _download(name)
    if not has_weights(folder):
        raise _no_weights(name, folder)
    try:
        sizes = _read_config(folder / CONFIG)
        tensors = _read_tensors(folder)
    except UserError as error:
        raise UserError(f"{error}{hidden_model(name)}") from error
    # A wrong config could ask for any amount of memory, so build nothing that the file does not contain.
    wte, wpe = (tensors.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    found = [None if t is None else tuple(t.shape) for t in (wte, wpe)]
    expected = [(sizes["vocab_size"], sizes["n_embd"]), (sizes["block_size"], sizes["n_embd"])]
    if found != expected or sizes["n_layer"] > len(tensors):
        raise UserError(f"{folder}: config.json describes a model of another shape than the weights")
    with torch.device("meta"):  # no memory, and no initial weights drawn
        model = build(**sizes)
    _fill(model, tensors, folder)  # on the meta device this only checks names and shapes
    model.to_empty(device="cpu")
    model.tie_weights()
    _fill(model, tensors, folder)
    return model


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights in a folder into a model, exactly.

    Raises UserError if a file is missing or damaged, or contains a model of another shape.
    """
    _fill(model, _read_tensors(folder), folder)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    vocab_size = model.config.vocab_size
    for name, parameter in model.named_parameters():
        target, tensor = as_stored(name, parameter, vocab_size), tensors.get(name)
        if tensor is None or tensor.shape != target.shape or tensor.dtype not in WEIGHT_TYPES:
            found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(
                f"{folder}: {name} is {found}, not {tuple(target.shape)}: the model has another shape"
            )
        target.copy_(tensor)
        parameter[len(without_padding(name, parameter, vocab_size)) :].zero_()


def has_weights(folder: Path) -> bool:
    """True if a folder contains weights that `load` reads."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def hidden_model(name: str) -> str:
    """Return a hint for an error about a path that hides a model of that name on the Hub; otherwise ""."""
    if not Path(name).exists():
        return ""
    if name in OPENAI_MODELS:
        return f"; it hides the Hub's {name}: to use that, name openai-community/{name}"
    if "/" in name and _may_be_on_hub(name):
        return f"; if you mean the Hub's {name}, run the command from another folder"
    return ""


def refuse_lfs_pointer(file: Path) -> None:
    """Raise UserError if the file is a Git LFS pointer."""
    if is_lfs_pointer(file):
        raise UserError(f"{file}: a Git LFS pointer, not the file: run `git lfs pull` in {file.parent}")


def _may_be_on_hub(name: str) -> bool:
    is_file = name.endswith((*TORCH_FILES, ".safetensors", ".gguf", ".json", ".jsonl"))
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None and not is_file


def _check_hub_name(name: str) -> None:
    """Raise UserError for a file, and for a path that cannot be a name on the Hub."""
    path = Path(name)
    if not path.exists():
        if not _may_be_on_hub(name):
            raise UserError(f"{name}: no such folder: {EXPECTED}, or a model on the Hub (gpt2, USER/NAME)")
        return
    folder, is_torch = path.parent, path.suffix in TORCH_FILES
    # nanoGPT's ckpt.pt may lie beside anything; a .pt beside weights is part of a checkpoint.
    is_part = not is_torch or has_weights(folder) or path.match("pytorch_model*")
    if is_part and (folder / CONFIG).exists():
        advice = f"name its folder, {folder}"
    elif is_torch:
        advice = f"`python convert.py --file {name} --out FOLDER` makes a folder of it"
    else:
        advice = f"name a run, or a folder with {CONFIG} and {WEIGHTS}"
    raise UserError(f"{name}: a file: {advice}{hidden_model(name)}")


def _no_weights(name: str, folder: Path) -> UserError:
    """Build the error for a folder without weights, with a way to convert those in other formats."""
    others = [(f.name, *how) for glob, how in OTHER_WEIGHTS.items() for f in sorted(folder.glob(glob))]
    if not others and not Path(name).is_dir() and (folder / CONFIG).exists():
        # Only config.json was downloaded: the Hub's models without safetensors have a pytorch_model.bin.
        others = [("other weights", *OTHER_WEIGHTS["pytorch_model*.bin"])]
    if not others:
        below = [*folder.glob(f"[!.]*/{WEIGHTS}*"), *folder.glob(f"*/[!.]*/{WEIGHTS}*")]
        models = ", ".join(sorted({str(path.parent) for path in below})[:3])
        models = f" (models there: {models})" if models else ""
        return UserError(f"{name}: contains no {WEIGHTS}: {EXPECTED}{models}{hidden_model(name)}")
    file, packages, code = others[0]
    refuse_lfs_pointer(folder / file)
    code = code.format(name=Path(name).as_posix(), file=file)
    out = f"{Path(name).resolve().name}-safetensors"
    command = f"import {code.partition('.')[0]}; {code}.save_pretrained({out!r})"
    return UserError(
        f"{name}: contains {file}, not {WEIGHTS}: with {packages} installed, this makes a folder to name "
        f'instead: python -c "{command}"{hidden_model(name)}'
    )


def _download(name: str) -> Path:
    """Download the configuration and weights of a model from the Hub, or find them in the local cache."""
    repo = f"openai-community/{name}" if name in OPENAI_MODELS else name
    files = [CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    try:
        with hub.user_errors(f"{name} (no such folder, so a name on the Hub)", "name a folder, or connect"):
            from huggingface_hub import snapshot_download  # most runs do not need it

            return Path(hub.with_retries(lambda: snapshot_download(repo, allow_patterns=files)))
    except hub.NoWay:
        with contextlib.suppress(Exception):  # the first error is the one to report
            from huggingface_hub import snapshot_download

            cached = Path(snapshot_download(repo, allow_patterns=files, local_files_only=True))
            if has_weights(cached):
                return cached
        raise


def _weight_files(folder: Path) -> list[Path]:
    """List the files that transformers reads: model.safetensors, else the files in its index."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        listed = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        names = sorted({Path(name) for name in listed.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse_lfs_pointer(index)
        raise UserError(f"{index}: damaged ({error!r}): download it again") from error
    for name in names:
        if name.anchor or ".." in name.parts:
            raise UserError(f"{index}: lists {name}, outside its folder: refused")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, and {INDEX} lists it: download it again")
    return [folder / name for name in names]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, by their names in GPT2LMHeadModel, without the tied head."""
    found: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            found |= safetensors.torch.load_file(file)
        except (SafetensorError, OSError) as error:
            refuse_lfs_pointer(file)
            raise UserError(f"{file}: damaged: {error}: use another checkpoint") from error
    # OpenAI's own upload has no prefix, and carries the causal masks.
    tensors = {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in found.items()}
    head = tensors.pop("transformer.lm_head.weight", None)
    if head is not None:
        # A file may have the tied matrix under either name, or both.
        wte = tensors.setdefault("transformer.wte.weight", head)
        if head.dtype != wte.dtype or not torch.equal(head, wte):
            raise UserError(f"{folder}: lm_head.weight is not tied to wte.weight: not GPT-2's architecture")
    return tensors


def _read_config(file: Path) -> dict[str, float]:
    """Read sizes and dropout from a Hugging Face config.json. Raises UserError if it is not that of a GPT-2.

    GPTConfig has one dropout rate: 0 if the file has several.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
        # A run's config.json has no model_type, and must not pass for a GPT-2 of default sizes.
        values = DEFAULT_SIZES if "model_type" in raw else {}
        values = values | {size: raw[key] for key, size in SIZE_KEYS.items() if key in raw}
        sizes = {size: int(values[size]) for size in DEFAULT_SIZES}
        rates = {float(raw.get(name, 0.1)) for name in DROPOUTS}
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f"dropout {rates}")
        if min(sizes.values()) < 1:
            raise ValueError(f"sizes {sizes}")
        if sizes["n_embd"] % sizes["n_head"]:
            raise ValueError(f"n_head {sizes['n_head']} does not divide n_embd {sizes['n_embd']}")
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing: {EXPECTED}") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        refuse_lfs_pointer(file)
        raise UserError(f"{file}: not the configuration of a GPT-2 ({error!r})") from error
    # transformers' default for each of these keys is GPT-2's own value.
    expected = {
        "model_type": ("gpt2",),
        "transformers_weights": (None,),  # weights in a file of another name
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in expected.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file}: {key} is {raw[key]!r}: not GPT-2's architecture")
    return {**sizes, "dropout": rates.pop() if len(rates) == 1 else 0.0}
