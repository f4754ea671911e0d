"""Apple's GPUs, of which there is none here: torch's meta device stands in, and its books are checked.

Every operation of a step, of a validation, of HellaSwag and of sampling must be among those that torch lists
for MPS, and none may use float64, which MPS lacks.
"""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dataloader
import hellaswag
import optim
from model import GPT, GPTConfig
from pre_tokens import shards
from support import runtime
from train_gpt2 import Trainer

MPS = torch.device("meta")
COMPOSITE = {
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
}


def operations_of_mps() -> set[str]:
    """The operations that torch has kernels for on MPS, as it lists them when it is built."""
    root = Path(find_spec("torchgen").origin).parent
    listed = yaml.safe_load((root / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8"))
    keys, delegates, found = {}, {}, set()
    for entry in listed:
        name = entry["func"].split("(")[0]
        delegates[name] = entry.get("structured_delegate")
        dispatch = entry.get("dispatch", {} if delegates[name] else {"CompositeImplicitAutograd": ""})
        keys[name] = {key.strip() for names in dispatch for key in names.split(",")}
        if "CompositeExplicitAutograd" in keys[name]:
            found |= {other.strip() for other in entry.get("autogen", "").split(",")}
    for name, own in keys.items():
        if (own | keys.get(delegates[name], set())) & (COMPOSITE | {"MPS"}):
            found.add(name)
    return found


class Books(TorchDispatchMode):
    """Notes what happens on the stand-in; what is copied from there to the host arrives as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        with self:  # in inference mode torch hands over operations that it has not taken apart yet
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        to_host = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if to_host and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].zero_()
        result = func(*args, **kwargs)
        there = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.is_meta]
        if there:
            self.operations.add(func.name().removeprefix("aten::"))
            self.dtypes |= {t.dtype for t in there}
        return result


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    """All of a test's operations, checked at its end."""
    fused = sys.modules["torch.optim.optimizer"]  # torch hides its name
    monkeypatch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: contextlib.nullcontext())
    with Books() as noted:
        yield noted
    assert noted.operations and not noted.operations - operations_of_mps()
    assert torch.float64 not in noted.dtypes


def small_model(dropout: float = 0.0) -> GPT:
    return GPT(GPTConfig(32, 50257, 2, 2, 16, dropout=dropout)).to(MPS)


@pytest.mark.parametrize(("optimizer", "dropout"), [("adamw", 0.0), ("muon", 0.0), ("adamw", 0.1)])
def test_a_training_step_uses_only_operations_of_mps(optimizer: str, dropout: float, books: Books) -> None:
    model, rt = small_model(dropout), runtime.Runtime(MPS, torch.float32)
    optimizers = optim.build_optimizers(model, optimizer, 1e-3, 1.0, 0.1)
    scaler = torch.amp.GradScaler("mps", enabled=False)
    trainer = Trainer(rt, model, model, model, optimizers, scaler, 2, 2, loss_chunks=2, grad_clip=1.0)
    x = torch.zeros(2, 32, dtype=torch.int64)
    batches = iter([(dataloader._move(x, MPS), dataloader._move(x, MPS))] * 2)
    trainer.step(batches)
    assert {"_fused_adamw_", "_foreach_sub_.List"} & books.operations


def test_validation_uses_only_operations_of_mps(data_dir: Path, books: Books) -> None:
    stream = dataloader.TokenStream(shards.find_shards(data_dir)["val"], 16)
    model, rt = small_model(), runtime.Runtime(MPS, torch.float32)
    trainer = Trainer(rt, model, model, model, [], None, 2, 1, loss_chunks=1, grad_clip=1.0)
    assert trainer.validate(dataloader.val_batches(stream, 10, 2, 0, 1, MPS), 160) == 0


def test_hellaswag_uses_only_operations_of_mps(books: Books) -> None:
    examples = [hellaswag.Example([1, 2], [[3, 4], [5], [6], [7]], [2, 1, 1, 1], 0)] * 2
    rt = runtime.Runtime(MPS, torch.float32)
    assert hellaswag.evaluate(small_model(), examples, rt).n == 2


def test_sampling_uses_only_operations_of_mps(books: Books) -> None:
    rows = small_model().generate([[1, 2, 3], [4]], 4, top_k=20, top_p=0.9)
    assert [len(row) for row in rows] == [7, 5]
