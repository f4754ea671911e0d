"""Which recipe needs the fewest tokens, on a ladder of GPT-2 shapes.

    python benchmarks/recipe.py --data-dir DIR --rungs 2x64 2x128 --seeds 3    # train what has no result yet
    python benchmarks/recipe.py --report                                      # only the table and the figure

Each recipe is trained on each rung at several learning rates, a factor of 1.4 apart, until the best of them
lies between two others; then at the best one with several seeds and for several lengths, each with its own
decay. The measure is the tokens after which a recipe has the loss that the reference recipe ends with,
interpolated between its lengths in the logarithm of the tokens. Seeds are paired: each gives initial weights
and an order of the data that all recipes share.

A result is a line of --results, known by its settings: what is there already is not run again, and a run that
was interrupted continues. So the ladder can grow over days, and on several machines. Results of runs beside
other work are better without their seconds: delete those.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import vocabulary

from pre_tokens import shards
from settings import PRESETS
from support import cli, files, metrics, tokenizer
from support.cli import Dtype, UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    data_dir: Path = Path("data/builtin")
    """Folder of token shards."""
    rungs: list[str] = field(default_factory=lambda: ["2x64"])
    """Shapes to train, LAYERSxWIDTH with heads of 64: 2x64, 2x128, 4x192, 6x256, 12x768."""
    recipes: list[str] = field(default_factory=lambda: ["adamw", "muon"])
    """Recipes to train beside the reference."""
    lengths: list[float] = field(default_factory=lambda: [5.0, 10.0])
    """Lengths of a run, in tokens per parameter of the blocks' matrices. Rates are swept at the shortest."""
    seeds: int = 3
    """Seeds for each recipe at its best rate."""
    jobs: int = 1
    """Runs at the same time; they share the cores."""
    dtype: Dtype = "auto"
    """Precision of matrix products."""
    results: Path = ROOT / "benchmarks" / "recipe_results.jsonl"
    """File of results, one line for each run; of one data set."""
    out_dir: Path = Path("benchmarks/log/recipe")
    """Folder for the runs under way, report.md and recipe.png."""
    report: bool = False
    """Train nothing: report what --results holds."""


# ---------------------------------------------------------------- the ladder


