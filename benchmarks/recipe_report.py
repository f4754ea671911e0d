"""Report the results of benchmarks/recipe.py: the tokens that recipes save, as tables and a figure."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ladder import REFERENCE, RUNGS, base_of

Result = dict[str, object]
Runs = dict[int, dict[float, Result]]  # of one recipe on one rung, by seed and length

# Muon's steps to tuned AdamW's loss, as a fraction of its own, at 124M with rotary positions on FineWeb: in
# modded-nanogpt's early records, on its track 3, and there relative to the AdamW of pull request 353.
PUBLISHED = (6200 / 9536, 3250 / 5625, 3250 / 4950)
MUON_TO_ADAMW = "Muon, to tuned AdamW's loss"
EARLIER = "muon-beta2-95"  # the preset before it had AdamW's beta2 at 0.99, which suits small batches


# ---------------------------------------------------------------- statistics


def tokens_to_reach(target: float, tokens: Iterable[float], losses: Iterable[float]) -> float:
    """Interpolate the tokens at which runs of these lengths, each decayed to its end, reach `target`.

    Interpolates in the logarithm of the tokens, and extrapolates by a factor of 2 at most. NaN if that does
    not reach it.
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


def student_t(freedom: int) -> float:
    """Half the width of a 95 % confidence interval in standard errors (NaN without a degree of freedom)."""
    known = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
    return known[freedom] if freedom < len(known) else 2.16


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % confidence interval (NaN for one value)."""
    n = len(values)
    half = student_t(n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def line_at(at: float, x: list[float], y: list[float]) -> tuple[float, float]:
    """Fit a straight line by least squares; its value at `at`, and half of its 95 % interval."""
    x, y = np.array(x), np.array(y)
    slope, start = np.polyfit(x, y, 1)
    spread = ((x - x.mean()) ** 2).sum()
    freedom = len(x) - 2
    error = math.sqrt(((y - start - slope * x) ** 2).sum() / freedom)
    half = student_t(freedom) * error * math.sqrt(1 / len(x) + (at - x.mean()) ** 2 / spread)
    return float(start + slope * at), float(half)


def best_runs(results: list[Result], rung: str, recipe: str) -> Runs:
    """Return the runs of a recipe at the best rate for its shortest length and the first seed."""
    own = [r for r in results if (r["rung"], r["recipe"]) == (rung, recipe) and r["loss"] is not None]
    shortest = min((r["length"] for r in own), default=None)
    sweep = [r for r in own if r["length"] == shortest and r["flags"]["seed"] == 1]
    if not sweep:
        return {}
    best = min(sweep, key=lambda r: r["loss"])["flags"]["learning_rate"]
    found: Runs = {}
    for r in own:
        if r["flags"]["learning_rate"] == best:
            found.setdefault(r["flags"]["seed"], {})[r["length"]] = r
    return found


def shared(*sides: Runs) -> tuple[float, list[int]]:
    """Return the longest length that all recipes have, and the seeds with which they all have it."""
    lengths = [{length for runs in side.values() for length in runs} for side in sides]
    longest = max(set.intersection(*lengths), default=0.0)
    seeds = [set(seed for seed, runs in side.items() if longest in runs) for side in sides]
    return longest, sorted(set.intersection(*seeds))


# ---------------------------------------------------------------- recipes against each other


def compare(results: list[Result], rung: str, recipe: str, other: str = REFERENCE) -> Result | None:
    """Compare a recipe at its best rate with another at its own, on one rung. None without common runs.

    "ratio": the tokens after which it reaches the final loss of the other, as a fraction of the other's.
    """
    own, others = best_runs(results, rung, recipe), best_runs(results, rung, other)
    length, seeds = shared(own, others)
    if not seeds:
        return None
    ratios, seconds = [], []
    for seed in seeds:
        target, run = others[seed][length], own[seed][length]
        runs = own[seed].values()
        reached = tokens_to_reach(target["loss"], [r["tokens"] for r in runs], [r["loss"] for r in runs])
        ratios.append(math.log(reached / target["tokens"]))
        if "seconds" in run and "seconds" in target:
            seconds.append(run["seconds"] / target["seconds"])
    mean, half = interval(ratios)
    return {
        "rung": rung,
        "recipe": recipe,
        "rate": own[seeds[0]][length]["flags"]["learning_rate"],
        "length": length,
        "seeds": len(seeds),
        "loss": float(np.mean([own[seed][length]["loss"] for seed in seeds])),
        "ratio": math.exp(mean),
        "ratio_low": math.exp(mean - half),
        "ratio_high": math.exp(mean + half),
        "log_ratios": ratios,
        "step_time": float(np.median(seconds)) if seconds else math.nan,
    }


# ---------------------------------------------------------------- variants against their base


def vary(results: list[Result], rung: str, recipe: str) -> Result | None:
    """Compare a variant with its base at equal tokens, each at its best rate. None without common runs.

    "saved" is the fraction of the tokens that the lower loss is worth, by the slope of the base's loss from
    its shortest to its longest run. NaN if the base has only one length.
    """
    base = best_runs(results, rung, base_of(recipe))
    own = best_runs(results, rung, recipe)
    length, seeds = shared(own, base) if own and base else (0.0, [])
    if not seeds:
        return None
    mean, half = interval([own[seed][length]["loss"] - base[seed][length]["loss"] for seed in seeds])
    slopes = []  # what the loss falls for e times the tokens
    for runs in base.values():
        first, last = runs[min(runs)], runs[max(runs)]
        if first is not last:
            slopes.append((first["loss"] - last["loss"]) / math.log(last["tokens"] / first["tokens"]))
    slope = float(np.mean(slopes)) if slopes else math.nan
    return {
        "rung": rung,
        "recipe": recipe,
        "rate": own[seeds[0]][length]["flags"]["learning_rate"],
        "length": length,
        "seeds": len(seeds),
        "difference": mean,
        "difference_half": half,
        "saved": 1 - math.exp(mean / slope),
        "saved_low": 1 - math.exp((mean + half) / slope),
        "saved_high": 1 - math.exp((mean - half) / slope),
    }


# ---------------------------------------------------------------- text and figure


def names(results: list[Result]) -> list[str]:
    """List every recipe with a result. Variants are named "base-…"."""
    return sorted({r["recipe"] for r in results})


def tuned_adamw(results: list[Result], rung: str) -> str | None:
    """Return the best AdamW of a rung, by the loss that also selects its rate."""
    losses = {}
    for name in names(results):
        runs = best_runs(results, rung, name).get(1) if name.startswith("adamw") else None
        if runs:
            losses[name] = runs[min(runs)]["loss"]
    return min(losses, key=losses.get, default=None)


def text(results: list[Result]) -> str:
    """Format both comparisons as tables in Markdown."""
    variants = [name for name in names(results) if base_of(name)]
    varied = [row for name in variants for rung in RUNGS if (row := vary(results, rung, name))]
    lines = [
        "| shape | recipe | best rate | tokens per block parameter | seeds | loss | "
        "tokens to the reference's loss | to tuned AdamW's | time of a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rung in RUNGS:
        tuned = tuned_adamw(results, rung)
        for name in dict.fromkeys((REFERENCE, tuned, EARLIER, "muon")):
            if not (name and (r := compare(results, rung, name))):
                continue
            cells = [rung, name, f"{r['rate']:.2g}", f"{r['length']:g}", r["seeds"], f"{r['loss']:.4f}"]
            for other in (REFERENCE, tuned):
                row = compare(results, rung, name, other) if other and name != other else None
                cells.append(with_range(row["ratio"], row["ratio_low"], row["ratio_high"]) if row else "")
            cells.append("" if math.isnan(r["step_time"]) else f"{r['step_time']:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    size = RUNGS["12x768"].block_parameters
    for label, rows in pairs(results).items():
        if found := extrapolated(rows, size):
            lines += ["", f"Continued to {size / 1e6:.0f} M: {label}: {with_range(*found)}"]
    lines += [
        "",
        "| variant | shape | best rate | tokens per block parameter | seeds | loss minus its base's | "
        "tokens saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in varied:
        cells = [
            *(r["recipe"], r["rung"], f"{r['rate']:.2g}", f"{r['length']:g}", r["seeds"]),
            with_error(r["difference"], r["difference_half"]),
            with_range(r["saved"], r["saved_low"], r["saved_high"], ".0%").replace("%", " %"),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def pairs(results: list[Result]) -> dict[str, list[Result]]:
    """Compare recipes on every rung where there is a ratio."""
    tuned = {rung: name for rung in RUNGS if (name := tuned_adamw(results, rung))}
    reference, muon, earlier = (dict.fromkeys(RUNGS, name) for name in (REFERENCE, "muon", EARLIER))
    found = {}
    for label, recipe, other in (
        ("tuned AdamW, to the reference's loss", tuned, reference),
        ("Muon with AdamW's beta2 at 0.95, to the reference's loss", earlier, reference),
        ("Muon, to the reference's loss", muon, reference),
        (MUON_TO_ADAMW, muon, tuned),
    ):
        rungs = [rung for rung in RUNGS if rung in recipe and rung in other]
        rows = [row for rung in rungs if (row := compare(results, rung, recipe[rung], other[rung]))]
        found[label] = [row for row in rows if not math.isnan(row["ratio"])]
    return found


def extrapolated(rows: list[Result], size: float) -> tuple[float, float, float] | None:
    """Extrapolate the ratio to `size` by a power law, with its 95 % range. Needs three rungs.

    Only rungs with the longest runs count, because shorter ones favour recipes that are fast at first.
    """
    longest = max((row["length"] for row in rows), default=0.0)
    rows = [row for row in rows if row["length"] == longest]
    if len(rows) < 3:
        return None
    points = [(math.log(block_parameters(row)), y) for row in rows for y in row["log_ratios"]]
    middle, half = line_at(math.log(size), *zip(*points, strict=True))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def block_parameters(row: Result) -> int:
    return RUNGS[row["rung"]].block_parameters


def with_error(value: float, half: float) -> str:
    """Format a difference with its error, which one seed does not have."""
    return f"{value:+.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def with_range(value: float, low: float, high: float, form: str = ".2f") -> str:
    """Format a ratio with its range; empty if there is none, as with runs of one length."""
    if math.isnan(value):
        return ""
    return f"{value:{form}}" + ("" if math.isnan(low) else f" ({low:{form}} to {high:{form}})")


def draw(results: list[Result], out: Path) -> None:
    """Draw the tokens that Muon needs for the loss of tuned AdamW, against the size of the model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_title("Tokens needed to reach the baseline's loss (lower is better)")
    axes.axhline(1, color="0.5", linestyle=":")
    at_right = {"textcoords": "offset points", "va": "center"}
    axes.annotate(
        "baseline: AdamW at its best settings", (1e7, 1), (0, 9), ha="center", color="0.4", **at_right
    )
    if rows := pairs(results)[MUON_TO_ADAMW]:
        sizes, ratios = [block_parameters(row) for row in rows], [row["ratio"] for row in rows]
        ends = [[row["ratio_low"], row["ratio_high"]] for row in rows]
        bars = np.nan_to_num(np.abs(np.array(ends).T - ratios))
        axes.errorbar(sizes, ratios, bars, color="C3", marker="o", capsize=3)
        text = "Muon, our small models\n(95 % intervals over seeds)"
        axes.annotate(text, (sizes[-1], ratios[-1]), (12, 0), color="C3", **at_right)
    size = RUNGS["12x768"].block_parameters
    axes.plot([size] * len(PUBLISHED), PUBLISHED, "o", color="C3", fillstyle="none")
    text = "Muon, modded-nanogpt's runs\n(124M, rotary positions)"
    axes.annotate(text, (size, np.mean(PUBLISHED)), (-12, 0), ha="right", color="C3", **at_right)
    axes.set_xscale("log")
    axes.set_xlim(6e4, 1.5e8)
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("parameters in the blocks' matrices")
    axes.set_ylabel("fraction of the baseline's tokens")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)
