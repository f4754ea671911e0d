"""Parts of gpu_report.py. Each measures something on this GPU and notes the results.

gpu_report.py runs each part in a separate process and ends it when its time is over. Results are on the disk
as soon as they are noted. A measurement that fails is noted, too, and does not affect the next one. `device`
and `speed` are here; gpu_runs.py has the parts that train.
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import bench
from pre_tokens.shards import names_in
from settings import PRESETS
from support import cli, compiler, files, gpus, hardware, planning, runtime
from support.cli import Above0, UserError
from support.progress import Stopwatch
from support.runtime import Runtime

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
RECIPE = PRESETS["gpt2-124m"]
# Environment variables with which torch.compile takes longer, to find faster kernels.
INDUCTOR_OPTIONS = ("TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "TORCHINDUCTOR_MAX_AUTOTUNE")
# In place of GPT-2 124M in a try-out: enough to call every part, small enough for a CPU.
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "sequence_length": 64}


@dataclass
class Settings:
    data_dir: Path = Path("data/fineweb-edu-10b")
    """Folder of token shards."""
    out: Path = Path("benchmarks/log/gpu_report")
    """Folder for report.md, report.json, figures, logs and the runs made on the way."""
    minutes: Above0 = 25.0
    """Time for all of it. Each part has a share; what one leaves over goes to the later ones."""
    only: str = ""
    """Some of the parts (device, speed, rehearsal, peers, recipes, between-steps), separated by commas; the results of the others in --out are kept."""  # noqa: E501
    peer: list[Path] = field(default_factory=list)
    """Folders with build-nanogpt's train_gpt2.py or nanoGPT's model.py, to be compared with ours."""
    hellaswag_data: Path | None = None
    """A local file of HellaSwag examples. Default: the published validation file, fetched once; none with --tiny."""  # noqa: E501
    tiny: bool = False
    """Dry run of every part with a one-layer model, on a CPU too: for errors, not for figures."""

    @property
    def results(self) -> Path:
        """Folder of what the parts have noted, NAME.json."""
        return self.out / "parts"


class Part:
    """Settings, time limit and results of one part. Results are on the disk once noted."""

    def __init__(self, s: Settings, name: str, until: float) -> None:
        """until: when its time is over, of time.monotonic()."""
        self.s, self.name, self.until = s, name, until
        self.results: dict[str, object] = {}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def note(self, name: str, value: object) -> None:
        """Add a result: a number or text, a dict of such, or a list of dicts, the rows of a table."""
        self.results[name] = value
        files.write_atomically(self.s.results / f"{self.name}.json", json.dumps(self.results, default=str))

    def measure(self, name: str, work: Callable[[], T]) -> T | None:
        """Note the result of `work`, and return it. If it fails, note why, and return None."""
        try:
            value = work()
        except Exception as error:  # anything may go wrong on a machine that nobody has tried
            traceback.print_exc()
            text = " ".join(str(error).split())
            text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
            noted = self.results.get(name)  # what `work` itself has noted stays
            self.note(name, {**(noted if isinstance(noted, dict) else {}), "failed": text})
            return None
        self.note(name, value)
        return value

    def earlier(self, name: str) -> dict[str, object]:
        """Return the results of another part, or {} if it has none."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.s.results / f"{name}.json").read_text(encoding="utf-8"))
        return {}

    def script(self, *command: str) -> str:
        """Return the output of one of our scripts. Raises UserError with its message if it fails."""
        line, name = [sys.executable, *command], Path(command[0]).name
        try:
            done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=max(1.0, self.left))
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{name}: not done after {error.timeout:.0f} s") from error
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise UserError(f"{name}: {cli.last_error(done.stderr)}")
        return done.stdout

    def bench(self, **changes: object) -> bench.Settings:
        """Settings of bench.py for the recipe's model on --data-dir, for one micro-batch a step."""
        compiled = compiler.on_by_default("auto") and not self.s.tiny
        small = {**TINY, "steps": 2, "warmup": 1} if self.s.tiny else {"steps": 10, "warmup": 3}
        values = {"data_dir": self.s.data_dir.resolve(), "compile": compiled, **small, **changes}
        return bench.Settings(**values)

    def training_flags(self, **changes: object) -> list[str]:
        """Flags of train_gpt2.py for --data-dir as it is. In a dry run no HellaSwag is fetched."""
        here = len(names_in(self.s.data_dir))  # the manifest may list more, as after a rehearsal
        values = {"data_dir": self.s.data_dir.resolve(), "dataset_repo": "none", "num_shards": here}
        if self.s.hellaswag_data:
            values["hellaswag_data"] = self.s.hellaswag_data.resolve()
        if self.s.tiny:
            values |= {
                **TINY,
                "block_size": 256,
                "total_batch_size": 512,
                "val_tokens": 2048,
                "compile": False,
            }
        values |= changes
        if self.s.tiny and not self.s.hellaswag_data:
            values["hellaswag_interval"] = 0
        return cli.flags(values)


