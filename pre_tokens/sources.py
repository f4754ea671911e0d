"""Where documents come from: local files and data sets on the Hub, read one block at a time.

Files are .txt, .jsonl, .jsonl.gz or .parquet. A block is a few hundred documents, or a megabyte of a .txt
file that is one document: the memory needed does not depend on the size of the files.
"""

import codecs
import contextlib
import fnmatch
import functools
import glob
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import pyarrow
import pyarrow.parquet

from pre_tokens.build_shards import Block
from support import hub
from support.cli import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DOCUMENTS_PER_BLOCK = 256
CHARACTERS_PER_BLOCK = 2**20
# The encoding always splits between a character that is not white space and a space or newline, so text cut
# there has the same tokens in parts as in one piece.
SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)

Text = TypeVar("Text", str, bytes)
Texts = tuple[
    list[str | None], int, bool
]  # documents, bytes of the file read so far, first one continues the last


@dataclass(frozen=True)
class File:
    name: str
    size: int
    open: Callable[[], BinaryIO]


class Files:
    """Documents of several files, in the order given."""

    def __init__(
        self, files: list[File], description: dict[str, object], text_column: str, separator: str = ""
    ) -> None:
        self.files = files
        self.description = description
        self.text_column = text_column
        self.separator = separator
        self.size = sum(file.size for file in files)

    def describe(self) -> dict[str, object]:
        """What the manifest records of the source: enough to notice another one."""
        files = [{"name": Path(file.name).name, "bytes": file.size} for file in self.files]
        given = {"text_column": self.text_column, "document_separator": self.separator}
        return {**self.description, **given, "files": files}

    def blocks(self, file: int, block: int) -> Iterator[Block]:
        """The blocks from `block` of `file` on; those before are skipped without being encoded.

        Raises UserError if a file cannot be read.
        """
        before = sum(f.size for f in self.files[:file])
        for index in range(file, len(self.files)):
            skip = block if index == file else 0
            current = self.files[index]
            with _user_errors(current.name), current.open() as stream:
                for number, (texts, n_bytes, continues) in enumerate(self._read(current, stream, skip), skip):
                    yield Block(index, number, texts, before + n_bytes, continues)
            before += current.size

    def _read(self, file: File, stream: BinaryIO, skip: int) -> Iterator[Texts]:
        if file.name.endswith(".parquet"):
            return _read_parquet(file, stream, skip, self.text_column)
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            return _read_jsonl(file, stream, skip, self.text_column)
        if self.separator:
            return _read_separated(stream, skip, self.separator)
        return _read_text(stream, skip)


@contextlib.contextmanager
def _user_errors(name: str) -> Iterator[None]:
    """Turn the errors of a broken file or connection into a UserError that names the file."""
    try:
        with hub.translated_errors(name, "run the same command again to continue"):
            yield
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start} of a block: convert the file") from error
    except (pyarrow.ArrowException, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name}: damaged ({str(error).splitlines()[0]}): fetch it again") from error


# ---------------------------------------------------------------- formats


def _read_text(stream: BinaryIO, skip: int) -> Iterator[Texts]:
    """One document, in pieces of about a million characters."""
    pieces = _pieces(stream)
    for number, (piece, n_bytes) in enumerate(pieces):
        if number >= skip:
            yield [piece], n_bytes, number > 0


def _pieces(stream: BinaryIO) -> Iterator[tuple[str, int]]:
    rest = ""
    for text in _decoded(stream):
        rest += text
        if len(rest) >= CHARACTERS_PER_BLOCK and (cut := SAFE_CUT.match(rest)):
            yield cut[0], stream.tell()
            rest = rest[cut.end() :]
    yield rest, stream.tell()


def _read_separated(stream: BinaryIO, skip: int, separator: str) -> Iterator[Texts]:
    """Documents separated by `separator`."""

    def documents() -> Iterator[str]:
        rest = ""
        for text in _decoded(stream):
            *complete, rest = (rest + text).split(separator)
            yield from complete
        yield rest

    for number, texts in enumerate(_grouped(documents())):
        if number >= skip:
            yield texts, stream.tell(), False


