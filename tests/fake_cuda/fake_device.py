"""torch's Python side of the CUDA device that is not there: torch.cuda, FakeTensorMode, DDP's reducer.

`install` once per process, before the project is imported; then, inside `device(recorder)`, "cuda" tensors
have shapes, dtypes and devices but no data, and torch.cuda answers from the recorder's count of live bytes.
"""

import contextlib
import json
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
import torch._dynamo  # before `install`: it looks at the functions of torch.cuda by name
import torch.distributed as dist
import torch.nn.parallel.distributed as ddp
from recorder import LATE_EVENT, NEW_EVENT, SYNCHRONIZE, Recorder
from torch import Tensor, nn
from torch._functorch import partitioners
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

NAME = "NVIDIA A100-SXM4-80GB"
CAPABILITY = (8, 0)
CUDA = torch.device("cuda", 0)

_recorder: Recorder | None = None  # the one that is on


@contextlib.contextmanager
def device(recorder: Recorder) -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake; `recorder` sees every operation of this thread and its backward passes."""
    global _recorder
    _recorder = recorder
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, recorder:
            yield mode
    finally:
        _recorder = None


def install() -> None:
    """Replace what needs a driver, memory or other processes. For a process that does nothing else."""
    for name, value in _cuda_functions().items():
        setattr(torch.cuda, name, value)
    FakeTensorMode.avoid_device_init = True  # torch.tensor(…, device="cuda") copies what was made on the CPU
    torch.inference_mode = _inference_mode
    nn.Module._apply = _apply
    FakeTensor.tolist = _tolist
    Tensor.pin_memory = _pin_memory
    Tensor.is_pinned = lambda self, *_: _on().is_pinned(self)
    torch.autograd.backward = _watched_backward(torch.autograd.backward)
    # Where torch.compile computes attention again it keeps the generator's state: there is none here.
    partitioners.functionalize_rng_ops = lambda joint, forward, backward, *_: (forward, backward)
    _install_files()
    _install_distributed()


def _on() -> Recorder:
    if _recorder is None:
        raise RuntimeError("the fake device is used outside of device(…)")
    return _recorder


# ---------------------------------------------------------------- torch.cuda


class Event:
    """torch.cuda.Event. Waiting for it is noted, and whether this step or an earlier one recorded it."""

    def __init__(self, *_: object, **__: object) -> None:
        self.moment = -1
        self.step = 0

    def record(self, stream: object = None) -> None:
        self.moment, self.step = _on().now(), _on().step

    def synchronize(self) -> None:
        age = _on().step - self.step
        _on().wait(LATE_EVENT if age else NEW_EVENT, until=self.moment)

    def query(self) -> bool:
        _on().happened(self.moment)
        return True

    def wait(self, stream: object = None) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds: one per thousand operations. Both events must have happened, as on a real device."""
        if not _on().has_happened(max(self.moment, end.moment)):
            raise RuntimeError("CUDA error: device not ready")
        return max(1.0, (end.moment - self.moment) / 1000)


class Stream:
    """torch.cuda.Stream, also as a context; all streams are one."""

    device = CUDA

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        _on().wait(SYNCHRONIZE)

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True


def _cuda_functions() -> dict[str, object]:
    answer = lambda value: lambda *_, **__: value  # noqa: E731
    stream = Stream()
    return {
        "is_available": answer(True),
        "is_initialized": answer(True),
        "init": answer(None),
        "_lazy_init": answer(None),
        "device_count": answer(1),
        "current_device": answer(0),
        "set_device": answer(None),
        "get_device_name": answer(NAME),
        "get_device_capability": answer(CAPABILITY),
        "get_device_properties": lambda *_: types.SimpleNamespace(
            name=NAME, total_memory=_on().capacity, major=8, minor=0, multi_processor_count=108
        ),
        "is_bf16_supported": answer(True),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": answer(None),
        "manual_seed": answer(None),
        "manual_seed_all": answer(None),
        "synchronize": lambda *_: _on().wait(SYNCHRONIZE),
        "empty_cache": lambda *_: _on().empty_cache(),
        "mem_get_info": lambda *_: (_on().capacity - _on().reserved_bytes, _on().capacity),
        "memory_allocated": lambda *_: _on().live_bytes,
        "memory_reserved": lambda *_: _on().reserved_bytes,
        "max_memory_allocated": lambda *_: _on().peak_bytes,
        "max_memory_reserved": lambda *_: _on().peak_bytes,
        "reset_peak_memory_stats": lambda *_: _on().reset_peak(),
        "Event": Event,
        "Stream": Stream,
        "current_stream": answer(stream),
        "default_stream": answer(stream),
        "stream": answer(stream),
    }


# ---------------------------------------------------------------- tensors and modules


