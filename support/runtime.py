"""Processes, device and precision: everything that differs between a laptop and eight GPUs."""

import contextlib
import dataclasses
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

# DDP imports this module too late: its default arguments would hold the process group for ever.
import torch.distributed.nn.functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support import driver
from support.cli import Dtype, UserError
from support.stop_signal import StopSignal

T = TypeVar("T")
# How long processes wait for each other before they give up: while one of them downloads data, and in
# training, where it must exceed the longest evaluation, checkpoint or compilation.
FETCH_TIMEOUT = timedelta(hours=6)
STEP_TIMEOUT = timedelta(minutes=15)
# DDP's gradient buckets, in MiB. They cut the compiled graph, and nothing is fused across a cut. With torch's
# 25 a micro-step of GPT-2 124M moves 5.7 % more bytes than uncut, with 64 1.0 % (BENCHMARKS.md).
BUCKET_MB = 64
# The oldest torch for Apple's GPUs. Earlier attention was wrong there for some shapes of queries and masks
# (pytorch/pytorch#181151, #184180).
MPS_NEEDS = (2, 13)

# From the precision of few devices to that of all. Processes on different devices take one that all have.
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Runtime:
    """One of `world_size` processes, each on its own device."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters and optimizer states stay fp32
    rank: int = 0
    local_rank: int = 0  # rank on this machine
    world_size: int = 1
    agent: int = 0  # process id of the torchrun that started this process; 0: none did
    stop: StopSignal = field(default_factory=StopSignal, compare=False)  # listens while training
    ddp_models: list[DistributedDataParallel] = field(default_factory=list, compare=False, repr=False)

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the process group, whose threads must end before the interpreter does.

        Gloo's threads want the GIL to free tensors. So a DDP reducer that destroys the group with the GIL
        held would wait for them forever, and a thread that the interpreter's end finds aborts the process.
        DDP models may live on in the frames of an exception, but without a reference to the group.
        """
        if self.world_size == 1:
            return
        for model in self.ddp_models:
            model.reducer = model.logger = model.process_group = None
        # After an error NCCL would wait here for the other processes. The end of this one frees its part.
        if error is None or self.device.type != "cuda":
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(text)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the model runs: 16-bit matrix products, or nothing for fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def all_reduce(
        self, tensor: torch.Tensor, op: str = "SUM", group: dist.ProcessGroup | None = None
    ) -> torch.Tensor:
        """Sum (or "MIN", "MAX") over all processes, in place; with one process the tensor itself."""
        if self.world_size > 1:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group)
        return tensor

    def mean_and_votes(self, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Average a float32 scalar over all processes. Also returns their votes, float32 (3,), on the device.

        The votes count the processes that have received SIGTERM, or SIGINT, or want a checkpoint. They travel
        with the number, because a separate all-reduce would cost every step its latency.
        """
        flags = (
            self.stop.number == signal.SIGTERM, self.stop.number == signal.SIGINT, self.stop.wants_checkpoint
        )  # fmt: skip
        # full_like fills on the device, because a copy would wait for it.
        shares = [number / self.world_size, *(torch.full_like(number, flag) for flag in flags)]
        mean, *votes = self.all_reduce(torch.stack(shares))
        return mean, torch.stack(votes)

    def on_any(self, flag: bool) -> bool:
        """True if the flag is set on any process."""
        return self.max_over_ranks(flag)[0] > 0

    def max_over_ranks(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over all processes."""
        return self.all_reduce(torch.tensor(numbers, device=self.device, dtype=torch.int64), "MAX").tolist()

    def agree(self, number: int) -> bool:
        """True if the number is the same on all processes."""
        highest, negative_lowest = self.max_over_ranks(number, -number)
        return highest == -negative_lowest

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce(torch.zeros((), device=self.device))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def wrap(self, model: nn.Module, compiled: bool) -> tuple[nn.Module, nn.Module]:
        """Return the modules for training (in DDP if there are several processes) and for validation."""
        train_model: nn.Module = model
        if self.world_size > 1:
            train_model = DistributedDataParallel(
                model, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB
            )
            self.ddp_models.append(train_model)
        if not compiled:
            return train_model, model
        eval_model = torch.compile(model)
        # DDP is compiled with the model, so that its all-reduce overlaps with the backward pass.
        return eval_model if self.world_size == 1 else torch.compile(train_model), eval_model

    def run_on(self, on_this_rank: bool, work: Callable[[], T], fetches: bool = False) -> T | None:
        """Do `work` on the processes where `on_this_rank` is true, while the others wait and get None.

        A UserError on one process is raised on all of them, with its text, so that none waits for a dead one.
        fetches: the work may take hours, such as a download.
        """
        group = dist.new_group(timeout=FETCH_TIMEOUT) if fetches and self.world_size > 1 else None
        result, failure = None, None
        if on_this_rank:
            try:
                result = work()
            except UserError as error:
                failure = error
        error = self._first_error(failure, group)
        if group is not None:  # only now, because a GPU may have been busy with the all-reduces
            dist.destroy_process_group(group)
        if error:
            raise failure or error
        return result

    def _first_error(self, failure: UserError | None, group: dist.ProcessGroup | None) -> UserError | None:
        """Return the error of the lowest rank that has one, or None. Every process calls it with its own."""
        failed = torch.tensor(self.world_size if failure is None else self.rank, device=self.device)
        first = int(self.all_reduce(failed, "MIN", group).item())
        if first == self.world_size:
            return None
        codes = torch.zeros(1000, dtype=torch.int64)
        if first == self.rank:
            own = str(failure).encode()[: len(codes)]
            codes[: len(own)] = torch.tensor(list(own))
        codes = self.all_reduce(codes.to(self.device), "MAX", group)
        text = bytes(codes.tolist()).rstrip(b"\0").decode(errors="ignore")
        return UserError(f"process {first}: {text}" if first else text)


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it.

    Raises UserError if its variables contradict each other, such as those left over from another start.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = " ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    problem = f"{missing[0]} is not set" if missing else ""
    try:
        rank, local_rank, size = (
            int(os.environ.get(name) or default) for name, default in zip(names, "001", strict=True)
        )
        if not 0 <= rank < size or local_rank < 0:
            problem = "they do not fit together"
        elif size == 1 and local_rank == 0:
            return 1
        elif not missing and not 0 < int(os.environ["MASTER_PORT"]) < 2**16:
            problem = f"MASTER_PORT={os.environ['MASTER_PORT']} is no port"
    except ValueError:
        problem = "not numbers"
    if problem:
        raise UserError(f"{given}: {problem}: start with torchrun, or `unset {' '.join(names)}`")
    return size


def start(device: str, dtype: Dtype) -> Runtime:
    """Choose device and precision, and join the other processes if torchrun started this one.

    device: "auto" (CUDA, else Apple's MPS, else CPU), "cpu", "cuda", "cuda:1", "mps". A script that may run
    as several processes uses the result in a `with` block, which leaves the group at its end.
    Raises UserError for a device or precision that this machine does not have, or that torch cannot use.
    """
    size = world_size()
    rank = int(os.environ.get("RANK") or "0")
    local_rank = int(os.environ.get("LOCAL_RANK") or "0")
    chosen = _pick_device(device, local_rank, size)
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # first, because torch answers for the current GPU
        # Products that autocast leaves in fp32 use TF32. On a CPU this setting would change results.
        torch.set_float32_matmul_precision("high")
    rt = Runtime(chosen, pick_dtype(chosen, dtype), rank, local_rank, size, agent)
    if rt.world_size > 1:
        if chosen.type == "cuda" and not dist.is_nccl_available():
            raise UserError(
                f"--device {device}: several GPUs need NCCL, which torch {torch.__version__} lacks here: "
                "on Windows use WSL; or run without torchrun, on one GPU"
            )
        if not agent and rt.is_main:
            text = f"waiting for {size} processes: to train in this one alone, unset RANK and WORLD_SIZE"
            print(text, file=sys.stderr)
        try:
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                store=_store_of_this_start(),
                rank=rank,
                world_size=rt.world_size,
                timeout=STEP_TIMEOUT,
                device_id=chosen if chosen.type == "cuda" else None,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"WORLD_SIZE={size}: the other processes cannot be reached: {reason}") from error
        if dtype == "auto":  # scaled fp16 gradients and bf16 gradients cannot be averaged
            [least] = rt.max_over_ranks(PRECISIONS.index(rt.dtype))
            rt = dataclasses.replace(rt, dtype=PRECISIONS[least])
    return rt


