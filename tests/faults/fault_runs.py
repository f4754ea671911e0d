"""Real training processes to break, and the table of what they survived."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helpers import TINY, as_flags, command, environment, history

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


def tally(fault: str) -> Tally:
    return TABLE.setdefault(fault, Tally())


class Run:
    """A training run in a folder, started again and again with the same command."""

    def __init__(self, data_dir: Path, out: Path, **settings: object) -> None:
        self.out = out
        self.flags = as_flags({**SETTINGS, "data_dir": data_dir, "out_dir": out, **settings})

    def start(
        self, nproc: int = 0, torchrun: Sequence[str] = ("--standalone",), **popen: object
    ) -> subprocess.Popen:
        line = command("train_gpt2.py", "--preset", "demo", *self.flags, nproc=nproc, torchrun=torchrun)
        options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, **{**options, **popen})

    def finish(self, **options: object) -> subprocess.CompletedProcess:
        """Start and wait for the end."""
        process = self.start(**options)
        output, errors = process.communicate(timeout=300)
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

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 120
        while self.last_step() < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def check(self, expected: list[dict[str, object]]) -> None:
        """The metrics of the undisturbed run, bit for bit, each step once; nothing half-written around."""
        assert history(self.out) == expected
        assert checkpoint.latest_intact(self.out)[0].name == f"step_{STEPS:06d}"
        assert not list(self.out.rglob(".*unfinished*"))
        assert (self.out / "summary.json").exists()
