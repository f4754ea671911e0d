"""Text to shards: nothing lost, the same bytes however they come about, mistakes in one line."""

import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import transformers
from helpers import ROOT, command, environment, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import LoopbackHub

from pre_tokens import build_shards, handle_tokens, shards, sources
from support import tokenizer
from support.cli import UserError
from support.files import sha256_of

SCRIPT = "pre_tokens/handle_tokens.py"
# tiktoken's own spelling of the rule, from tiktoken_ext/openai_public.py (r50k).
PUBLISHED_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Any unicode, and what encodings stumble over: special tokens, lone surrogates, NULs, runs of white space.
AWKWARD = [
    "<|endoftext|>",
    "\ud800",
    "\udc00",
    "\0",
    "\r\n",
    "   ",
    "\n\n",
    "\t",
    "\x1c",
    "\u2028",
    "\u2019s",
    "'ll",
]
texts = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from([*AWKWARD, "word", " 12", "日本語", "🤖", "e\u0301"]), max_size=60).map("".join),
)


def tokens_of(folder: Path) -> np.ndarray:
    """All tokens of a folder's shards in order, after checking what every shard of a build must be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["next"] is None
    names = [shard["file"] for shard in manifest["shards"]]
    assert sorted(path.name for path in folder.glob("*.npy")) == sorted(names)
    assert names == [
        f"{manifest['name']}_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(names))
    ]  # fmt: skip
    parts = [np.load(folder / name) for name in names]
    assert all(part.dtype == np.uint16 and part.ndim == 1 for part in parts)
    sizes = [manifest["val_size"], *[manifest["shard_size"]] * len(parts)]
    assert all(len(part) == size for part, size in zip(parts[:-1], sizes, strict=False))
    for shard, part in zip(manifest["shards"], parts, strict=True):
        assert (shard["tokens"], shard["documents"]) == (len(part), np.count_nonzero(part == 50256))
        assert shard["sha256"] == sha256_of(folder / shard["file"])
    whole = np.concatenate(parts)
    assert (manifest["tokens"], manifest["documents"]) == (len(whole), np.count_nonzero(whole == 50256))
    return whole


def documents_of(folder: Path) -> list[str]:
    tokens = tokens_of(folder)
    assert tokens[0] == 50256
    enc = tokenizer.get_encoding()
    return [enc.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 50256))[1:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def write_jsonl(path: Path, documents: list[object]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    return path


def build(out_dir: Path, *files: Path, shard_size: int = 1000, workers: int = 2, separator: str = "") -> dict:
    source = sources.local([str(file) for file in files], "text", separator)
    return build_shards.build(source, out_dir, "x", shard_size, workers)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A few thousand documents of very different lengths."""
    rng = random.Random(0)
    words = ["the", " of", " and", "\n", " 1984", "é", " don't", " tokens", ".", "  "]
    documents = ["".join(rng.choices(words, k=int(rng.paretovariate(0.7)) % 5000)) for _ in range(3000)]
    return write_jsonl(tmp_path / "corpus.jsonl", documents)


# ---------------------------------------------------------------- the encoding


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_our_splitting_rule_splits_like_tiktokens(published: tiktoken.Encoding, text: str) -> None:
    ids, _ = build_shards.encode([text, "end"])
    expected = [50256, *published.encode_ordinary(text)] if text else []
    assert ids.tolist() == [*expected, 50256, 437]


@pytest.fixture(scope="module")
def published() -> tiktoken.Encoding:
    ours = tokenizer.get_encoding()
    return tiktoken.Encoding(
        "published",
        pat_str=PUBLISHED_PATTERN,
        mergeable_ranks=ours._mergeable_ranks,
        special_tokens=ours._special_tokens,
    )


@settings(max_examples=150, deadline=None)
@given(documents=st.lists(texts.filter(lambda text: "<|endoftext|>" not in text), max_size=5))
def test_ids_equal_those_of_transformers(
    exported: transformers.PreTrainedTokenizerBase,
    documents: list[str],
) -> None:
    documents = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in documents]
    expected = [id for text in documents if text for id in [50256, *exported(text)["input_ids"]]]
    ids, empty = build_shards.encode(documents)
    assert ids.dtype == np.uint16
    assert ids.tolist() == expected
    assert empty == documents.count("")


