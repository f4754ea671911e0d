"""One's own text, from a .txt file to samples of a model that was trained before."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_script

from model import GPT, GPTConfig
from settings import PRESETS
from support import run_files


@pytest.mark.slow
def test_fine_tuning_leads_from_text_to_samples(tmp_path: Path) -> None:
    """As workflow.md has it, with a small model in place of GPT-2."""
    torch.manual_seed(0)
    GPT(GPTConfig(96, 50257, 2, 2, 32, dropout=0.0)).save_pretrained(tmp_path / "gpt2")
    text = (ROOT / "LICENSE").read_text() * 15
    (tmp_path / "mine.txt").write_text(text)
    done = run_script("pre_tokens/handle_tokens.py", "--files", "mine.txt", "--out-dir", "data/mine",
                      cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    flags = ["--init-from", "gpt2", "--sequence-length", "64", "--total-batch-size", "512", "--device", "cpu"]
    flags += ["--max-steps", "50", "--learning-rate", "1e-2", "--micro-batch-size", "8"]
    done = run_script("train_gpt2.py", "--preset", "finetune", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "positions" not in done.stdout  # those beyond --sequence-length are trained already

    records = [
        json.loads(line) for line in (tmp_path / "log/finetune/metrics.jsonl").read_text().splitlines()
    ]
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "val"}
    assert list(losses) == [0, 25, 50]
    assert losses[50] < losses[0] - 2
    best = Path(run_files.find_model(f"{tmp_path}/log/finetune:best"))
    assert int(best.name.removeprefix("step_")) == min((25, 50), key=losses.get)
    model = GPT.from_pretrained(best)
    assert model.config == GPTConfig(96, 50257, 2, 2, 32, dropout=0.1)
    assert model.generate([[50256]], 8, temperature=0) == model.generate([[50256]], 8, temperature=0)


def test_the_preset_trains_gpt2_on_own_shards() -> None:
    s = PRESETS["finetune"]
    assert (s.init_from, s.dropout, s.keep_best, s.hellaswag_interval) == ("gpt2", 0.1, True, 0)
    assert s.dataset_repo == "none"  # nothing is fetched in place of shards that are missing
