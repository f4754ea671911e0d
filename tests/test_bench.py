"""bench.py at toy size, and the plan's formulas against known figures."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import T, run_script

import bench
from model import GPT, GPTConfig
from settings import PRESETS
from support import compiler, gpus, hardware, planning
from support.cli import UserError
from train_gpt2 import StepResult, Trainer

TOY = ["--preset", "demo", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--sequence-length", "16"]
TOY += ["--device", "cpu", "--dtype", "float32"]


def test_parts_of_a_measurement_add_up(data_dir: Path) -> None:
    """The parts make up the step, tokens/s and MFU follow from its time."""
    for loader in ("memmap", "int64"):
        s = bench.Settings(
            preset="demo", n_layer=1, n_head=1, n_embd=8, sequence_length=T, micro_batch_size=2, device="cpu",
            accumulation_steps=2, dtype="float32", steps=1, data_dir=data_dir, loader=loader,
        )  # fmt: skip
        result = bench.measure(s)
        assert sum(result["parts_ms"].values()) == pytest.approx(result["step_ms"])
        assert result["tokens_per_sec"] == pytest.approx(2 * 2 * T / result["step_ms"] * 1000)
        flops = GPTConfig(128, 50257, 1, 1, 8).flops_per_token(T)
        assert result["flops_per_token"] == flops
        expected = flops * result["tokens_per_sec"] / (result["peak_tflops"] * 1e12)
        assert result["mfu"] == pytest.approx(expected)
        assert "tokens/s" in bench.describe(result)


def test_the_int64_loader_reads_the_shard_in_order(data_dir: Path) -> None:
    s = bench.Settings(data_dir=data_dir, loader="int64")
    batches = bench.micro_batches(s, 2, 8, torch.device("cpu"))
    tokens = np.load(sorted(data_dir.glob("*_train_*"))[0]).astype(np.int64)
    for number in range(2):
        x, y = next(batches)
        part = tokens[number * 16 : number * 16 + 17]
        np.testing.assert_array_equal(x.numpy().ravel(), part[:-1])
        np.testing.assert_array_equal(y.numpy().ravel(), part[1:])


@pytest.mark.slow
def test_two_settings_are_compared_in_turn() -> None:
    done = run_script(
        "bench.py", *TOY, "--steps", "1", "--rounds", "1", "--json",
        "--compare", "micro_batch_size=1 loss_chunks=2", "micro_batch_size=2 sync=True",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    a, b = result["sides"]
    assert result["ratio"] == pytest.approx(a["tokens_per_sec"] / b["tokens_per_sec"])
    assert b["settings"] == "micro_batch_size=2 sync=True"


@pytest.mark.parametrize("text", ["compile", "speed=1", "steps=x"])
def test_invalid_settings_to_compare_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        bench.override(bench.Settings(), text)


@pytest.mark.parametrize(
    ("numbers", "fine"),
    [
        ((4.0, 1.5, 1.0), True),
        ((math.nan, 1.5, 1.0), False),
        ((4.0, math.inf, 1.0), False),
        ((math.inf, 1.5, 2.0**15), False),
    ],
)
def test_steps_that_are_not_finite_are_not_timed(
    numbers: tuple[float, float, float], fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numbers: the loss, the gradient's norm and the scale of the second of three steps."""
    coming = iter([(4.0, 1.5, 1.0), numbers, (4.0, 1.5, 1.0)])

    def step(trainer: Trainer, batches: Iterator) -> StepResult:
        trainer.train_model(*next(batches))
        return StepResult(*torch.tensor(next(coming)), votes=torch.zeros(3))

    monkeypatch.setattr(Trainer, "step", step)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": T}
    s = bench.Settings(preset="demo", **shape, device="cpu", dtype="float32", steps=2, warmup=1)
    if fine:
        assert bench.measure(s)["tokens_per_sec"] > 0
        return
    with pytest.raises(UserError, match="not finite"):
        bench.measure(s)


