"""Turn text into token shards.

    python pre_tokens/handle_tokens.py                                    # FineWeb-Edu, 10 billion tokens
    python pre_tokens/handle_tokens.py --files 'books/*.txt' --name books --out-dir data/books
    python pre_tokens/handle_tokens.py --repo-id USER/NAME --text-column text --name mine --out-dir data/mine
    python pre_tokens/handle_tokens.py --source builtin --out-dir data/builtin

If interrupted, the same command continues after the last complete shard.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules beside this folder

from pre_tokens import build_shards, builtin_corpus, shards, sources
from support import cli, tokenizer
from support.cli import UserError

FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "sample-10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9")


@dataclass
class Settings:
    source: Literal["fineweb-edu", "builtin"] = "fineweb-edu"
    """Source without --files or --repo-id: FineWeb-Edu's sample-10BT on the Hub or Python's documentation."""
    files: list[str] = field(default_factory=list)
    """Files and globs on this machine: .txt, .jsonl, .jsonl.gz, .parquet."""
    document_separator: str = ""
    """Separator of documents in a .txt file (\\n and \\t are escapes). Empty: <|endoftext|> if a file contains it; otherwise each file is one document."""  # noqa: E501
    repo_id: str = ""
    """A data set on the Hub with parquet files, USER/NAME."""
    subset: str = ""
    """Part of --repo-id: a configuration from its page, or a folder. Empty: the default configuration, or all. Only training splits are used."""  # noqa: E501
    revision: str = "main"
    """Branch, tag or commit of --repo-id. FineWeb-Edu is pinned to one commit unless another is given."""
    text_column: str = "text"
    """Column or key of the text in .jsonl and .parquet files."""
    out_dir: Path = Path("data/fineweb-edu-10b")
    """Folder for the shards."""
    name: str = ""
    """File name prefix of the shards. Empty: edufineweb or builtin, else the name of --out-dir."""
    shard_size: int = 0
    """Tokens per shard; the first shard is for validation. 0: 60,000 for builtin, otherwise 100 million; with --files or --repo-id about 1 % of the text is held out, 1,025 to 100 million."""  # noqa: E501
    workers: int = 0
    """Encoding threads. 0: one per core."""


def main() -> None:
    settings = cli.parse(Settings, "Turn text into token shards for train_gpt2.py.")
    source, name = choose_source(settings)
    shard_size = settings.shard_size
    if not (shard_size or settings.files or settings.repo_id):
        builtin = settings.source == "builtin"
        shard_size = builtin_corpus.SHARD_SIZE if builtin else build_shards.SHARD_SIZE
    manifest = build_shards.build(source, settings.out_dir, name, shard_size, settings.workers)
    print(
        f"{manifest['tokens']:,} tokens of {manifest['documents']:,} documents in {len(manifest['shards'])} "
        f"shards: {settings.out_dir} ({manifest['skipped']:,} documents without text skipped)"
    )
    if isinstance(source, sources.Files) and source.contains_end_of_text:
        print(f"note: some documents contain {tokenizer.END_OF_TEXT}: it became plain characters")


def choose_source(s: Settings) -> tuple[build_shards.Source, str]:
    """Return the source that the settings ask for, and the name of its shards."""
    if s.files and s.repo_id:
        raise UserError("--files --repo-id: two sources: drop one of them")
    if (s.files or s.repo_id or s.source == "builtin") and s.out_dir == Settings.out_dir:
        raise UserError(f"--out-dir {s.out_dir}: the folder of FineWeb-Edu: name another, such as data/mine")
    own_name = s.name or s.out_dir.name
    if not shards.SHARD_NAME.fullmatch(f"{own_name}_val_000000.npy"):
        raise UserError(f"--name {own_name}: not usable in a file name: use letters, digits, - and _")
    if s.files:
        separator = s.document_separator
        for escape, character in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t")):
            separator = separator.replace(escape, character)
        separator = separator.replace("\r\n", "\n").replace("\r", "\n")  # as the files are read
        return sources.local(s.files, s.text_column, separator), own_name
    if s.repo_id:
        return sources.on_hub(s.repo_id, s.subset, s.revision, s.text_column), own_name
    if s.source == "builtin":
        return builtin_corpus.BuiltinCorpus(), s.name or "builtin"
    repo_id, subset, commit = FINEWEB_EDU
    revision = commit if s.revision == "main" else s.revision
    return sources.on_hub(repo_id, s.subset or subset, revision, s.text_column), s.name or "edufineweb"


if __name__ == "__main__":
    cli.run(main, must_finish=True)
