"""The runs that the tests look at, in groups: each group is a process of its own, each run a `Case` there.

fake_training.py says what the keys of a case mean.
"""

import re

from model import GPTConfig

STEPS_ONLY = [
    "--max-steps", "2", "--val-interval", "0", "--hellaswag-interval", "0", "--sample-interval", "0",
    "--checkpoint-interval", "0", "--no-reload-checkpoints",
]  # fmt: skip

# ---------------------------------------------------------------- whole runs

# GPT-2 124M at T = 1024, on a device of a size for which the search finds B = 64; processes and precision. In
# fp16 two of its layers: what differs from bf16 is in every layer, or in none.
REHEARSALS = [(processes, dtype) for processes in (1, 8) for dtype in ("bfloat16", "float16")]
LAYERS = {"bfloat16": 12, "float16": 2}


def rehearsals(optimizer: str) -> list[dict]:
    """One run of each."""
    cases = [
        {"flags": ["--optimizer", optimizer, "--dtype", dtype], "processes": n, "gpu_memory": 48e9}
        for n, dtype in REHEARSALS
    ]
    for case, (_, dtype) in zip(cases, REHEARSALS, strict=True):
        if LAYERS[dtype] < 12:
            case["flags"] += ["--n-layer", str(LAYERS[dtype]), "--micro-batch-size", "64"]
    cases[0]["flags"] += ["--max-steps", "4"]  # once with samples and a checkpoint in the middle of the run
    # What is due between steps has been seen with one process in fp16, and with eight in bf16.
    cases[-1]["flags"] += [*STEPS_ONLY, "--max-steps", "3"]
    return cases


# ---------------------------------------------------------------- torch.compile

COMPILED = ["one chunk", "chunks", "processes", "full size"]

COMPILE = ["--compile", "--micro-batch-size", "64", "--hellaswag-interval", "0", "--no-reload-checkpoints"]
ONE_STEP = [*COMPILE, "--max-steps", "1", "--val-interval", "0", "--total-batch-size", str(64 * 1024)]


def compiled() -> list[dict]:
    """Two layers with the loss in one chunk, in several, and as one of eight processes; all twelve
    layers."""
    small = [*COMPILE, "--n-layer", "2", "--max-steps", "2"]
    return [
        {"flags": [*small, "--loss-chunks", "1"]},
        {"flags": [*small, "--loss-chunks", "8"]},
        {"flags": [*small, "--loss-chunks", "1"], "processes": 8},
        {"flags": ONE_STEP},
    ]


# ---------------------------------------------------------------- memory

XL = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
STEPS = ["124M, B = 1", "124M, B = 8", "124M, B = 64", "search"]


def two_steps(B: int) -> list[str]:
    """Flags for two steps of two rounds of one of eight processes."""
    return [*STEPS_ONLY, "--micro-batch-size", str(B), "--total-batch-size", str(8 * 2 * B * 1024)]


def steps() -> list[dict]:
    """Two steps with several micro-batches; at last on a device that is too small for B = 64."""
    cases = []
    for name in STEPS[:-1]:
        B = int(re.search(r"B = (\d+)", name)[1])
        cases.append({"flags": two_steps(B), "processes": 8, "flops": name == "124M, B = 8"})
    flags = [*STEPS_ONLY, "--total-batch-size", str(8 * 2 * 64 * 1024)]
    return [*cases, {"flags": flags, "processes": 8, "gpu_memory": 0}]


def xl() -> list[dict]:
    """The same two steps of the largest GPT-2."""
    size = ["--n-layer", str(XL.n_layer), "--n-head", str(XL.n_head), "--n-embd", str(XL.n_embd)]
    return [{"flags": [*two_steps(1), *size], "processes": 8}]


# ---------------------------------------------------------------- --recompute

RECOMPUTE = ["four layers, compiled", "124M, B = 8"]


def recompute() -> list[dict]:
    """As above, with --recompute."""
    return [
        {"flags": [*ONE_STEP, "--n-layer", "4", "--recompute"]},
        {"flags": [*two_steps(8), "--recompute"], "processes": 8},
    ]


# ---------------------------------------------------------------- planted faults

PLANTED = [
    "", "hidden item", "index from the host", "not pinned", "early read", "synchronize", "wrong device",
    "gradients in every round",
]  # fmt: skip


def planted() -> list[dict]:
    """Small runs, each with one of the faults in planted.py."""
    flags = ["--n-layer", "1", "--n-head", "2", "--n-embd", "64", *STEPS_ONLY]
    flags += ["--micro-batch-size", "4", "--total-batch-size", str(2 * 2 * 4 * 1024)]
    return [{"flags": flags, "processes": 2, "plant": name} for name in PLANTED]


GROUPS = {  # the longest first
    "muon": rehearsals("muon"),
    "adamw": rehearsals("adamw"),
    "compiled": compiled(),
    "steps": steps(),
    "planted": planted(),
}
SLOW_GROUPS = {"recompute": recompute(), "xl": xl()}  # of tests marked slow