@pytest.mark.parametrize("norms", [(math.inf, math.inf, 1.5), (math.inf, math.inf, math.inf)])
def test_in_fp16_gradients_may_overflow_at_first(
    norms: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = iter(norms)

    def step(trainer: Trainer, batches: Iterator) -> StepResult:
        trainer.train_model(*next(batches))
        return StepResult(*torch.tensor([4.0, next(coming), 2.0**15]), votes=torch.zeros(3))

    monkeypatch.setattr(Trainer, "step", step)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": T}
    s = bench.Settings(preset="demo", **shape, device="cpu", dtype="float16", steps=2, warmup=1)
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 1e12)
    if math.isfinite(norms[-1]):
        assert bench.measure(s)["tokens_per_sec"] > 0
        return
    with pytest.raises(UserError, match="not finite"):
        bench.measure(s)


def test_bench_prepares_the_device_like_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps away from faulty attention, and tries out the compiler."""
    asked = []
    monkeypatch.setattr(hardware, "avoid_faulty_attention", lambda *args: asked.append(args))
    monkeypatch.setattr(compiler, "try_out", lambda rt: (_ for _ in ()).throw(UserError("no compiler")))
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "sequence_length": T}
    s = bench.Settings(preset="demo", **shape, device="cpu", dtype="float32", compile=True)
    with pytest.raises(UserError, match="no compiler"):
        bench.measure(s)
    assert asked == [(T, 0.0)]


def test_bench_times_the_step_of_the_training_script(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: steps.append(args) or step(*args))
    s = bench.Settings(
        preset="demo", n_layer=1, n_head=1, n_embd=8, sequence_length=T, device="cpu", dtype="float32",
        steps=2, warmup=1,
    )  # fmt: skip
    bench.measure(s)
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [((12, 12, 768), 124_439_808), ((24, 16, 1024), 354_823_168), ((48, 25, 1600), 1_557_611_200)],
)
def test_parameter_counts_match_the_gpt2_family(sizes: tuple[int, int, int], parameters: int) -> None:
    assert GPTConfig(1024, 50257, *sizes).n_parameters == parameters


def test_plans_agree_with_the_model_and_with_arithmetic() -> None:
    config = GPTConfig()
    with torch.device("meta"):
        padding = (config.embedding_rows - 50257) * 768
        assert sum(p.numel() for p in GPT(config).parameters()) - padding == config.n_parameters
    assert config.n_parameters == 124_439_808
    assert config.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    plan = planning.plan("8xA100-80GB", config, 1024, 524_288, 19_073, mfu=0.5, price=2.0)
    # 10.0B tokens at 855 MFLOP each, on eight GPUs that do 156 TFLOP/s.
    hours = 19_073 * 524_288 * 855.166464e6 / (8 * 156e12) / 3600
    assert plan.hours == pytest.approx(hours, rel=0.02)
    assert plan.cost == pytest.approx(8 * 2.0 * plan.hours)
    assert plan.micro_batch_size * plan.accumulation_steps * 8 * 1024 == 524_288
    assert plan.memory_gb < 80
    one = planning.plan("1xA100-80GB", config, 1024, 524_288, 19_073, mfu=0.5)
    assert one.exposed_seconds == 0
    # The tied embedding's gradient is complete only at the end: its journey around the ring is never hidden.
    embedding = 2 * 7 / 8 * 4 * 50257 * 768 / (0.8 * 300e9)
    assert plan.exposed_seconds == pytest.approx(embedding)
    assert planning.all_reduce_seconds(8e9, 8, 10) == pytest.approx(2 * 7 / 8)
    slow = planning.plan("8xA100-80GB", config, 1024, 524_288, 100, mfu=0.5, nodes=4, network=0.1)
    assert slow.scaling_efficiency < 0.2


# What the graph of torch.compile keeps for backward, counted on fake CUDA tensors (bf16, flash attention, the
# loss alone; at B = 64 one of its four chunks of logits), and 16 bytes per parameter.
@pytest.mark.parametrize(
    ("sizes", "B", "saved_gb"),
    [
        ((12, 12, 768), 1, 0.70),
        ((12, 12, 768), 8, 3.84),
        ((12, 12, 768), 64, 28.93 - 0.75 * 6.59),
        ((48, 25, 1600), 1, 6.06),
    ],
)
def test_planned_memory_matches_the_compiled_step(
    sizes: tuple[int, int, int], B: int, saved_gb: float
) -> None:
    config = GPTConfig(1024, 50257, *sizes)
    needed = 16 * config.n_parameters + saved_gb * 1e9
    assert planning.memory_bytes(config, 1024, B) == pytest.approx(needed, rel=0.02)
    buckets = planning.memory_bytes(config, 1024, B, buckets=True) - planning.memory_bytes(config, 1024, B)
    assert buckets == 4 * config.n_parameters
    with torch.device("meta"):
        model = GPT(config)
    muon = hardware._state_floats(model, "muon", 1) - hardware._state_floats(model, "adamw", 1)
    assert planning.memory_bytes(config, 1024, B, "muon") == planning.memory_bytes(config, 1024, B) + 4 * muon


def test_plans_leave_room_and_count_buckets() -> None:
    config = GPTConfig()
    for gpu, B in (("A100-40GB", 64), ("RTX4090-24GB", 32), ("T4-16GB", 16), ("RTX4060-8GB", 8)):
        plan = planning.plan(f"1x{gpu}", config, 1024, 524_288, 100, mfu=0.5)
        assert plan.micro_batch_size == B
    two = planning.plan("2xRTX4090-24GB", config, 1024, 524_288, 100, mfu=0.5)
    assert two.memory_gb == pytest.approx(planning.memory_bytes(config, 1024, 32, buckets=True) / 1e9)
    one_round = planning.plan("8xA100-80GB", config, 1024, 524_288, 100, mfu=0.5)
    assert one_round.memory_gb == pytest.approx(planning.memory_bytes(config, 1024, 64) / 1e9)
    with pytest.raises(UserError, match=r"does not fit into 24 GB .*not even with --recompute"):
        planning.plan("1xRTX4090-24GB", GPTConfig(1024, 50257, 48, 25, 1600), 1024, 524_288, 100, mfu=0.5)


@pytest.mark.parametrize("hardware", ["8xA100", "A100", "", "0xA100-80GB", "3xA100-80GB", "-1xA100-80GB"])
def test_plans_for_unknown_hardware_are_refused(hardware: str) -> None:
    with pytest.raises(UserError, match="--plan"):
        planning.plan(hardware, GPTConfig(), 1024, 524_288, 100, mfu=0.5)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("0xH100-80GB", "1xH100-80GB"), ("1xRTX-4090", "1xRTX4090-24GB"), ("2xt4", "2xT4-16GB")],
)
def test_a_plan_for_unknown_hardware_suggests_similar_names(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        planning.plan(typed, GPTConfig(), 1024, 524_288, 100, mfu=0.5)


def test_a_plan_without_a_count_is_for_one_gpu() -> None:
    one = planning.plan("1xT4-16GB", GPTConfig(), 1024, 524_288, 100, mfu=0.5)
    assert planning.plan("T4-16GB", GPTConfig(), 1024, 524_288, 100, mfu=0.5) == one


def test_known_devices_have_their_peak_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tflops in (
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 835),
        ("NVIDIA L4", 121), ("NVIDIA GH200 480GB", 989), ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250), ("Tesla T4", 65), ("Tesla P100-PCIE-16GB", 9.3),
        ("Tesla V100-SXM2-16GB", 125), ("NVIDIA A40", 150), ("NVIDIA RTX A4000", 77),
        ("NVIDIA RTX A5000", 111), ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504), ("NVIDIA GeForce RTX 2080 Ti", 53.8),
        ("NVIDIA GeForce RTX 3060", 25.5), ("NVIDIA GeForce GTX 1650", 2.98),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware.peak_flops(torch.device("cuda"), torch.bfloat16) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA T400", "NVIDIA RTX A1000", "NVIDIA RTX A400", "NVIDIA T4G", "Quadro RTX 6000", "NVIDIA L400",
        "NVIDIA RTX 5000 Ada Generation", "Tesla V100S-PCIE-32GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4070 Laptop GPU", "NVIDIA GeForce RTX 4070 Ti", "NVIDIA GeForce RTX 4070 SUPER",
        "NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 2080",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "NVIDIA GeForce GTX 1080", "",
    ],
)  # fmt: skip
def test_similar_names_mean_other_cards(name: str) -> None:
    assert gpus.find(name) is None


def test_rates_of_geforce_cards_follow_from_their_advertised_ai_tops() -> None:
    """Which are for fp8 (RTX 40) or fp4 (RTX 50), with sparsity, accumulated in fp16: 8 and 16 times ours."""
    for card, tops, times in (
        ("RTX 5090", 3352, 16), ("RTX 5080", 1801, 16), ("RTX 5070", 988, 16), ("RTX 4090", 1321, 8),
        ("RTX 4080", 780, 8), ("RTX 4070", 466, 8), ("RTX 4060", 242, 8),
    ):  # fmt: skip
        assert gpus.find(f"NVIDIA GeForce {card}").tflops == pytest.approx(tops / times, rel=0.01)


def test_every_gpu_can_be_planned_and_found() -> None:
    assert len({gpu.plan_name for gpu in gpus.GPUS}) == len(gpus.GPUS)
    for gpu in gpus.GPUS:
        assert gpus.find(f"NVIDIA {gpu.model}").model == gpu.model
        plan = planning.plan(f"1x{gpu.plan_name}", GPTConfig(), 1024, 524_288, 100, mfu=0.5)
        assert plan.memory_gb < gpu.memory_gb
        assert plan.recompute == (gpu.memory_gb < 8)  # only where not one sequence fits without
        config = GPTConfig(dropout=PRESETS["finetune"].dropout)
        plan = planning.plan(f"1x{gpu.plan_name}", config, 1024, 8192, 300, mfu=0.5)
        assert plan.memory_gb < gpu.memory_gb


def test_a_plan_with_recompute_takes_less_memory_and_more_time() -> None:
    """The blocks' forward pass but for its last product again: 8 of 12·d² a layer, and attention's two."""
    config, common = GPTConfig(), (1024, 524_288, 100, 0.5)
    kept, again = (
        planning.plan("1xRTX4060-8GB", config, *common, recompute=recompute) for recompute in (False, True)
    )
    added = 2 * 12 * (8 * 768**2 + 2 * 768 * 1024)
    assert again.hours / kept.hours == pytest.approx(1 + added / config.flops_per_token(1024))
    assert (kept.recompute, again.recompute) == (False, True)
    assert again.micro_batch_size == 4 * kept.micro_batch_size
    assert "--recompute" in planning.describe(again, 1024, 524_288)
    small = planning.plan("1xGTX1650-4GB", config, *common)
    assert (small.micro_batch_size, small.recompute) == (2, True)
    # What the compiled graphs keep, counted on fake CUDA tensors.
    needed = 16 * config.n_parameters + 4.81e9
    assert planning.memory_bytes(config, 1024, 64, recompute=True) == pytest.approx(needed, rel=0.05)


def test_a_sweep_recommends_flags_that_training_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """train_gpt2.py leaves the attention kernel to PyTorch, so another that is faster is no advice."""
    rows = [
        {"micro_batch_size": B, "compile": True, "attention": attention, "tokens_per_sec": speed}
        for B, attention, speed in ((64, "flash", 3.0), (32, "default", 2.0), (16, "default", 1.0))
    ]
    monkeypatch.setattr(bench, "sweep", lambda s: rows)
    monkeypatch.setattr("sys.argv", ["bench.py", "--sweep", "--device", "cpu"])
    bench.main()
    assert "best: --micro-batch-size 32 --compile: 2 tokens/s" in capsys.readouterr().out
