"""train_gpt2.py over the first ids of GPT-2's vocabulary, for the small shapes of benchmarks/recipe.py.

    python benchmarks/train_small_vocabulary.py 2048 --optimizer muon …      # then the flags of train_gpt2.py

The shards of --data-dir must be in that vocabulary (benchmarks/vocabulary.py).
"""

import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules above this folder

import train_gpt2
from support import cli

if __name__ == "__main__":
    train_gpt2.tokenizer = types.SimpleNamespace(VOCAB_SIZE=int(sys.argv.pop(1)))
    cli.run(train_gpt2.main)
