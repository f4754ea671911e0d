"""The training script at full size on a GPU that is not there: devices, waits, collectives, memory, graphs.

Each run is fake_training.py in a process of its own, which prints by hand what these tests look at; the device
is in fake_device.py, what is noted of it in recorder.py. Values, kernels, streams and time are not tested here.
"""

from collections.abc import Callable

import pytest

from model import GPTConfig
from support import planning

Report = dict[str, object]
Runner = Callable[[str, list[dict]], list[Report]]

GPT2 = GPTConfig(padded_vocab_size=50304)
N_PARAMETERS = GPT2.n_parameters + (50304 - 50257) * GPT2.n_embd  # with the embedding's padding
LOGITS = 64 * 1024 * 50257  # numbers in a micro-batch's logits
PAUSES = {"set_up", "evaluate", "save", "finish"}  # what the training loop calls beside steps

# The only places that may exchange anything with the device within a step: (kind, file).
IN_A_STEP = {
    ("pinned copy to the device", "dataloader.py"),  # the batches
    ("pinned copy to the host", "support/progress.py"),  # the step's numbers, which arrive …
    ("event of an earlier step", "support/progress.py"),  # … while the next step is computed
}
# Before a pause the loop catches up with the device.
BEFORE_A_PAUSE = {*IN_A_STEP, ("event of this step", "support/progress.py")}
# Between steps: (phase, kind, file).
BETWEEN_STEPS = {
    *(("set_up", "blocking copy to the device", f) for f in ("train_gpt2.py", "support/hardware.py")),
    *(("set_up", "read of a number", f) for f in ("train_gpt2.py", "support/hardware.py")),
    ("set_up", "blocking copy to the device", "support/runtime.py"),
    ("set_up", "read of a number", "support/runtime.py"),
    ("evaluate", "pinned copy to the device", "dataloader.py"),
    ("evaluate", "blocking copy to the device", "train_gpt2.py"),
    ("evaluate", "blocking copy to the host", "train_gpt2.py"),
    ("evaluate", "read of a number", "train_gpt2.py"),
    ("evaluate", "blocking copy to the device", "hellaswag.py"),
    ("evaluate", "blocking copy to the host", "hellaswag.py"),
    ("evaluate", "read of a number", "hellaswag.py"),
    *((p, "blocking copy to the device", "support/sampling.py") for p in ("evaluate", "finish")),
    *((p, "blocking copy to the host", "support/sampling.py") for p in ("evaluate", "finish")),
    *((p, "synchronize", "support/runtime.py") for p in ("evaluate", "save", "finish")),
    *(("save", "blocking copy to the host", f) for f in ("support/checkpoint.py", "support/pretrained.py")),
    *(("save", "blocking copy to the device", f) for f in ("support/checkpoint.py", "support/pretrained.py")),
    ("save", "read of a number", "train_gpt2.py"),  # the scale of fp16
}


def entries(report: Report, steps: set[int] | None = None) -> list[dict]:
    """What was noted in a run that came to its end; with `steps`, in these, their pauses left out."""
    assert "error" not in report, report["error"]
    if steps is None:
        return report["entries"]
    return [e for e in report["entries"] if e["step"] in steps and e["phase"] not in PAUSES]


def places(found: list[dict]) -> set[tuple[str, str]]:
    """(kind, file) of copies and waits."""
    return {(e["kind"], e["place"].split(":")[0]) for e in found if e["kind"] != "collective"}


# ---------------------------------------------------------------- whole runs

RUNS = [(o, d, n) for o in ("adamw", "muon") for n in (1, 8) for d in ("bfloat16", "float16")]


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(map(str, run)))
def rehearsal(request: pytest.FixtureRequest, run_cases: Runner) -> tuple[str, str, int, Report]:
    """Optimizer, precision, processes; the report of a rehearsal of GPT-2 124M with them."""
    optimizer, dtype, processes = request.param
    cases = [
        {"flags": ["--optimizer", optimizer, "--dtype", dtype], "processes": processes}
        for dtype in ("bfloat16", "float16")
    ]
    # Once, a fourth step: only then are samples drawn between steps.
    cases[0]["flags"] += ["--max-steps", "4"] if (optimizer, processes) == ("adamw", 1) else []
    reports = run_cases(f"{optimizer} {processes}", cases)
    return optimizer, dtype, processes, reports[dtype == "float16"]


@pytest.mark.xfail(strict=True, reason="Progress.report asks for the numbers of the step just enqueued")
def test_nothing_waits_within_a_step(rehearsal: tuple) -> None:
    *_, report = rehearsal
    assert places(entries(report, {1})) <= IN_A_STEP
    assert places(entries(report, {2})) == IN_A_STEP  # a step between two others
    assert places(entries(report, {3})) <= BEFORE_A_PAUSE


def test_an_update_takes_its_batches_and_nothing_else(rehearsal: tuple, request) -> None:
    """The part of a step that must be free of waits even where the loop catches up."""
    optimizer, dtype, processes, report = rehearsal
    if (optimizer, dtype) == ("muon", "float16"):
        request.applymarker(
            pytest.mark.xfail(strict=True, reason="GradScaler asks whether Muon's gradients are finite")
        )
    found = [e for e in entries(report) if e["phase"] == "update" and e["kind"] != "collective"]
    assert places(found) == {("pinned copy to the device", "dataloader.py")}
    sent = {step: [e["n_bytes"] for e in found if e["step"] == step] for step in (1, 2, 3)}
    assert set(map(tuple, sent.values())) == {(64 * 1024 * 8,) * 4}  # inputs and targets of two rounds


