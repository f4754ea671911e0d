"""HellaSwag: pick the likeliest of four endings. Used by the training loop, and as a script.

    python hellaswag.py --model log                        # the newest checkpoint of a run
    python hellaswag.py --model gpt2 --style harness       # scored as lm-evaluation-harness does

Unusual:
- One row holds a whole example: the context once, then the four endings. A mask lets each ending attend only
  to the context and to itself, and the positions of each ending continue those of the context.
- Logits are computed only where they predict a token of an ending.
- Batches hold examples of similar length. They do not depend on the number of processes that share them.

Paper: Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?"; data: rowanz/hellaswag.
"""

if __name__ == "__main__":
    from support import launch

    launch.prepare()

import dataclasses
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import GPT
from support import cli, hardware, hellaswag_data, run_files, runtime, tokenizer
from support.cli import Dtype, UserError
from support.runtime import Runtime

Style = Literal["completion", "harness"]

N_EXAMPLES = 10_042  # of the published validation set

# acc and acc_norm of OpenAI's GPT-2 124M on all examples.
PUBLISHED = {"completion": (0.2859, 0.2955), "harness": (0.2892, 0.3114)}

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}  # enough to keep the device busy
HEAD_ROWS = 1024  # logits at a time; each row is 50257 wide


@dataclass(frozen=True)
class Example:
    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings, in tokens or characters; acc_norm divides losses by them
    label: int

    @property
    def row_length(self) -> int:
        """Tokens of the row that holds the example. The last token of an ending is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Score:
    acc: float  # fraction of examples whose right ending has the lowest summed loss
    acc_norm: float  # the same, with losses divided by length
    n: int

    def standard_error(self, fraction: float) -> float:
        """Standard error of a fraction of n examples: sample standard deviation / sqrt(n)."""
        return math.sqrt(fraction * (1 - fraction) / (self.n - 1)) if self.n > 1 else math.nan


# ---------------------------------------------------------------- data


def prepare(data: str, rt: Runtime, required: bool) -> tuple[list[Example], str]:
    """Load the examples for a training run. Returns them and "", or no examples and the reason.

    data: a local file; "" for the published examples.
    required: raise UserError, on every process, if a local file cannot be used.
    """
    try:
        if not data:
            rt.run_on(rt.local_rank == 0, hellaswag_data.fetch, fetches=True)
        return rt.run_on(True, lambda: load(Path(data) if data else None)), ""
    except UserError as error:
        if data and required:
            raise
        rt.say(f"warning: continuing without HellaSwag: {error}")
        return [], str(error)


def load(data: Path | None = None, style: Style = "completion", limit: int = 0) -> list[Example]:
    """Load and tokenize a HellaSwag file. None: the published one, fetched if necessary.

    limit: only the first N examples; 0: all. Raises UserError if the file holds something else.
    """
    path = data or hellaswag_data.fetch()
    try:
        lines = hellaswag_data.read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as HellaSwag examples ({error}): check --data") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if limit and len(examples) == limit:
            break
        if not line.strip():
            continue
        try:
            examples.append(encode(json.loads(line), style))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not a HellaSwag example ({error!r})") from error
    if not examples:
        raise UserError(f"{path}: holds no examples: check --data")
    return examples


def encode(record: dict[str, object], style: Style) -> Example:
    """Tokenize one record of the file.

    completion: the context as it is, then " " + ending.
    harness: like the task `hellaswag` of EleutherAI's lm-evaluation-harness. The activity precedes the
    context, ctx_b starts with a capital, WikiHow's bracketed marks are removed, lengths are in characters.
    Raises ValueError, KeyError or TypeError if the record is not an example.
    """
    enc = tokenizer.get_encoding()
    label, endings = int(record["label"]), record["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or label not in range(4):
        raise ValueError("needs four endings and a label from 0 to 3")
    if style == "completion":
        context = enc.encode_ordinary(record["ctx"])
        tokens = [enc.encode_ordinary(" " + ending) for ending in endings]
        lengths = [len(ending) for ending in tokens]
    else:
        text = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        text, endings = _clean(text), [_clean(ending) for ending in endings]
        # Trailing white space moves from the context to the endings, so that no token spans both.
        stem = text.rstrip()
        context = enc.encode_ordinary(stem)
        wholes = [enc.encode_ordinary(f"{text} {ending}") for ending in endings]
        tokens = [whole[len(context) :] for whole in wholes]
        lengths = [len(ending) for ending in endings]
    if not context or not all(tokens):
        raise ValueError("the context or an ending is empty")
    return Example(context, tokens, lengths, label)


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---------------------------------------------------------------- scoring


class SharedContext:
    """Attention over rows that hold a context and its endings (see `model.Attention`)."""

    def __init__(self, positions: Tensor, segments: Tensor) -> None:
        """positions (B, T); segments (B, T): 0 for the context, 1 to 4 for the endings, 5 for padding."""
        self.positions = positions
        T = positions.shape[1]
        earlier = torch.ones(T, T, dtype=torch.bool, device=positions.device).tril()
        same = segments[:, :, None] == segments[:, None, :]
        self.mask = (earlier & (same | (segments == 0)[:, None, :]))[:, None]

    def start(self, T: int, device: torch.device) -> Tensor:
        """Return the positions of the tokens, (B, T)."""
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend under the mask."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


@torch.no_grad()
def ending_losses(model: GPT, batch: list[Example]) -> Tensor:
    """Return the summed loss in nats of each ending: float32 (len(batch), 4), on the CPU."""
    # GPUs need a multiple of 8 for fast masked attention.
    T = -(-max(example.row_length for example in batch) // 8) * 8
    idx, positions, segments = (torch.full((len(batch), T), value) for value in (0, 0, 5))
    sources, targets, owners = [], [], []  # of each predicted token: state, id, ending
    for b, example in enumerate(batch):
        end = c = len(example.context)
        idx[b, :c] = torch.tensor(example.context)
        positions[b, :c] = torch.arange(c)
        segments[b, :c] = 0
        for number, ending in enumerate(example.endings):
            begin, end = end, end + len(ending) - 1
            idx[b, begin:end] = torch.tensor(ending[:-1])
            positions[b, begin:end] = torch.arange(c, c + len(ending) - 1)
            segments[b, begin:end] = number + 1
            sources += [b * T + c - 1, *range(b * T + begin, b * T + end)]
            targets += ending
            owners += [4 * b + number] * len(ending)
    idx, positions, segments = (t.to(model.device) for t in (idx, positions, segments))
    with hardware.attention_for_many_shapes(model.device):
        states = model.hidden(idx, SharedContext(positions, segments)).flatten(0, 1)
    sums = torch.zeros(4 * len(batch), device=model.device)
    pieces = (torch.tensor(t, device=model.device).split(HEAD_ROWS) for t in (sources, targets, owners))
    for source, target, owner in zip(*pieces, strict=True):
        logits = model.head(states[source]).float()
        sums.index_add_(0, owner, F.cross_entropy(logits, target, reduction="none"))
    return sums.view(-1, 4).cpu()


def truncate_contexts(examples: list[Example], block_size: int) -> list[Example]:
    """Cut contexts on the left where context and longest ending exceed block_size positions.

    Raises UserError if an ending alone exceeds them.
    """
    fitting = []
    for example in examples:
        room = block_size - max(map(len, example.endings)) + 1
        if room < 1:
            raise UserError(f"HellaSwag: an ending is longer than the model's {block_size} positions")
        fitting.append(Example(example.context[-room:], example.endings, example.lengths, example.label))
    return fitting


def batches(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Sort examples by length, longest first, into batches of at most `tokens` tokens with padding."""
    found: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: e.row_length, reverse=True):
        if not found or (len(found[-1]) + 1) * found[-1][0].row_length > tokens:
            found.append([])
        found[-1].append(example)
    return found


