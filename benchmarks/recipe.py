"""Find the recipe that needs the fewest tokens, on a ladder of GPT-2 shapes.

    python benchmarks/recipe.py --data-dir DIR --rungs 2x64 2x128 --seeds 3    # train what has no result yet
    python benchmarks/recipe.py --report                                      # only the table and the figure

Each recipe is trained on each rung at several learning rates, a factor of 1.4 apart, until the best lies
between two others. Then it is trained at the best rate with several seeds and for several lengths, each with
its own decay. The measure is the tokens after which a recipe reaches the final loss of the reference recipe,
interpolated between its lengths in the logarithm of the tokens. Seeds are paired: each gives all recipes the
same initial weights and order of the data.

A result is a line of --results, identified by its settings. Existing results are not repeated, and an
interrupted run continues. So the ladder can grow over days, and on several machines. If a run shared its
machine with other work, delete the seconds of its result.
"""

import concurrent.futures
import datetime
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import recipe_report
import vocabulary
from ladder import RECIPES, REFERENCE, RUNGS, Rung, base_of
from recipe_report import Result

from pre_tokens import shards
from support import cli, files, metrics, tokenizer
from support.cli import AtLeast1, Dtype, UserError

ROOT = Path(__file__).resolve().parent.parent
VAL_TOKENS = 65_536


@dataclass
class Settings:
    data_dir: Path = Path("data/builtin")
    """Folder of token shards."""
    rungs: list[str] = field(default_factory=lambda: ["2x64"])
    """Shapes to train, LAYERSxWIDTH with heads of 64: 2x64, 4x64, 2x128, 2x192, 4x192, 6x256, 12x768."""
    recipes: list[str] = field(default_factory=lambda: ["adamw", "muon"])
    """Recipes to train, besides the reference."""
    lengths: list[float] = field(default_factory=lambda: [5.0, 10.0])
    """Lengths of a run, in tokens per parameter of the blocks' matrices. Rates are swept at the shortest."""
    seeds: AtLeast1 = 3
    """Seeds for each recipe at its best rate."""
    jobs: AtLeast1 = 1
    """Runs at the same time; they share the cores."""
    dtype: Dtype = "auto"
    """Precision of matrix products."""
    results: Path = ROOT / "benchmarks" / "recipe_results.jsonl"
    """File of results, one line for each run; of one data set."""
    out_dir: Path = Path("benchmarks/log/recipe")
    """Folder for the runs under way, report.md and recipe.png."""
    report: bool = False
    """Train nothing: report what --results holds."""


