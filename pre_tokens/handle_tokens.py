"""Text to token shards.

python pre_tokens/handle_tokens.py --source builtin --out-dir data/builtin
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules beside this folder

import cli
import tokenizer
from pre_tokens import builtin_corpus
from pre_tokens.shards import ShardWriter


@dataclass
class Settings:
    source: Literal["builtin"] = "builtin"
    """Where the text comes from. builtin: the documentation that Python itself carries."""
    out_dir: Path = Path("data/builtin")
    """Folder for the shards."""
    name: str = "builtin"
    """First part of the shards' file names."""
    shard_size: int = 60_000
    """Tokens a shard; the first shard is for validation."""


def main() -> None:
    settings = cli.parse(Settings, "Turn text into token shards for train_gpt2.py.")
    enc = tokenizer.get_encoding()
    writer = ShardWriter(settings.out_dir, settings.name, settings.shard_size)
    for text in builtin_corpus.documents():
        writer.add(np.array([tokenizer.END_OF_TEXT_ID, *enc.encode_ordinary(text)], dtype=np.uint16))
    writer.close()
    total = (len(writer.paths) - 1) * settings.shard_size + np.load(writer.paths[-1], mmap_mode="r").size
    print(f"{total:,} tokens in {len(writer.paths)} shards: {settings.out_dir}")


if __name__ == "__main__":
    cli.run(main)
