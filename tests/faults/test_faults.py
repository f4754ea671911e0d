"""Runs survive faults: real processes, broken at random moments, end as if nothing had happened.

`make test-faults` runs all of this and prints a table; `make test` a selection.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fault_runs import STEPS, Run, tally
from helpers import environment, history

from support import checkpoint, metrics

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="breaks processes by way of Linux"),
]
Expected = list[dict[str, object]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_stops_after_one_or_two_signals(
    run: Run, expected: Expected, number: signal.Signals, times: int
) -> None:
    row = tally(f"{number.name}, {'once' if times == 1 else 'twice'}")
    process = run.start()
    run.wait_for_step(random.randint(3, 60), process)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.01)
    row.injected += 1
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert run.lost() == 0
    row.lost.append(0)
    assert run.finish().returncode == 0
    run.check(expected)
    row.survived += 1


def limit_file_size(n_bytes: int) -> None:
    """For Popen's preexec_fn: what is written beyond `n_bytes` of a file fails as on a full disk."""
    import resource  # not on Windows

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_run_survives_a_full_disk(run: Run, expected: Expected, what: str) -> None:
    """A file that cannot grow: the weights' (a few MB) in a checkpoint, or metrics.jsonl.

    The first checkpoint that cannot be written is only recorded, the second in a row ends the run.
    """
    row = tally(f"no space left for the {what}")
    process = run.start()
    run.wait_for_step(12, process)
    process.kill()
    process.communicate(timeout=60)
    whole = checkpoint.latest_intact(run.out)[0]
    limit = 2_000_000 if what == "checkpoint" else (run.out / "metrics.jsonl").stat().st_size + 500
    done = run.finish(preexec_fn=lambda: limit_file_size(limit))
    row.injected += 1
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert ("checkpoint failed" in (run.out / "metrics.jsonl").read_text()) == (what == "checkpoint")
    assert "File too large" in lines[0] or "No space" in lines[0]
    assert checkpoint.latest_intact(run.out)[0] == whole
    row.lost.append(run.lost())
    assert run.finish().returncode == 0
    run.check(expected)
    row.survived += 1


def test_a_run_survives_an_out_dir_that_turns_read_only(run: Run, expected: Expected) -> None:
    """The checkpoints' folder becomes a file, which stops even the superuser."""
    row = tally("folder of checkpoints cannot be written")
    process = run.start()
    run.wait_for_step(7, process)
    process.kill()
    process.communicate(timeout=60)
    checkpoints, aside = run.out / "checkpoints", run.out / "aside"
    checkpoints.rename(aside)
    checkpoints.write_text("")
    row.injected += 1
    done = run.finish()
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    checkpoints.unlink()
    aside.rename(checkpoints)
    row.lost.append(run.lost())
    assert run.finish().returncode == 0
    run.check(expected)
    row.survived += 1


@pytest.mark.parametrize("damage", ["vanishes", "is cut short"])
def test_a_run_survives_a_shard_that_vanishes(
    fault_data: Path, tmp_path: Path, expected: Expected, damage: str
) -> None:
    row = tally(f"a shard {damage} while in use")
    data = tmp_path / "data"
    shutil.copytree(fault_data, data)
    run = Run(data, tmp_path / "run")
    process = run.start()
    run.wait_for_step(8, process)
    for shard in data.glob("*_train_*"):
        if damage == "vanishes":
            shard.unlink()
        else:
            os.truncate(shard, 1000)
    row.injected += 1
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "deleted or cut short" in errors
    row.lost.append(run.lost())
    shutil.copytree(fault_data, data, dirs_exist_ok=True)
    assert run.finish().returncode == 0
    run.check(expected)
    row.survived += 1


