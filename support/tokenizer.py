"""GPT-2's byte-pair encoding, from the rank file in assets/, without a download.

enc = get_encoding()
enc.encode_ordinary("Hello") -> [15496]
encode(text)                 # the same as an array, for any text: megabytes without a space, lone surrogates
"""

import base64
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from support.cli import UserError

RANKS_FILE = Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257

# The splitting rule of OpenAI's GPT-2 release. All alternatives but white space are in one group without
# possessive quantifiers, so that the engine runs it as a single automaton. That makes encoding 1.6 times as
# fast as with tiktoken's own spelling. Greedy quantifiers match the same at the end of a pattern.
SPLIT_PATTERN = (
    r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
    r"|\s++$|\s+(?!\S)|\s"
)


# Characters that are encoded at once, because the engine gives up on millions of spaces in a row.
PIECE = 2**20
# The rule always splits between a character and a following space or newline, so text cut there has the same
# tokens in parts as in one piece.
SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@functools.cache
def get_encoding() -> tiktoken.Encoding:
    """Return the GPT-2 encoding: 50257 ids, `<|endoftext|>` is 50256.

    Raises UserError if the file of ranks is missing or is not the published one.
    """
    try:
        contents = RANKS_FILE.read_bytes()
    except OSError as error:
        raise UserError(f"{RANKS_FILE}: {error.strerror}: restore it with `git checkout assets`") from error
    digest = hashlib.sha256(contents).hexdigest()
    if digest != RANKS_SHA256:
        raise UserError(f"{RANKS_FILE}: not GPT-2's ranks (sha256 {digest}): `git checkout assets`")
    # Not tiktoken's loader, which reads a copy in the folder for temporary files the next time.
    lines = (line.split() for line in contents.splitlines())
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
    )


def encode(text: str) -> np.ndarray:
    """Encode any text: ids, uint32 (n,).

    Like `encode_ordinary`, encodes text that looks like a special token as plain characters, and a lone
    surrogate as U+FFFD.
    """
    try:
        parts = [get_encoding().encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
    except UnicodeEncodeError:
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])


def pieces(text: str) -> Iterator[str]:
    """Cut a text into parts of at most PIECE characters."""
    begin = 0
    while len(text) - begin > PIECE:
        end = cut(text, begin + PIECE, begin)
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def cut(text: str, end: int, begin: int = 0) -> int:
    """Find the last place after `begin` and up to `end` where a text can be cut without changing its tokens.

    If there is none, as in a megabyte without a space, returns `end`; then a few tokens around it differ.
    """
    safe = SAFE_CUT.match(text, begin, end + 1)
    return safe.end() if safe else end


def save_pretrained(folder: Path, model_max_length: int) -> None:
    """Write the tokenizer files that `transformers.AutoTokenizer.from_pretrained(folder)` reads."""
    for name, text in _huggingface_files(model_max_length).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


@functools.cache
def _huggingface_files(model_max_length: int) -> dict[str, str]:
    """File name -> contents, for transformers with and without the Rust tokenizers."""
    ranks = {token: get_encoding().encode_single_token(token) for token in get_encoding().token_byte_values()}
    to_text = _byte_to_unicode()
    spell = lambda token: "".join(to_text[byte] for byte in token)  # noqa: E731
    tokens = sorted((t for t in ranks if ranks[t] != END_OF_TEXT_ID), key=ranks.__getitem__)
    vocab = {spell(token): ranks[token] for token in tokens} | {END_OF_TEXT: END_OF_TEXT_ID}
    merges = [tuple(map(spell, _last_merge(token, ranks))) for token in tokens if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_TEXT_ID, **special, "single_word": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": merges},
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
    }
    return {
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
    }


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Find the two parts that byte-pair encoding joins last to make `token`: its line in merges.txt."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, VOCAB_SIZE) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_to_unicode() -> dict[int, str]:
    """Map bytes to GPT-2's printable stand-ins.

    Visible Latin-1 bytes stand for themselves, and the other 68 become U+0100 onwards.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