def evaluate(model: GPT, examples: list[Example], rt: Runtime, progress: bool = False) -> Score:
    """Score the examples, which the processes share. The score does not depend on their number.

    model: not compiled, because the batches have many shapes.
    """
    fitting = truncate_contexts(examples, model.config.block_size)
    return total_score(count_correct(model, fitting, rt, progress), len(examples), rt)


def count_correct(model: GPT, examples: list[Example], rt: Runtime, progress: bool = False) -> Tensor:
    """Count right answers, for acc and acc_norm, in this process's share of the examples: int64 (2,), CPU.

    The examples must fit into the model: see `truncate_contexts`.
    """
    correct = torch.zeros(2, dtype=torch.int64)
    todo = batches(examples, BATCH_TOKENS.get(rt.device.type, 2048))
    with tqdm(total=len(examples), unit=" examples", disable=not progress) as bar:
        for batch in todo[rt.rank :: rt.world_size]:
            rt.stop.check()
            with rt.autocast():
                losses = ending_losses(model, batch)
            labels = torch.tensor([example.label for example in batch])
            lengths = torch.tensor([example.lengths for example in batch])
            choices = torch.stack([losses.argmin(dim=1), (losses / lengths).argmin(dim=1)])
            correct += (choices == labels).sum(dim=1)
            bar.update(len(batch) * rt.world_size)
    return correct


