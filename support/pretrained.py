"""Models as folders in the Hugging Face format: config.json and model.safetensors.

A file stores a model's parameters under their own names, with two differences (`as_stored`): the embedding
has no padding rows, and four matrices per block are transposed, since GPT2LMHeadModel keeps them as `Conv1D`,
(in, out), where `nn.Linear` has (out, in).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from support import hub
from support.cli import UserError

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = "model.safetensors"
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that a file may contain
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class ModelShape(Protocol):
    """The sizes of a model, and its dropout: GPTConfig has them."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of this name is a matrix of a block: not an embedding, a bias or a LayerNorm's."""
    return parameter.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight"))


def without_padding(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """A view of a parameter, or of a tensor of its shape, without the embedding's padding rows."""
    return tensor[:vocab_size] if name.endswith("wte.weight") and tensor.dim() == 2 else tensor


def as_stored(name: str, parameter: Tensor, vocab_size: int) -> Tensor:
    """A view of a parameter in the shape it has in a file: read it to save, write to it to load."""
    view = without_padding(name, parameter, vocab_size)
    return view.t() if name.endswith(CONV1D_WEIGHTS) else view


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters as a file stores them: by name, fp32, in the host's memory."""
    copies = {}
    for name, parameter in model.named_parameters():
        view = as_stored(name, parameter.detach(), model.config.vocab_size)
        # Made contiguous on the device, where transposing is fast.
        copies[name] = view.float().contiguous().to("cpu", copy=True)
    return copies


def save(folder: Path, weights: dict[str, Tensor], config: ModelShape) -> None:
    """Write model.safetensors, config.json and generation_config.json, for transformers to read.

    weights: as `copy_weights` returns them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library makes it readable by its owner only
    for name, content in (
        ("config.json", _huggingface_config(config)),
        ("generation_config.json", {"bos_token_id": 50256, "eos_token_id": 50256}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def _huggingface_config(config: ModelShape) -> dict[str, object]:
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
    """The model in a folder, or on the Hub under a name (`gpt2`, `USER/NAME`), in fp32 on the CPU.

    build: makes the model from block_size, vocab_size, n_layer, n_head, n_embd and dropout.
    Raises UserError on anything missing, damaged or not a GPT-2.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = _download(str(name_or_folder))
    sizes = _read_config(folder / "config.json")
    tensors = _read_tensors(folder)
    # A config that lies could ask for any amount of memory: build nothing that the file does not contain.
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
    """Read the weights in a folder into a model, exactly.

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


def _download(name: str) -> Path:
    """A model's configuration and weights from the Hub, or from its local cache."""
    from huggingface_hub import snapshot_download  # most runs do without it

    repo = f"openai-community/{name}" if name in OPENAI_MODELS else name
    files = ["config.json", "model*.safetensors"]
    with hub.user_errors(f"{name} (no such folder, so a name on the Hub)", "name a folder, or connect"):
        return Path(hub.with_retries(lambda: snapshot_download(repo, allow_patterns=files)))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's `model*.safetensors`, by their names in GPT2LMHeadModel."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: contains no {WEIGHTS}: name a run, a checkpoint or a GPT-2 folder")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= safetensors.torch.load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged: {error}: use another checkpoint") from error
    # OpenAI's own upload has no prefix, carries the causal masks, and leaves out the tied head.
    return {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in found.items()}


def _read_config(file: Path) -> dict[str, float]:
    """A model's sizes and dropout from a Hugging Face config.json; UserError if it is not that of a GPT-2.

    GPTConfig has one rate of dropout: where the file has several, it gets 0.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        sizes = {name: int(raw[name]) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        sizes["block_size"] = int(raw["n_positions"])
        rates = {float(raw.get(name, 0.1)) for name in DROPOUTS}
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f"dropout {rates}")
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing: name a run, a checkpoint or a GPT-2 folder") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: not the configuration of a GPT-2 ({error!r})") from error
    # transformers' default for each of these keys is GPT-2's own value.
    expected = {
        "model_type": ("gpt2",),
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
