"""Text as people have it: line ends, byte order marks, separators, Arrow types, no spaces at all."""

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import documents_of

import generate
import hellaswag
from pre_tokens import handle_tokens, shards, sources
from settings import settings_from_config
from support import metrics, run_files, tokenizer
from support.cli import UserError

DOCUMENTS = ["First line.\nSecond line.", "日本語", "  spaces  kept  "]
ENDS = {"Windows": "\r\n", "old Mac": "\r", "Unix": "\n"}
BOM = b"\xef\xbb\xbf"


def read(path: Path, separator: str = "") -> list[str]:
    """The documents that a file holds, as shards would have them."""
    source = sources.local([str(path)], "text", separator)
    documents: list[str] = []
    for block in source.blocks(0, 0):
        texts = list(block.texts)
        if block.continues:
            documents[-1] += texts.pop(0)
        documents += texts
    return documents


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "marked"])
def test_text_is_read_like_in_text_mode(tmp_path: Path, end: str, mark: bytes) -> None:
    file = tmp_path / "A.TXT"
    file.write_bytes(mark + "\n---\n".join(DOCUMENTS).replace("\n", end).encode())
    assert read(file, "\n---\n") == DOCUMENTS
    assert read(file) == [file.read_text(encoding="utf-8-sig")]
    lines = (
        "\n\n".join(json.dumps({"text": text}) for text in DOCUMENTS) + "\n  \n"
    )  # blank ones between them
    for name, pack in (("a.JSONL", bytes), ("a.jsonl.GZ", gzip.compress)):
        (tmp_path / name).write_bytes(pack(mark + lines.replace("\n", end).encode()))
        assert read(tmp_path / name) == DOCUMENTS


def test_a_line_end_across_two_reads_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BYTES_READ_AT_ONCE", 1)
    (tmp_path / "a.txt").write_bytes(BOM + "é\r\nb\r\r\n".encode())
    assert read(tmp_path / "a.txt") == ["é\nb\n\n"]


