# ruff: noqa: E402
"""Count the bytes of GPU memory that a micro-step of training moves, with torch.compile's own compiler.

    python benchmarks/count_bytes.py --micro-batch-size 64 --loss-chunks 4

Compiles forward and backward of GPT-2 in bf16 for an A100, or for the GPU that is here. Prints the bytes that
their kernels read and write; bytes that one kernel reads twice count once. Nothing is run. Without a GPU it
needs a C++ compiler, for the fake device of the tests, and Triton: `pip install --no-deps triton`.
"""

import copy
import functools
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fake_cuda")]
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = Path("/proc/driver/nvidia/version").exists()

if __name__ == "__main__" and HAS_TRITON and not HAS_GPU:
    import fake_library

    fake_library.load(fake_library.build())  # before torch

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import config, debug, scheduler, utils
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx import GraphModule

from model import GPT, GPTConfig
from support.cli import AtLeast1, UserError, parse, run


@dataclass
class Settings:
    micro_batch_size: AtLeast1 = 64
    """Sequences in a micro-batch, of 1,024 tokens."""
    loss_chunks: int = 4
    """Chunks of the loss."""
    bucket_mb: int = 0
    """Cut the graph as DDP does for its buckets of so many MiB. 0: do not, as on one GPU."""


def pretend_a_gpu() -> AbstractContextManager:
    """Let Inductor and Triton find an A100 from now on. Inside the context, tensors can be on it."""
    import fake_device
    import recorder
    import triton
    from triton.backends.compiler import GPUTarget

    a100 = types.SimpleNamespace(
        name=fake_device.NAME, major=8, minor=0, multi_processor_count=108, total_memory=80 * 2**30,
        warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, gcnArchName="",
    )  # fmt: skip
    fake_device.install()
    torch.cuda.get_device_properties = lambda *_: a100
    cuda = torch._dynamo.device_interface.CudaInterface
    for name, value in {
        "is_available": True, "get_device_properties": a100, "get_compute_capability": 80,
        "current_device": 0, "device_count": 1, "is_triton_capable": True, "get_raw_stream": 0,
        "raise_if_triton_unavailable": None, "is_bf16_supported": True, "memory_allocated": 0,
    }.items():  # fmt: skip
        answer = staticmethod(lambda *_, value=value: value)
        setattr(cuda, name, answer)
        setattr(cuda.Worker, name, answer)
    for module in (torch.utils._triton, scheduler, utils):
        module.has_triton = lambda *_: True
    answers = {
        "get_current_target": GPUTarget("cuda", 80, 32), "get_current_device": 0,
        "get_active_torch_device": fake_device.CUDA, "get_device_interface": torch.cuda,
    }  # fmt: skip
    driver = types.SimpleNamespace(**{k: lambda value=value: value for k, value in answers.items()})
    triton.runtime.driver.set_active(driver)
    return fake_device.device(recorder.Recorder())


def count_large_tensors_whole() -> None:
    """Count shared tensors of more than 10^9 elements whole. Inductor's limit is too low for logits."""
    node, name = scheduler.BaseSchedulerNode, "get_read_write_buffer_accesses"
    source = inspect.getsource(getattr(node, name)).replace("int(1e9)", "int(1e15)")
    exec("from __future__ import annotations\nif True:\n" + source, namespace := dict(vars(scheduler)))
    setattr(node, name, namespace[name])


def compile_graph(totals: list[float], backward: bool, graph: GraphModule, inputs: list[Tensor]) -> Callable:
    """Backend for torch.compile: prints Inductor's kernels for the graph and adds their bytes to `totals`."""
    gm, mode = GraphModule(graph, copy.deepcopy(graph.graph)), detect_fake_mode(inputs)
    with V.set_fake_mode(mode), V.set_debug_handler(debug.DebugContext()):
        post_grad_passes(gm, False)
        lowered = GraphLowering(gm, inputs, mode.shape_env, is_backward=backward, graph_id=int(backward))
        with V.set_graph_handler(lowered):
            lowered.run(*inputs)
            code = lowered.codegen()[0].value
            n_bytes, *_ = lowered.count_bytes()
    totals.append(n_bytes)
    kernels = len(re.findall(r"triton_\w+\.run\(", code))
    calls = len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+", code[code.index("def call(") :]))
    title = "backward" if backward else "forward "
    print(f"{title}{n_bytes / 1e9:7.1f} GB in {kernels} Triton kernels and {calls} library calls")
    return make_boxed_func(graph.forward)


def partition(graph: GraphModule, *args: object, **kwargs: object) -> tuple[GraphModule, GraphModule]:
    """Partition like Inductor."""
    joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, *args, **kwargs)


def main() -> None:
    s = parse(Settings, description=__doc__)
    if not HAS_TRITON:
        raise UserError("triton is not installed: pip install --no-deps triton, also with torch for the CPU")
    config.compile_threads, config.joint_graph_constant_folding = 1, False
    count_large_tensors_whole()
    totals: list[float] = []
    backend = aot_autograd(
        fw_compiler=functools.partial(compile_graph, totals, False),
        bw_compiler=functools.partial(compile_graph, totals, True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    if s.bucket_mb:
        backend = DDPOptimizer(s.bucket_mb * 2**20, backend).compile_fn
    gpu = FakeTensorMode(allow_non_fake_inputs=True) if HAS_GPU else pretend_a_gpu()
    shape = GPTConfig()
    if HAS_GPU:
        with FakeCopyMode(gpu):
            model = copy.deepcopy(GPT(shape).to("cuda"))
    with gpu:
        if not HAS_GPU:
            model = GPT(shape).to("cuda")
        idx = torch.zeros(s.micro_batch_size, model.config.block_size, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = torch.compile(model, backend=backend, fullgraph=True)(idx, idx, s.loss_chunks)
        loss.backward()
    print(f"together{sum(totals) / 1e9:7.1f} GB")


if __name__ == "__main__":
    run(main)
