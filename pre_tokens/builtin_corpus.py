"""Text that comes with every Python installation, to try everything without a network.

It consists of the language reference in `pydoc_data.topics` and the docstrings of the standard library, read
from its source without importing it: about 0.6 million GPT-2 tokens.
"""

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from pre_tokens import build_shards, shards
from pre_tokens.build_shards import Block

NOT_DOCUMENTATION = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
SHARD_SIZE = 60_000
DOCUMENTS_PER_BLOCK = 256
PART_CHARACTERS = 2000


class BuiltinCorpus:
    """The documents as a source of shards."""

    def __init__(self) -> None:
        self.texts = list(documents())
        self.size = sum(map(len, self.texts))

    def describe(self) -> dict[str, object]:
        """Name the version of Python, because each has its own texts."""
        return {"kind": "builtin", "python": platform.python_version(), "characters": self.size}

    def blocks(self, file: int, block: int) -> Iterator[Block]:
        """Yield the blocks from this one on; there is only one file."""
        for number in range(block, -(-len(self.texts) // DOCUMENTS_PER_BLOCK)):
            end = (number + 1) * DOCUMENTS_PER_BLOCK
            done = sum(map(len, self.texts[:end]))
            yield Block(file, number, self.texts[end - DOCUMENTS_PER_BLOCK : end], done)


def complete(out_dir: Path) -> None:
    """Build the corpus in `out_dir` as token shards, or finish an interrupted build.

    A folder of other shards stays as it is.
    """
    manifest = shards.read_manifest(out_dir / shards.MANIFEST)
    if manifest is None:
        others = bool(shards.names_in(out_dir))
    else:
        others = manifest.get("source", {}).get("kind") != "builtin"
    done = manifest is not None and manifest.get("next") is None and not shards.missing(out_dir, manifest)
    if not (others or done):
        build_shards.build(BuiltinCorpus(), out_dir, "builtin", SHARD_SIZE)


def documents() -> Iterator[str]:
    """Yield the documents in an order that is well mixed and always the same.

    Each is a topic, or the docstrings of a class or function. Long ones come in parts, which are mixed like
    the rest. Otherwise a few would fill a shard, and validation text would differ from training text.
    """
    texts = {f"topic {name}": text.strip() for name, text in topics.topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_DOCUMENTATION.isdisjoint(parts[:-1]):
            texts |= _docstrings(path, ".".join(part for part in parts if part != "__init__"))
    parts = {f"{name} {n}": part for name, text in texts.items() for n, part in enumerate(_parts(text))}
    for name in sorted(parts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield parts[name]


def _parts(text: str) -> list[str]:
    """Cut a text at blank lines into parts of at most PART_CHARACTERS, if its paragraphs are short enough."""
    parts: list[str] = []
    for paragraph in text.split("\n\n"):
        if parts and len(parts[-1]) + len(paragraph) < PART_CHARACTERS:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    return parts


def _docstrings(path: Path, module: str) -> dict[str, str]:
    """Map documented objects to their docstring under their name, with those of a class's methods below."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules contain escapes that newer Pythons warn about
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
