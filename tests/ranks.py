"""Several processes as threads of this one: quick, and each may be given another file, answer or error."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from support.runtime import Runtime

T = TypeVar("T")
CPU = torch.device("cpu")


class Meeting:
    """Where the ranks' all-reduces meet. Fails if they do not make the same ones, or one stays away."""

    def __init__(self, size: int, timeout: float) -> None:
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.brought: list[tuple[str, torch.Tensor]] = [("", torch.empty(0))] * size

    def reduce(self, rank: int, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """As Runtime.all_reduce."""
        self.brought[rank] = (op, tensor.clone())
        self.barrier.wait()
        brought = list(self.brought)
        self.barrier.wait()
        kinds = {(other, t.shape, t.dtype) for other, t in brought}
        assert len(kinds) == 1, f"the ranks are in different all-reduces: {kinds}"
        values = torch.stack([t for _, t in brought])
        return tensor.copy_({"SUM": values.sum, "MIN": values.amin, "MAX": values.amax}[op](0))


@dataclass(frozen=True)
class Rank(Runtime):
    """One of several ranks. Each keeps its own gradients: there is no DDP."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1, 1.0), compare=False)

    def all_reduce(
        self, tensor: torch.Tensor, op: str = "SUM", group: dist.ProcessGroup | None = None
    ) -> torch.Tensor:
        return self.meeting.reduce(self.rank, tensor, op)


def together(work: Callable[[Rank], T], size: int = 2, timeout: float = 30.0) -> list[T | BaseException]:
    """Do `work` as each of `size` ranks at a time; what each returned or raised, in the order of ranks.

    The others of a rank that has failed fail as well, when they wait for it.
    """
    meeting = Meeting(size, timeout)
    results: list[T | BaseException] = [RuntimeError("not done")] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(Rank(CPU, torch.float32, rank, rank, size, meeting=meeting))
        except BaseException as error:
            results[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout * 4)
    return results
