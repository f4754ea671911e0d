"""What a training run will take, on paper: memory, time and cost on GPUs that are not at hand."""

import re
from dataclasses import dataclass

from cli import UserError
from model import GPTConfig
from runtime import PEAK_TFLOPS

# Memory in GB, and the rate in GB/s at which one GPU of a node exchanges data with the others in a ring:
# NVLink's bandwidth in one direction, or PCIe's where there is none (NVIDIA's data sheets).
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


@dataclass(frozen=True)
class Plan:
    gpus: int
    nodes: int
    micro_batch_size: int
    accumulation_steps: int
    memory_gb: float  # a GPU's, at that micro-batch
    step_seconds: float
    exposed_seconds: float  # of which waiting for gradients
    scaling_efficiency: float  # speed a GPU against the speed of one alone
    hours: float
    cost: float | None


def n_parameters(config: GPTConfig) -> int:
    """Trainable numbers of a GPT-2: embeddings, 12·d² + 13·d a block, the last LayerNorm."""
    d = config.n_embd
    return (config.vocab_size + config.block_size) * d + config.n_layer * (12 * d * d + 13 * d) + 2 * d


def flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """6N + 12·L·d·T for forward and backward, N without positions (PaLM, appendix B; see `GPT`)."""
    N = n_parameters(config) - config.block_size * config.n_embd
    return 6 * N + 12 * config.n_layer * config.n_embd * sequence_length


def memory_bytes(config: GPTConfig, sequence_length: int, micro_batch_size: int) -> float:
    """Memory of one GPU in training, in bytes.

    16 bytes a parameter: fp32 weight, gradient and AdamW's two moments (Rajbhandari et al. 2020, "ZeRO").
    Activations, T·B·d·34 bytes a block in 16 bits, attention's T×T part not stored (Korthikanti et al.
    2022, "Reducing Activation Recomputation", equation 2 less what flash attention recomputes).
    The head: logits in 16 bits and their gradient. A tenth on top for what the allocator cannot use, and
    1 GB for the CUDA context.
    """
    tokens = sequence_length * micro_batch_size
    state = 16 * n_parameters(config)
    activations = 34 * tokens * config.n_embd * config.n_layer
    head = 2 * 2 * tokens * config.vocab_size
    return 1.1 * (state + activations + head) + 1e9


def all_reduce_seconds(n_bytes: float, processes: int, gigabytes_per_second: float) -> float:
    """Time of a ring all-reduce: each link carries 2·(n - 1)/n of the data (Patarasuk & Yuan 2009)."""
    return 2 * (processes - 1) / processes * n_bytes / (LINK_EFFICIENCY * gigabytes_per_second * 1e9)


def plan(
    hardware: str,
    config: GPTConfig,
    sequence_length: int,
    total_batch_size: int,
    max_steps: int,
    mfu: float,
    nodes: int = 1,
    network: float = 12.5,
    price: float = 0.0,
) -> Plan:
    """Plan a run on `hardware`, "8xA100-80GB" a node, with `network` GB/s between nodes, `price` a GPU hour.

    A step computes at `mfu` of the GPUs' peak. Gradients, 4 bytes a parameter, travel while the last
    micro-batch's backward pass runs, two thirds of its time; what takes longer is waited for.
    Raises UserError on hardware that is not in the table, or too small for the model or the batch.
    """
    match = re.fullmatch(r"(\d+)x(.+)", hardware)
    if not match or match[2] not in GPUS or int(match[1]) < 1:
        alike = [f"{match[1]}x{gpu}" for gpu in GPUS if gpu.startswith(match[2])] if match else []
        advice = f"did you mean {' or '.join(alike)}?" if alike else f"GPUs known: {', '.join(GPUS)}"
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

    compute = total_batch_size * flops_per_token(config, sequence_length)
    compute /= gpus * PEAK_TFLOPS[name] * 1e12 * mfu
    gradient = 4 * n_parameters(config)
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