def test_a_pipe_in_place_of_a_shard_is_refused(fault_data: Path, tmp_path: Path, expected: Expected) -> None:
    """Opening it would wait for a writer for ever."""
    row = tally("a named pipe in place of a shard")
    data = tmp_path / "data"
    shutil.copytree(fault_data, data)
    run = Run(data, tmp_path / "run")
    process = run.start()
    run.wait_for_step(8, process)
    run.kill(process)
    shard = data / "x_train_000001.npy"
    shard.unlink()
    os.mkfifo(shard)
    row.injected += 1
    row.lost.append(run.lost())
    done = run.finish(timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{shard}: not a regular file" in done.stderr
    shard.unlink()
    shutil.copy(fault_data / shard.name, shard)
    assert run.finish().returncode == 0
    run.check(expected)
    row.survived += 1


# What stands for wandb: it works for a while, then fails as if its service were gone.
TRACKER = """
class Run:
    def __init__(self): self.left = 20
    def define_metric(self, *args, **kwargs): pass
    def log(self, values):
        self.left -= 1
        if not self.left:
            raise ConnectionError("the service is down")
def init(**kwargs): return Run()
"""


def test_a_run_survives_a_failing_tracker(fault_data: Path, tmp_path: Path, expected: Expected) -> None:
    """In each of two processes, the first of which is killed later."""
    row = tally("a tracker fails")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(TRACKER)
    run = Run(fault_data, tmp_path / "run", track="wandb")
    run.env["PYTHONPATH"] = str(tmp_path / "site")
    process = run.start()
    run.wait_for_step(40, process)
    run.kill(process)
    done = run.finish()
    assert done.returncode == 0
    assert done.stderr == (
        "warning: --track wandb: ConnectionError: the service is down: training continues without it\n"
    )
    failed = [r for r in metrics.read(run.out / "metrics.jsonl") if r.get("name") == "tracker failed"]
    assert [r["tracker"] for r in failed] == ["wandb"] * 2
    run.check(expected)
    row.injected += 2
    row.survived += 2


def test_a_run_survives_a_clock_that_jumps_back(run: Run, expected: Expected, tmp_path: Path) -> None:
    """time.time() falls by an hour at every call; what a step took is still positive."""
    row = tally("the clock jumps back an hour")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import itertools, time\nreal, hours = time.time, itertools.count()\n"
        "time.time = lambda: real() - 3600 * next(hours)\n"
    )
    row.injected += 1
    done = run.finish(env={**environment(), "PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    run.check(expected)
    times = [r["step_ms"] for r in metrics.read(run.out / "metrics.jsonl") if r["kind"] == "train"]
    assert min(times) > 0
    row.survived += 1


def test_a_second_run_in_one_folder_is_refused(run: Run, expected: Expected) -> None:
    row = tally("a second run in the same folder")
    process = run.start()
    run.wait_for_step(2, process)
    row.injected += 1
    second = run.finish()
    assert second.returncode == 2
    assert "another process is training in it" in second.stderr
    process.communicate(timeout=120)
    assert process.returncode == 0
    run.check(expected)
    row.survived += 1


def close(records: Expected) -> list[object]:
    """Losses of a history to within what the order of adding makes of them."""
    return [pytest.approx(r["loss"], abs=2e-4) for r in records]


def test_a_run_moves_between_numbers_of_processes(run: Run, expected: Expected) -> None:
    """Begun on two processes, continued on one and on four: the same order of data."""
    row = tally("two processes, then one, then four")
    for nproc, until in ((2, 20), (0, 40)):
        process = run.start(nproc=nproc)
        run.wait_for_step(until, process)
        os.kill(run.rank_processes()[0] if nproc else process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
        row.injected += 1
        row.lost.append(run.lost())
    assert run.finish(nproc=4).returncode == 0
    records = history(run.out)
    assert [(r["step"], r["kind"]) for r in records] == [(r["step"], r["kind"]) for r in expected]
    assert [r["loss"] for r in records] == close(expected)
    row.survived += 2


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_replaces_a_rank_that_dies(run: Run, expected_of_two: Expected, rank: int) -> None:
    """Twice in one run, without anyone giving a command."""
    row = tally(f"SIGKILL of rank {rank} of two, replaced by torchrun")
    process = run.start(nproc=2, torchrun=("--standalone", "--max-restarts=3"))
    for until in (random.randint(3, 40), random.randint(60, 100)):
        run.wait_for_step(until, process)
        os.kill(run.rank_processes()[rank], signal.SIGKILL)
        row.injected += 1
        row.lost.append(run.lost())
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    run.check(expected_of_two)
    row.survived += 2


def test_ranks_stop_when_only_torchrun_is_killed(run: Run, expected_of_two: Expected) -> None:
    """It leaves processes that soon save and end; none is left to train unnoticed."""
    row = tally("SIGKILL of torchrun alone")
    process = run.start(nproc=2)
    run.wait_for_step(random.randint(3, 60), process)
    process.kill()
    left_behind = run.rank_processes()
    row.injected += 1
    try:
        output, errors = process.communicate(timeout=30)  # until the last process has closed its end
    finally:
        run.kill(process)
    assert len(left_behind) == 2
    assert errors.count("torchrun is gone: stopping after this step") == 1 and "Traceback" not in errors
    assert f"stopped by SIGTERM after step {run.last_step()}" in output
    assert run.lost() == 0
    row.lost.append(0)
    assert run.finish(nproc=2).returncode == 0
    run.check(expected_of_two)
    row.survived += 1


@pytest.mark.parametrize("victim", [0, 1])
def test_two_machines_finish_after_one_dies_and_comes_back(
    run: Run, expected_of_two: Expected, victim: int
) -> None:
    """Two agents as on two machines, started again as the loop of workflow.md does.

    The first is the one where they meet: without it the other ends too, and is started again.
    """
    row = tally(f"machine {victim + 1} of two dies and comes back")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = ("--nnodes=2", "--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}")
    env = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def start_machine() -> subprocess.Popen:
        return run.start(nproc=1, torchrun=(*meet, "--rdzv_id=test"), env=env, **quiet)

    machines = [start_machine(), start_machine()]
    run.wait_for_step(random.randint(12, 60), machines[0])
    children = [pid for pid in run.rank_processes().values() if parent(pid) == machines[victim].pid]
    for pid in (machines[victim].pid, *children):
        os.kill(pid, signal.SIGKILL)
    row.injected += 1
    row.lost.append(run.lost())
    machines[victim].wait(timeout=60)
    deadline = time.monotonic() + 240
    while any(machine.poll() != 0 for machine in machines):
        assert time.monotonic() < deadline
        for number, machine in enumerate(machines):
            if machine.poll():
                machines[number] = start_machine()
        time.sleep(1)
    run.check(expected_of_two)
    row.survived += 1


def parent(pid: int) -> int:
    """The process that started `pid`."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_no_token_is_ever_written(run: Run, fault_data: Path) -> None:
    """A login in the environment appears in nothing that a run prints or writes, an error included."""
    secret = "hf_" + "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=34))
    env = {**environment(), "HF_TOKEN": secret, "WANDB_API_KEY": secret}
    small = Run(fault_data, run.out, max_steps=4, init_from="scratch")
    done = small.finish(env=env)
    assert done.returncode == 0, done.stderr
    failed = Run(fault_data, run.out.with_name("failed"), init_from="nobody/nothing").finish(env=env)
    assert failed.returncode == 2
    written = [path.read_bytes() for path in run.out.rglob("*") if path.is_file()]
    for content in (*written, *(text.encode() for text in (done.stdout, done.stderr, failed.stderr))):
        assert secret.encode() not in content


def test_the_undisturbed_run_is_whole(expected: Expected) -> None:
    """The reference for all other tests has each step once, with finite losses that fall."""
    steps = [r["step"] for r in expected if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    losses = np.array([r["loss"] for r in expected])
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 1
