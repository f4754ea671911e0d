"""bench.py at toy size, and the plan's formulas against known figures."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, T, run_script

import bench
from model import GPT, GPTConfig
from support import hardware, planning
from support.cli import UserError

TOY = ["--preset", "demo", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--sequence-length", "16"]
TOY += ["--device", "cpu", "--dtype", "float32"]


def test_a_measurement_adds_up(data_dir: Path) -> None:
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
def test_settings_to_compare_that_are_none(text: str) -> None:
    with pytest.raises(UserError):
        bench.override(bench.Settings(), text)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [((12, 12, 768), 124_439_808), ((24, 16, 1024), 354_823_168), ((48, 25, 1600), 1_557_611_200)],
)
def test_parameters_of_the_family(sizes: tuple[int, int, int], parameters: int) -> None:
    assert GPTConfig(1024, 50257, *sizes).n_parameters == parameters


def test_plan_agrees_with_the_model_and_with_arithmetic() -> None:
    config = GPTConfig()
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == config.n_parameters == 124_439_808
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
    assert planning.all_reduce_seconds(8e9, 8, 10) == pytest.approx(2 * 7 / 8)
    slow = planning.plan("8xA100-80GB", config, 1024, 524_288, 100, mfu=0.5, nodes=4, network=0.1)
    assert slow.scaling_efficiency < 0.2


@pytest.mark.parametrize("hardware", ["8xA100", "A100-80GB", "0xA100-80GB", "3xA100-80GB", "-1xA100-80GB"])
def test_plans_for_hardware_that_is_none(hardware: str) -> None:
    with pytest.raises(UserError, match="--plan"):
        planning.plan(hardware, GPTConfig(), 1024, 524_288, 100, mfu=0.5)


def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tflops in (
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA H100 PCIe", 756), ("NVIDIA L4", 121),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware.peak_flops(torch.device("cuda"), torch.bfloat16) == tflops * 1e12


def test_optimizers_are_compared_to_the_recipes_last_loss(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("optimizers", ROOT / "benchmarks" / "optimizers.py")
    optimizers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(optimizers)
    curve = {"tokens": np.array([0, 100, 200]), "loss": np.array([10.0, 6.0, 4.0])}
    assert optimizers.first_reach(curve, 5.0, "tokens") == 150
    assert optimizers.first_reach(curve, 3.0, "tokens") is None
    lines = [
        {"step": 0, "kind": "val", "loss": 10.0},
        {"step": 1, "kind": "train", "loss": 9.0, "tokens": 64, "step_ms": 500.0},
        {"step": 2, "kind": "train", "loss": 8.0, "tokens": 128, "step_ms": 250.0},
        {"step": 2, "kind": "val", "loss": 7.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + os.linesep for line in lines))
    read = optimizers.curve(tmp_path)
    assert {key: values.tolist() for key, values in read.items()} == {
        "tokens": [0, 128], "seconds": [0, 0.75], "loss": [10.0, 7.0],
    }  # fmt: skip