def _decoded(stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    while data := stream.read(CHARACTERS_PER_BLOCK):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _read_jsonl(file: File, stream: BinaryIO, skip: int, column: str) -> Iterator[Texts]:
    """One JSON object per line, its text under the key `column`."""
    lines = gzip.GzipFile(fileobj=stream) if file.name.endswith(".gz") else stream
    number = 0
    for index, group in enumerate(_grouped(lines)):
        if index >= skip:
            texts = [_json_text(line, file.name, number + i, column) for i, line in enumerate(group, 1)]
            yield [text for text in texts if text is not _BLANK], stream.tell(), False
        number += len(group)


_BLANK = object()  # an empty line is not a document


def _json_text(line: bytes, name: str, number: int, column: str) -> str | None:
    if not line.strip():
        return _BLANK
    try:
        record = json.loads(line)
        text = record.get(column)
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: line {number} is not a JSON object: fix or remove the line") from error
    if not isinstance(text, str | None):
        kind = type(text).__name__
        raise UserError(f"{name}: line {number} has {kind} under {column!r}, not text: check --text-column")
    return text


def _read_parquet(file: File, stream: BinaryIO, skip: int, column: str) -> Iterator[Texts]:
    """One column, row group by row group; row groups before the block are not read."""
    table = pyarrow.parquet.ParquetFile(stream)
    if column not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"{file.name}: has no column {column!r}, only {names}: check --text-column")
    kind = table.schema_arrow.field(column).type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise UserError(f"{file.name}: column {column!r} is {kind}, not text: check --text-column")
    groups = table.num_row_groups
    for group in range(groups):
        n_blocks = -(-table.metadata.row_group(group).num_rows // DOCUMENTS_PER_BLOCK)
        if skip >= n_blocks:
            skip -= n_blocks
            continue
        batches = table.iter_batches(DOCUMENTS_PER_BLOCK, row_groups=[group], columns=[column])
        for number, batch in enumerate(itertools.islice(batches, skip, None), skip + 1):
            done = (group + number / n_blocks) / groups
            yield batch.column(0).to_pylist(), int(done * file.size), False
        skip = 0


def _grouped(items: Iterable[Text]) -> Iterator[list[Text]]:
    group, size = [], 0
    for item in items:
        group.append(item)
        size += len(item)
        if len(group) == DOCUMENTS_PER_BLOCK or size >= CHARACTERS_PER_BLOCK:
            yield group
            group, size = [], 0
    if group:
        yield group


# ---------------------------------------------------------------- places


def local(patterns: list[str], text_column: str, separator: str = "") -> Files:
    """The files that names and globs match, those of one glob sorted by name.

    Raises UserError if one matches no file, or a file of a kind that cannot be read.
    """
    paths = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if Path(path).is_file()]
        if not found and Path(pattern).is_dir():
            folder = pattern.rstrip("/")
            raise UserError(f"--files {pattern}: a folder: use --files '{folder}/*.txt', or another suffix")
        if not found:
            raise UserError(f"--files {pattern}: no such file")
        paths += found
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise UserError(f"--files {path}: not one of {', '.join(SUFFIXES)}: convert it")
    files = [File(path, Path(path).stat().st_size, functools.partial(open, path, "rb")) for path in paths]
    return Files(files, {"kind": "files"}, text_column, separator)


def on_hub(repo_id: str, subset: str, revision: str, text_column: str) -> Files:
    """The parquet files of a data set on the Hub, streamed: ranges of bytes are fetched as needed.

    subset: a configuration from the data set's card, or a folder; "" for all files.
    Raises UserError if the data set, the revision or the subset does not exist.
    """
    what = f"--repo-id {repo_id} --revision {revision}"
    offline = "without a network use --source builtin, or --files for local text"
    with hub.user_errors(what, offline):
        from huggingface_hub import HfApi, HfFileSystem

        info = hub.with_retries(lambda: HfApi().dataset_info(repo_id, revision=revision, files_metadata=True))
    sizes = {file.rfilename: file.size for file in info.siblings if file.rfilename.endswith(".parquet")}
    patterns = _patterns_of(info.card_data, subset)
    names = [name for name in sorted(sizes) if any(fnmatch.fnmatch(name, p) for p in patterns)]
    if not names:
        raise UserError(f"--repo-id {repo_id} --subset {subset}: no parquet files: check the data set's page")
    file_system = HfFileSystem()

    # The commit, not the name of a branch: the files must not change while they are read.
    paths = {name: f"datasets/{repo_id}@{info.sha}/{name}" for name in names}
    files = [File(n, sizes[n], functools.partial(file_system.open, paths[n], "rb")) for n in names]
    description = {"kind": "hub", "repo_id": repo_id, "subset": subset, "revision": info.sha}
    return Files(files, description, text_column)


def _patterns_of(card: dict | None, subset: str) -> list[str]:
    """Globs of a subset's training files: from the card's configs, else everything in that folder."""
    for config in (card.get("configs") if card else None) or []:
        if config.get("config_name") == subset:
            files = config.get("data_files") or []
            files = files if isinstance(files, list) else [files]
            splits = [f if isinstance(f, dict) else {"split": "train", "path": f} for f in files]
            paths = [split["path"] for split in splits if split.get("split", "train") == "train"]
            return [p for path in paths for p in ([path] if isinstance(path, str) else path)]
    return [f"{subset}/*" if subset else "*"]