@pytest.mark.parametrize("given", ["\\n\\n", "\\r\\n\\r\\n", "\n\n", "\r\n\r\n"])
def test_separators_are_normalised_like_the_files(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one two\r\n\r\nthree four\r\n\r\nfive six")
    flags = ["--files", str(tmp_path / "a.txt"), "--document-separator", given, "--shard-size", "100"]
    monkeypatch.setattr(sys, "argv", ["handle_tokens.py", *flags, "--out-dir", str(tmp_path / "out")])
    handle_tokens.main()
    assert documents_of(tmp_path / "out") == ["one two", "three four", "five six"]


@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_end_of_text_separates_documents(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in TinyStories, whatever is read at once; a separator of one's own is the only one."""
    monkeypatch.setattr(sources, "BYTES_READ_AT_ONCE", at_once)
    monkeypatch.setattr(sources, "CHARACTERS_PER_BLOCK", at_once)
    stories = ["Once upon a time.\n\nThe end.", "Another.", "a last"]
    text = "\n<|endoftext|>\n".join(stories) + "<|endoftext|>\n"
    (tmp_path / "a.txt").write_text(text)
    assert [document for document in read(tmp_path / "a.txt") if document] == stories
    assert read(tmp_path / "a.txt", "\n\n") == text.split("\n\n")
    (tmp_path / "b.txt").write_text("\n\n" + stories[0] + "\n\n")  # without one, nothing is stripped
    assert read(tmp_path / "b.txt") == ["\n\n" + stories[0] + "\n\n"]


@given(
    documents=st.lists(st.text("ab -\n", max_size=12), min_size=1, max_size=6),
    separator=st.sampled_from(["--", "-", "\n\n", "-- --"]),
    at_once=st.integers(1, 9),
)
def test_a_separator_across_two_reads_stays_one(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], separator: str, at_once: int
) -> None:
    """Wherever a read ends; documents may hold parts of a separator, or begin and end with some."""
    text = separator.join(documents)
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BYTES_READ_AT_ONCE", at_once)
        patch.setattr(sources, "CHARACTERS_PER_BLOCK", at_once)
        assert read(file, separator) == text.split(separator)


def test_end_of_text_in_other_formats_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one <|endoftext|> two"}))
    (tmp_path / "a.txt").write_text("one <|endoftext|> two")
    for name, told in (("a.jsonl", True), ("a.txt", False)):
        flags = [
            "--files",
            str(tmp_path / name),
            "--shard-size",
            "100",
            "--out-dir",
            str(tmp_path / name[2:]),
        ]
        monkeypatch.setattr(sys, "argv", ["handle_tokens.py", *flags])
        handle_tokens.main()
        assert ("contain <|endoftext|>" in capsys.readouterr().out) == told


ARROW_TYPES = {
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "dictionary of bytes": pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
}


@pytest.mark.parametrize("name", ARROW_TYPES)
def test_a_column_may_hold_text_under_any_arrow_type(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.Parquet"
    values = [text.encode() for text in DOCUMENTS] if "bina" in name or "bytes" in name else DOCUMENTS
    kind = ARROW_TYPES[name]
    if name.startswith("dictionary"):
        column = pyarrow.array(values, kind.value_type).dictionary_encode().cast(kind)
    else:
        column = pyarrow.array([*values, None], kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    assert [text for text in read(file) if text is not None] == DOCUMENTS


def test_a_column_of_numbers_or_of_other_bytes_is_refused(tmp_path: Path) -> None:
    for values, message in (([1, 2], "is int64, not text"), ([b"\xff"], "not UTF-8")):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.parquet")


# ---------------------------------------------------------------- any text whatever


LONG = {
    "without a space": "x" * 2_500_000,
    "nothing but spaces": " " * 2_500_000,
    "spaces before a word": " " * 8_000_000 + "x",
    "emoji": "🙂" * 1_200_000,
    "white space of many kinds": " \t\u00a0\u3000\n\r" * 400_000,
    "words": "to be or not to be \n" * 120_000,
}


@pytest.mark.parametrize("case", LONG)
def test_any_text_can_be_encoded(case: str) -> None:
    """Millions of spaces before a word stop the splitting rule's engine, if they come in one piece."""
    text = LONG[case]
    ids = tokenizer.encode(text)
    assert tokenizer.get_encoding().decode(ids.tolist()) == text
    assert max(map(len, tokenizer.pieces(text))) <= tokenizer.PIECE
    if case == "words":
        assert np.array_equal(ids, tokenizer.get_encoding().encode_ordinary(text))


def test_a_document_without_spaces_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHARACTERS_PER_BLOCK", 1000)
    monkeypatch.setattr(sources, "BYTES_READ_AT_ONCE", 1000)
    (tmp_path / "a.txt").write_text("x" * 10_000)
    source = sources.local([str(tmp_path / "a.txt")], "text")
    blocks = list(source.blocks(0, 0))
    assert max(len(text) for block in blocks for text in block.texts) < 2000
    assert read(tmp_path / "a.txt") == ["x" * 10_000]
    for skip in (1, 5):  # a build continues in the middle
        assert [block.texts for block in source.blocks(0, skip)] == [block.texts for block in blocks[skip:]]


# ---------------------------------------------------------------- other files of people


def test_hellaswag_files_of_any_editor_are_read(tmp_path: Path) -> None:
    record = {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 1}
    lines = [json.dumps(record | {"ctx": f"Man {number}"}) for number in range(3)]
    (tmp_path / "plain.jsonl").write_text("\n".join(lines))
    (tmp_path / "edited.jsonl").write_bytes(BOM + "\r\n\r\n".join([*lines, ""]).encode())
    expected = hellaswag.load(tmp_path / "plain.jsonl")
    assert len(expected) == 3
    assert hellaswag.load(tmp_path / "edited.jsonl") == expected
    assert hellaswag.load(tmp_path / "edited.jsonl", limit=2) == expected[:2]
    rows = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    pyarrow.parquet.write_table(rows, tmp_path / "A.PARQUET")
    assert hellaswag.load(tmp_path / "A.PARQUET") == expected


def test_prompts_from_windows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.TextIOWrapper(io.BytesIO(BOM + b"one\r\ntwo\r\n"))
    monkeypatch.setattr(sys, "stdin", given)
    assert generate.read_prompt(generate.Settings(prompt="-")) == "one\ntwo"


def test_json_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """A config.json, a manifest, and metrics with blank lines."""
    config = json.dumps({"settings": {"n_layer": 3}}, indent=2).replace("\n", "\r\n").encode()
    (tmp_path / "config.json").write_bytes(BOM + config)
    assert settings_from_config(tmp_path / "config.json").n_layer == 3
    assert run_files.recorded_settings(tmp_path) == {"n_layer": 3}
    (tmp_path / "manifest.json").write_bytes(BOM + b'{"shards": []}')
    assert shards.read_manifest(tmp_path / "manifest.json") == {"shards": []}
    record = b'{"step": 1, "kind": "val", "loss": 2.0}\r\n'
    (tmp_path / "metrics.jsonl").write_bytes(BOM + record + b"\r\n" + record)
    assert [r["loss"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["x_train_000001.npy", "a.txt", "a.parquet"])
def test_a_git_lfs_pointer_is_refused_as_data(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 200000128\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=r"a Git LFS pointer, not the .*: .*git lfs pull"):
        shards.open_shard(tmp_path / name) if name.endswith(".npy") else read(tmp_path / name)


# ---------------------------------------------------------------- a data set's splits

SPLITS = ["data/train-0.parquet", "data/test-0.parquet", "data/validation-0.parquet"]
CONFIG = {
    "config_name": "default",
    "data_files": [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test", "validation")],
}
NAMED = CONFIG | {"config_name": "c"}
OTHER = {"config_name": "other", "data_files": "more/*"}
UNSPLIT = ["a.parquet", "b/c.parquet"]
CASES = {
    "the default configuration": (SPLITS, {"configs": [CONFIG]}, "", SPLITS[:1]),
    "by its name": (SPLITS, {"configs": [CONFIG]}, "default", SPLITS[:1]),
    "the default among others": ([*SPLITS, "more/x"], {"configs": [OTHER, CONFIG]}, "", SPLITS[:1]),
    "one marked as default": (
        [*SPLITS, "more/x"], {"configs": [OTHER | {"default": True}, NAMED]}, "", ["more/x"],
    ),
    "several, none of them default": (
        [*SPLITS, "more/x"], {"configs": [OTHER, NAMED]}, "", [SPLITS[0], "more/x"],
    ),
    "a configuration without files": (
        SPLITS, {"configs": [{"config_name": "en", "data_dir": "data"}]}, "", SPLITS[:1],
    ),
    "a mapping of splits": (
        SPLITS, {"configs": [{"data_files": {"train": "./data/train-*", "test": "data/t*"}}]}, "", SPLITS[:1],
    ),
    "several training splits": (
        ["sft.parquet", "gen.parquet", "test.parquet"],
        {"configs": [{"data_files": {"train_sft": "sft.*", "train_gen": ["gen.*"], "test_sft": "test.*"}}]},
        "", ["gen.parquet", "sft.parquet"],
    ),
    "no card": (SPLITS, None, "", SPLITS[:1]),
    "a card without configurations": (SPLITS, {"license": "mit"}, "", SPLITS[:1]),
    "folders of splits": (["en/train/0.parquet", "en/test/0.parquet"], None, "", ["en/train/0.parquet"]),
    "no split is named": (UNSPLIT, None, "", UNSPLIT),
    "only others are named": (["dev.parquet", "rest.parquet"], None, "", ["rest.parquet"]),
    "a folder": (SPLITS, None, "data", SPLITS[:1]),
    "a split that is asked for": (["test/0.parquet", "train/0.parquet"], None, "test", ["test/0.parquet"]),
    "no such folder": (SPLITS, None, "nothing", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_only_a_training_split_is_trained_on(case: str) -> None:
    names, card, subset, expected = CASES[case]
    assert sources.training_files(names, card, subset) == expected
