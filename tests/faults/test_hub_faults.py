"""Faults of the Hub, and boxes that are lost, in real processes that push to a Hub on a loopback port."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import REPO, STEPS, Run, tally, wait_until
from helpers import check_complete
from loopback_hub import LoopbackHub

from support import checkpoint, metrics

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="breaks processes by way of Linux"),
]
Expected = list[dict[str, object]]


def on_hub(hub: LoopbackHub) -> int:
    """The step of the newest checkpoint in the repository, 0 if there is none."""
    files = hub.repo(REPO).files if hub.repos else {}
    steps = [checkpoint.step_of(Path(name).parent) for name in files if name.endswith(checkpoint.CHECKSUMS)]
    return max(steps, default=0)


def steps_lost(run: Run, hub: LoopbackHub) -> int:
    """Steps that have to be done again if the run folder is gone."""
    return max(0, run.last_step() - on_hub(hub))


OUTAGES: dict[str, Callable[[LoopbackHub], object]] = {
    "the Hub answers 503 while the run pushes": lambda hub: hub.fail("/", status=503, times=10**6),
    "the Hub cannot be reached while the run pushes": lambda hub: hub.fail("/", break_after=0, times=10**6),
    "the repository vanishes": lambda hub: hub.repos.clear(),
    "the token is revoked while the run pushes": lambda hub: hub.fail("/", status=401, times=10**6),
}


@pytest.mark.parametrize("fault", OUTAGES)
def test_a_run_survives_a_failing_hub(
    pushing: Run, hub: LoopbackHub, expected: Expected, tmp_path: Path, fault: str
) -> None:
    """The run trains to its end; an outage it catches up with itself, the others at the next start."""
    row = tally(fault)
    process = pushing.start()
    wait_until(lambda: on_hub(hub) > 0)
    OUTAGES[fault](hub)
    row.injected += 1
    pushing.wait_for_step(pushing.last_step() + 30, process)
    passes = fault.startswith("the Hub ")
    if passes:
        hub.faults.clear()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    pushing.check(expected)
    failed = [r for r in metrics.read(pushing.out / "metrics.jsonl") if r.get("name") == "push failed"]
    assert failed and "warning: step_" in output
    if not passes:
        assert (
            f"step_{STEPS:06d} is not on the Hub: run the same command with --resume to upload it" in output
        )
        hub.faults.clear()
        done = pushing.finish()
        assert done.returncode == 0, done.stderr
    assert check_complete(hub.repo(REPO).files, tmp_path) == [STEPS]
    row.survived += 1


@pytest.mark.parametrize("path", ["^/lfs/", "/commit/"])
def test_a_run_survives_a_kill_during_a_push(
    pushing: Run, hub: LoopbackHub, expected: Expected, tmp_path: Path, path: str
) -> None:
    """While a file is on its way, and while the commit is; on the disk and on the Hub all is whole."""
    row = tally("SIGKILL in the middle of a push, the box is lost")
    process = pushing.start()
    wait_until(lambda: on_hub(hub) > 0)
    hub.fail(path, delay=60, times=999)
    wait_until(lambda: hub.faults[0].times < 999)
    pushing.kill(process)
    hub.faults.clear()
    row.injected += 1
    held = check_complete(hub.repo(REPO).files, tmp_path)
    assert len(held) == 1 and 0 < held[0] < STEPS
    row.lost.append(steps_lost(pushing, hub))
    shutil.rmtree(pushing.out)
    done = pushing.finish()
    assert done.returncode == 0, done.stderr
    starts = [r for r in metrics.read(pushing.out / "metrics.jsonl") if r.get("name") == "resume"]
    assert [r["step"] for r in starts] == held
    pushing.check(expected)
    assert check_complete(hub.repo(REPO).files, tmp_path) == [STEPS]
    row.survived += 1


def test_a_run_survives_the_loss_of_its_machine(
    pushing: Run, hub: LoopbackHub, expected: Expected, tmp_path: Path
) -> None:
    """Three times in one run, each on an empty folder; the next is killed while its folder is filled."""
    row, interrupted = tally("the box is lost with its disk"), tally("SIGKILL while a lost run is fetched")
    for _ in range(3):
        before = on_hub(hub)
        process = pushing.start()
        wait_until(lambda: on_hub(hub) > before)  # noqa: B023
        pushing.wait_for_step(on_hub(hub) + random.randint(1, 10), process)
        pushing.kill(process)
        row.injected += 1
        row.lost.append(steps_lost(pushing, hub))
        shutil.rmtree(pushing.out)
    hub.bytes_per_second = 2e6  # a checkpoint has 10 MB
    process = pushing.start()
    wait_until(lambda: any(path.is_file() for path in (pushing.out / ".from-hub").rglob("*")))
    pushing.kill(process)
    assert not checkpoint.folders(pushing.out)
    hub.bytes_per_second = None
    interrupted.injected += 1
    done = pushing.finish()
    assert done.returncode == 0, done.stderr
    pushing.check(expected)
    assert check_complete(hub.repo(REPO).files, tmp_path) == [STEPS]
    row.survived += 3
    interrupted.survived += 1


def test_the_loop_for_spot_instances_survives_a_lost_machine(
    pushing: Run, hub: LoopbackHub, expected_of_two: Expected, tmp_path: Path
) -> None:
    """The loop as workflow.md has it: killed with its box, and the very same line on the next one."""
    row = tally("workflow.md's spot instance, two processes")
    process = pushing.start_recipe()
    wait_until(lambda: on_hub(hub) > 0)
    pushing.wait_for_step(on_hub(hub) + random.randint(1, 20), process)
    pushing.kill(process)
    row.injected += 1
    row.lost.append(steps_lost(pushing, hub))
    held = on_hub(hub)
    shutil.rmtree(pushing.out)
    process = pushing.start_recipe()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"fetching   checkpoints/step_{held:06d} of {REPO}" in output
    assert len(hub.downloads(f"checkpoints/step_{held:06d}/training_state.pt")) == 1  # by rank 0 alone
    assert hub.repo(REPO).private
    pushing.check(expected_of_two)
    assert check_complete(hub.repo(REPO).files, tmp_path) == [STEPS]
    row.survived += 1
