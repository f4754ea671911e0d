"""Token shards over a smaller vocabulary, so that the embedding of a small model does not dwarf its blocks.

The token embedding has 31 % of GPT-2 124M's parameters; with 2 layers of width 64 it would have 97 %. The
first ids of GPT-2's vocabulary are a byte-pair encoding of their own, with the merges that were learned
first.
"""

import io
from pathlib import Path

import numpy as np
import tiktoken

from pre_tokens import shards, transfer_tokens_hf
from support import files, tokenizer


def encoding(vocab_size: int) -> tiktoken.Encoding:
    """GPT-2's encoding with only its first merges. The last of the `vocab_size` ids ends a text."""
    full = tokenizer.get_encoding()
    ranks = {full.decode_single_token_bytes(i): i for i in range(vocab_size - 1)}
    return tiktoken.Encoding(
        name=f"gpt2-{vocab_size}",
        pat_str=tokenizer.SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={tokenizer.END_OF_TEXT: vocab_size - 1},
    )


def reencode(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Translate GPT-2's ids, uint16 (n,), to ids below `vocab_size`, uint16. Ends of text stay in place."""
    full, small = tokenizer.get_encoding(), encoding(vocab_size)
    ends = np.flatnonzero(tokens == tokenizer.END_OF_TEXT_ID)
    texts = [full.decode(part[part != tokenizer.END_OF_TEXT_ID].tolist()) for part in np.split(tokens, ends)]
    parts = [np.array(ids, dtype=np.uint16) for ids in small.encode_ordinary_batch(texts)]
    end = np.array([vocab_size - 1], dtype=np.uint16)
    return np.concatenate([parts[0], *(piece for part in parts[1:] for piece in (end, part))])


def reencode_folder(data_dir: Path, out_dir: Path, vocab_size: int) -> None:
    """Write every shard of `data_dir` in the small vocabulary under the same name, and a manifest.

    Shards that exist stay.
    """
    for found in shards.find_shards(data_dir).values():
        for shard in found:
            target = out_dir / shard.path.name
            if not target.exists():
                print(f"{target}: encoding with {vocab_size} ids", flush=True)
                buffer = io.BytesIO()
                np.save(buffer, reencode(shard.map(), vocab_size))
                files.make_folder(out_dir)
                files.write_atomically(target, buffer.getvalue())
    if not (out_dir / shards.MANIFEST).exists():
        shards.write_manifest(out_dir, {**transfer_tokens_hf.manifest_of(out_dir), "vocab_size": vocab_size})