class Ladder:
    """Results of runs, trained now if they are missing."""

    def __init__(self, s: Settings) -> None:
        self.s = s
        self.lock = threading.Lock()
        lines = s.results.read_text(encoding="utf-8").splitlines() if s.results.exists() else []
        self.results: list[Result] = [json.loads(line) for line in lines]
        self.pool = concurrent.futures.ThreadPoolExecutor(s.jobs)
        self.started: dict[tuple, concurrent.futures.Future[Result]] = {}

    def key(self, rung: str, recipe: str, rate: float, length: float, seed: int) -> Result:
        """Settings that identify a result."""
        shape, steps = RUNGS[rung], RUNGS[rung].steps(length)
        flags = {**shape.flags(), **RECIPES[recipe].flags(steps), "learning_rate": rate, "max_steps": steps}
        flags |= {"seed": seed, "val_tokens": VAL_TOKENS, "dtype": self.s.dtype}
        about = {"data": self.data, "rung": rung, "vocab_size": shape.vocab_size, "recipe": recipe}
        return {**about, "length": length, "flags": flags}

    def find(self, key: Result) -> Result | None:
        """Return the result of the run with these settings, or None."""
        return next((r for r in self.results if all(r.get(name) == key[name] for name in key)), None)

    def start(
        self, rung: str, recipe: str, rate: float, length: float, seed: int
    ) -> concurrent.futures.Future[Result]:
        """Return the future result of a run."""
        run = (rung, recipe, rate, length, seed)
        with self.lock:
            if run not in self.started:
                self.started[run] = self.pool.submit(self.train, *run)
            return self.started[run]

    def train(self, rung: str, recipe: str, rate: float, length: float, seed: int) -> Result:
        """Train one run to its end, or return its existing result."""
        shape, s = RUNGS[rung], self.s
        key = self.key(rung, recipe, rate, length, seed)
        if other := next((r["data"] for r in self.results if r["data"] != self.data), None):
            raise UserError(
                f"--results {s.results}: its runs are on {other}, not {self.data}: name another file"
            )
        if found := self.find(key):
            return found
        # A recipe can change under its name: a folder that an earlier one left must not be continued.
        mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        run = s.out_dir / f"{rung}-{recipe}-{rate:g}-{length:g}-{seed}-{mark}"
        flags_of_place = {
            "data_dir": self.data_dir(shape),
            "dataset_repo": "none",
            "out_dir": run,
            "val_interval": shape.steps(length),  # before the first step and after the last
            "hellaswag_interval": 0,
            "sample_interval": 0,
            "keep_checkpoints": 1,
            "max_bad_steps": shape.steps(length),  # too large a rate is a result, not an error
        }
        flags = cli.flags({**key["flags"], **flags_of_place})
        command = [sys.executable, str(ROOT / "train_gpt2.py"), "--resume", *flags]
        threads = max(1, (os.cpu_count() or 1) // s.jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise UserError(cli.last_error(done.stderr))
        result = {**key, **outcome(run)}
        with self.lock:
            self.results.append(result)
            with open(s.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        print(f"{run.name:40} loss {as_loss(result['loss']):.4f}  {result['seconds']:.0f} s", flush=True)
        return result

    @functools.cached_property
    def data(self) -> str:
        """Name of the data set and its training tokens."""
        found = shards.find_shards(self.s.data_dir)["train"]
        return f"{found[0].name}-{sum(shard.n_tokens for shard in found)}"

    def data_dir(self, shape: Rung) -> Path:
        """Return the folder of shards in this rung's vocabulary."""
        if shape.vocab_size == tokenizer.VOCAB_SIZE:
            return self.s.data_dir
        folder = self.s.out_dir / f"tokens-{self.data}-{shape.vocab_size}"
        with self.lock:
            vocabulary.reencode_folder(self.s.data_dir, folder, shape.vocab_size)
        return folder

    def finish(self, rung: str, recipe: str) -> None:
        """Do all runs of a recipe on a rung: the sweep, then the best rate with all seeds and lengths."""
        rate = self.rate(recipe, self.best_exponent(rung, recipe))
        seeds = range(1, self.s.seeds + 1)
        runs = [self.start(rung, recipe, rate, length, seed) for seed in seeds for length in self.s.lengths]
        for run in runs:
            run.result()

    def rate(self, recipe: str, exponent: int) -> float:
        return RECIPES[recipe].learning_rate * 2 ** (exponent / 2)

    def best_exponent(self, rung: str, recipe: str) -> int:
        """Find the exponent of the best learning rate at the shortest length with the first seed.

        Its neighbours are worse. The search starts with factors of 2, then of the square root of 2. It begins
        with the latter if a start is known: the best rate with a result, that of a variant's base, or that of
        this recipe on a rung below.
        """
        length, base = min(self.s.lengths), base_of(recipe)
        keys = {k: self.key(rung, recipe, self.rate(recipe, k), length, 1) for k in range(-12, 13)}
        losses = {k: as_loss(found["loss"]) for k, key in keys.items() if (found := self.find(key))}
        if losses:
            start = min(losses, key=losses.get)
        else:
            start = self.best_exponent(rung, base) if base else self.exponent_below(rung, recipe)
        best = start or 0
        for step in (2, 1) if start is None else (1,):
            while wanted := {best - step, best, best + step} - set(losses):
                runs = {k: self.start(rung, recipe, self.rate(recipe, k), length, 1) for k in wanted}
                losses |= {k: as_loss(future.result()["loss"]) for k, future in runs.items()}
                best = min(losses, key=losses.get)
        return best

    def exponent_below(self, rung: str, recipe: str) -> int | None:
        """Return the exponent of a recipe's best rate on the next rung below that has results."""
        for below in reversed(list(RUNGS)[: list(RUNGS).index(rung)]):
            for runs in recipe_report.best_runs(self.results, below, recipe).values():
                for run in runs.values():
                    return round(2 * math.log2(run["flags"]["learning_rate"] / self.rate(recipe, 0)))
        return None


def as_loss(value: float | None) -> float:
    """Return the loss of a run, infinity if it diverged."""
    return math.inf if value is None else value


def outcome(run: Path) -> Result:
    """Read the result of a finished run: its last validation loss, and the seconds of its steps."""
    records = metrics.read(run / "metrics.jsonl")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return {
        "loss": [r["loss"] for r in records if r["kind"] == "val"][-1],
        "seconds": round(sum(r["step_ms"] for r in records if r["kind"] == "train") / 1000, 1),
        "tokens": max(r["tokens"] for r in records if r["kind"] == "train"),
        "hardware": config["hardware"]["name"],
        "commit": config["git_commit"],
        "torch": config["versions"]["torch"],
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    s = cli.parse(Settings, "Measure recipes on a ladder of GPT-2 shapes.")
    for name, known in (("rungs", RUNGS), ("recipes", RECIPES)):
        for value in getattr(s, name):
            if value not in known:
                raise UserError(f"--{name} {value}: not one of {', '.join(known)}")
    ladder = Ladder(s)
    if not s.report:
        recipes = dict.fromkeys([REFERENCE, *s.recipes])
        for rung in s.rungs:
            # As many at a time as runs, so that none waits for the last run of another's sweep.
            with concurrent.futures.ThreadPoolExecutor(s.jobs) as pool:
                list(pool.map(functools.partial(ladder.finish, rung), recipes))
    text = recipe_report.text(ladder.results)
    s.out_dir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(s.out_dir / "report.md", text)
    recipe_report.draw(ladder.results, s.out_dir / "recipe.png")
    print(f"{text}figure: {s.out_dir / 'recipe.png'}")


if __name__ == "__main__":
    cli.run(main)
