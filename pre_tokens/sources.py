"""Read documents from local files and data sets on the Hub, one block at a time.

Files are .txt, .jsonl, .jsonl.gz or .parquet. A block is a few hundred documents, or a megabyte of a long one
in a .txt file, so the memory needed does not depend on the size of the files. Line ends of any system become
newlines, and a byte order mark is dropped.
"""

import codecs
import contextlib
import fnmatch
import functools
import glob
import gzip
import io
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
from support import hub, tokenizer
from support.cli import UserError
from support.files import is_lfs_pointer
from support.tokenizer import END_OF_TEXT

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DOCUMENTS_PER_BLOCK = 256
CHARACTERS_PER_BLOCK = 2**20
BYTES_READ_AT_ONCE = 2**20
OTHER_SPLITS = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}

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
        self.contains_end_of_text = False  # in any document so far
        self.size = sum(file.size for file in files)

    def describe(self) -> dict[str, object]:
        """Describe the source for the manifest, in enough detail to recognise another one."""
        files = [{"name": Path(file.name).name, "bytes": file.size} for file in self.files]
        given = {"text_column": self.text_column, "document_separator": self.separator}
        return {**self.description, **given, "files": files}

    def blocks(self, file: int, block: int) -> Iterator[Block]:
        """Yield the blocks from `block` of `file` on. Earlier ones are skipped without being encoded.

        Raises UserError if a file cannot be read.
        """
        before = sum(f.size for f in self.files[:file])
        for index in range(file, len(self.files)):
            skip = block if index == file else 0
            current = self.files[index]
            with _user_errors(current.name), current.open() as stream:
                for number, (texts, n_bytes, continues) in enumerate(self._read(current, stream, skip), skip):
                    if any(END_OF_TEXT in text for text in texts if text):
                        self.contains_end_of_text = True
                    yield Block(index, number, texts, before + n_bytes, continues)
            before += current.size

    def _read(self, file: File, stream: BinaryIO, skip: int) -> Iterator[Texts]:
        name = file.name.lower()
        if name.endswith(".parquet"):
            return _read_parquet(file, stream, skip, self.text_column)
        if name.endswith((".jsonl", ".jsonl.gz")):
            return _read_jsonl(file, stream, skip, self.text_column)
        return _read_text(stream, skip, self.separator)


@contextlib.contextmanager
def _user_errors(name: str) -> Iterator[None]:
    """Turn errors of a broken file or connection into a UserError that names the file."""
    try:
        with hub.translated_errors(name, "run the same command again to continue"):
            yield
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start} of a block: convert the file") from error
    except (pyarrow.ArrowException, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name}: damaged ({str(error).splitlines()[0]}): fetch it again") from error


# ---------------------------------------------------------------- formats


def _read_text(stream: BinaryIO, skip: int, separator: str) -> Iterator[Texts]:
    """Yield documents between separators, long ones in parts of about a million characters."""
    for number, block in enumerate(_grouped_parts(_parts(stream, separator))):
        if number >= skip:
            yield block


def _parts(stream: BinaryIO, separator: str) -> Iterator[tuple[str, int, bool]]:
    """Yield parts of documents, the bytes of the file read so far, and True if the part begins a document.

    Without a separator, <|endoftext|> is one, together with the line ends around it.
    """
    around, separator = ("", separator) if separator else ("\n", END_OF_TEXT)
    rest, begins, before = "", True, ""  # before: characters to strip at the start of the document
    for text in _decoded(stream):
        *complete, rest = (rest + text).split(separator)
        for document in complete:
            part = (document.lstrip(before) if begins else document).rstrip(around)
            if begins or part:
                yield part, stream.tell(), begins
            begins, before = True, around
        # The end of the rest may be the beginning of a separator, so keep enough of it for the next round.
        while (end := len(rest) - len(around + separator) + 1) >= CHARACTERS_PER_BLOCK:
            end = tokenizer.cut(rest, end)
            part = rest[:end].lstrip(before) if begins else rest[:end]
            rest = rest[end:]
            if part:
                yield part, stream.tell(), begins
                begins = False
    yield rest.lstrip(before) if begins else rest, stream.tell(), begins


def _grouped_parts(parts: Iterable[tuple[str, int, bool]]) -> Iterator[Texts]:
    """Group parts. Only the first of a group may continue a document."""
    group, size, read, continues = [], 0, 0, False
    for text, n_bytes, begins in parts:
        if group and (not begins or len(group) == DOCUMENTS_PER_BLOCK or size >= CHARACTERS_PER_BLOCK):
            yield group, read, continues
            group, size = [], 0
        if not group:
            continues = not begins
        group.append(text)
        size += len(text)
        read = n_bytes
    if group:
        yield group, read, continues


def _decoded(stream: BinaryIO) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    while data := stream.read(BYTES_READ_AT_ONCE):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _read_jsonl(file: File, stream: BinaryIO, skip: int, column: str) -> Iterator[Texts]:
    """Read one JSON object per line, with its text under the key `column`."""
    binary = gzip.GzipFile(fileobj=stream) if file.name.lower().endswith(".gz") else stream
    lines = io.TextIOWrapper(binary, encoding="utf-8-sig")
    number = 0
    for index, group in enumerate(_grouped(lines)):
        if index >= skip:
            texts = [_json_text(line, file.name, number + i, column) for i, line in enumerate(group, 1)]
            yield [text for text in texts if text is not _BLANK], stream.tell(), False
        number += len(group)


