"""The real training script on a CUDA device that is not there: waits, copies, collectives, peak memory.

    python tests/fake_cuda/fake_training.py                                    # GPT-2 124M, one process
    python tests/fake_cuda/fake_training.py --processes 8 --optimizer muon     # and any flag of train_gpt2.py

Prints every place where the host copies or waits, the collectives of a step and the peak of live bytes.
Nothing is computed and no time is measured. Needs a C++ compiler, once.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import fake_library  # noqa: E402

if __name__ == "__main__":
    fake_library.load(fake_library.build())

import argparse  # noqa: E402
import collections  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import traceback  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from unittest import mock  # noqa: E402

import fake_device  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fake_compile import Graphs  # noqa: E402
from recorder import COLLECTIVE, Recorder  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

fake_device.install()
TORCHRUNS_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

import planted  # noqa: E402

import train_gpt2  # noqa: E402
from model import GPT  # noqa: E402
from settings import read_settings  # noqa: E402
from support import compiler  # noqa: E402
from train_gpt2 import Trainer  # noqa: E402

# The rehearsal, as short as it can be with every part in it: steps 1 and 2 follow each other without a pause.
FLAGS = (  # noqa: SIM905
    "--preset rehearsal --dataset-repo none --num-shards 0 --device cuda --no-compile --overwrite "
    "--max-steps 3 --val-interval 3 --hellaswag-interval 3 --sample-interval 3 --checkpoint-interval 3 "
    "--val-tokens 131072"
).split()
EXAMPLE = {
    "ctx": "A man is in the park. He", "ctx_a": "A man is in the park.", "ctx_b": "he", "label": 1,
    "activity_label": "Park", "endings": ["runs.", "sits.", "throws the ball to a dog.", "sings a song."],
}  # fmt: skip


@dataclass
class Case:
    """A run of the training script."""

    flags: list[str] = field(default_factory=list)  # of train_gpt2.py, after FLAGS
    processes: int = 1  # this one is rank 0 of so many
    gpu_memory: float = 80e9  # bytes; 0: one less than a step of the run before needed
    flops: bool = False  # count the last step's
    plant: str = ""  # a fault, by its name in planted.py


def write_data(folder: Path) -> None:
    """Shards and HellaSwag examples to train on."""
    rng = np.random.default_rng(0)
    for name, sequences in (("tiny_val_000000", 128), ("tiny_train_000001", 2048)):
        np.save(folder / f"{name}.npy", rng.integers(0, 50256, 1024 * sequences + 1).astype(np.uint16))
    lines = [json.dumps({**EXAMPLE, "ctx": EXAMPLE["ctx"] + " and" * i}) for i in range(20)]
    (folder / "hellaswag.jsonl").write_text("\n".join(lines) + "\n")


class Training:
    """train_gpt2.train() on the fake device, and what was seen of it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.recorder = Recorder(case.gpu_memory)
        self.graphs = Graphs(fullgraph=case.processes == 1)  # DDP is compiled in parts
        self.step_peak = 0  # of live bytes within a step
        self.flops = 0  # of the last step
        self._step, self._generate = Trainer.step, GPT.generate
        write_data(folder)
        flags = [*FLAGS, "--total-batch-size", str(128 * 1024 * case.processes)]
        flags += ["--data-dir", str(folder), "--out-dir", str(folder / "run")]
        flags += ["--hellaswag-data", str(folder / "hellaswag.jsonl")]
        self.settings = read_settings([*flags, *case.flags])

    def run(self) -> None:
        """Train to the end. Raises whatever the script raises."""
        with (
            mock.patch.dict(os.environ, TORCHRUNS_VARIABLES, WORLD_SIZE=str(self.case.processes)),
            mock.patch.object(Trainer, "step", lambda trainer, batches: self.step(trainer, batches)),
            mock.patch.object(GPT, "generate", self.generate_few()),
            # fake_compile.py needs neither Triton nor a compiler.
            mock.patch.multiple(compiler, _has_triton=lambda: True, try_out=lambda rt: None),
            planted.FAULTS[self.case.plant](),
            self.graphs,
            fake_device.device(self.recorder),
        ):
            try:
                status = train_gpt2.train(self.settings)
            finally:
                if torch.distributed.is_initialized():  # the script has failed
                    torch.distributed.destroy_process_group()
        if status:
            raise RuntimeError(f"exit status {status}")

    def step(self, *args: object) -> object:
        """The script's own, counted."""
        recorder = self.recorder
        recorder.begin_step()
        before = recorder.peak_bytes
        recorder.reset_peak()
        count = self.case.flops and recorder.step == self.settings.max_steps
        with FlopCounterMode(display=False) if count else contextlib.nullcontext() as counter:
            result = self._step(*args)
        if counter:
            self.flops = counter.get_total_flops()
        self.step_peak = max(self.step_peak, recorder.peak_bytes)
        recorder.peak_bytes = max(before, recorder.peak_bytes)
        return result

    def generate_few(self) -> object:
        """GPT.generate, but three tokens: they show all there is to see in a twentieth of the time."""
        generate = self._generate
        return lambda model, idx, n, *args, **kwargs: generate(model, idx, min(n, 3), *args, **kwargs)

    def report(self) -> dict[str, object]:
        """Return the observations as plain values."""
        seen = {"step_peak": self.step_peak, "flops": self.flops, "graphs": self.graphs.report()}
        return {**self.recorder.report(), **seen}


