"""The training script at full size on a GPU that is not there: devices, waits, collectives, memory, graphs.

`python tests/fake_cuda/fake_training.py` prints what these tests look at. The device is in fake_device.py,
what is noted of it in recorder.py. Values, kernels, streams and time are not tested here.
"""

import dataclasses
from collections.abc import Callable

import pytest
from groups import COMPILED, LAYERS, PLANTED, RECOMPUTE, REHEARSALS, STEPS, XL

from model import GPTConfig
from support import planning

Report = dict[str, object]
Reports = Callable[[str], list[Report]]

GPT2 = GPTConfig()
PADDING = (50304 - 50257) * GPT2.n_embd  # the embedding's, in parameters
N_PARAMETERS = GPT2.n_parameters + PADDING
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
    ("evaluate", "read of a number", "evaluation.py"),
    ("evaluate", "blocking copy to the device", "hellaswag.py"),
    ("evaluate", "blocking copy to the host", "hellaswag.py"),
    ("evaluate", "read of a number", "hellaswag.py"),
    *((p, "blocking copy to the device", "support/sampling.py") for p in ("evaluate", "finish")),
    *((p, "blocking copy to the host", "support/sampling.py") for p in ("evaluate", "finish")),
    *((p, "synchronize", "support/runtime.py") for p in ("evaluate", "save", "finish")),
    # Whether an evaluation failed on any process.
    *((p, "blocking copy to the device", "support/runtime.py") for p in ("evaluate", "finish")),
    *((p, "read of a number", "support/runtime.py") for p in ("evaluate", "finish")),
    *(("save", "blocking copy to the host", f) for f in ("support/checkpoint.py", "support/pretrained.py")),
    *(("save", "blocking copy to the device", f) for f in ("support/checkpoint.py", "support/pretrained.py")),
    ("save", "read of a number", "support/run_folder.py"),  # the scale of fp16
    ("save", "blocking copy to the device", "optim.py"),  # Muon's momentum, loaded back in a rehearsal
}


def entries(report: Report, steps: set[int] | None = None) -> list[dict]:
    """The entries of a run without errors; with `steps`, only theirs, without pauses."""
    assert "error" not in report, report["error"]
    if steps is None:
        return report["entries"]
    return [e for e in report["entries"] if e["step"] in steps and e["phase"] not in PAUSES]


def places(found: list[dict]) -> set[tuple[str, str]]:
    """(kind, file) of copies and waits."""
    return {(e["kind"], e["place"].split(":")[0]) for e in found if e["kind"] != "collective"}


# ---------------------------------------------------------------- whole runs


@pytest.fixture(params=[(o, *run) for o in ("adamw", "muon") for run in REHEARSALS], ids=str)
def rehearsal(request: pytest.FixtureRequest, reports: Reports) -> tuple[str, int, str, Report]:
    """Optimizer, processes, precision, and the report of their run."""
    optimizer, *run = request.param
    return *request.param, reports(optimizer)[REHEARSALS.index(tuple(run))]


def test_nothing_waits_within_a_step(rehearsal: tuple) -> None:
    *_, report = rehearsal
    assert places(entries(report, {1})) <= IN_A_STEP
    assert places(entries(report, {2})) == IN_A_STEP  # a step between two others
    assert places(entries(report, {3})) <= BEFORE_A_PAUSE


def test_a_step_copies_only_its_batches(rehearsal: tuple) -> None:
    """The part of a step that must be free of waits even where the loop catches up."""
    *_, report = rehearsal
    found = [e for e in entries(report) if e["phase"] == "step" and e["kind"] != "collective"]
    assert places(found) == {("pinned copy to the device", "dataloader.py")}
    sent = {step: [e["n_bytes"] for e in found if e["step"] == step] for step in (1, 2, 3)}
    assert set(map(tuple, sent.values())) == {(64 * 1024 * 8,) * 4}  # inputs and targets of two rounds


def test_the_host_waits_between_steps_only_in_known_places(rehearsal: tuple) -> None:
    *_, report = rehearsal
    found = [e for e in entries(report) if e["phase"] in PAUSES and e["kind"] != "collective"]
    assert {(e["phase"], e["kind"], e["place"].split(":")[0]) for e in found} <= BETWEEN_STEPS


