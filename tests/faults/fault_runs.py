"""Real training processes to break, and the table of what they survived."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from helpers import ROOT, TINY, as_flags, command, environment, history
from loopback_hub import LoopbackHub

from support import checkpoint, metrics

STEPS = 160
SETTINGS = {
    **TINY, "max_steps": STEPS, "warmup_steps": 10, "val_interval": 40, "checkpoint_interval": 5,
    "keep_checkpoints": 2, "sample_interval": 0, "resume": True,
}  # fmt: skip


@dataclass
class Tally:
    """One row of the table: how often a fault struck, was survived, and how many steps it cost."""

    injected: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)


TABLE: dict[str, Tally] = {}
REPO = "ann/run"


def tally(fault: str) -> Tally:
    return TABLE.setdefault(fault, Tally())


def wait_until(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Run:
    """A training run in a folder, started again and again with the same command; it may push to a hub."""

    def __init__(
        self,
        data_dir: Path,
        out: Path,
        hub: LoopbackHub | None = None,
        script: str = "train_gpt2.py",
        **settings: object,
    ) -> None:
        self.out, self.script = out, script
        settings = {**SETTINGS, "data_dir": data_dir, "dataset_repo": "none", "out_dir": out, **settings}
        self.settings = {**settings, "push_to_hub": REPO} if hub else settings
        self.env = {**environment(), **(hub.environment(out.parent) if hub else {})}

    def start(
        self, nproc: int = 0, torchrun: Sequence[str] = ("--standalone",), **popen: object
    ) -> subprocess.Popen:
        flags = as_flags(self.settings)
        line = command(self.script, "--preset", "demo", *flags, nproc=nproc, torchrun=torchrun)
        options = {"env": self.env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, **{**options, **popen})

    def start_recipe(self, pause: int = 10, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen:
        """The loop of workflow.md for spot instances, on two processes, with the flags of this run."""
        chapter = (ROOT / "workflow.md").read_text(encoding="utf-8").split("### Spot instances")[1]
        line = re.search(r"^    (for (?:.*\n)*?    done)$", chapter, re.MULTILINE)[1]
        flags = as_flags({k: v for k, v in self.settings.items() if k not in ("resume", "push_to_hub")})
        for written, here in (
            ("--nproc_per_node=8", "--nproc_per_node=2"),
            ("train_gpt2.py", f"train_gpt2.py --preset demo {' '.join(flags)}"),
            ("USER/NAME", REPO),
            ("sleep 10", f"sleep {pause}"),
            ("{1..20}", "{1..1000}"),  # a soak has more faults than a run
        ):
            assert line.count(written) == 1
            line = line.replace(written, here)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", line], env={**self.env, "PATH": path}, cwd=ROOT,
            stdout=stdout, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, timeout: float = 300, **options: object) -> subprocess.CompletedProcess:
        """Start and wait for the end."""
        process = self.start(**options)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def last_step(self) -> int:
        records = metrics.read(self.out / "metrics.jsonl")
        return max((r["step"] for r in records if r["kind"] == "train"), default=0)

    def last_checkpoint(self) -> int:
        return max(map(checkpoint.step_of, checkpoint.folders(self.out)), default=0)

    def lost(self) -> int:
        """Steps that were done and will have to be done again."""
        return max(0, self.last_step() - self.last_checkpoint())

    def rank_processes(self) -> dict[int, int]:
        """Rank -> process id of the training processes that torchrun has started."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes()
                if str(self.out).encode() in line and b"torch.distributed.run" not in line:
                    pairs = (v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if v)
                    found[int(dict(pairs)[b"RANK"])] = int(folder.name)
            except (OSError, KeyError):
                continue
        return found

    def processes(self) -> list[int]:
        """All processes with this run's folder in their command line: shells, torchrun, ranks."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if str(self.out).encode() in line.replace(b" ", b"\0").split(b"\0"):
                found.append(int(folder.name))
        return found

    def kill_all(self) -> None:
        """SIGKILL of every process of this run."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL of a process and of all that it has started for this run."""
        self.kill_all()
        process.communicate(timeout=60)

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 120
        while self.last_step() < step:
            assert process.poll() is None, process.communicate(timeout=60)
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_checkpoint(self, step: int, process: subprocess.Popen) -> None:
        wait_until(lambda: self.last_checkpoint() >= step or process.poll() is not None)
        assert process.poll() is None, process.communicate(timeout=60)

    def check(self, expected: list[dict[str, object]]) -> None:
        """The metrics of the undisturbed run, bit for bit, each step once; nothing half-written around."""
        assert history(self.out) == expected
        assert checkpoint.step_of(checkpoint.latest_intact(self.out)[0]) == expected[-1]["step"]
        for leftover in ("checkpoints/.*", ".from-hub"):
            assert not list(self.out.glob(leftover))
        assert (self.out / "summary.json").exists()
