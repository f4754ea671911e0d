"""Bad input: one line that names the flag or file, exit status 2, nothing left behind.

Most cases call the script's `main` in this process, through the same `cli.run` that a user's call goes
through; a few real processes show that nothing else is printed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, T, as_flags, posix, run_script, torchruns_variables, write_shard

import bench
import generate
import hellaswag
import plot_loss
import train_gpt2
import upload_hf
from pre_tokens import handle_tokens
from settings import SHAPE, read_settings
from support import cli, hellaswag_data
from support.cli import UserError
from support.files import sha256_of


def fails(
    main: Callable[[], object],
    args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> str:
    """Run a script's main that must fail as a user's mistake does; returns its one line."""
    monkeypatch.setattr(sys, "argv", ["script.py", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


SHARD = "tiny_train_000002.npy"


def put(content: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / SHARD, content)


def alter(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (alter(lambda whole: whole[:-100]), "bytes, but its header says"),
    "longer than it says": (alter(lambda whole: whole + b"12"), "bytes, but its header says"),
    "cut in its header": (alter(lambda whole: whole[:40]), "not an npy file"),
    "not npy": (alter(lambda whole: b"PK\x03\x04 something else"), "not an npy file"),
    "no bytes": (alter(lambda whole: b""), "not an npy file"),
    "int64": (put(np.zeros(500, np.int64)), "contains int64"),
    "big-endian": (put(np.zeros(500, ">u2")), "contains >u2"),
    "two-dimensional": (put(np.zeros((20, 20), np.uint16)), "2 dimensions"),
    "empty": (put(np.zeros(0, np.uint16)), "is empty"),
    "id 50257": (put(np.full(500, 50257, np.uint16)), "contains token id 50257"),
    "all too short": (
        lambda d: [np.save(path, np.zeros(T, np.uint16)) for path in d.glob("*_train_*.npy")],
        "too short for one sequence",
    ),
    "a folder": (lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), "not a regular file"),
    "a pipe": (lambda d: ((d / SHARD).unlink(), os.mkfifo(d / SHARD)), "not a regular file"),
    "a pipe as the manifest": (lambda d: os.mkfifo(d / "manifest.json"), "not a regular file"),
    "no val": (lambda d: (d / "tiny_val_000000.npy").unlink(), "NAME_val_"),
    "no train": (lambda d: [path.unlink() for path in d.glob("*_train_*")], "NAME_train_"),
    "no folder": (lambda d: d.rename(d.with_name("elsewhere")), "no such folder"),
    "one that the manifest lists": (
        lambda d: list_in_manifest(d, "tiny_train_000004.npy"),
        "000004.npy: missing",
    ),
}


def list_in_manifest(folder: Path, name: str) -> None:
    shards = [{"file": name, "bytes": 9, "sha256": None}]
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=posix if "pipe" in case else ()) for case in SHARD_DAMAGE]
)
def test_bad_shards_are_one_line(
    case: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    damage, message = SHARD_DAMAGE[case]
    damage(data_dir)
    flags = as_flags({**TINY, "data_dir": data_dir, "dataset_repo": "none", "out_dir": tmp_path / "run"})
    line = fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
    assert message in line
    assert str(data_dir) in line
    assert not (tmp_path / "run").exists()


BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "unknown preset": (["--preset", "gpt3"], "--preset gpt3"),
    "unknown flag": (["--learning-rat", "1"], "--learning-rat"),
    "not a number": (["--learning-rate", "fast"], "--learning-rate"),
    "missing value": (["--learning-rate"], "--learning-rate"),
    "missing preset": (["--preset"], "--preset"),
    "not a choice": (["--schedule", "sine"], "--schedule"),
    "negative": (["--warmup-steps", "-1"], "--warmup-steps"),
    "nan": (["--grad-clip", "nan"], "--grad-clip"),
    "no learning": (["--learning-rate", "0"], "--learning-rate"),
    "heads that do not divide": (["--n-head", "3"], "--n-head 3"),
    "batch that does not divide": (["--total-batch-size", "100"], "--total-batch-size 100"),
    "micro-batch that does not divide": (["--micro-batch-size", "3"], "--micro-batch-size 3"),
    "sequence above the positions": (["--sequence-length", "32"], "--sequence-length 32"),
    "both ways": (["--resume", "--overwrite"], "--resume --overwrite"),
    "one shard": (["--num-shards", "1"], "--num-shards 1"),
    "unknown device": (["--device", "abacus"], "--device abacus"),
    "a share above 1": (["--min-lr-ratio", "2"], "--min-lr-ratio"),
    "a beta of 1": (["--adam-beta2", "1"], "--adam-beta2 1.0"),
    "no such weights": (["--init-from", "./nowhere"], "nowhere: no such folder"),
    "a shape beside weights": (["--init-from", "x", "--n-layer", "3"], "--n-layer 3: --init-from x has"),
    "a seed of 64 bits": (["--seed", str(2**63)], f"--seed {2**63}"),
    "a folder to build the corpus in": (["--data-dir", "./typo"], "typo: no such folder"),
}  # fmt: skip


WITHOUT_SHAPE = {name: value for name, value in TINY.items() if name not in SHAPE}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_one_line(
    case: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args, message = BAD_SETTINGS[case]
    tiny = WITHOUT_SHAPE if "--init-from" in args else TINY
    flags = as_flags({**tiny, "data_dir": data_dir, "out_dir": tmp_path / "run"})
    line = fails(train_gpt2.main, ["--preset", "demo", *flags, *args], monkeypatch, capsys)
    assert message in line
    assert not (tmp_path / "run").exists()


BAD_BENCHES: dict[str, tuple[list[str], str]] = {
    "no machines": (["--plan", "8xA100-80GB", "--nodes", "0"], "--nodes 0"),
    "no steps": (["--steps", "0"], "--steps 0"),
    "negative warm-up": (["--warmup", "-1"], "--warmup -1"),
    "no rounds": (["--rounds", "0", "--compare", "", ""], "--rounds 0"),
    "no preset": (["--sweep", "--preset", "nope"], "--preset nope"),
    "no preset to compare": (["--compare", "", "preset=nope"], "--preset nope"),
    "MFU in per cent": (["--plan", "8xA100-80GB", "--mfu", "45"], "--mfu 45.0"),
    "MFU of nan": (["--plan", "8xA100-80GB", "--mfu", "nan"], "--mfu nan"),
    "negative price": (["--plan", "8xA100-80GB", "--price", "-3"], "--price -3.0"),
    "no network": (["--plan", "8xA100-80GB", "--network", "0"], "--network 0"),
    "an odd number of GPUs": (["--plan", "3xA100-80GB"], "do not divide among 3 GPUs"),
    "two sizes of a GPU": (["--plan", "8xA100"], "did you mean 8xA100-40GB or 8xA100-80GB?"),
    "no GPU": (["--plan", "8xAbacus"], "A100-40GB, A100-80GB, "),
    "heads that do not divide": (["--preset", "demo", "--n-head", "3"], "--n-head 3"),
    "nothing that runs": (["--preset", "demo", "--sweep", "--n-head", "3"], "--n-head 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BENCHES)
def test_bad_settings_of_bench_are_one_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args, message = BAD_BENCHES[case]
    if "--sweep" in args:
        monkeypatch.setattr(bench, "measure_apart", lambda s: bench.measure(s))
    line = fails(bench.main, [*args, "--device", "cpu"], monkeypatch, capsys)
    assert message in line
    assert "--total-batch-size" not in line  # a flag that bench.py does not have


def test_bench_times_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, value in torchruns_variables(2).items():
        monkeypatch.setenv(name, value)
    assert "without torchrun" in fails(bench.main, ["--device", "cpu"], monkeypatch, capsys)


LEFT_OVER: dict[str, tuple[dict[str, str], str]] = {
    "a size alone": ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8: RANK is not set: start with torchrun, or `unset"),
    "a rank alone": ({"RANK": "3"}, "RANK=3: they do not fit together"),
    "a local rank alone": ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: RANK is not set"),
    "text": ({"WORLD_SIZE": "all"}, "WORLD_SIZE=all: not numbers"),
    "a port that is text": ({**torchruns_variables(2), "MASTER_PORT": "abc"}, "not numbers"),
    "a port that is too large": ({**torchruns_variables(2), "MASTER_PORT": "99999"}, "is no port"),
    "a rank beyond the size": ({**torchruns_variables(2), "RANK": "2"}, "they do not fit together"),
    "no address": ({**torchruns_variables(2), "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    "a torchrun that has ended": (
        {
            **torchruns_variables(2),
            "MASTER_PORT": "9", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        },
        "MASTER_ADDR=127.0.0.1 MASTER_PORT=9: no torchrun there (Connection refused): start with torchrun",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OVER)
def test_leftover_variables_of_torchrun_are_one_line(
    case: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    variables, message = LEFT_OVER[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run"})
    assert message in fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_a_world_size_of_one_needs_no_other_variables(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a job of one process say nothing else."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "")
    assert (train(max_steps=0) / "metrics.jsonl").exists()


RECORDED: dict[str, tuple[dict[str, object], str]] = {
    "a choice": ({"optimizer": "sgd"}, "invalid choice 'sgd' for argument '--optimizer'"),
    "another choice": ({"schedule": "cosin"}, "invalid choice 'cosin' for argument '--schedule'"),
    "a switch that is text": ({"compile": "false"}, 'compile is "false", not true or false'),
    "a switch that is a number": ({"shuffle": 1}, "shuffle is 1, not true or false"),
    "a number that is a switch": ({"n_layer": True}, "n_layer is true, not text or a number"),
    "a number that is text": ({"n_layer": "two"}, "--n-layer"),
    "a whole number with a fraction": ({"max_steps": 1.5}, "--max-steps"),
    "nothing": ({"learning_rate": None}, "learning_rate is null, not text or a number"),
    "a list": ({"track": ["wandb"]}, 'track is ["wandb"], not text or a number'),
    "no setting": ({"n_layers": 2}, "unknown settings: n_layers"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_settings_are_checked_like_flags(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    changes, message = RECORDED[case]
    (tmp_path / "config.json").write_text(json.dumps({"settings": changes}))
    line = fails(train_gpt2.main, ["--preset", str(tmp_path / "config.json")], monkeypatch, capsys)
    assert line.startswith(f"error: --preset {tmp_path / 'config.json'}: ")
    assert message in line


def test_a_run_folder_is_a_preset(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train(max_steps=0, learning_rate=0.25, data_dir=tmp_path / "data")
    again = read_settings(["--preset", str(run), "--max-steps", "7"])
    assert (again.learning_rate, again.max_steps, again.data_dir) == (0.25, 7, tmp_path / "data")
    with pytest.raises(UserError, match="neither a run, nor a file, nor one of gpt2-124m, "):
        read_settings(["--preset", str(tmp_path)])


def test_a_folder_for_files_suggests_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = ["--files", f"{tmp_path}/", "--out-dir", str(tmp_path / "out")]
    assert f"use --files '{tmp_path}/*.txt'" in fails(handle_tokens.main, args, monkeypatch, capsys)


@pytest.mark.parametrize(
    "source", [["--files", "x.txt"], ["--repo-id", "USER/NAME"], ["--source", "builtin"]]
)
def test_other_text_is_kept_out_of_fineweb_edus_folder(
    source: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    line = fails(handle_tokens.main, source, monkeypatch, capsys)
    assert "--out-dir data/fineweb-edu-10b" in line and "name another" in line


def test_settings_become_flags_as_a_user_types_them() -> None:
    values = {"n_layer": 2, "resume": True, "shuffle": False, "compare": None, "data_dir": Path("a b")}
    assert cli.flags(values) == ["--n-layer", "2", "--resume", "--no-shuffle", "--data-dir", "a b"]
    for args, device in ((["--device", "cpu"], "cpu"), (["--device=cpu"], "cpu"), (["--device"], None)):
        assert cli.given("device", args) == device


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"settings": {"n_layer": "many"}}', '{"settings": {"x": 1}}']
)
def test_an_invalid_config_is_one_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(content)
    line = fails(train_gpt2.main, ["--preset", str(tmp_path / "config.json")], monkeypatch, capsys)
    assert "config.json" in line


def test_a_folder_that_holds_a_run_stays_unchanged(
    train: Callable[..., Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = train(max_steps=2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": run})
    line = fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
    assert "--resume" in line
    assert "--overwrite" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


BAD_RESUMES: dict[str, tuple[dict[str, object], str]] = {
    "another width": ({"n_embd": 32}, "shape of the model"),
    "another batch": ({"total_batch_size": 16 * T}, "--total-batch-size"),
    "another seed": ({"seed": 2}, "--seed"),
    "another order": ({"shuffle": False}, "--shuffle"),
    "fewer shards": ({"num_shards": 2}, "--num-shards"),
    "fewer steps than done": ({"max_steps": 1}, "--max-steps 1"),
}


@pytest.mark.parametrize("case", BAD_RESUMES)
def test_a_resume_with_other_settings_is_refused(
    case: str,
    train: Callable[..., Path],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    change, message = BAD_RESUMES[case]
    run = train(max_steps=2)
    before = (run / "metrics.jsonl").read_bytes()
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": run, "resume": True, **change})
    assert message in fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "config.json", "SHA256SUMS"])
def test_damaged_checkpoints_are_one_line(
    name: str,
    train: Callable[..., Path],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """With no whole checkpoint left a run does not start over in silence."""
    run = train(max_steps=2)
    file = run / "checkpoints" / "step_000002" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": run, "resume": True})
    line = fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
    assert "step_000002" in line
    flags = {**WITHOUT_SHAPE, "data_dir": data_dir, "out_dir": run.with_name("new"), "init_from": run}
    flags = as_flags(flags)
    fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
    assert not run.with_name("new").exists()


HOSTILE_STATES: dict[str, Callable[[dict], object]] = {
    "moments of another shape": lambda state: change_moments(state, lambda moment: torch.zeros(3)),
    "moments of 2^40": lambda state: change_moments(state, lambda moment: torch.zeros(1).expand(2**40)),
    "numbers for moments": lambda state: change_moments(state, lambda moment: 3),
    "numbers for a state": lambda state: state["optimizer"].update({k: 3 for k in state["optimizer"]}),
    "an empty state": lambda state: state["optimizer"].update({k: {} for k in state["optimizer"]}),
    "a tensor for the scaler": lambda state: state.update(scaler={"x": torch.zeros(1)}),
    "a tensor for the identity": lambda state: state.update(identity={"model": torch.zeros(2)}),
    "words for seconds": lambda state: state.update(seconds={"training": "x"}),
    "a list": lambda state: state.update(optimizer=[1]),
}


def change_moments(state: dict, change: Callable[[torch.Tensor], object]) -> None:
    for own in state["optimizer"].values():
        own.update({key: change(value) for key, value in own.items() if value.dim()})


@pytest.mark.parametrize("case", HOSTILE_STATES)
def test_false_training_states_are_one_line(
    case: str,
    train: Callable[..., Path],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Checksums and all in order, as someone else's run may be."""
    run = train(max_steps=2)
    folder = run / "checkpoints" / "step_000002"
    state = torch.load(folder / "training_state.pt")
    HOSTILE_STATES[case](state)
    torch.save(state, folder / "training_state.pt")
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    own = f"{sha256_of(folder / 'training_state.pt')}  training_state.pt"
    sums = [own if line.endswith("training_state.pt") else line for line in sums]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": run, "resume": True, "max_steps": 4})
    assert "step_000002" in fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)


