"""Faults to plant into the training script: each must be found by the tests on the fake device."""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from support.progress import Progress
from train_gpt2 import StepResult

forward, hidden, add = GPT.forward, GPT.hidden, Progress.add


def hidden_item(model: GPT, *args: object) -> object:
    """A loss that is looked at in the middle of a step."""
    output = forward(model, *args)
    if torch.is_grad_enabled():
        float(output[1])
    return output


def wrong_device(model: GPT, *args: object) -> Tensor:
    """Something made on the CPU, the default."""
    states = hidden(model, *args)
    return states + torch.zeros(states.shape[-1])


def index_from_the_host(model: GPT, *args: object) -> Tensor:
    """Something made on the CPU where torch moves it over without a word."""
    states = hidden(model, *args)
    return states[torch.arange(len(states))]


def early_read(progress: Progress, step: int, lr: float, result: StepResult) -> None:
    """Numbers fetched without waiting, and read without waiting either: whatever was in that memory."""
    result.loss.to("cpu", non_blocking=True).tolist()
    add(progress, step, lr, result)


def synchronize(progress: Progress, step: int, lr: float, result: StepResult) -> None:
    """A loop that waits for its own step."""
    torch.cuda.synchronize()
    add(progress, step, lr, result)


def not_pinned(tensor: Tensor, *_: object) -> Tensor:
    """Batches that only look pinned."""
    return tensor


def always_sync(ddp: DistributedDataParallel) -> contextlib.AbstractContextManager:
    """Gradients that travel in every round."""
    return contextlib.nullcontext()


FAULTS = {
    "": contextlib.nullcontext,
    "hidden item": lambda: mock.patch.object(GPT, "forward", hidden_item),
    "wrong device": lambda: mock.patch.object(GPT, "hidden", wrong_device),
    "index from the host": lambda: mock.patch.object(GPT, "hidden", index_from_the_host),
    "early read": lambda: mock.patch.object(Progress, "add", early_read),
    "synchronize": lambda: mock.patch.object(Progress, "add", synchronize),
    "not pinned": lambda: mock.patch.object(torch.Tensor, "pin_memory", not_pinned),
    "gradients in every round": lambda: mock.patch.object(DistributedDataParallel, "no_sync", always_sync),
}