def describe(training: Training) -> str:
    """Format the observations as text."""
    places = collections.Counter()
    collectives = collections.defaultdict(list)
    for e in training.recorder.entries:
        if e.kind != COLLECTIVE:
            places[(e.phase, e.kind, f"{e.place}:{e.line}", e.name)] += 1
        elif e.step == 1 and e.phase == "step":
            where = f"round {e.round}" if e.in_backward else "after the rounds"
            collectives[(where, e.name, f"{e.place}:{e.line}")].append(e.n_bytes)
    seen = training.report()
    graphs, gb = seen["graphs"], 1e9
    lines = ["", "where the host copies or waits (phase, kind, line, operation):"]
    lines += [f"{n:6} x {'  '.join(key)}" for key, n in sorted(places.items())]
    lines += ["", "collectives of a step (round, operation, line, number, MB):"]
    lines += [f"  {'  '.join(k)}  {len(v)}  {sum(v) / 1e6:.1f}" for k, v in collectives.items()]
    lines += [
        "",
        f"peak: {seen['peak_bytes'] / gb:.2f} GB, within a step {seen['step_peak'] / gb:.2f} GB; then live:",
    ]
    lines += [f"  {n / gb:7.2f} GB  {what}" for what, n in seen["largest_at_peak"]]
    if saved := graphs.pop("saved", None):
        sizes = collections.Counter()
        for tensor in saved:
            sizes[f"{tensor['dtype']} {tuple(tensor['shape'])} {tensor['operation']}"] += tensor["bytes"]
        peak = graphs.pop("backward_peak")
        lines += ["", f"compiled: {graphs}", f"peak of the backward pass: {peak / gb:.2f} GB"]
        lines += [f"saved for it: {sizes.total() / gb:.2f} GB"]
        lines += [f"  {n / gb:7.2f} GB  {what}" for what, n in sizes.most_common(15)]
    return "\n".join(lines)


def run_all(cases: list[Case]) -> list[dict[str, object]]:
    """The reports of these runs, one after another; of a run that fails {"error": its traceback}."""
    reports = []
    for case in cases:
        case.gpu_memory = case.gpu_memory or reports[-1]["step_peak"] - 1
        with tempfile.TemporaryDirectory() as folder:
            training = Training(case, Path(folder))
            try:
                training.run()
                reports.append(training.report())
            except Exception:
                reports.append({"error": traceback.format_exc()})
        del training
        gc.collect()
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="this one is rank 0 of so many")
    parser.add_argument("--gpu-memory", type=float, default=80, help="of the device, in GB")
    parser.add_argument(
        "--cases", type=Path, help="a JSON list of cases; their reports are written beside it"
    )
    args, flags = parser.parse_known_args()
    if args.cases:
        cases = [Case(**case) for case in json.loads(args.cases.read_text())]
        args.cases.with_suffix(".out").write_text(json.dumps(run_all(cases)))
        return
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Case(flags, args.processes, args.gpu_memory * 1e9), Path(folder))
        training.run()
    print(describe(training))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
