"""Measure tokenizing, and compare with a pool that encodes one document at a time.

    python benchmarks/tokenizing.py                        # the built-in corpus, ten times over
    python benchmarks/tokenizing.py --files 'books/*.txt'

Both sides encode the same documents on the same number of cores, in turn, for several rounds. The pool is the
usual way: multiprocessing with `np.array(enc.encode_ordinary(text))` and `imap(chunksize=16)`. Neither writes
files, and both give the same tokens.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules beside this folder

import numpy as np
import tiktoken

from pre_tokens import build_shards, builtin_corpus, sources
from support import cli, tokenizer
from support.cli import AtLeast1

# tiktoken's own spelling of the rule, which the pool uses.
PUBLISHED_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass
class Settings:
    files: list[str] = field(default_factory=list)
    """Text to encode: .txt, .jsonl, .jsonl.gz, .parquet. None: the built-in corpus, ten times over."""
    workers: AtLeast1 = os.cpu_count() or 1
    """Processes of the pool, and threads of ours."""
    rounds: AtLeast1 = 5
    """How often each side is timed."""


encoding: tiktoken.Encoding


def start_process() -> None:
    global encoding
    ours = tokenizer.get_encoding()
    encoding = tiktoken.Encoding(
        "published",
        pat_str=PUBLISHED_PATTERN,
        mergeable_ranks=ours._mergeable_ranks,
        special_tokens=ours._special_tokens,
    )


def encode_one(text: str) -> np.ndarray:
    return np.array([tokenizer.END_OF_TEXT_ID, *encoding.encode_ordinary(text)]).astype(np.uint16)


def blocks_of(texts: list[str]) -> Iterator[build_shards.Block]:
    for number, begin in enumerate(range(0, len(texts), sources.DOCUMENTS_PER_BLOCK)):
        yield build_shards.Block(0, number, texts[begin : begin + sources.DOCUMENTS_PER_BLOCK], 0)


def main() -> None:
    s = cli.parse(Settings, "Time tokenising, and a pool of processes doing the same.")
    if s.files:
        texts = [
            text for block in sources.local(s.files, "text").blocks(0, 0) for text in block.texts if text
        ]
    else:
        texts = list(builtin_corpus.documents()) * 10
    times: dict[str, list[float]] = {"pool": [], "ours": []}
    with multiprocessing.get_context("spawn").Pool(s.workers, start_process) as pool:
        pool.map(encode_one, texts[: 16 * s.workers])
        build_shards.encode(texts[:16])
        for _ in range(s.rounds):
            begin = time.perf_counter()
            theirs = list(pool.imap(encode_one, texts, chunksize=16))
            times["pool"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            ours = [ids for _, ids, _ in build_shards.encoded(blocks_of(texts), s.workers)]
            times["ours"].append(time.perf_counter() - begin)
    tokens = np.concatenate(ours)
    assert np.array_equal(tokens, np.concatenate(theirs))
    print(f"{len(texts):,} documents, {len(tokens):,} tokens, {s.workers} workers, {s.rounds} rounds")
    for side, seconds in times.items():
        rates = sorted(len(tokens) / second / 1e6 for second in seconds)
        print(f"{side}: {statistics.median(rates):.2f} M tokens/s ({rates[0]:.2f} to {rates[-1]:.2f})")
    ratios = [pool_s / ours_s for pool_s, ours_s in zip(times["pool"], times["ours"], strict=True)]
    print(f"ours / pool: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    cli.run(main)
