"""Estimate a training run on GPUs that one does not have: memory, time and cost."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from support.cli import UserError
from support.gpus import GPU, GPUS
from support.loss import default_chunks

if TYPE_CHECKING:
    from model import GPTConfig

LINK_EFFICIENCY = 0.8  # share of a link's bandwidth that a large all-reduce reaches
# Of a GPU's memory the CUDA context takes 1 GB, and a tenth is left for fragments of the allocator's.
CONTEXT_BYTES = 1e9
USABLE = 0.9


@dataclass(frozen=True)
class Plan:
    gpus: int
    nodes: int
    micro_batch_size: int
    accumulation_steps: int
    recompute: bool  # with --recompute, asked for or because it does not fit without
    memory_gb: float  # per GPU, at that micro-batch
    step_seconds: float
    exposed_seconds: float  # of these, waiting for gradients
    scaling_efficiency: float  # speed per GPU relative to one GPU alone
    hours: float
    cost: float | None


def describe(plan: Plan, sequence_length: int, total_batch_size: int) -> str:
    """Format a plan as text, one figure per line."""
    n, waiting = plan.accumulation_steps, 1000 * plan.exposed_seconds
    lines = [
        f"batch      {plan.micro_batch_size} × {sequence_length} tokens per GPU, "  # noqa: RUF001
        f"{n} accumulation step{'s' * (n > 1)}{', --recompute' * plan.recompute}",
        f"memory     {plan.memory_gb:.1f} GB per GPU",
        f"step       {1000 * plan.step_seconds:,.0f} ms, of which {waiting:,.1f} ms waiting for gradients",
        f"speed      {total_batch_size / plan.step_seconds:,.0f} tokens/s",
        f"scaling    {100 * plan.scaling_efficiency:.1f} % of perfect scaling",
        f"time       {plan.hours:.2f} hours, without validation and checkpoints",
    ]
    if plan.cost is not None:
        per_hour = plan.cost / plan.hours / plan.gpus
        lines.append(f"cost       {plan.cost:,.2f} at {per_hour:g} per GPU hour")
    return "\n".join(lines)


def memory_bytes(
    config: "GPTConfig",
    sequence_length: int,
    micro_batch_size: int,
    optimizer: str = "adamw",
    buckets: bool = False,
    recompute: bool = False,
) -> float:
    """Bytes of tensors on one GPU at the peak of a compiled 16-bit step: at the loss of a micro-batch.

    Per parameter 16: fp32 weight, gradient and AdamW's two moments (Rajbhandari et al. 2020, "ZeRO"); 12
    where Muon has one moment. `buckets` adds 4, because a process that accumulates has DDP's buckets besides
    its gradients. Matrices have a 16-bit copy.
    Activations, as traced from the compiled graph: 36·T·B·d per block (8 for the residual stream in fp32, 16
    for the MLP, 6 for q, k and v, 4 for the inputs of c_attn and c_fc, 2 for the output of attention), and
    4·T·B·d for the input of the first block. Dropout adds a mask of 1 byte for each of its outputs outside
    attention.
    The logits of one chunk of the loss are in 16 bits, and become their own gradient.
    With `recompute`: 4·T·B·d per block for its input and, later, in place of the logits, 40·T·B·d for the
    block that is recomputed and its gradients.
    """
    tokens, d = sequence_length * micro_batch_size, config.n_embd
    blocks = 12 * config.n_layer * d * d  # parameters of the blocks' matrices
    per_parameter = 16 + 4 * buckets
    state = per_parameter * config.n_parameters - (4 * blocks if optimizer == "muon" else 0)
    weights = 2 * (blocks + config.vocab_size * d)
    logits = 2 * tokens * config.vocab_size / default_chunks(tokens, torch.device("cuda"))
    masks = 2 if config.dropout else 0
    if recompute:
        return state + weights + tokens * d * (4 * config.n_layer + 4) + max(logits, 40 * tokens * d)
    return state + weights + tokens * d * ((36 + masks) * config.n_layer + 4) + logits


def recompute_flops_per_token(config: "GPTConfig", sequence_length: int) -> float:
    """FLOPs that `recompute` adds for one token: L·(16·d² + 4·d·T), a fifth of a small model's.

    That is the forward pass of the blocks without the last product of each, whose result backward does not
    need.
    """
    return config.n_layer * (16 * config.n_embd**2 + 4 * config.n_embd * sequence_length)


def _fitting(
    room: float,
    sequences: int,
    gpus: int,
    config: "GPTConfig",
    sequence_length: int,
    optimizer: str,
    recompute: bool,
) -> dict[int, float]:
    """Find micro-batches that divide the `sequences` of a GPU and fit into `room`, with their bytes."""
    needed = {}
    for B in (2**i for i in range(11) if sequences % 2**i == 0):
        accumulates = gpus > 1 and sequences > B
        needed[B] = memory_bytes(config, sequence_length, B, optimizer, accumulates, recompute)
    return {B: n_bytes for B, n_bytes in needed.items() if n_bytes <= room}


def all_reduce_seconds(n_bytes: float, processes: int, gigabytes_per_second: float) -> float:
    """Duration of a ring all-reduce: each link carries 2·(n - 1)/n of the data (Patarasuk & Yuan 2009)."""
    return 2 * (processes - 1) / processes * n_bytes / (LINK_EFFICIENCY * gigabytes_per_second * 1e9)


def _find_gpu(hardware: str) -> tuple[int, GPU]:
    """Parse "8xA100-80GB". Raises UserError, with similar names, if the table lacks the GPU."""
    match = re.fullmatch(r"(?:(\d+)x)?(.*)", hardware)
    known = {gpu.plan_name: gpu for gpu in GPUS}
    count, name = int(match[1] or 1), match[2]
    if name not in known or count < 1:
        asked = name.replace("-", "").upper()
        found = [other for other in known if other.replace("-", "").upper().startswith(asked)]
        similar = [f"{count or 1}x{other}" for other in found]
        advice = f"did you mean {' or '.join(similar)}?" if similar else f"known GPUs: {', '.join(known)}"
        raise UserError(f"--plan {hardware}: not COUNTxGPU, such as 8xA100-80GB: {advice}")
    return count, known[name]


def plan(
    hardware: str,
    config: "GPTConfig",
    sequence_length: int,
    total_batch_size: int,
    max_steps: int,
    mfu: float,
    nodes: int = 1,
    network: float = 12.5,
    price: float = 0.0,
    optimizer: str = "adamw",
    recompute: bool = False,
) -> Plan:
    """Plan a run on nodes of `hardware` ("8xA100-80GB", "T4-16GB"), with `network` GB/s between them.

    A GPU costs `price` per hour. A step computes at `mfu` of the peak of the GPUs, including the work that
    `recompute` adds. If not one sequence fits without, the plan recomputes too.
    Gradients, 4 bytes per parameter, are all-reduced during the backward pass of the last micro-batch, which
    is two thirds of its time. The step waits for the rest, and always for the token embedding's gradient, the
    largest: it is complete only when backward ends, because its matrix is also the head.
    Raises UserError on hardware that is not in the table, or too small for the model or the batch.
    """
    count, gpu = _find_gpu(hardware)
    gpus = count * nodes
    sequences, rest = divmod(total_batch_size, sequence_length * gpus)
    if rest or sequences == 0:
        raise UserError(
            f"--plan {hardware}: the preset's {total_batch_size // sequence_length} sequences per step do "
            f"not divide among {gpus} GPUs: plan for a number of GPUs that divides them"
        )
    room = USABLE * gpu.memory_gb * 1e9 - CONTEXT_BYTES
    given = (room, sequences, gpus, config, sequence_length, optimizer)
    memory = {} if recompute else _fitting(*given, recompute=False)
    recompute = not memory
    memory = memory or _fitting(*given, recompute=True)
    if not memory:
        raise UserError(
            f"--plan {hardware}: the model does not fit into {gpu.memory_gb} GB with one sequence, not even "
            "with --recompute"
        )

    B = max(memory)
    flops = config.flops_per_token(sequence_length)
    flops += recompute_flops_per_token(config, sequence_length) if recompute else 0
    compute = total_batch_size * flops / (gpus * gpu.tflops * 1e12 * mfu)

    def all_reduce(n_bytes: float) -> float:
        between = all_reduce_seconds(n_bytes, nodes, network) if nodes > 1 else 0.0
        return all_reduce_seconds(n_bytes, count, gpu.link) + between

    last = 4 * config.vocab_size * config.n_embd
    hidden = 2 / 3 * compute / (sequences // B)
    exposed = all_reduce(last) + max(0.0, all_reduce(4 * config.n_parameters - last) - hidden)
    hours = max_steps * (compute + exposed) / 3600
    return Plan(
        gpus=gpus,
        nodes=nodes,
        micro_batch_size=B,
        accumulation_steps=sequences // B,
        recompute=recompute,
        memory_gb=memory[B] / 1e9,
        step_seconds=compute + exposed,
        exposed_seconds=exposed,
        scaling_efficiency=compute / (compute + exposed),
        hours=hours,
        cost=hours * gpus * price if price else None,
    )