# ---------------------------------------------------------------- 1: the device


def device(part: Part) -> None:
    """Describe the machine, measure its two peak rates, and run the tests that need a GPU."""
    rt = runtime.start("auto", "auto")
    part.measure("machine", lambda: describe(rt))
    part.measure("peak_rates", lambda: peak_rates(rt, part.s.tiny))
    if rt.device.type == "cuda":
        torch.cuda.empty_cache()
    part.measure("tests", lambda: gpu_tests(part))


def describe(rt: Runtime) -> dict[str, object]:
    """Name the hardware and the versions of the software."""
    described = {
        **hardware.describe(rt), "torch": torch.__version__, "python": sys.version.split()[0],
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "attention": hardware.attention_backend(rt, RECIPE.n_head, RECIPE.n_embd // RECIPE.n_head, 1024),
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import triton

        described["triton"] = triton.__version__
    if rt.device.type == "cuda":
        peak = hardware.peak_flops(rt.device, rt.dtype)
        described["data_sheet_tflops"] = peak and peak / 1e12
        for query in ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"):
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
                described[query] = done.stdout.strip()
    return described


def median_seconds(work: Callable[[], object], rt: Runtime, repeats: int) -> float:
    """Return the median time of `work` on the device, after three calls that do not count."""
    watch = Stopwatch(rt.device)
    for _ in range(3 + repeats):
        watch.start_lap()
        work()
        watch.mark("work")
    return statistics.median(lap["work"] for lap in watch.seconds()[3:])


def peak_rates(rt: Runtime, tiny: bool) -> dict[str, float]:
    """Measure peak rates: products of random matrices in the precision of training, and copying.

    A copied byte counts twice, because it is read and written.
    """
    n, n_bytes = (128, 2**20) if tiny else (8192, min(2**32, torch.cuda.mem_get_info()[0] // 4))
    a, b = torch.randn(2, n, n, device=rt.device, dtype=rt.dtype)
    product = torch.empty_like(a)
    seconds = median_seconds(lambda: torch.mm(a, b, out=product), rt, 30)
    source = torch.randint(256, (n_bytes,), dtype=torch.uint8, device=rt.device)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), rt, 30)
    return {
        "product_size": n,
        "product_dtype": str(rt.dtype).removeprefix("torch."),
        "product_tflops": 2 * n**3 / seconds / 1e12,
        "copy_gb": n_bytes / 1e9,
        "copy_gb_per_sec": 2 * n_bytes / copy_seconds / 1e9,
    }


def gpu_tests(part: Part) -> list[dict[str, str]]:
    """Run the tests that need a GPU. Returns the outcomes of those that have ended in time."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-vv", "-rfEs", "tests/test_gpu.py"]
    log = part.s.out / "logs" / "gpu_tests.txt"
    with open(log, "w", encoding="utf-8") as file, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=max(1.0, part.left - 5)
        )
    return read_outcomes(log.read_text(encoding="utf-8"))


def read_outcomes(output: str) -> list[dict[str, str]]:
    """Read tests and outcomes from the output of `pytest -vv -rfEs`, with the reasons of failures."""
    outcomes = {}
    for match in re.finditer(r"^\S+\.py::(\S+) (?:.*?)(PASSED|FAILED|ERROR|SKIPPED)", output, re.MULTILINE):
        outcomes[match[1]] = {"test": match[1], "outcome": match[2].lower(), "reason": ""}
    for match in re.finditer(r"^(?:FAILED|ERROR) \S+\.py::(\S+) - (.*)", output, re.MULTILINE):
        if match[1] in outcomes:
            outcomes[match[1]]["reason"] = match[2]
    if not outcomes:
        raise UserError(f"pytest ran no test: {cli.last_error(output)}")
    return list(outcomes.values())


# ---------------------------------------------------------------- 2: speed


def speed(part: Part) -> None:
    """Measure the training speed at the micro-batch that the search finds, its bounds, and other settings."""
    alone = part.measure("one_micro_batch", lambda: figures(bench.measure_apart(part.bench())))
    if alone is None:
        return
    B = alone["micro_batch_size"]
    part.measure("recipe_step", lambda: figures(bench.measure_apart(recipe_step(part, B))))
    part.measure("forecast", lambda: forecast(part))
    if torch.cuda.is_available():
        part.measure("roofline", lambda: roofline(part, alone))
    rows: list[dict[str, object]] = []
    for row in sweep(part, B):
        rows.append(row)
        part.note("sweep", rows)


def recipe_step(part: Part, B: int, **changes: object) -> bench.Settings:
    """Settings of bench.py for the recipe's optimizer step, in as many micro-batches as it takes."""
    n = 1 if part.s.tiny else RECIPE.total_batch_size // RECIPE.sequence_length // B
    return part.bench(micro_batch_size=B, accumulation_steps=n, **changes)


def figures(result: dict[str, object]) -> dict[str, object]:
    """Flatten a measurement of bench.py for the report."""
    names = (
        "micro_batch_size", "optimizer", "compiled", "tokens_per_sec", "mfu", "memory_gb", "step_ms",
        "step_ms_min", "step_ms_max", "loss_chunks", "warmup_s",
    )  # fmt: skip
    parts = {f"{name}_ms": value for name, value in result["parts_ms"].items()}
    return {**{name: result[name] for name in names}, **parts, "dtype": result["hardware"]["dtype"]}


def forecast(part: Part) -> list[dict[str, object]]:
    """Compare the recipe's step with `bench.py --plan` for this GPU."""
    config, length, _ = bench.model_config(part.bench())
    name, memory = "A100", 80.0  # something to try out a CPU with
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory / 1e9
    gpu = gpus.find(name)
    if gpu is None:
        raise UserError(f"{name}: not in the table of bench.py --plan")
    sizes = [other for other in gpus.GPUS if other.model == gpu.model]
    gpu = min(sizes, key=lambda other: abs(other.memory_gb - memory))
    mfu = bench.Settings.mfu
    plan = planning.plan(f"1x{gpu.plan_name}", config, length, RECIPE.total_batch_size, RECIPE.max_steps, mfu)
    measured = part.results.get("recipe_step", {})
    planned = {
        "micro_batch_size": plan.micro_batch_size,
        "memory_gb": plan.memory_gb,
        "tokens_per_sec": RECIPE.total_batch_size / plan.step_seconds,
        "mfu": mfu,
    }
    return [
        {"what": k, "measured": measured.get(k), f"plan for 1x{gpu.plan_name}": v} for k, v in planned.items()
    ]


def roofline(part: Part, alone: dict[str, object]) -> dict[str, object]:
    """Measure forward and backward of a micro-batch, and its bounds by FLOPs and bytes (roofline)."""
    rates = part.earlier("device").get("peak_rates", {})
    if "copy_gb_per_sec" not in rates:
        raise UserError("needs the peak rates of the part `device`")
    config, length, _ = bench.model_config(part.bench())
    B = alone["micro_batch_size"]
    flops = config.flops_per_token(length) * B * length
    found = {
        "forward_and_backward_ms": alone["forward_ms"] + alone["backward_ms"],
        "flops": flops,
        "floor_by_flops_ms": 1000 * flops / (rates["product_tflops"] * 1e12),
    }
    part.note("roofline", found)  # counting bytes takes a minute and may fail
    flags = ("--micro-batch-size", str(B), "--loss-chunks", str(alone["loss_chunks"]))
    counted = re.search(r"together\s+([\d.]+) GB", part.script("benchmarks/count_bytes.py", *flags))
    gigabytes = float(counted[1])
    return {
        **found,
        "counted_gb": gigabytes,
        "floor_by_bytes_ms": 1000 * gigabytes / rates["copy_gb_per_sec"],
    }


def sweep(part: Part, B: int) -> Iterator[dict[str, object]]:
    """Measure other attention kernels, micro-batches and so on, while there is time for one more."""
    changes = [{}, *({"attention": name} for name in ("flash", "cudnn", "efficient"))]
    changes += [{"micro_batch_size": size} for size in (B // 2, B // 4, 2 * B) if size]
    changes += [{"compile": False}, {"loader": "int64", "sync": True}, {"loss_chunks": 1}]
    if part.bench().compile:
        changes += [{name: "1"} for name in INDUCTOR_OPTIONS]
    slowest = 0.0
    for change in changes[: 1 if part.s.tiny else None]:
        begin = time.monotonic()
        options = {name: value for name, value in change.items() if name in INDUCTOR_OPTIONS}
        if part.left < (4 if options else 1.2) * slowest:
            return
        s = part.bench(**{"micro_batch_size": B, **{k: v for k, v in change.items() if k not in options}})
        row = {"micro_batch": s.micro_batch_size, "attention": s.attention, "compiled": s.compile}
        shown = set(change) - {"micro_batch_size", "attention", "compile"}
        row["other"] = " ".join(f"{name}={change[name]}" for name in change if name in shown)
        try:
            result = bench.measure_apart(s, options)
            row |= {key: result[key] for key in ("tokens_per_sec", "mfu", "memory_gb")}
        except UserError as error:
            row["failed"] = str(error)
        slowest = max(slowest, time.monotonic() - begin)
        yield row