_BLANK = object()  # an empty line is not a document


def _json_text(line: str, name: str, number: int, column: str) -> str | None:
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
    """Read one column, row group by row group. Row groups before the block are not read."""
    table = pyarrow.parquet.ParquetFile(stream)
    if column not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"{file.name}: has no column {column!r}, only {names}: check --text-column")
    if table.schema_arrow.names.count(column) > 1:
        raise UserError(f"{file.name}: has several columns {column!r}: rename one")
    kind = table.schema_arrow.field(column).type
    if not _holds_text(kind):
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
            texts = batch.column(0).to_pylist()
            texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
            yield texts, int(done * file.size), False
        skip = 0


def _holds_text(kind: pyarrow.DataType) -> bool:
    """True if a column of this type holds text, UTF-8 in bytes, or nothing at all."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _holds_text(kind.storage_type)
    if pyarrow.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    return kind in (*texts, pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.null())


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
    """Find the files that names and globs match. Those of one glob are sorted by name.

    Raises UserError if a pattern matches no file, or a file of a kind that cannot be read.
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
        if not path.lower().endswith(SUFFIXES):
            raise UserError(f"--files {path}: not one of {', '.join(SUFFIXES)}: convert it")
        if is_lfs_pointer(Path(path)):
            raise UserError(f"--files {path}: a Git LFS pointer, not the file: run `git lfs pull` beside it")
    files = [File(path, Path(path).stat().st_size, functools.partial(open, path, "rb")) for path in paths]
    return Files(files, {"kind": "files"}, text_column, separator)


def on_hub(repo_id: str, subset: str, revision: str, text_column: str) -> Files:
    """Stream the parquet files of a data set on the Hub. Ranges of bytes are fetched as needed.

    subset: a configuration from the card of the data set, or a folder; "" for all files.
    Raises UserError if the data set, the revision or the subset does not exist.
    """
    what = f"--repo-id {repo_id} --revision {revision}"
    offline = "without a network use --source builtin, or --files for local text"
    with hub.user_errors(what, offline):
        from huggingface_hub import HfApi, HfFileSystem

        info = hub.with_retries(lambda: HfApi().dataset_info(repo_id, revision=revision, files_metadata=True))
    sizes = {file.rfilename: file.size for file in info.siblings if _is_parquet(file.rfilename)}
    part = f"--repo-id {repo_id}" + (f" --subset {subset}" if subset else "")
    try:
        names = training_files(sorted(sizes), info.card_data, subset)
    except (AttributeError, KeyError, TypeError) as error:
        text = "the configurations on its card are not as the Hub describes them"
        raise UserError(f"{part}: {text} ({error!r}): name a folder of it with --subset") from error
    if not names:
        raise UserError(
            f"{part}: no parquet files for training: name a configuration or folder of its page with --subset"
        )
    file_system = HfFileSystem()

    # A commit, because files of a branch may change while they are read.
    paths = {name: f"datasets/{repo_id}@{info.sha}/{name}" for name in names}
    files = [File(n, sizes[n], functools.partial(file_system.open, paths[n], "rb")) for n in names]
    description = {"kind": "hub", "repo_id": repo_id, "subset": subset, "revision": info.sha}
    return Files(files, description, text_column)


def _is_parquet(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return name.lower().endswith(".parquet") and not hidden


def training_files(names: list[str], card: dict | None, subset: str) -> list[str]:
    """Select the files of a data set that are for training.

    subset: a configuration from the card, or a folder; "": the default configuration, or all of them.
    """
    configs = (card.get("configs") if card else None) or []
    default = [c for c in configs if c.get("config_name") == "default" or c.get("default")]
    chosen = [c for c in configs if c.get("config_name") == subset] if subset else default[:1] or configs
    found: set[str] = set()
    for config in chosen or [{"data_dir": subset}]:
        if config.get("data_files"):
            patterns = _training_patterns(config["data_files"])
            found |= {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
        else:
            found |= _named_for_training(names, config.get("data_dir", ""))
    return sorted(found)


def _training_patterns(data_files: object) -> list[str]:
    """Return globs for the training files in the `data_files` of a configuration."""
    if isinstance(data_files, dict) and "path" not in data_files:  # split -> globs
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits = [f if isinstance(f, dict) else {"split": "train", "path": f} for f in entries]
    # Some have several training splits: train_sft, train_gen.
    paths = [split["path"] for split in splits if re.match("train(?![a-z])", split.get("split", "train"))]
    globs = [glob for path in paths for glob in ([path] if isinstance(path, str) else path)]
    return [glob.removeprefix("./") for glob in globs]


def _named_for_training(names: list[str], folder: str) -> set[str]:
    """Select files in a folder by the words in their paths, like `datasets.load_dataset`.

    If no path says "train": all that do not belong to another split.
    """
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    inside = [name for name in names if name.startswith(prefix)]
    words = {name: set(re.split(r"[^a-z]+", name.removeprefix(prefix).lower())) for name in inside}
    named = {name for name in inside if words[name] & {"train", "training"}}
    return named or {name for name in inside if not words[name] & OTHER_SPLITS}
