"""Several processes as threads of this one: quick, and each may be given its own file, answer or error."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from support.runtime import Runtime

T = TypeVar("T")
CPU = torch.device("cpu")


class Meeting:
    """Where the ranks' all-reduces meet. Fails if they do not make the same ones, or if one stays away."""

    def __init__(self, size: int, timeout: float) -> None:
        self.timeout = timeout
        self.changed = threading.Condition()  # guards the next two
        self.brought: list[list[tuple[str, torch.Tensor]]] = [[] for _ in range(size)]
        self.left = False  # whether one has ended

    def reduce(self, rank: int, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """As Runtime.all_reduce."""
        with self.changed:
            self.brought[rank].append((op, tensor.detach().clone()))
            number = len(self.brought[rank])
            self.changed.notify_all()
            all_here = lambda: all(len(own) >= number for own in self.brought)  # noqa: E731
            self.changed.wait_for(lambda: all_here() or self.left, self.timeout)
            assert all_here(), f"rank {rank} waits for another one at its all-reduce {number}: it would hang"
            brought = [own[number - 1] for own in self.brought]
        kinds = {(op, each.shape, each.dtype) for op, each in brought}
        assert len(kinds) == 1, f"the ranks are at different all-reduces: {kinds}"
        values = torch.stack([each for _, each in brought])
        return tensor.copy_({"SUM": values.sum, "MIN": values.amin, "MAX": values.amax}[op](0))

    def leave(self) -> None:
        """Let the others no longer wait."""
        with self.changed:
            self.left = True
            self.changed.notify_all()


class Averaging(nn.Module):
    """In place of DDP: a backward pass ends with the ranks' mean gradients, except inside no_sync()."""

    def __init__(self, model: nn.Module, rank: "Rank") -> None:
        super().__init__()
        self.module, self.rank, self.together = model, rank, True
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.average)

    def average(self, parameter: nn.Parameter) -> None:
        if self.together:
            self.rank.all_reduce(parameter.grad).div_(self.rank.world_size)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.together = False
        yield
        self.together = True

    def forward(self, *args: object) -> object:
        return self.module(*args)


@dataclass(frozen=True)
class Rank(Runtime):
    """One of several ranks."""

    meeting: Meeting = field(kw_only=True, compare=False)

    def all_reduce(
        self, tensor: torch.Tensor, op: str = "SUM", group: dist.ProcessGroup | None = None
    ) -> torch.Tensor:
        return self.meeting.reduce(self.rank, tensor, op)

    def wrap(self, model: nn.Module, compiled: bool) -> tuple[nn.Module, nn.Module]:
        return Averaging(model, self), model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass  # there is no group to leave


def together(work: Callable[[Rank], T], size: int = 2, timeout: float = 60.0) -> list[T | BaseException]:
    """Do `work` as each of `size` ranks at the same time; what each returned or raised, in their order.

    Each is the only one of its machine.

    Where one has failed, the others that wait for it fail as well, with AssertionError.
    """
    meeting = Meeting(size, timeout)
    results: list[T | BaseException] = [TimeoutError("still at it")] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(Rank(CPU, torch.float32, rank, 0, size, meeting=meeting))
        except BaseException as error:  # SystemExit too: whatever ends a process
            results[rank] = error
        finally:
            meeting.leave()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * timeout)
    return results
