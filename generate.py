"""Sample from a model.

    python generate.py --prompt "Hello, I'm a language model,"     # the newest checkpoint of the run in log/
    python generate.py                                             # on a terminal: a prompt loop
    python generate.py --model gpt2 --prompt - --json < prompt.txt

In the prompt loop, Ctrl-C stops a sample and Ctrl-D quits. Samples do not change with --num-samples.
"""

if __name__ == "__main__":
    from support import launch

    launch.prepare()

import codecs
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from model import GPT
from support import cli, run_files, runtime, tokenizer
from support.cli import AtLeast1, Bounds, Dtype, Seed, UserError
from support.linear import cast_once


@dataclass
class Settings:
    model: str = "log"
    """A run (RUN:best: its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder, or a Hub name."""
    prompt: str | None = None
    """Text to continue; - reads standard input. Default: a prompt loop; with no terminal, an empty prompt."""
    num_samples: AtLeast1 = 3
    """Samples per prompt."""
    max_new_tokens: AtLeast1 = 64
    """Maximum tokens per sample; a sample ends earlier if the model ends the text."""
    temperature: float = 0.8
    """Below 1 more conservative, above 1 more varied; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample from the k likeliest tokens. 0: from all."""
    top_p: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Sample from the fewest tokens whose probabilities add up to this. 1: from all."""
    seed: Seed = 42
    """Seed of the samples."""
    json: bool = False
    """Print one JSON object: the prompt and, for each sample, its text, tokens and why it ended."""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Precision of matrix products."""


def encode_prompt(text: str, block_size: int) -> list[int]:
    """Tokenize a prompt and keep its last block_size ids. An empty prompt starts a document."""
    ids = tokenizer.encode(text).tolist() or [tokenizer.END_OF_TEXT_ID]
    if len(ids) > block_size:
        print(
            f"warning: the prompt has {len(ids)} tokens, the model reads the last {block_size}",
            file=sys.stderr,
        )
    return ids[-block_size:]


def samples(model: GPT, ids: list[int], s: Settings, first: int, n: int) -> Iterator[list[int | None]]:
    """Generate samples `first` to `first + n` - 1 token by token: yield n ids, None for ended samples."""
    generators = [torch.Generator().manual_seed((s.seed + i) % 2**63) for i in range(first, first + n)]
    choice = (s.temperature, s.top_k or None, s.top_p, generators, tokenizer.END_OF_TEXT_ID)
    return model.stream([ids] * n, s.max_new_tokens, *choice)


def decode(tokens: Iterator[int | None]) -> Iterator[str]:
    """Turn tokens into text as they arrive, up to the end of text. Incomplete characters are held back."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token in (None, tokenizer.END_OF_TEXT_ID):
            break
        yield decoder.decode(tokenizer.get_encoding().decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def as_json(model: GPT, prompt: str, s: Settings) -> str:
    """Draw all samples of a prompt in one batch, and format them as one line of JSON."""
    ids = encode_prompt(prompt, model.config.block_size)
    steps = list(samples(model, ids, s, 0, s.num_samples))
    drawn = []
    for column in zip(*steps, strict=True):
        tokens = [token for token in column if token is not None]
        ended = tokens[-1] == tokenizer.END_OF_TEXT_ID
        reason = "end of text" if ended else "length"
        drawn.append({"text": "".join(decode(iter(tokens))), "tokens": tokens, "finish_reason": reason})
    return json.dumps({"model": s.model, "prompt": prompt, "seed": s.seed, "samples": drawn})


def print_samples(model: GPT, prompt: str, s: Settings) -> None:
    """Stream the samples of a prompt to standard output, one after another."""
    ids = encode_prompt(prompt, model.config.block_size)
    for number in range(s.num_samples):
        print(prompt, end="", flush=True)
        for text in decode(step[0] for step in samples(model, ids, s, number, 1)):
            print(text, end="", flush=True)
        print("\n---" if number + 1 < s.num_samples else "")


def prompt_loop(show: Callable[[str], None]) -> None:
    """Ask for prompts and show samples until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and editing
    print("Type a prompt and press Enter. Ctrl-C stops a sample, Ctrl-D quits.")
    while True:
        try:
            show(input("> "))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def main() -> int:
    s = cli.parse(Settings, "Sample from a model.")
    rt = runtime.start(s.device, s.dtype)
    model = GPT.from_pretrained(run_files.find_model(s.model)).to(rt.device)
    if model.config.vocab_size != tokenizer.VOCAB_SIZE:
        raise UserError(f"--model {s.model}: has {model.config.vocab_size} token ids, not GPT-2's 50257")
    try:
        with rt.autocast(), cast_once(model):
            if s.json:
                print(as_json(model, read_prompt(s), s))
            elif s.prompt is None and sys.stdin.isatty():
                prompt_loop(lambda prompt: print_samples(model, prompt, s))
            else:
                if s.prompt is None:
                    print("no terminal, so no prompt: --prompt - reads standard input", file=sys.stderr)
                print_samples(model, read_prompt(s), s)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def read_prompt(s: Settings) -> str:
    """Return the prompt, from standard input for "-". Raises UserError if that is not UTF-8."""
    if s.prompt != "-":
        return s.prompt or ""
    try:
        # UTF-8 whatever the encoding of the system; utf-8-sig drops a byte order mark.
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig").read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8 ({error})") from error


if __name__ == "__main__":
    cli.run(main)