def total_score(correct: Tensor, n: int, rt: Runtime) -> Score:
    """Combine the results of `count_correct` on all processes, over n examples in total."""
    acc, acc_norm = (rt.all_reduce(correct.to(rt.device)).cpu().double() / n).tolist()
    return Score(acc, acc_norm, n)


# ---------------------------------------------------------------- script


@dataclass
class Settings:
    model: str = "log"
    """A run (RUN:best: its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder, or a Hub name."""
    data: Path | None = None
    """A file of examples, .jsonl or the Hub's .parquet. Default: the published ones, fetched once."""
    limit: int = 0
    """Use only the first N examples. 0: all."""
    style: Style = "completion"
    """completion: text unchanged, loss per token. harness: prepared as in lm-evaluation-harness."""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Precision of matrix products. auto: float32 on a CPU, where bfloat16 moved one answer in 300."""


def main() -> None:
    s = cli.parse(Settings, "Evaluate a model on HellaSwag.")
    with runtime.start(s.device, s.dtype) as rt:
        if s.dtype == "auto" and rt.device.type == "cpu":
            rt = dataclasses.replace(rt, dtype=torch.float32)
        score_and_print(s, rt)


def score_and_print(s: Settings, rt: Runtime) -> None:
    """Evaluate the model, and print its scores beside the published ones."""
    folder = run_files.find_model(s.model)  # first, because it may raise, and the download takes long
    if s.data is None:
        rt.run_on(rt.local_rank == 0, hellaswag_data.fetch, fetches=True)
    examples = load(s.data, s.style, s.limit)
    model = GPT.from_pretrained(folder).to(rt.device)
    begin = time.perf_counter()
    score = evaluate(model, examples, rt, progress=rt.is_main)
    seconds = time.perf_counter() - begin
    if rt.is_main:
        truncated = truncate_contexts(examples, model.config.block_size)
        cut = sum(a.context != b.context for a, b in zip(examples, truncated, strict=True))
        if cut:
            print(f"warning: {cut} contexts truncated to the model's {model.config.block_size} positions")
        print(f"{'':24}{'acc':>16}{'acc_norm':>18}{'examples':>10}")
        shares = "".join(f"{p:11.4f} ± {score.standard_error(p):.4f}" for p in (score.acc, score.acc_norm))
        print(f"{s.model[-22:]:22}{shares}{score.n:10,}   {s.style} style")
        acc, acc_norm = PUBLISHED[s.style]
        print(f"{'GPT-2 124M, published':22}{acc:11.4f}{acc_norm:20.4f}{N_EXAMPLES:19,}")
        print(f"{score.n / seconds:.1f} examples/s on {hardware.describe(rt)['name']}, {rt.dtype}")


if __name__ == "__main__":
    cli.run(main)