def test_gradients_are_reduced_once_per_step(rehearsal: tuple) -> None:
    optimizer, processes, dtype, report = rehearsal
    n_parameters = dataclasses.replace(GPT2, n_layer=LAYERS[dtype]).n_parameters + PADDING
    for step in (1, 2, 3):
        found = [e for e in entries(report, {step}) if e["kind"] == "collective"]
        if processes == 1:
            assert not found
            continue
        gradients = [e for e in found if e["in_backward"]]
        assert {e["round"] for e in gradients} == {2}  # the last of the two
        assert sum(e["n_bytes"] for e in gradients) == 4 * n_parameters
        (numbers,) = [e for e in found if not e["in_backward"] and e["name"] == "c10d.allreduce_"]
        assert numbers["n_bytes"] < 100
        others = [e for e in found if not e["in_backward"] and e is not numbers]
        assert bool(others) == (optimizer == "muon")


def test_muon_gathers_its_updates_in_two_collectives(reports: Reports) -> None:
    report = reports("muon")[REHEARSALS.index((8, "bfloat16"))]
    found = [e for e in entries(report, {2}) if e["kind"] == "collective" and not e["in_backward"]]
    updates = [e for e in found if e["name"] != "c10d.allreduce_"]
    assert len(updates) <= 2
    matrices = GPT2.n_layer * 12 * GPT2.n_embd**2
    assert 2 * matrices <= sum(e["n_bytes"] for e in updates) < 1.3 * 2 * matrices  # bf16, and padding


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled(reports: Reports) -> dict[str, Report]:
    return dict(zip(COMPILED, reports("compiled"), strict=True))


@pytest.mark.parametrize("case", ["one chunk", "chunks"])
def test_the_training_forward_is_one_graph(case: str, compiled: dict[str, Report]) -> None:
    """One for training with its accumulation, one for validation: torch.compile(fullgraph=True) made them."""
    entries(compiled[case])
    graphs = compiled[case]["graphs"]
    assert [graphs[kind] for kind in ("forward", "backward", "inference", "graphs")] == [1, 1, 1, 2]
    assert max(sizes(graphs["saved"])) > 0  # there is a backward pass to speak of


def test_no_sync_costs_one_more_graph(compiled: dict[str, Report]) -> None:
    """DDP's forward depends on whether gradients travel: two graphs, and validation's."""
    entries(compiled["processes"])
    graphs = compiled["processes"]["graphs"]
    assert graphs["inference"] == 1
    assert graphs["graphs"] <= 3


@pytest.mark.parametrize("case", ["one chunk", "chunks"])
def test_no_tangent_has_the_size_of_the_logits(case: str, compiled: dict[str, Report]) -> None:
    entries(compiled[case])
    graphs = compiled[case]["graphs"]
    assert max(sizes(graphs["tangents"])) == 1  # the loss's own


@pytest.mark.parametrize("case", ["one chunk", "chunks"])
def test_nothing_saved_has_the_size_of_the_logits(case: str, compiled: dict[str, Report]) -> None:
    entries(compiled[case])
    assert max(sizes(compiled[case]["graphs"]["saved"])) < LOGITS


def test_only_the_residual_stream_is_saved_in_fp32(compiled: dict[str, Report]) -> None:
    """In two dimensions, so that its gradient and that one's 16-bit copy have one shape, and one kernel."""
    entries(compiled["full size"])
    saved = [t for t in compiled["full size"]["graphs"]["saved"] if t["dtype"] == "float32"]
    states = [t for t in saved if t["elements"] == 64 * 1024 * GPT2.n_embd]
    embedding = [t for t in states if "embedding" in t["operation"]]
    sums = [t for t in states if t["operation"] == "aten.add.Tensor" and len(t["shape"]) == 2]
    assert (len(embedding), len(sums)) == (1, 2 * GPT2.n_layer)
    assert len(states) == len(embedding) + len(sums)


def sizes(tensors: list[dict]) -> list[int]:
    """The number of elements of each."""
    return [t["elements"] for t in tensors]


# ---------------------------------------------------------------- memory and FLOPs

# Bytes live at the peak of a step of one of eight processes, not compiled: at most.
PEAKS = {"124M, B = 1": 3.9e9, "124M, B = 8": 10.5e9, "124M, B = 64": 36.5e9}


@pytest.fixture
def steps(reports: Reports) -> dict[str, Report]:
    return dict(zip(STEPS, reports("steps"), strict=True))


@pytest.mark.parametrize("name", PEAKS)
def test_a_step_stays_below_its_peak_memory(name: str, steps: dict[str, Report]) -> None:
    entries(steps[name])
    # Weights, gradients, two moments, and DDP's buckets, before any activation.
    assert 20 * GPT2.n_parameters < steps[name]["step_peak"] < PEAKS[name]


