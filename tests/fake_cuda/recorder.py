"""Record the calls to a fake CUDA device: copies, waits and collectives by line, and bytes alive.

A Recorder is a dispatch mode: it sees every operation, before the fake device answers it.
"""

import collections
import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
GRANULE = 512  # the CUDA allocator's unit in bytes
Frame = tuple[str, str, int]  # file below ROOT, function, line

# Copies between host and device. Those of pageable memory, or not asked to be non_blocking, wait.
PINNED_IN, PINNED_OUT = "pinned copy to the device", "pinned copy to the host"
BLOCKING_IN, BLOCKING_OUT = "blocking copy to the device", "blocking copy to the host"
READ = "read of a number"  # .item(), .tolist(), float(), if tensor: waits
EARLY = "read before its copy has arrived"  # a race: neither event nor synchronize came between
SYNCHRONIZE = "synchronize"
NEW_EVENT, LATE_EVENT = "event of this step", "event of an earlier step"  # waited for
COLLECTIVE = "collective"


@dataclass(frozen=True)
class Entry:
    """One copy, wait or collective."""

    kind: str
    phase: str  # the function that the training loop had called, "train" for the loop itself
    place: str  # file:function of the innermost line of the project
    line: int
    step: int  # optimizer steps begun
    round: int  # backward passes begun in this step
    in_backward: bool
    n_bytes: int
    name: str  # of the operation