@dataclass(frozen=True)
class Rung:
    n_layer: int
    n_embd: int
    total_batch_size: int
    sequence_length: int = 256
    vocab_size: int = 2048

    @property
    def block_parameters(self) -> int:
        return 12 * self.n_layer * self.n_embd**2

    def steps(self, length: float) -> int:
        return max(1, round(length * self.block_parameters / self.total_batch_size))

    def flags(self) -> dict[str, object]:
        names = ("n_layer", "n_embd", "total_batch_size", "sequence_length")
        shape = {name: getattr(self, name) for name in names}
        return {**shape, "block_size": self.sequence_length, "n_head": self.n_embd // 64}


RUNGS = {
    "2x64": Rung(2, 64, 1024),
    "2x128": Rung(2, 128, 2048),
    "4x192": Rung(4, 192, 4096),
    "6x256": Rung(6, 256, 8192),
    "12x768": Rung(12, 768, 65_536, 1024, tokenizer.VOCAB_SIZE),
}
VAL_TOKENS = 65_536


@dataclass(frozen=True)
class Recipe:
    """What a run is trained with, beside its rate, which the sweep finds from `learning_rate` on."""

    learning_rate: float
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.02  # fraction of all steps
    min_lr_ratio: float = 0.0
    cooldown_fraction: float = 0.3
    weight_decay: float = 0.1
    embedding_lr_ratio: float = 1.0
    ingredients: str = ""  # of benchmarks/trial.py, separated by commas
    base: str = ""  # the recipe that this one varies

    @classmethod
    def of_preset(cls, name: str) -> "Recipe":
        p = PRESETS[name]
        names = [f.name for f in dataclasses.fields(cls) if hasattr(p, f.name) and f.name != "learning_rate"]
        rate = p.learning_rate * 2  # small models take larger rates
        return cls(rate, warmup=p.warmup_steps / p.max_steps, **{name: getattr(p, name) for name in names})

    def flags(self, steps: int) -> dict[str, object]:
        values = dataclasses.asdict(self)
        values["warmup_steps"] = round(values.pop("warmup") * steps)
        del values["ingredients"], values["base"]
        return values


REFERENCE = "reference"
RECIPES = {
    REFERENCE: Recipe.of_preset("gpt2-124m"),
    "adamw": Recipe(4.8e-3, schedule="linear", warmup=0.1),
    "muon": dataclasses.replace(Recipe.of_preset("gpt2-124m-muon"), cooldown_fraction=0.7),
}
# Recipes that differ from those in one thing each.
VARIANTS = {
    "adamw": {
        "warmup-2": {"warmup": 0.02},
        "cosine": {"schedule": "cosine"},
        "decay": {"weight_decay": 0.4},
        "embedding-2": {"embedding_lr_ratio": 2.0},
        **{name: {"ingredients": name} for name in ("zero-init", "betas-80", "average")},
    },
    "muon": {
        "cooldown-30": {"cooldown_fraction": 0.3},
        "linear": {"schedule": "linear"},
        "warmup-10": {"warmup": 0.1},
        "decay": {"weight_decay": 0.4},
        "decay-cautious": {"weight_decay": 0.4, "ingredients": "cautious"},
        "embedding-1": {"embedding_lr_ratio": 1.0},
        "embedding-4": {"embedding_lr_ratio": 4.0},
        **{
            name: {"ingredients": name}
            for name in (
                "normuon", "polar-express", "cubic", "momentum-warmup", "zero-init", "betas-80", "average",
            )
        },
    },
}  # fmt: skip
for base, variants in VARIANTS.items():
    for name, changes in variants.items():
        RECIPES[f"{base}-{name}"] = dataclasses.replace(RECIPES[base], base=base, **changes)


# ---------------------------------------------------------------- runs

Result = dict[str, object]


class Ladder:
    """Runs that are asked for, from the results or trained now."""

    def __init__(self, s: Settings) -> None:
        self.s = s
        self.lock = threading.Lock()
        lines = s.results.read_text(encoding="utf-8").splitlines() if s.results.exists() else []
        self.results: list[Result] = [json.loads(line) for line in lines]
        self.pool = concurrent.futures.ThreadPoolExecutor(s.jobs)
        self.started: dict[tuple, concurrent.futures.Future[Result]] = {}

    def find(self, key: Result) -> Result | None:
        """The result of the run with these settings."""
        return next((r for r in self.results if all(r.get(name) == key[name] for name in key)), None)

    def start(
        self, rung: str, recipe: str, rate: float, length: float, seed: int
    ) -> concurrent.futures.Future[Result]:
        """The run's result, once it is trained."""
        run = (rung, recipe, rate, length, seed)
        with self.lock:
            if run not in self.started:
                self.started[run] = self.pool.submit(self.train, *run)
            return self.started[run]

    def train(self, rung: str, recipe: str, rate: float, length: float, seed: int) -> Result:
        """Train one run to its end, or find it among the results."""
        shape, s = RUNGS[rung], self.s
        steps = shape.steps(length)
        flags = {**shape.flags(), **RECIPES[recipe].flags(steps), "learning_rate": rate}
        flags |= {"max_steps": steps, "seed": seed, "val_tokens": VAL_TOKENS, "dtype": s.dtype}
        ingredients = RECIPES[recipe].ingredients
        if other := next((r["data"] for r in self.results if r["data"] != self.data), None):
            raise UserError(
                f"--results {s.results}: its runs are on {other}, not {self.data}: name another file"
            )
        key = {
            "data": self.data,
            "rung": rung,
            "vocab_size": shape.vocab_size,
            "recipe": recipe,
            "ingredients": ingredients,
        }
        key |= {"length": length, "flags": flags}
        if found := self.find(key):
            return found
        run = s.out_dir / f"{rung}-{recipe}-{rate:g}-{length:g}-{seed}"
        flags_of_place = {
            "data_dir": self.data_dir(shape),
            "dataset_repo": "none",
            "out_dir": run,
            "val_interval": steps,  # before the first step and after the last
            "hellaswag_interval": 0,
            "sample_interval": 0,
            "keep_checkpoints": 1,
        }
        script = str(ROOT / "benchmarks" / "trial.py")
        # What an ingredient remembers is in no checkpoint.
        start = "--overwrite" if ingredients else "--resume"
        command = [sys.executable, script, str(shape.vocab_size), ingredients, start]
        for name, value in {**flags, **flags_of_place}.items():
            command += ["--" + name.replace("_", "-"), str(value)]
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
        print(f"{run.name:32} loss {result['loss']:.4f}  {result['seconds']:.0f} s", flush=True)
        return result

    @functools.cached_property
    def data(self) -> str:
        """The data set's name and its training tokens."""
        found = shards.find_shards(self.s.data_dir)["train"]
        return f"{found[0].name}-{sum(shard.n_tokens for shard in found)}"

    def data_dir(self, shape: Rung) -> Path:
        """The folder of shards in this rung's vocabulary."""
        if shape.vocab_size == tokenizer.VOCAB_SIZE:
            return self.s.data_dir
        folder = self.s.out_dir / f"tokens-{self.data}-{shape.vocab_size}"
        with self.lock:
            vocabulary.reencode_folder(self.s.data_dir, folder, shape.vocab_size)
        return folder

    def finish(self, rung: str, recipe: str) -> None:
        """Every run of this recipe on this rung: the sweep, then the best rate with all seeds and lengths."""
        rate = self.rate(recipe, self.best_exponent(rung, recipe))
        seeds = range(1, self.s.seeds + 1)
        runs = [self.start(rung, recipe, rate, length, seed) for seed in seeds for length in self.s.lengths]
        for run in runs:
            run.result()

    def rate(self, recipe: str, exponent: int) -> float:
        return RECIPES[recipe].learning_rate * 2 ** (exponent / 2)

    def best_exponent(self, rung: str, recipe: str) -> int:
        """Of the best learning rate at the shortest length with the first seed; its neighbours are worse.

        A factor of 2 apart at first, then the square root of 2. A variant starts where its base ends.
        """
        length, base = min(self.s.lengths), RECIPES[recipe].base
        best = self.best_exponent(rung, base) if base else 0
        losses: dict[int, float] = {}
        for step in (1,) if base else (2, 1):
            while wanted := {best - step, best, best + step} - set(losses):
                runs = {k: self.start(rung, recipe, self.rate(recipe, k), length, 1) for k in wanted}
                losses |= {k: as_loss(future.result()["loss"]) for k, future in runs.items()}
                best = min(losses, key=losses.get)
        return best


def as_loss(value: float | None) -> float:
    """A run that diverged has no loss."""
    return math.inf if value is None else value


def outcome(run: Path) -> Result:
    """What a finished run has to tell: its last validation loss, and the seconds of its steps."""
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


# ---------------------------------------------------------------- report


def tokens_to_reach(target: float, tokens: Iterable[float], losses: Iterable[float]) -> float:
    """Tokens at which runs of these lengths, each decayed to its end, come down to `target`.

    Interpolated in the logarithm of the tokens; beyond the shortest and the longest run a straight line goes
    on for a factor of 2 at most. NaN where that does not reach.
    """
    points = sorted(zip(tokens, losses, strict=True))
    x, y = np.log([t for t, _ in points]), np.array([loss for _, loss in points])
    for i in range(len(x) - 1):
        (x0, x1), (y0, y1) = x[i : i + 2], y[i : i + 2]
        first, last = i == 0, i == len(x) - 2
        at = x0 + (x1 - x0) * (y0 - target) / (y0 - y1) if y0 > y1 else math.nan
        low, high = x0 - math.log(2) * first, x1 + math.log(2) * last
        if low <= at <= high:
            return math.exp(at)
    return math.nan


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t (NaN for one value)."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    n = len(values)
    half = t.get(n, 2.3) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def compare(results: list[Result], rung: str, recipe: str) -> Result | None:
    """One row of the table: a recipe at its best rate beside the reference at its own, on one rung."""
    runs = by_seed(results, rung, recipe)
    reference = by_seed(results, rung, REFERENCE)
    seeds = sorted(set(runs) & set(reference))
    if not seeds:
        return None
    longest = min(max(max(lengths) for lengths in side.values()) for side in (runs, reference))
    seeds = [s for s in seeds if longest in runs[s] and longest in reference[s]]
    differences, ratios, seconds = [], [], []
    for seed in seeds:
        target, own = reference[seed][longest], runs[seed]
        differences.append(own[longest]["loss"] - target["loss"])
        reached = tokens_to_reach(
            target["loss"], [r["tokens"] for r in own.values()], [r["loss"] for r in own.values()]
        )
        ratios.append(math.log(reached / target["tokens"]))
        if "seconds" in own[longest] and "seconds" in target:
            seconds.append(own[longest]["seconds"] / target["seconds"])
    mean, half = interval(ratios)
    difference, its_half = interval(differences)
    return {
        "rung": rung,
        "recipe": recipe,
        "rate": runs[seeds[0]][longest]["flags"]["learning_rate"],
        "length": longest,
        "seeds": len(seeds),
        "loss": float(np.mean([runs[s][longest]["loss"] for s in seeds])),
        "difference": difference,
        "difference_half": its_half,
        "ratio": math.exp(mean),
        "ratio_low": math.exp(mean - half),
        "ratio_high": math.exp(mean + half),
        "step_time": float(np.median(seconds)) if seconds else math.nan,
    }


def by_seed(results: list[Result], rung: str, recipe: str) -> dict[int, dict[float, Result]]:
    """The runs of a recipe at its best rate, by seed and length."""
    own = [r for r in results if (r["rung"], r["recipe"]) == (rung, recipe) and r["loss"] is not None]
    if not own:
        return {}
    shortest = min(r["length"] for r in own)
    sweep = [r for r in own if r["length"] == shortest and r["flags"]["seed"] == 1]
    if not sweep:
        return {}
    best = min(sweep, key=lambda r: r["loss"])["flags"]["learning_rate"]
    found: dict[int, dict[float, Result]] = {}
    for r in own:
        if r["flags"]["learning_rate"] == best:
            found.setdefault(r["flags"]["seed"], {})[r["length"]] = r
    return found


def table(rows: list[Result]) -> str:
    """The rows as Markdown."""
    lines = [
        "| shape | recipe | best rate | tokens per block parameter | seeds | loss | minus the reference's | "
        "tokens to the reference's loss | time of a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            r["rung"],
            r["recipe"],
            f"{r['rate']:.2g}",
            f"{r['length']:g}",
            str(r["seeds"]),
            f"{r['loss']:.4f}",
            f"{r['difference']:+.4f} ± {r['difference_half']:.4f}",
            f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})",
            f"{r['step_time']:.2f}",
        ]
        # One seed has no interval, one length no ratio.
        cells = [re.sub(r" ± nan| ?\(nan to nan\)|^nan", "", cell) for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[Result], out: Path) -> None:
    """Tokens to the reference's loss against the model's size, one line per recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for recipe in dict.fromkeys(r["recipe"] for r in rows):
        own = [r for r in rows if r["recipe"] == recipe and not math.isnan(r["ratio"])]
        sizes = [RUNGS[r["rung"]].block_parameters for r in own]
        ratios = np.array([r["ratio"] for r in own])
        bars = [ratios - [r["ratio_low"] for r in own], [r["ratio_high"] for r in own] - ratios]
        axes.errorbar(sizes, ratios, np.nan_to_num(bars), marker="o", capsize=3, label=recipe)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters in the blocks' matrices")
    axes.set_ylabel("tokens to the reference's loss, as a fraction of its own")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out)


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
    rows = [compare(ladder.results, rung, recipe) for rung in RUNGS for recipe in RECIPES]
    rows = [row for row in rows if row]
    s.out_dir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(s.out_dir / "report.md", table(rows) + "\n")
    draw(rows, s.out_dir / "recipe.png")
    print(f"{table(rows)}\nfigure: {s.out_dir / 'recipe.png'}")


if __name__ == "__main__":
    cli.run(main)
