"""What a training run will take, on paper: memory, time and cost on GPUs one does not have."""

import re
from dataclasses import dataclass
from typing import Protocol

from support.cli import UserError
from support.hardware import PEAK_TFLOPS

# Memory in GB, and the rate in GB/s at which one GPU of a node exchanges data with the others in a ring:
# NVLink's bandwidth in one direction, or PCIe's without it (NVIDIA's data sheets).
GPUS = {
    "A100-40GB": ("A100", 40, 300),
    "A100-80GB": ("A100", 80, 300),
    "H100-80GB": ("H100", 80, 450),
    "H200-141GB": ("H200", 141, 450),
    "B200-180GB": ("B200", 180, 900),
    "L40S-48GB": ("L40S", 48, 32),
    "A10G-24GB": ("A10G", 24, 16),
    "RTX4090-24GB": ("RTX 4090", 24, 32),
    "RTX3090-24GB": ("RTX 3090", 24, 32),
}
LINK_EFFICIENCY = 0.8  # share of a link's bandwidth that a large all-reduce reaches


class ModelShape(Protocol):
    """What a plan needs to know of a model: GPTConfig has it."""

    vocab_size: int
    n_layer: int
    n_embd: int

    @property
    def n_parameters(self) -> int: ...

    def flops_per_token(self, sequence_length: int) -> float: ...


@dataclass(frozen=True)
class Plan:
    gpus: int
    nodes: int
    micro_batch_size: int
    accumulation_steps: int
    memory_gb: float  # per GPU, at that micro-batch
    step_seconds: float
    exposed_seconds: float  # of these, waiting for gradients
    scaling_efficiency: float  # speed per GPU relative to one GPU alone
    hours: float
    cost: float | None


def describe(plan: Plan, sequence_length: int, total_batch_size: int) -> str:
    """A plan for a person to read, one line per figure."""
    n, waiting = plan.accumulation_steps, 1000 * plan.exposed_seconds
    lines = [
        f"batch      {plan.micro_batch_size} × {sequence_length} tokens per GPU, "  # noqa: RUF001
        f"{n} accumulation step{'s' * (n > 1)}",
        f"memory     {plan.memory_gb:.1f} GB per GPU",
        f"step       {1000 * plan.step_seconds:,.0f} ms, of which {waiting:,.1f} waiting for gradients",
        f"speed      {total_batch_size / plan.step_seconds:,.0f} tokens/s",
        f"scaling    {100 * plan.scaling_efficiency:.1f} % of perfect scaling",
        f"time       {plan.hours:.2f} hours, without validation and checkpoints",
    ]
    if plan.cost is not None:
        per_hour = plan.cost / plan.hours / plan.gpus
        lines.append(f"cost       {plan.cost:,.2f} at {per_hour:g} per GPU hour")
    return "\n".join(lines)


def memory_bytes(config: ModelShape, sequence_length: int, micro_batch_size: int) -> float:
    """Memory of one GPU in training, in bytes.

    16 bytes per parameter: fp32 weight, gradient and AdamW's two moments (Rajbhandari et al. 2020, "ZeRO").
    Activations: 34·T·B·d bytes per block in 16 bits, without attention's T×T part (Korthikanti et al. 2022,
    "Reducing Activation Recomputation", equation 2 less what flash attention recomputes).
    The head: logits in 16 bits and their gradient. A tenth on top for what the allocator cannot use, and
    1 GB for the CUDA context.
    """
    tokens = sequence_length * micro_batch_size
    state = 16 * config.n_parameters
    activations = 34 * tokens * config.n_embd * config.n_layer
    head = 2 * 2 * tokens * config.vocab_size
    return 1.1 * (state + activations + head) + 1e9


def all_reduce_seconds(n_bytes: float, processes: int, gigabytes_per_second: float) -> float:
    """Time of a ring all-reduce: each link carries 2·(n - 1)/n of the data (Patarasuk & Yuan 2009)."""
    return 2 * (processes - 1) / processes * n_bytes / (LINK_EFFICIENCY * gigabytes_per_second * 1e9)


def plan(
    hardware: str,
    config: ModelShape,
    sequence_length: int,
    total_batch_size: int,
    max_steps: int,
    mfu: float,
    nodes: int = 1,
    network: float = 12.5,
    price: float = 0.0,
) -> Plan:
    """Plan a run on nodes of `hardware` ("8xA100-80GB"), `network` GB/s between them, `price` per GPU hour.

    A step computes at `mfu` of the GPUs' peak. Gradients, 4 bytes per parameter, travel during the backward
    pass of the last micro-batch, two thirds of its time; the step waits for the rest.
    Raises UserError on hardware that is not in the table, or too small for the model or the batch.
    """
    match = re.fullmatch(r"(\d+)x(.+)", hardware)
    if not match or match[2] not in GPUS or int(match[1]) < 1:
        similar = [f"{match[1]}x{gpu}" for gpu in GPUS if gpu.startswith(match[2])] if match else []
        advice = f"did you mean {' or '.join(similar)}?" if similar else f"known GPUs: {', '.join(GPUS)}"
        raise UserError(f"--plan {hardware}: not COUNTxGPU, such as 8xA100-80GB: {advice}")
    name, memory_gb, link = GPUS[match[2]]
    gpus = int(match[1]) * nodes
    sequences, rest = divmod(total_batch_size, sequence_length * gpus)
    if rest or sequences == 0:
        raise UserError(
            f"--plan {hardware}: the preset's {total_batch_size // sequence_length} sequences per step do "
            f"not divide among {gpus} GPUs: plan for a number of GPUs that divides them"
        )
    sizes = [B for B in (2**i for i in range(11)) if sequences % B == 0]
    fitting = [B for B in sizes if memory_bytes(config, sequence_length, B) <= memory_gb * 1e9]
    if not fitting:
        raise UserError(f"--plan {hardware}: the model does not fit into {memory_gb} GB with one sequence")
    B = fitting[-1]

    compute = total_batch_size * config.flops_per_token(sequence_length)
    compute /= gpus * PEAK_TFLOPS[name] * 1e12 * mfu
    gradient = 4 * config.n_parameters
    travel = all_reduce_seconds(gradient, int(match[1]), link)
    if nodes > 1:
        travel += all_reduce_seconds(gradient, nodes, network)
    hidden = 2 / 3 * compute / (sequences // B)
    exposed = max(0.0, travel - hidden)
    hours = max_steps * (compute + exposed) / 3600
    return Plan(
        gpus=gpus,
        nodes=nodes,
        micro_batch_size=B,
        accumulation_steps=sequences // B,
        memory_gb=memory_bytes(config, sequence_length, B) / 1e9,
        step_seconds=compute + exposed,
        exposed_seconds=exposed,
        scaling_efficiency=compute / (compute + exposed),
        hours=hours,
        cost=hours * gpus * price if price else None,
    )