def test_the_host_waits_between_steps_only_in_known_places(rehearsal: tuple) -> None:
    *_, report = rehearsal
    found = [e for e in entries(report) if e["phase"] in PAUSES and e["kind"] != "collective"]
    assert {(e["phase"], e["kind"], e["place"].split(":")[0]) for e in found} <= BETWEEN_STEPS


def test_gradients_travel_once_per_step(rehearsal: tuple, request) -> None:
    optimizer, _, processes, report = rehearsal
    for step in (1, 2, 3):
        found = [e for e in entries(report, {step}) if e["kind"] == "collective"]
        if processes == 1:
            assert not found
            continue
        gradients = [e for e in found if e["in_backward"]]
        assert {e["round"] for e in gradients} == {2}  # the last of the two
        assert sum(e["n_bytes"] for e in gradients) == 4 * N_PARAMETERS
        (numbers,) = [e for e in found if not e["in_backward"] and e["name"] == "c10d.allreduce_"]
        assert numbers["n_bytes"] < 100
        others = [e for e in found if not e["in_backward"] and e is not numbers]
        assert bool(others) == (optimizer == "muon")


@pytest.mark.xfail(strict=True, reason="Muon broadcasts every matrix by itself, in fp32")
def test_muon_exchanges_its_updates_in_two_collectives(run_cases: Runner) -> None:
    cases = [{"flags": ["--optimizer", "muon", "--n-layer", "4", "--micro-batch-size", "64"], "processes": 8}]
    (report,) = run_cases("muon in parts", cases)
    found = [e for e in entries(report, {2}) if e["kind"] == "collective" and not e["in_backward"]]
    updates = [e for e in found if e["name"] != "c10d.allreduce_"]
    assert len(updates) <= 2
    matrices = 4 * 12 * 768**2
    assert 2 * matrices <= sum(e["n_bytes"] for e in updates) < 1.3 * 2 * matrices  # bf16, and padding


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled(run_cases: Runner) -> dict[str, Report]:
    """Compiled runs: the model as it is, the loss in chunks, as one of eight processes."""
    shared = ["--compile", "--micro-batch-size", "64", "--hellaswag-interval", "0"]
    small = ["--n-layer", "2"]
    cases = {
        "one chunk": {"flags": [*shared, "--loss-chunks", "1"]},
        "chunks": {"flags": [*shared, *small, "--loss-chunks", "8"]},
        "processes": {"flags": [*shared, *small, "--loss-chunks", "1"], "processes": 8},
    }
    return dict(zip(cases, run_cases("compiled", list(cases.values())), strict=True))


@pytest.mark.parametrize("case", ["one chunk", "chunks"])
def test_the_training_forward_is_one_graph(case: str, compiled: dict[str, Report]) -> None:
    """One for training with its accumulation, one for validation: torch.compile(fullgraph=True) made them."""
    entries(compiled[case])
    graphs = compiled[case]["graphs"]
    assert (graphs["forward"], graphs["backward"], graphs["inference"], graphs["graphs"]) == (1, 1, 1, 2)
    assert max(sizes(graphs["saved"])) > 0  # there is a backward pass to speak of


def test_rounds_that_keep_gradients_here_cost_one_more_graph(compiled: dict[str, Report]) -> None:
    """DDP's forward depends on whether gradients travel; more graphs than its two and validation's are waste."""
    entries(compiled["processes"])
    graphs = compiled["processes"]["graphs"]
    assert graphs["inference"] == 1
    assert graphs["graphs"] <= 3


@pytest.mark.parametrize("case", ["one chunk", "chunks"])
def test_no_tangent_of_the_logits_size(case: str, compiled: dict[str, Report], request) -> None:
    if case == "one chunk":
        request.applymarker(pytest.mark.xfail(strict=True, reason="the logits are returned with the loss"))
    entries(compiled[case])
    graphs = compiled[case]["graphs"]
    assert max(sizes(graphs["tangents"])) == 1  # the loss's own


@pytest.mark.parametrize("case", ["one chunk", "chunks"])
def test_nothing_saved_of_the_logits_size(case: str, compiled: dict[str, Report], request) -> None:
    if case == "one chunk":
        request.applymarker(pytest.mark.xfail(strict=True, reason="cross_entropy keeps the logits"))
    entries(compiled[case])
    assert max(sizes(compiled[case]["graphs"]["saved"])) < LOGITS


def sizes(tensors: list[dict]) -> list[int]:
    """The number of elements of each."""
    return [t["elements"] for t in tensors]


# ---------------------------------------------------------------- memory and FLOPs


def memory_cases() -> dict[str, dict]:
    """Steps of eight processes without anything between, so that all but B is the same."""
    steps = "--max-steps 2 --val-interval 0 --hellaswag-interval 0 --sample-interval 0 --checkpoint-interval 0"
    flags = [*steps.split(), "--no-reload-checkpoints"]
    xl = ["--n-layer", "48", "--n-head", "25", "--n-embd", "1600"]
    return {
        f"{name} {B}": {
            "flags": [*flags, "--micro-batch-size", str(B), "--total-batch-size", str(16 * B * 1024), *shape],
            "processes": 8,
            "flops": name == "124M",
        }
        for name, B, shape in (("124M", 1, []), ("124M", 8, []), ("124M", 64, []), ("xl", 1, xl))
    }


@pytest.fixture
def memory(run_cases: Runner) -> dict[str, Report]:
    cases = memory_cases()
    return dict(zip(cases, run_cases("memory", list(cases.values())), strict=True))