def test_an_out_dir_that_is_a_file_is_refused(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": out_dir})
        line = fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)
        assert f"--out-dir {out_dir}" in line


def test_a_read_only_out_dir_is_refused(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """/proc refuses even the superuser, whom a mode of 0o555 would not stop."""
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux")
    flags = as_flags({**TINY, "data_dir": data_dir, "out_dir": "/proc/run"})
    assert "/proc/run" in fails(train_gpt2.main, ["--preset", "demo", *flags], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run there"),
        ("", "no losses"),
        ("hello\n", "line 1"),
        ("1 train x\n", "line 1"),
        ("1 loss 3\n", "line 1"),
    ],
)
def test_unreadable_logs_are_one_line(
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    log = tmp_path / "log.txt"
    if content is not None:
        log.write_text(content)
    assert message in fails(plot_loss.main, [str(log)], monkeypatch, capsys)
    assert not (tmp_path / "loss_curves.png").exists()


def test_errors_name_the_runs_below_a_folder(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Scripts look into log/, where a preset's run may be one level deeper."""
    train("log/demo", max_steps=0, checkpoint_interval=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag_data, "fetch", lambda: pytest.fail("examples were fetched"))
    for main, args in (
        (plot_loss.main, []),
        (generate.main, ["--prompt", "x"]),
        (hellaswag.main, []),
        (upload_hf.main, ["--repo-id", "ann/x"]),
    ):
        assert "(runs there: log/demo)" in fails(main, args, monkeypatch, capsys)


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": "1", "kind": "val"}', '{"step": 1}', "\x00"])
def test_a_broken_record_before_the_last_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "kind": "val", "loss": 3}}\n')
    assert "line 1" in fails(plot_loss.main, [str(tmp_path)], monkeypatch, capsys)


def test_an_unknown_figure_format_is_refused(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = train(max_steps=2)
    assert "--out" in fails(plot_loss.main, [str(run), "--out", str(tmp_path / "a.xyz")], monkeypatch, capsys)
    assert not (tmp_path / "a.xyz").exists()


def test_errors_of_a_process_are_one_line_and_status_2(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_000001.npy", 400)
    flags = as_flags({**TINY, "data_dir": tmp_path, "out_dir": tmp_path / "run"})
    for nproc in (0, 2):
        done = run_script("train_gpt2.py", "--preset", "demo", *flags, nproc=nproc)
        assert done.returncode == (1 if nproc else 2)  # torchrun has an exit status of its own
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "NAME_val_NNNNNN.npy" in errors[0]
        assert 'train_gpt2.py", line' not in done.stderr  # no traceback through the script
        assert not (tmp_path / "run").exists()