# ---------------------------------------------------------------- documents in, documents out


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(texts, min_size=1, max_size=12), shard_size=st.integers(1, 400))
def test_documents_decode_back_to_the_input(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], shard_size: int
) -> None:
    """Also those that are longer than a shard, or than several."""
    folder = tmp_path_factory.mktemp("roundtrip")
    file = write_jsonl(folder / "d.jsonl", [*documents, "", None, "last"])
    manifest = build(folder / "out", file, shard_size=shard_size)
    # A pair of surrogates is one character; a lone one has no UTF-8 and becomes U+FFFD.
    paired = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in documents]
    assert documents_of(folder / "out") == [text for text in [*paired, "last"] if text]
    assert manifest["skipped"] == documents.count("") + 2


def test_every_file_format_gives_the_same_shards(tmp_path: Path) -> None:
    documents = ["One.\r\ntwo <|endoftext|>", "日本\0語 🤖", "x" * 3000, "last\n"]
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "a.jsonl.gz", documents)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": documents, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet", row_group_size=3
    )
    (tmp_path / "a.txt").write_bytes("\n---\n".join(documents).encode())
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        build(tmp_path / f"out {name}", tmp_path / name, separator="\n---\n")
        expected = [text.replace("\r\n", "\n") for text in documents] if name == "a.txt" else documents
        assert documents_of(tmp_path / f"out {name}") == expected
    build(tmp_path / "both", tmp_path / "a.jsonl", tmp_path / "a.parquet")
    assert documents_of(tmp_path / "both") == documents * 2


@pytest.mark.parametrize("text", ["to be, or not to be \n" * 100_000, "a  \n\n b" * 300_000, "é" * 1_500_000])
def test_reading_a_long_text_file_in_parts_changes_no_token(tmp_path: Path, text: str) -> None:
    """Read a megabyte at a time, it has the tokens of one piece: this rests on where pieces are cut."""
    (tmp_path / "long.txt").write_bytes(text.encode())
    build(tmp_path / "out", tmp_path / "long.txt", shard_size=100_000)
    expected = [50256, *tokenizer.get_encoding().encode_ordinary(text)]
    assert tokens_of(tmp_path / "out").tolist() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="memory is not measured there")
def test_memory_does_not_grow_with_the_input(tmp_path: Path, corpus: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from pre_tokens import build_shards, sources\n"
        "import torch; from support import hardware\n"
        "build_shards.build(sources.local(sys.argv[3:], 'text'), Path(sys.argv[2]), 'x', 1_000_000, 2)\n"
        "print(hardware.peak_memory(torch.device('cpu')))\n"
    )
    peaks = []
    for megabytes in (8, 48):
        file = tmp_path / f"{megabytes}.jsonl"
        file.write_bytes(corpus.read_bytes() * (megabytes * 2**20 // corpus.stat().st_size))
        args = [str(ROOT), str(tmp_path / f"out{megabytes}"), str(file)]
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 2**20)
    assert peaks[1] - peaks[0] < 15


# ---------------------------------------------------------------- the same bytes, whatever happens


def test_the_number_of_workers_does_not_change_the_bytes(tmp_path: Path, corpus: Path) -> None:
    for workers in (1, 2, 7):
        build(tmp_path / str(workers), corpus, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "separated"])
def test_a_build_interrupted_after_any_shard_ends_with_the_same_bytes(
    tmp_path: Path, corpus: Path, kind: str
) -> None:
    """At the end of every shard, with what a kill leaves: a part, a shard that is not listed yet."""
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()][:900]
    file = tmp_path / f"file.{kind.replace('separated', 'txt')}"
    separator = ""
    if kind == "jsonl":
        write_jsonl(file, documents)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), file, row_group_size=300)
    else:
        separator = "|" if kind == "separated" else ""
        file.write_text("|".join(documents) * (12 if kind == "txt" else 1))
    shard_size = build(tmp_path / "count", file, separator=separator, shard_size=10**6)["tokens"] // 8
    build(tmp_path / "whole", file, shard_size=shard_size, separator=separator)
    whole = contents(tmp_path / "whole")
    out = tmp_path / "part"
    written = shards.write_manifest
    ends = len(json.loads(whole["manifest.json"])["shards"])
    assert ends > 5

    for end in range(ends):

        class Killed(BaseException):
            pass

        def write_then_die(folder: Path, manifest: dict, end: int = end) -> None:
            if len(manifest["shards"]) > end:
                raise Killed  # the shard is there, the manifest does not know
            written(folder, manifest)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(shards, "write_manifest", write_then_die)
            build(out, file, shard_size=shard_size, separator=separator)
        (out / f"x_train_{end + 1:06d}.tmp").write_bytes(b"half")
    build(out, file, shard_size=shard_size, separator=separator)
    left = contents(out)
    assert {name: left[name] for name in whole} == whole