def _inference_mode(mode: bool | Callable = True) -> object:
    """no_grad instead: inference tensors and FakeTensorMode do not mix."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


def _pin_memory(self: Tensor, *_: object) -> Tensor:
    pinned = self.clone()
    _on().pin(pinned)
    return pinned


def _tolist(self: FakeTensor) -> object:
    """Zeros in the tensor's shape: one wait, however many numbers."""
    value: object = self.flatten()[0].item() if self.numel() else 0
    for n in reversed(self.shape):
        value = [value] * n
    return value


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply for fake parameters, which cannot be changed in place: new ones, shared as before."""
    made: dict[Tensor, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter not in made:
                with torch.no_grad():
                    made[parameter] = nn.Parameter(convert(parameter), parameter.requires_grad)
            child._parameters[name] = None if parameter is None else made[parameter]
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else convert(buffer)
    return module


def _watched_backward(backward: Callable[..., None]) -> Callable[..., None]:
    """autograd runs a CUDA backward pass in threads of its own: they inherit the place that started it."""

    def watched(*args: object, **kwargs: object) -> None:
        if _recorder is None:
            return backward(*args, **kwargs)
        with _recorder.backward_pass():
            return backward(*args, **kwargs)

    return watched


# ---------------------------------------------------------------- files


def _install_files() -> None:
    """Saved tensors are remembered, since they have no contents; a file holds the key of its own."""
    saved: dict[str, object] = {}

    def save(content: object, path: str | Path) -> None:
        key = str(uuid.uuid4())
        saved[key] = _to_host(content)
        Path(path).write_text(json.dumps(key))

    def load(path: str | Path) -> object:
        return saved[json.loads(Path(path).read_text())]

    safetensors.torch.save_file = lambda tensors, path, metadata=None: save(tensors, path)
    safetensors.torch.load_file = lambda path, device="cpu": dict(load(path))
    torch.save = lambda content, path, **_: save(content, path)
    torch.load = lambda path, **_: load(path)


def _to_host(content: object) -> object:
    """Copy `content` with its tensors on the CPU, as for a file. The copy waits for the device."""
    if isinstance(content, Tensor):
        return content.detach().cpu()
    if isinstance(content, dict):
        return {key: _to_host(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_to_host(value) for value in content)
    return content


# ---------------------------------------------------------------- processes


def _install_distributed() -> None:
    """Any process group becomes torch's fake one, where collectives return at once; DDP keeps its Python."""
    init = dist.init_process_group

    def init_fake(backend: str | None = None, *, rank: int, world_size: int, **_: object) -> None:
        init("fake", store=FakeStore(), rank=rank, world_size=world_size)

    dist.init_process_group = init_fake
    dist.is_nccl_available = lambda: True
    dist.Reducer = Reducer
    dist.Logger = Silent
    ddp._verify_param_shape_across_processes = lambda *_, **__: None
    ddp._sync_module_states = lambda *_, **__: None


class Silent:
    """Accepts any call: what DDP tells its reducer and its log."""

    def __init__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Reducer(Silent):
    """DDP's reducer, whose C++ would read the gradients' memory.

    As there: a bucket of gradients travels once all of them are complete, in those backward passes that
    DDP.forward has announced with `prepare_for_backward` (not under no_sync); gradients become views of it.
    """

    def __init__(self, parameters: list[nn.Parameter], buckets: list[list[int]], *_: object) -> None:
        self.buckets = []
        self.expecting = False
        for indices in buckets:
            members = [parameters[i] for i in indices]
            flat = torch.zeros(sum(p.numel() for p in members), device=members[0].device)
            parts = flat.split([p.numel() for p in members])
            views = [part.view_as(p) for part, p in zip(parts, members, strict=True)]
            bucket = types.SimpleNamespace(flat=flat, missing=len(members), size=len(members))
            self.buckets.append(bucket)
            for parameter, view in zip(members, views, strict=True):
                hook = lambda p, view=view, bucket=bucket: self._ready(p, view, bucket)  # noqa: E731
                parameter.register_post_accumulate_grad_hook(hook)

    def _rebuild_buckets(self) -> bool:
        return False

    def prepare_for_backward(self, outputs: list[Tensor]) -> None:
        self.expecting = True
        for bucket in self.buckets:
            bucket.missing = bucket.size

    def _ready(self, parameter: nn.Parameter, view: Tensor, bucket: types.SimpleNamespace) -> None:
        if not self.expecting:
            return
        with torch.no_grad():
            if parameter.grad is not view:
                view.copy_(parameter.grad)
                parameter.grad = view
            bucket.missing -= 1
            if bucket.missing == 0:
                dist.all_reduce(bucket.flat)
        self.expecting = any(bucket.missing for bucket in self.buckets)