@pytest.mark.slow
def test_a_step_of_gpt2_xl_stays_below_its_peak_memory(reports: Reports) -> None:
    [report] = reports("xl")
    entries(report)
    assert 20 * XL.n_parameters < report["step_peak"] < 38.5e9


def test_the_micro_batch_that_the_search_finds_fits(steps: dict[str, Report]) -> None:
    """On a device with one byte less than B = 64 takes, training must start with 32, and run."""
    report = steps["search"]
    copies = [e for e in entries(report, {1}) if e["kind"] == "pinned copy to the device"]
    assert {e["n_bytes"] for e in copies} == {8 * 32 * 1024}


def test_planned_memory_matches_the_compiled_step(compiled: dict[str, Report]) -> None:
    """--plan against weights, gradients, moments, buckets, and the peak of the traced backward pass."""
    report = compiled["full size"]
    entries(report)
    saved = sum(t["bytes"] for t in report["graphs"]["saved"])
    assert saved < report["graphs"]["backward_peak"] < 1.5 * saved
    needed = 20 * N_PARAMETERS + report["graphs"]["backward_peak"]
    assert planning.memory_bytes(GPT2, 1024, 64) == pytest.approx(needed, rel=0.1)


@pytest.mark.slow
def test_recompute_lowers_the_peak(reports: Reports) -> None:
    report = reports("recompute")[RECOMPUTE.index("124M, B = 8")]
    entries(report)
    assert 20 * GPT2.n_parameters < report["step_peak"] < 7.9e9  # 10.2 without


@pytest.mark.slow
def test_planned_memory_with_recompute_matches_the_compiled_step(reports: Reports) -> None:
    """One graph, which keeps the inputs of blocks alone; four layers."""
    report = reports("recompute")[RECOMPUTE.index("four layers, compiled")]
    config = dataclasses.replace(GPT2, n_layer=4)
    entries(report)
    graphs, tokens = report["graphs"], 64 * 1024
    assert (graphs["forward"], graphs["backward"], graphs["graphs"]) == (1, 1, 1)
    saved = [t for t in graphs["saved"] if t["elements"] == tokens * GPT2.n_embd]
    assert [t["dtype"] for t in saved].count("float32") == 4 + 1  # blocks' inputs, and what ln_f reads
    assert len(saved) == 4 + 2  # and in 16 bits the gradient of what the head reads
    needed = 16 * (config.n_parameters + 47 * 768) + graphs["backward_peak"]
    planned = planning.memory_bytes(config, 1024, 64, recompute=True)
    assert planned == pytest.approx(needed, rel=0.1)


def test_flops_of_a_step_match_the_formula(steps: dict[str, Report]) -> None:
    """Against torch's own count of what the step ran."""
    report = steps["124M, B = 8"]
    entries(report)
    per_token = report["flops"] / (2 * 8 * 1024)
    # Flash attention's backward pass computes the first of the two products again; the formula does not.
    per_token -= 2 * GPT2.n_layer * GPT2.n_embd * 1024
    assert GPT2.flops_per_token(1024) == pytest.approx(per_token, rel=1e-3)


# ---------------------------------------------------------------- the tests' own test

WAITS = {
    "hidden item": ("step", "read of a number"),
    "index from the host": ("step", "blocking copy to the device"),
    "not pinned": ("step", "blocking copy to the device"),
    "early read": ("train", "read before its copy has arrived"),
    "synchronize": ("train", "synchronize"),
}


@pytest.fixture
def planted(reports: Reports) -> dict[str, Report]:
    return dict(zip(PLANTED, reports("planted"), strict=True))


@pytest.mark.parametrize("fault", WAITS)
def test_a_planted_wait_is_noted(fault: str, planted: dict[str, Report]) -> None:
    seen = [{(e["phase"], e["kind"]) for e in entries(planted[name], {1, 2})} for name in ("", fault)]
    assert WAITS[fault] in seen[1] - seen[0]


def test_a_planted_tensor_on_the_wrong_device_fails(planted: dict[str, Report]) -> None:
    entries(planted[""])
    error = planted["wrong device"]["error"].splitlines()[-1]
    assert all(word in error for word in ("device", "cuda:0", "cpu")), error


def test_planted_reductions_in_every_round_are_noted(planted: dict[str, Report]) -> None:
    for fault, rounds in (("", {2}), ("gradients in every round", {1, 2})):
        assert {e["round"] for e in entries(planted[fault], {1}) if e["in_backward"]} == rounds