def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_bytes(corpus.read_bytes() * 20)
    flags = ["--files", str(long), "--name", "x", "--shard-size", "20000", "--workers", "2"]
    out = tmp_path / "out"
    kills = 0
    while True:
        process = subprocess.Popen(command(SCRIPT, *flags, "--out-dir", str(out)), env=environment())
        try:
            process.wait(random.uniform(0.6, 1.6) if kills < 3 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)
            kills += 1
            continue
        assert process.returncode == 0
        break
    build(tmp_path / "whole", long, shard_size=20_000)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_removed_shard_is_built_again(tmp_path: Path, corpus: Path) -> None:
    build(tmp_path / "out", corpus, shard_size=100_000)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "x_train_000001.npy").unlink()
    build(tmp_path / "out", corpus, shard_size=100_000)
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------- the size of the validation shard


def words(n_tokens: int) -> str:
    """A text with this many tokens, the 50256 before it included."""
    return " the" * (n_tokens - 1)


@pytest.mark.parametrize(
    ("tokens", "validation"),
    [
        (2050, 1025),
        (60_000, 1025),
        (204_799, 1025),
        (204_800, 2049),
        (400_000, 3073),
        (3_000_000, 29 * 1024 + 1),
    ],
)
def test_validation_gets_one_percent_in_whole_sequences(tmp_path: Path, tokens: int, validation: int) -> None:
    (tmp_path / "a.txt").write_text(words(tokens))
    manifest = build(tmp_path / "out", tmp_path / "a.txt", shard_size=0)
    assert manifest["tokens"] == tokens == len(tokens_of(tmp_path / "out"))
    assert [shard["tokens"] for shard in manifest["shards"]] == [validation, tokens - validation]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_tokens_of_a_large_text_are_estimated_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With every number of threads alike; and cut off after the first shard it ends with the same bytes."""
    monkeypatch.setattr(build_shards, "COUNTED", 300_000)
    monkeypatch.setattr(build_shards, "SHARD_SIZE", 1_000_000)
    rng, file = random.Random(0), tmp_path / f"a.{kind}"
    documents = ["".join(rng.choices([" the", " of", " and", " to", " in"], k=750)) for _ in range(200)] * 20
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), file, row_group_size=1000)
    elif kind == "txt":
        file.write_text("".join(documents))
    else:
        write_jsonl(file, documents)
    for workers in (1, 5):
        build(tmp_path / str(workers), file, shard_size=0, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "5")
    sizes = [shard["tokens"] for shard in json.loads(contents(tmp_path / "1")["manifest.json"])["shards"]]
    assert sizes[0] % 1024 == 1 and sizes[1:3] == [1_000_000] * 2
    share = sizes[0] / sum(sizes)
    assert 0.005 < share < 0.02 if kind == "jsonl.gz" else 0.009 < share < 0.011

    written = shards.write_manifest

    def write_one(folder: Path, manifest: dict) -> None:
        written(folder, manifest)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_manifest", write_one)
        build(tmp_path / "part", file, shard_size=0)
    build(tmp_path / "part", file, shard_size=0)
    assert contents(tmp_path / "part") == contents(tmp_path / "1")


def test_validation_gets_at_most_a_hundred_million_tokens() -> None:
    class Terabytes:
        size = 10**13

        def blocks(self, file: int, block: int) -> Iterator[build_shards.Block]:
            text = words(2**20)
            for number in range(20):
                yield build_shards.Block(0, number, [text], (number + 1) * len(text))

    assert build_shards.validation_size(Terabytes(), 2) == 97_656 * 1024 + 1 <= 10**8


def test_a_text_that_is_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(2049))
    flags = ["--files", str(tmp_path / "a.txt"), "--out-dir", str(tmp_path / "out")]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*2,049 tokens: at least 2,050 are needed.*--shard-size.*\n", done.stderr)
    assert not (tmp_path / "out").exists()
    assert run_script(SCRIPT, *flags, "--shard-size", "1025").returncode == 0
    assert [len(np.load(path)) for path in sorted((tmp_path / "out").glob("*.npy"))[::-1]] == [1025, 1024]


# ---------------------------------------------------------------- the Hub as a source


def parquet(documents: list[str | None], column: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    columns = {column: documents, "url": ["https://example.org/" + "x" * 500] * len(documents)}
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=1000, compression="none")
    return sink.getvalue().to_pybytes()


CARD = b"""---
configs:
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


