"""Text that every Python installation carries: enough to try the whole way without a network.

The language reference, as `pydoc_data.topics` holds it, and the docstrings of the standard library, read
from its source without importing it: about 0.6 M tokens of GPT-2's encoding.
"""

import ast
import hashlib
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np

import tokenizer
from pre_tokens.shards import ShardWriter

NOT_DOCUMENTATION = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}


def build(out_dir: Path, name: str = "builtin", shard_size: int = 60_000) -> None:
    """Write the corpus as token shards into `out_dir`, which appears when all of them are there."""
    unfinished = out_dir.with_name(f".{out_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    enc = tokenizer.get_encoding()
    writer = ShardWriter(unfinished, name, shard_size)
    for text in documents():
        writer.add(np.array([tokenizer.END_OF_TEXT_ID, *enc.encode_ordinary(text)], dtype=np.uint16))
    writer.close()
    unfinished.rename(out_dir)


def documents() -> Iterator[str]:
    """The documents, one a topic and one a class or function, well mixed and always in the same order."""
    texts = {f"topic {name}": text.strip() for name, text in topics.topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_DOCUMENTATION.isdisjoint(parts[:-1]):
            texts |= _docstrings(path, ".".join(part for part in parts if part != "__init__"))
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield texts[name]


def _docstrings(path: Path, module: str) -> dict[str, str]:
    """Documented object -> its docstring under its name, those of a class's methods following."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold escapes that newer Pythons warn of
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return {}
    found = {}

    def collect(node: ast.AST, name: str) -> str:
        text = ast.get_docstring(node)
        parts = [f"{name}\n\n{text}"] if text else []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                below = collect(child, f"{name}.{child.name}")
                if node is tree and below:
                    found[f"object {name}.{child.name}"] = below
                elif below:
                    parts.append(below)
        return "\n\n".join(parts)

    own = collect(tree, module)
    return {**found, f"module {module}": own} if own else found
