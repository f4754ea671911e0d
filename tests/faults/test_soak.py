"""Minutes of training in the restart loop of workflow.md, with a fault every half minute.

make soak                # 20 minutes, then the undisturbed run of as many steps
make soak MINUTES=2
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_runs import REPO, Run, tally, wait_until
from helpers import check_complete, history
from loopback_hub import LoopbackHub

from support import checkpoint

MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))
EVERY = 30  # seconds from a fault to the next, or longer if the run does not train again by then
OUTAGE = 8  # seconds until what goes away by itself does so
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="breaks processes by way of Linux"),
    pytest.mark.skipif(not MINUTES, reason="make soak runs it"),
]

# What stands for wandb: a service that is down while a file is there.
TRACKER = """
import os
class Run:
    def define_metric(self, *args, **kwargs): pass
    def finish(self): pass
    def log(self, values):
        if os.path.exists({flag!r}):
            raise ConnectionError("the service is down")
def init(**kwargs): return Run()
"""


class Box:
    """The machine that trains, two processes of it, and all that may happen to them."""

    def __init__(self, fault_data: Path, folder: Path, hub: LoopbackHub) -> None:
        self.hub, self.pristine, self.data, self.log = hub, fault_data, folder / "data", folder / "log.txt"
        shutil.copytree(fault_data, self.data)
        self.flag = folder / "tracker_is_down"
        (folder / "site").mkdir()
        (folder / "site" / "wandb.py").write_text(TRACKER.format(flag=str(self.flag)))
        self.run = Run(self.data, folder / "run", hub, **settings(10**6), track="wandb")
        self.run.env["PYTHONPATH"] = str(folder / "site")
        self.loop = self.start()

    def start(self) -> subprocess.Popen:
        with open(self.log, "a") as log:
            return self.run.start_recipe(pause=1, stdout=log)

    def faults(self) -> list[Callable[[], None]]:
        return [
            self.kill_rank_0, self.kill_rank_1, self.kill_torchrun, self.stop_torchrun, self.power_failure,
            self.power_failure_in_a_checkpoint, self.power_failure_in_an_evaluation, self.damaged_checkpoint,
            self.lost_box, self.hub_is_busy, self.hub_out_of_reach, self.token_revoked,
            self.repository_vanishes, self.tracker_is_down, self.shard_vanishes, self.pipe_for_a_shard,
            self.no_space, self.checkpoints_cannot_be_written, self.second_run,
        ]  # fmt: skip

    def torchrun(self) -> int:
        """Its process id: the child of the loop."""
        wait_until(lambda: self.children())
        return self.children()[0]

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.loop.pid}/task/{self.loop.pid}/children")
        own = self.run.processes()  # without the loop's `sleep`
        return [int(pid) for pid in path.read_text().split() if int(pid) in own]

    def kill_rank(self, rank: int) -> None:
        wait_until(lambda: rank in self.run.rank_processes())
        os.kill(self.run.rank_processes()[rank], signal.SIGKILL)

    def kill_rank_0(self) -> None:
        self.kill_rank(0)

    def kill_rank_1(self) -> None:
        self.kill_rank(1)

    def kill_torchrun(self) -> None:
        os.kill(self.torchrun(), signal.SIGKILL)

    def stop_torchrun(self) -> None:
        os.kill(self.torchrun(), signal.SIGTERM)

    def power_failure(self) -> None:
        self.run.kill(self.loop)
        self.loop = self.start()

    def power_failure_in_a_checkpoint(self) -> None:
        wait_until(lambda: list(self.run.out.glob("checkpoints/.unfinished-step*")))
        self.power_failure()

    def power_failure_in_an_evaluation(self) -> None:
        wait_until(lambda: (self.run.out / ".evaluating.json").exists())
        self.power_failure()

    def damaged_checkpoint(self) -> None:
        self.run.kill(self.loop)
        for folder in checkpoint.folders(self.run.out)[:1]:
            os.truncate(folder / "model.safetensors", 1000)
        self.loop = self.start()

    def lost_box(self) -> None:
        self.run.kill(self.loop)
        shutil.rmtree(self.run.out)
        self.loop = self.start()

    def hub_fails(self, **how: object) -> None:
        self.hub.fail("/", times=10**6, **how)
        time.sleep(OUTAGE)
        self.hub.faults.clear()

    def hub_is_busy(self) -> None:
        self.hub_fails(status=503)

    def hub_out_of_reach(self) -> None:
        self.hub_fails(break_after=0)

    def token_revoked(self) -> None:
        self.hub_fails(status=401)

    def repository_vanishes(self) -> None:
        """And is brought back, in place of what may have been created there in the meantime."""
        repos = dict(self.hub.repos)
        self.hub.repos.clear()
        time.sleep(OUTAGE)
        self.hub.repos.update(repos)

    def tracker_is_down(self) -> None:
        self.flag.touch()
        time.sleep(OUTAGE)
        self.flag.unlink()

    def shard_is(self, replace: Callable[[Path], None]) -> None:
        """Both training shards are replaced, and the processes killed; no start succeeds for a while."""
        shards = list(self.data.glob("*_train_*"))
        for shard in shards:
            shard.unlink()
            replace(shard)
        self.power_failure()
        time.sleep(OUTAGE)
        for shard in shards:
            shard.unlink(missing_ok=True)
            shutil.copy(self.pristine / shard.name, shard)

    def shard_vanishes(self) -> None:
        self.shard_is(lambda shard: None)

    def pipe_for_a_shard(self) -> None:
        self.shard_is(os.mkfifo)

    def no_space(self) -> None:
        """Files of rank 0 cannot grow beyond 2 MB: the second checkpoint in a row that fails ends it."""
        import resource  # not on Windows

        wait_until(lambda: 0 in self.run.rank_processes())
        limits = (2_000_000, resource.RLIM_INFINITY)
        resource.prlimit(self.run.rank_processes()[0], resource.RLIMIT_FSIZE, limits)

    def checkpoints_cannot_be_written(self) -> None:
        """Their folder becomes a file, and is brought back."""
        checkpoints, aside = self.run.out / "checkpoints", self.run.out / "aside"
        wait_until(lambda: checkpoints.is_dir())
        checkpoints.rename(aside)
        checkpoints.write_text("")
        time.sleep(OUTAGE)
        self.run.kill(self.loop)
        checkpoints.unlink(missing_ok=True)
        aside.rename(checkpoints)
        self.loop = self.start()

    def second_run(self) -> None:
        second = self.run.start(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: second.poll() is not None)
        assert second.returncode == 2

    def end_loop(self) -> None:
        """Let torchrun stop after the step, without the loop that would start another."""
        torchrun = self.torchrun()
        self.loop.kill()
        os.kill(torchrun, signal.SIGTERM)
        wait_until(lambda: not self.run.processes())

    def trains_since(self, moment: float) -> bool:
        """True if a step has been recorded since this moment (seconds of time.time())."""
        record = self.run.out / "metrics.jsonl"
        if not record.exists() or record.stat().st_mtime <= moment:
            return False
        with open(record, "rb") as file:
            file.seek(max(0, record.stat().st_size - 2000))
            lines = file.read().splitlines()
        return any(b'"kind": "train"' in line for line in lines[-1:])

    def wait_until_it_trains(self) -> None:
        """Until a step has been recorded; twice, as a start at first rewrites the record of earlier steps."""
        for _ in range(2):
            moment = time.time()
            wait_until(lambda: self.trains_since(moment), seconds=600)  # noqa: B023

    def forget_history(self) -> None:
        """Drop older commits of the Hub, which would fill the memory."""
        with self.hub.lock:
            for repo in self.hub.repos.values():
                repo.commits[:-2] = [(sha, title, {}) for sha, title, _ in repo.commits[:-2]]
            kept = {id(data) for repo in self.hub.repos.values() for data in repo.files.values()}
            self.hub.blobs = {oid: data for oid, data in self.hub.blobs.items() if id(data) in kept}


def settings(max_steps: int) -> dict[str, object]:
    """Of a run whose steps are the same however many are to come."""
    return {
        "max_steps": max_steps, "min_lr_ratio": 1.0, "val_interval": 20, "checkpoint_interval": 0,
        "checkpoint_minutes": 0.05,
    }  # fmt: skip


@pytest.fixture
def box(fault_data: Path, tmp_path: Path, hub: LoopbackHub) -> Iterator[Box]:
    made = Box(fault_data, tmp_path, hub)
    yield made
    made.run.kill_all()


def test_a_restart_loop_survives_faults_for_minutes(
    box: Box, fault_data: Path, tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture
) -> None:
    run, end, coming = box.run, time.monotonic() + 60 * MINUTES, []
    box.wait_until_it_trains()
    while time.monotonic() < end:
        due = time.monotonic() + EVERY
        coming = coming or random.sample(box.faults(), len(box.faults()))  # each once, then each again
        fault = coming.pop()
        row = tally(f"soak: {fault.__name__.replace('_', ' ')}")
        before = run.last_step()
        fault()
        row.injected += 1
        box.wait_until_it_trains()
        row.lost.append(max(0, before - run.last_step()))
        row.survived += 1
        box.forget_history()
        time.sleep(max(0, due - time.monotonic()))
    box.end_loop()
    last = run.last_step() // 20 * 20 + 20
    run.settings |= settings(last)
    box.loop = box.start()
    assert box.loop.wait(timeout=600) == 0, box.log.read_text()[-5000:]
    whole = Run(fault_data, tmp_path / "whole", **settings(last))
    assert whole.finish(nproc=2, timeout=60 * (60 + 2 * MINUTES), stdout=subprocess.DEVNULL).returncode == 0
    run.check(history(whole.out))
    assert check_complete(hub.repo(REPO).files, tmp_path) == [last]
    with capsys.disabled():
        print(f"\n{last} steps, bit for bit those of an undisturbed run")
