"""A hundred SIGKILLs, at random moments of every phase in the life of a run."""

import contextlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import REPO, Run, tally, wait_until
from helpers import check_complete, history
from loopback_hub import LoopbackHub

from support import attempts, checkpoint

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="breaks processes by way of Linux"),
]
KILLS = 100
LAST = 60
SETTINGS = {
    "max_steps": LAST, "val_interval": 12, "checkpoint_interval": 6, "sample_interval": 20,
    "dataset_repo": "ann/words",
}  # fmt: skip
# Phase -> the longest wait, in seconds, between its first sign and the kill: about as long as it lasts.
PHASES = {
    "fetch": 1.5, "start-up": 4, "steps": 0.1, "evaluation": 0.05, "checkpoint": 0.15, "push": 0.2, "end": 1,
}  # fmt: skip


class Life:
    """A run from an empty disk to its end, as its folders show it from outside."""

    def __init__(self, fault_data: Path, folder: Path, hub: LoopbackHub) -> None:
        self.data, self.hub = folder / "data", hub
        shards = {file.name: file.read_bytes() for file in fault_data.glob("*.npy")}
        hub.put("ann/words", shards, "dataset")
        self.n_shards = len(shards)
        hub.bytes_per_second = 4e4  # of each download: two seconds for a shard
        self.run = Run(self.data, folder / "run", hub, **SETTINGS)
        self.out = self.run.out
        self.look_back()

    def look_back(self) -> None:
        """Remember what a process that is about to start will find."""
        self.before = self.record(), self.under_way(), self.run.last_checkpoint(), self.parts()

    def record(self) -> int:
        """The inode of metrics.jsonl: each process that opens its record makes another one."""
        path = self.out / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def parts(self) -> list[tuple[str, int]]:
        """Names and sizes of shards that have arrived in part."""
        found = []
        for path in sorted(self.data.glob(".*.part")):
            with contextlib.suppress(FileNotFoundError):  # complete by now
                found.append((path.name, path.stat().st_size))
        return found

    def under_way(self) -> dict[str, int]:
        """Name of an evaluation -> how often it has begun without ending."""
        path = self.out / attempts.UNDER_WAY
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return {}

    def signs(self) -> dict[str, Callable[[], object]]:
        """Phase -> whether the process is in it; of phases that coincide the more telling one comes first."""
        record, under_way, _, parts = self.before
        opened = lambda: self.record() != record  # noqa: E731
        evaluating = lambda: self.under_way() not in ({}, under_way)  # noqa: E731
        ending = lambda: any(name.endswith((".txt", ".png")) for name in self.under_way())  # noqa: E731
        signs = {
            "fetch": lambda: self.parts() not in ([], parts),
            "start-up": lambda: not opened(),
            "end": lambda: opened() and ((self.out / "summary.json").exists() or (evaluating() and ending())),
            "evaluation": evaluating,
            "checkpoint": lambda: [*self.out.glob("checkpoints/.unfinished-*")],
            "push": lambda: [*self.out.glob("checkpoints/.pushing-*")],
        }
        return {**signs, "steps": lambda: self.advances() and not any(sign() for sign in signs.values())}

    def advances(self) -> bool:
        """True if the process has done a step."""
        record, _, steps_done, _ = self.before
        return self.record() != record and self.run.last_step() > steps_done

    def choose_phase(self) -> str:
        """Choose a phase that is still to come, and those that come only once whenever possible."""
        if len(list(self.data.glob("*.npy"))) < self.n_shards:
            return "fetch"
        if self.run.last_checkpoint() >= LAST - 6 and random.random() < 0.6 and not self.to_be_spared():
            return "end"
        return random.choice([phase for phase in PHASES if phase not in ("fetch", "end")])

    def to_be_spared(self) -> bool:
        """True if one more kill or two would make the run skip an evaluation."""
        return max(self.under_way().values(), default=0) >= attempts.MAX_DEATHS - 2

    def choose_step(self) -> int:
        """The step from which on to kill: between two kills the run advances by about a checkpoint."""
        if self.to_be_spared():
            return self.run.last_step() + 1
        return self.run.last_checkpoint() + random.randint(0, 12)

    def kill_once(self) -> str | None:
        """Start, and kill in a phase; returns in which one the kill fell, None if the run ended before."""
        phase, step = self.choose_phase(), self.choose_step()
        self.look_back()
        signs = self.signs()
        process = self.run.start()
        if phase not in ("start-up", "fetch", "end"):
            wait_until(
                lambda: process.poll() is not None or (self.advances() and self.run.last_step() >= step)
            )
        wait_until(lambda: process.poll() is not None or signs[phase]())
        time.sleep(random.uniform(0, PHASES[phase]))
        process.kill()
        _, errors = process.communicate(timeout=60)
        if process.returncode == -9:
            return next((phase for phase, sign in signs.items() if sign()), "steps")
        assert process.returncode == 0, errors
        return None

    def check(self, expected: list[dict[str, object]], tmp_path: Path) -> None:
        done = self.run.finish()
        assert done.returncode == 0, done.stderr
        self.run.check(expected)
        assert check_complete(self.hub.repo(REPO).files, tmp_path) == [LAST]
        assert not self.parts()


def test_a_run_survives_a_hundred_kills(fault_data: Path, tmp_path: Path) -> None:
    """Each life is a run that is killed again and again, and ends bit for bit as one that never was."""
    undisturbed = Run(fault_data, tmp_path / "undisturbed", **{**SETTINGS, "dataset_repo": "none"})
    assert undisturbed.finish().returncode == 0
    expected = history(undisturbed.out)
    kills = 0
    for number in itertools.count():
        (tmp_path / f"life_{number}").mkdir()
        rows = []
        with LoopbackHub() as hub:
            life = Life(fault_data, tmp_path / f"life_{number}", hub)
            while kills < KILLS:
                had_one = life.run.last_checkpoint() > 0
                phase = life.kill_once()
                if phase is None:
                    break
                kills += 1
                rows.append(tally(f"SIGKILL: {phase}"))
                rows[-1].injected += 1
                rows[-1].lost.append(life.run.lost())
                newest, _ = checkpoint.latest_intact(life.out)
                assert newest or not had_one, "there is always a whole checkpoint once there has been one"
            life.check(expected, tmp_path)
        for row in rows:
            row.survived += 1
        if kills == KILLS:
            return
