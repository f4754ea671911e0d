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
    fake_library.load(fake_library.build(Path(tempfile.gettempdir())))

import argparse  # noqa: E402
import collections  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402

import fake_device  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from recorder import COLLECTIVE, Recorder  # noqa: E402

fake_device.install()

import train_gpt2  # noqa: E402
from model import GPT  # noqa: E402
from settings import read_settings  # noqa: E402

# The rehearsal, as short as it can be with every part in it; each step has two rounds.
FLAGS = (  # noqa: SIM905
    "--preset rehearsal --dataset-repo none --num-shards 0 --device cuda --no-compile --overwrite "
    "--max-steps 4 --val-interval 2 --hellaswag-interval 2 --sample-interval 2 --checkpoint-interval 2 "
    "--val-tokens 131072"
).split()
EXAMPLE = {
    "ctx": "A man is in the park. He", "ctx_a": "A man is in the park.", "ctx_b": "he", "label": 1,
    "activity_label": "Park", "endings": ["runs.", "sits.", "throws the ball to a dog.", "sings a song."],
}  # fmt: skip


def write_data(folder: Path) -> None:
    """Shards and HellaSwag examples to train on."""
    rng = np.random.default_rng(0)
    for name, sequences in (("tiny_val_000000", 128), ("tiny_train_000001", 2048)):
        np.save(folder / f"{name}.npy", rng.integers(0, 50256, 1024 * sequences + 1).astype(np.uint16))
    lines = [json.dumps({**EXAMPLE, "ctx": EXAMPLE["ctx"] + " and" * i}) for i in range(20)]
    (folder / "hellaswag.jsonl").write_text("\n".join(lines) + "\n")


def train(flags: list[str], processes: int, folder: Path, capacity: float = 80e9) -> Recorder:
    """train_gpt2.py with these flags, as rank 0 of `processes`; returns what was recorded."""
    if not (folder / "hellaswag.jsonl").exists():
        write_data(folder)
    paths = ["--data-dir", str(folder), "--out-dir", str(folder / "run")]
    paths += ["--hellaswag-data", str(folder / "hellaswag.jsonl")]
    settings = read_settings([*FLAGS, "--total-batch-size", str(128 * 1024 * processes), *paths, *flags])
    os.environ["WORLD_SIZE"] = str(processes)
    recorder = Recorder(capacity)
    update, generate = train_gpt2.update, GPT.generate

    def counted(*args: object) -> object:
        recorder.begin_step()
        return update(*args)

    train_gpt2.update = counted
    # Three tokens show all there is to see, in a twentieth of the time.
    GPT.generate = lambda self, idx, n, *args, **kwargs: generate(self, idx, min(n, 3), *args, **kwargs)
    try:
        with fake_device.device(recorder):
            status = train_gpt2.train(settings)
    finally:
        train_gpt2.update, GPT.generate = update, generate
    if status:
        raise RuntimeError(f"exit status {status}")
    return recorder


def describe(recorder: Recorder) -> str:
    """The record for a person to read."""
    places = collections.Counter()
    for e in recorder.entries:
        if e.kind != COLLECTIVE:
            places[(e.phase, e.kind, f"{e.place}:{e.line}", e.name)] += 1
    lines = ["", "where the host copies or waits (phase, kind, line, operation):"]
    lines += [f"{n:6} x {'  '.join(key)}" for key, n in sorted(places.items())]
    lines += ["", "collectives of a step (round, operation, number, MB):"]
    found = collections.defaultdict(list)
    for e in recorder.entries:
        if e.kind == COLLECTIVE and e.step == 1 and e.phase == "update":
            where = f"round {e.round}" if e.in_backward else "after the rounds"
            found[(where, e.name, e.place)].append(e.n_bytes)
    lines += [f"  {'  '.join(k)}  {len(v)}  {sum(v) / 1e6:.1f} MB" for k, v in found.items()]
    lines += ["", f"peak: {recorder.peak_bytes / 1e9:.2f} GB"]
    lines += [f"  {n / 1e9:7.2f} GB  {what}" for what, n in recorder.report()["largest_at_peak"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="this one is rank 0 of so many")
    parser.add_argument("--gpu-memory", type=float, default=80, help="of the device, in GB")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        print(describe(train(flags, args.processes, Path(folder), args.gpu_memory * 1e9)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