def test_a_data_set_is_streamed_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {i} " + "word " * (i % 50) for i in range(5000)]
    files = {
        "README.md": CARD,
        "sample/10BT/000.parquet": parquet(documents[:3000]),
        "sample/10BT/001.parquet": parquet([*documents[3000:], None, ""]),
        "data/other.parquet": parquet(["not this"]),
    }
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path)
        repo = hub.put("ann/web", files, "dataset")
        source = sources.on_hub("ann/web", "sample-10BT", "main", "text")
        hub.put("ann/web", {"sample/10BT/000.parquet": parquet(["changed under way"])}, "dataset")
        manifest = build_shards.build(source, tmp_path / "out", "web", 10_000, 2)
        assert documents_of(tmp_path / "out") == documents
        assert manifest["skipped"] == 2
        assert manifest["source"]["revision"] == repo.commits[1][0]
        # The other column is most of each file and is not fetched.
        ranges = [r for r in (h.get("range") for _, p, h in hub.requests if "/cdn/" in p) if r]
        assert ranges and len(ranges) == len([1 for _, p, _ in hub.requests if "/cdn/" in p])


def test_subset_selects_a_folder_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path)
        hub.put("ann/web", {"a/1.parquet": parquet(["one"]), "b/2.parquet": parquet(["two"])}, "dataset")
        source = sources.on_hub("ann/web", "b", "main", "text")
        build_shards.build(source, tmp_path / "out", "web", 10_000)
        assert documents_of(tmp_path / "out") == ["two"]
        with pytest.raises(UserError, match="--subset c: no parquet files for training"):
            sources.on_hub("ann/web", "c", "main", "text")
        with pytest.raises(UserError, match=r"--repo-id ann/none .*not on the Hub"):
            sources.on_hub("ann/none", "", "main", "text")
        with pytest.raises(UserError, match="--revision v9: HTTP 404"):
            sources.on_hub("ann/web", "", "v9", "text")
        body = sources.on_hub("ann/web", "", "main", "body")
        with pytest.raises(UserError, match="has no column 'body', only text, url"):
            build_shards.build(body, tmp_path / "out2", "web", 10_000)


def test_fineweb_edu_is_pinned() -> None:
    repo_id, subset, revision = handle_tokens.FINEWEB_EDU
    assert (repo_id, subset) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert re.fullmatch("[0-9a-f]{40}", revision)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "data", "flags", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', [], "a.jsonl: line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', [], "a.jsonl: line 1 has int under 'text'"),
        ("a.jsonl", b'{"body": "a"}\n', [], "no text in the source (1 empty documents)"),
        ("a.jsonl.gz", b"not gzip", [], "a.jsonl.gz: damaged"),
        ("a.txt", b"caf\xe9", [], "a.txt: not UTF-8"),
        ("a.txt", b"", [], "no text in the source"),
        ("a.parquet", b"PAR1 not", [], "a.parquet: damaged"),
        ("a.csv", b"a,b", [], "a.csv: not one of .txt, .jsonl"),
        ("a.txt", b"a", ["--shard-size", "-3"], "--shard-size -3: must be at least 0"),
        ("a.txt", b"a", ["--name", "../up"], "--name ../up: not usable in a file name"),
        ("a.txt", b"a", ["--repo-id", "ann/web"], "--files --repo-id: two sources"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, name: str, data: bytes, flags: list[str], message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    done = run_script(SCRIPT, "--files", str(tmp_path / name), "--out-dir", str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not list(tmp_path.glob("out/*.npy"))


def test_a_folder_with_other_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    build(tmp_path / "out", tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"out: its shards differ in files"):
        build(tmp_path / "out", tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"differ in shard_size \(1000, now 50\)"):
        build(tmp_path / "out", tmp_path / "a.txt", shard_size=50)
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / "my_train_000001.npy", np.zeros(3, np.uint16))
    with pytest.raises(UserError, match="contains shards from elsewhere"):
        build(tmp_path / "mine", tmp_path / "a.txt")


def test_two_builds_of_one_folder_take_turns(tmp_path: Path, corpus: Path) -> None:
    flags = [
        "--files",
        str(corpus),
        "--name",
        "x",
        "--shard-size",
        "20000",
        "--out-dir",
        str(tmp_path / "out"),
    ]
    processes = [subprocess.Popen(command(SCRIPT, *flags), env=environment()) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    build(tmp_path / "whole", corpus, shard_size=20_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