class Recorder(TorchDispatchMode):
    """Record entries and live bytes of "cuda" storages while active.

    capacity: the device's memory in bytes; beyond it an allocation raises torch.OutOfMemoryError.
    """

    def __init__(self, capacity: float = 80e9) -> None:
        super().__init__()
        self.capacity = int(capacity)
        self.entries: list[Entry] = []
        self.step = self.round = 0
        self.live_bytes = self.peak_bytes = 0
        self.reserved_bytes = 0  # what torch's allocator keeps for later: the most since empty_cache
        self._live: dict[int, tuple[int, str]] = {}
        self.at_peak: list[tuple[int, str]] = []  # size and description of what was live then, to 0.1 %
        self._peak_described = 0
        self._lock = threading.RLock()
        self._operations = 0
        self._backward_frames: list[Frame] = []
        self._pinned: set[int] = set()
        self._arrivals: dict[int, int] = {}  # host storage -> when its copy was enqueued
        self._known: dict[int, Tensor] = {}  # storage -> the number in it
        self._arrived = 0  # everything enqueued until then has happened

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile would otherwise not compile under this mode."""
        return True

    # ------------------------------------------------------------ calls of the fake device

    def begin_step(self) -> None:
        self.step, self.round = self.step + 1, 0

    @contextlib.contextmanager
    def backward_pass(self) -> Iterator[None]:
        self.round += 1
        self._backward_frames = _frames()
        try:
            yield
        finally:
            self._backward_frames = []

    def now(self) -> int:
        """The number of operations enqueued."""
        return self._operations

    def wait(self, kind: str, until: int | None = None) -> None:
        """Note that the host waits for what was enqueued `until` then (None: for all)."""
        self._note(kind)
        self.happened(self._operations if until is None else until)

    def happened(self, moment: int) -> None:
        """Note that the host knows the device to have come so far."""
        self._arrived = max(self._arrived, moment)

    def has_happened(self, moment: int) -> bool:
        return moment <= self._arrived

    def pin(self, tensor: Tensor) -> None:
        """Note that the tensor's memory is pinned."""
        self._remember(tensor, self._pinned)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def reset_peak(self) -> None:
        self.peak_bytes, self._peak_described = self.live_bytes, 0

    # ------------------------------------------------------------ operations

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked twice per operation: a shortcut
        kwargs = dict(kwargs or {})
        if TracingContext.try_get():  # torch.compile looks at what the operations would do
            return func(*args, **kwargs)
        self._operations += 1
        inputs = _tensors((args, kwargs))
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            return self._read(func, args[0])
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if self._arrivals and not func.is_view:
            self._check_arrival(inputs[-1:] if copies else inputs)
        pinned = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if func._schema.is_mutable and func.namespace != "c10d":  # what one process has, all have here
            for t in inputs:
                self._known.pop(t.untyped_storage()._cdata, None)
        outputs = _tensors(out)
        if func.namespace == "c10d":
            self._note(COLLECTIVE, sum(t.nbytes for t in _tensors(args[0])), func)
        elif copies:
            blocking = not (
                kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:3] == (True,))
            )
            self._copy(func, inputs[-1], outputs[0], blocking)
        elif any(_on_device(t) for t in outputs):
            # An index or the like that has to be sent first; a single number is passed with the kernel.
            for t in inputs:
                if t.device.type == "cpu" and t.dim():
                    self._note(BLOCKING_IN, t.nbytes, func)
        for t in outputs:
            if pinned:
                self.pin(t)
            self._allocate(t)
        return out

    def _read(self, func: torch._ops.OpOverload, tensor: Tensor) -> object:
        """The number, if it came from the host; fake tensors hold no data: any other is 0."""
        if _on_device(tensor):
            self.wait(READ)
        else:
            self._check_arrival([tensor])
        value = self._value(tensor)
        if value is None:
            number = 0.0 if tensor.dtype.is_floating_point else 0
        else:
            with _disable_current_modes():
                number = value.item()
        return bool(number) if func is aten.is_nonzero.default else number

    def _check_arrival(self, tensors: list[Tensor]) -> None:
        """Note if one of these is the target of a copy that may be still under way."""
        for tensor in tensors:
            if self._arrivals.get(tensor.untyped_storage()._cdata, 0) > self._arrived:
                self._note(EARLY)

    def _value(self, tensor: Tensor) -> Tensor | None:
        """The real tensor behind a fake one of a few numbers that were copied from the host, as they were."""
        if not isinstance(tensor, FakeTensor):
            return tensor if tensor.device.type == "cpu" and tensor.numel() == 1 else None
        return (
            self._known.get(tensor.untyped_storage()._cdata) if tensor.constant is None else tensor.constant
        )

    def _copy(self, func: torch._ops.OpOverload, source: Tensor, target: Tensor, blocking: bool) -> None:
        value = self._value(source)
        if value is not None and target.numel() == 1:
            self._remember(target, self._known, value)
        if _on_device(source) == _on_device(target):
            return
        if _on_device(target):
            asynchronous = self.is_pinned(source) and not blocking
            self._note(PINNED_IN if asynchronous else BLOCKING_IN, target.nbytes, func)
        else:
            # `.to("cpu", non_blocking=True)` makes its result in pinned memory by itself.
            pinned = func is aten._to_copy.default or self.is_pinned(target)
            asynchronous = pinned and not blocking
            self._note(PINNED_OUT if asynchronous else BLOCKING_OUT, target.nbytes, func)
            if asynchronous:
                self._remember(target, self._arrivals, self._operations)
        if not asynchronous:
            self._arrived = self._operations

    # ------------------------------------------------------------ bytes

    def _allocate(self, tensor: Tensor) -> None:
        if not _on_device(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._live:
                return
            size = -(-storage.nbytes() // GRANULE) * GRANULE
            if self.live_bytes + size > self.capacity:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: {size / 1e9:.2f} GB beside {self.live_bytes / 1e9:.2f} GB"
                )
            self._live[key] = (size, f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}")
            weakref.finalize(storage, self._free, key).atexit = False
            self.live_bytes += size
            self.reserved_bytes = max(self.reserved_bytes, self.live_bytes)
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes = self.live_bytes
                if self.peak_bytes > 1.001 * self._peak_described:
                    self._peak_described, self.at_peak = self.peak_bytes, list(self._live.values())

    def empty_cache(self) -> None:
        """Give back what is reserved and not live."""
        self.reserved_bytes = self.live_bytes

    def _free(self, key: int) -> None:
        with self._lock:
            self.live_bytes -= self._live.pop(key)[0]

    def _remember(self, tensor: Tensor, where: set | dict, value: object = None) -> None:
        """Note something about a storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in where:
            forget = where.discard if isinstance(where, set) else lambda key: where.pop(key, None)
            weakref.finalize(storage, forget, key).atexit = False
        if isinstance(where, set):
            where.add(key)
        else:
            where[key] = value

    # ------------------------------------------------------------ the record

    def _note(self, kind: str, n_bytes: int = 0, func: object = "") -> None:
        here, outer = _frames(), self._backward_frames
        frames = here if any(name == "train" for _, name, _ in here) else [*outer, *here]
        names = [name for _, name, _ in frames]
        after = frames[names.index("train") + 1 :] if "train" in names else frames
        after = after[1:] if after and after[0][1] == "run_steps" else after
        file, function, line = frames[-1] if frames else ("?", "?", 0)
        phase = after[0][1] if after else "train"
        place = f"{file}:{function}"
        entry = (self.step, self.round, bool(outer), n_bytes, str(func).removesuffix(".default"))
        self.entries.append(Entry(kind, phase, place, line, *entry))

    def report(self) -> dict[str, object]:
        """Everything recorded, as plain values."""
        largest = collections.Counter()
        for size, what in self.at_peak:
            largest[what] += size
        return {
            "entries": [asdict(entry) for entry in self.entries],
            "peak_bytes": self.peak_bytes,
            "largest_at_peak": largest.most_common(12),
        }


def _tensors(values: object) -> list[Tensor]:
    """The tensors in lists, tuples and dictionaries, in their order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return _tensors(list(values.values())) if isinstance(values, dict) else []


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"  # `is_cuda` would ask the fake tensor's dispatcher


def _frames() -> list[Frame]:
    """The project's own frames of this thread, outermost first, without tests."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and "/tests/" not in file and "/site-packages/" not in file:
            found.append((file[len(str(ROOT)) + 1 :], frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return found[::-1]