def _store_of_this_start() -> dist.Store | None:
    """Return the store in which the processes find each other; None: at MASTER_ADDR and MASTER_PORT.

    On one machine torchrun keeps one store through all its restarts, with the addresses of dead processes
    still in it (pytorch/pytorch#135712), so every start uses its own keys. With several machines each counts
    restarts for itself, and torchrun must be told to make new stores: see workflow.md.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    try:
        socket.create_connection((address, port), timeout=60).close()  # torchrun listens before it starts us
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: no torchrun there ({reason}): start with torchrun, "
            "or unset its variables"
        ) from error
    store = dist.TCPStore(address, port, is_master=False, timeout=STEP_TIMEOUT)
    return dist.PrefixStore(f"restart_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _pick_device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device.startswith(("auto", "cuda")) and not torch.cuda.is_available():
        driver.check_found(device)
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and world_size == 1:
            device = "mps"
        elif torch.xpu.is_available():
            raise UserError(
                "--device auto: the only GPU here is one of Intel's (XPU), which is not supported: "
                "--device cpu to do without it"
            )
        else:
            device = "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: not a device: use auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {device}: torch {torch.__version__} finds no CUDA device: use --device cpu"
            )
        if chosen.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"--device {device}: all processes would share that GPU: --device cuda gives each its own, "
                "and CUDA_VISIBLE_DEVICES chooses them"
            )
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, no number {index}: "
                "lower --nproc_per_node"
            )
        driver.check_architecture(torch.device("cuda", index))
        return torch.device("cuda", index)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available on this machine: use --device cpu")
    if chosen.type == "mps" and torch_version() < MPS_NEEDS:
        raise UserError(
            f"--device {device}: torch {torch.__version__} has errors in its attention on Apple's GPUs: "
            "pip install torch==2.13.0, or --device cpu"
        )
    if chosen.type == "xpu":
        raise UserError(f"--device {device}: Intel's GPUs are not supported: use cpu, cuda, cuda:N or mps")
    if chosen.type not in ("cpu", "mps"):
        raise UserError(f"--device {device}: not supported: use auto, cpu, cuda, cuda:N or mps")
    if chosen.type == "mps" and world_size > 1:
        raise UserError("--device mps: one process only: run without torchrun, or use --device cpu")
    return chosen


def pick_dtype(device: torch.device, dtype: Dtype) -> torch.dtype:
    """The precision of matrix products: the one asked for, or for "auto" the best that the device is fast at.

    CUDA: bf16 from Ampere on, fp16 before. MPS: fp32, since the M1 and M2 only emulate bf16, and we have not
    measured it on later ones. CPU: bf16 if it has units for it, else fp32: without them bf16 works, but
    hundreds of times slower, so the CPU's feature flags decide.
    Raises UserError for bf16 on a macOS that lacks it.
    """
    if dtype == "bfloat16" and device.type == "mps" and _macos_version() < (14, 0):
        raise UserError("--dtype bfloat16: needs macOS 14 or newer: use float16 or float32")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and cpu_flags() & {"amx_bf16", "avx512_bf16"}:
        return torch.bfloat16
    return torch.float32


def torch_version() -> tuple[int, ...]:
    """Major and minor version: "2.13.0+cpu" -> (2, 13)."""
    return tuple(map(int, torch.__version__.split(".")[:2]))


def _macos_version() -> tuple[int, ...]:
    return tuple(map(int, platform.mac_ver()[0].split(".")[:2]))


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> set[str]:
    """The CPU's feature flags as Linux lists them; empty if there is no such list."""
    try:
        with open(cpuinfo) as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()
