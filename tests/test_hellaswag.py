"""HellaSwag against a model of transformers, lm-evaluation-harness' rules written out, and brute force."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from helpers import history, run_script
from loopback_hub import TOKEN, LoopbackHub

import hellaswag
from hellaswag import Example
from model import GPT, GPTConfig
from support import files, hellaswag_data, metrics, tokenizer
from support.cli import UserError
from support.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
WORDS = ["a man", "is", "on the roof", "with", "ripping tiles", "naïve 🙂", "dog's", "3,000", "then", "  two"]


def record(rng: np.random.Generator, **changes: object) -> dict[str, object]:
    text = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    ctx_a, ctx_b = text(rng.integers(1, 12)) + ".", text(rng.integers(0, 3))
    endings = [text(rng.integers(1, 9)) for _ in range(4)]
    made = {"activity_label": text(2), "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}".strip()}
    return {**made, "endings": endings, "label": int(rng.integers(4)), **changes}


RNG = np.random.default_rng(0)
RECORDS = [record(RNG) for _ in range(30)] + [
    record(RNG, ctx_a="How to run [title] Start. [step] Buy shoes [substeps]", ctx_b="", label="2"),
    record(RNG, ctx_a="[header] How to sit", ctx_b="[title] sit DOWN. [step]"),
    record(RNG, endings=["[substeps] go. [step]", " out", "in  the end", "[title] over. [title] again"]),
    record(RNG, endings=["same", "same", "same ", "same"]),
    record(RNG, endings=["a line\u2028within", "a\x85one", "a\u2029one", "none"]),  # separators JSON allows
    record(RNG, endings=["[title]", "is cleaned", "to nothing", "first"]),  # loss over length is infinite
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights, large enough ones that endings differ, and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, 128)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS), encoding="utf-8")
    return path


@torch.no_grad()
def row_by_row(model: transformers.PreTrainedModel, context: list[int], ending: list[int]) -> float:
    """Summed loss of one ending, from the logits of one full row."""
    logits = model(torch.tensor([context + ending])).logits[0].double()
    log_probs = logits.log_softmax(dim=-1)
    return -sum(log_probs[len(context) + i - 1, token].item() for i, token in enumerate(ending))


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_ending_losses_equal_full_rows_in_transformers(folder: Path, data: Path, style: str) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    examples = hellaswag.load(data, style)
    losses = hellaswag.ending_losses(GPT.from_pretrained(folder), examples)
    for example, row in zip(examples, losses.tolist(), strict=True):
        expected = [row_by_row(theirs, example.context, ending) for ending in example.endings]
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-4)


def harness_requests(record: dict[str, object], encode: Callable) -> tuple[list, list[int]]:
    """The harness' own steps: its preprocessing, then its way to split a pair of strings into tokens."""

    def preprocess(text: str) -> str:
        text = text.strip()
        text = text.replace(" [title]", ". ")
        text = re.sub("\\[.*?\\]", "", text)
        return text.replace("  ", " ")

    context = record["ctx_a"] + " " + record["ctx_b"].capitalize()
    query = preprocess(record["activity_label"] + ": " + context)
    choices = [preprocess(ending) for ending in record["endings"]]
    requests = []
    for choice in choices:
        first, second = query, " " + choice
        n_spaces = len(first) - len(first.rstrip())
        if n_spaces > 0:
            second = first[-n_spaces:] + second
            first = first[:-n_spaces]
        whole = encode(first + second)
        n = len(encode(first))
        requests.append((whole[:n], whole[n:]))
    return requests, [len(choice) for choice in choices]


def test_harness_style_equals_the_harness_example_by_example(folder: Path, data: Path) -> None:
    encode = transformers.AutoTokenizer.from_pretrained(folder).encode
    for record, example in zip(RECORDS, hellaswag.load(data, "harness"), strict=True):
        requests, lengths = harness_requests(record, encode)
        assert [(example.context, ending) for ending in example.endings] == requests
        assert example.lengths == lengths
        assert example.label == int(record["label"])


def test_completion_style_keeps_the_text_unchanged(folder: Path, data: Path) -> None:
    encode = transformers.AutoTokenizer.from_pretrained(folder).encode
    for record, example in zip(RECORDS, hellaswag.load(data), strict=True):
        assert example.context == encode(record["ctx"])
        assert example.endings == [encode(" " + ending) for ending in record["endings"]]
        assert example.lengths == [len(ending) for ending in example.endings]


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_accuracy_equals_brute_force(
    folder: Path, data: Path, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    examples = hellaswag.load(data, style)
    right = np.zeros(2)
    for example in examples:
        losses = np.array([row_by_row(theirs, example.context, ending) for ending in example.endings])
        right += [losses.argmin() == example.label, (losses / example.lengths).argmin() == example.label]
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 300)  # several batches
    score = hellaswag.evaluate(GPT.from_pretrained(folder), examples, CPU)
    assert (score.acc, score.acc_norm) == pytest.approx(right / len(examples))
    assert score.n == len(RECORDS)
    assert 0 < right[0] < len(examples)
    assert right[0] != right[1]
    sample = np.repeat([1.0, 0.0], [right[0], score.n - right[0]])
    expected = sample.std(ddof=1) / np.sqrt(score.n)
    assert score.standard_error(score.acc) == pytest.approx(expected)


def test_processes_share_the_examples(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = GPT.from_pretrained(folder), hellaswag.load(data)
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 300)
    whole = hellaswag.evaluate(model, examples, CPU)
    monkeypatch.setattr(Runtime, "all_reduce", lambda self, tensor: tensor)
    parts = [hellaswag.evaluate(model, examples, Runtime(CPU.device, CPU.dtype, r, r, 3)) for r in range(3)]
    assert sum(part.acc for part in parts) == pytest.approx(whole.acc)
    assert sum(part.acc_norm for part in parts) == pytest.approx(whole.acc_norm)
    assert all(part.acc < whole.acc for part in parts)


def test_batches_contain_each_example_once(data: Path) -> None:
    examples = hellaswag.load(data)
    made = hellaswag.batches(examples, 300)
    assert sorted(id(example) for batch in made for example in batch) == sorted(map(id, examples))
    assert all(len(batch) == 1 or len(batch) * batch[0].row_length <= 300 for batch in made)
    padding = 1 - sum(e.row_length for e in examples) / sum(len(b) * b[0].row_length for b in made)
    assert padding < 0.2


def test_a_long_context_is_cut_on_the_left(folder: Path) -> None:
    short, long = (Example(list(range(n)), [[5], [6, 7], [8], [9]], [1, 2, 1, 1], 0) for n in (9, 300))
    fitting = hellaswag.truncate_contexts([short, long], 128)
    assert fitting[0] == short
    assert fitting[1].context == list(range(173, 300))  # 127 and the first token of the longest ending
    hellaswag.evaluate(GPT.from_pretrained(folder), [short, long], CPU)
    with pytest.raises(UserError, match="longer than the model's 1 positions"):
        hellaswag.truncate_contexts([short], 1)


def test_evaluation_does_not_recompile(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a compiled model, batches of many shapes cost it no compilation."""
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 200)
    model, examples = GPT.from_pretrained(folder), hellaswag.load(data)
    compiled = torch.compile(model, backend="eager")
    idx = torch.zeros(2, 16, dtype=torch.int64)
    with torch.no_grad():
        compiled(idx)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        hellaswag.evaluate(model, examples, CPU)
        compiled(idx)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


# ---------------------------------------------------------------- the file

HUB_FILE = "data/validation-00000-of-00001.parquet"


def as_on_the_hub(records: list[dict[str, object]]) -> bytes:
    """The records as parquet in the layout of the data set Rowan/hellaswag."""
    names = [
        "activity_label",
        "ctx_a",
        "ctx_b",
        "ctx",
        "endings",
        "source_id",
        "split",
        "split_type",
        "label",
    ]
    text = {
        name: pyarrow.list_(pyarrow.string()) if name == "endings" else pyarrow.string() for name in names
    }
    more = {"source_id": "wikihow~1", "split": "val", "split_type": "zeroshot"}
    rows = [{"ind": i, **more, **r, "label": str(r["label"])} for i, r in enumerate(records)]
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema({"ind": pyarrow.int32(), **text}))
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


class Places:
    """`github` is what GitHub serves, None: HTTP 404; `github_headers` those of each request it had."""

    def __init__(self, hub: LoopbackHub, github: bytes, parquet: bytes) -> None:
        self.hub = hub
        self.github: bytes | None = github
        self.github_headers: list[dict[str, str]] = []
        both = {"hellaswag_val.jsonl": github, "hellaswag_val.parquet": parquet}
        self.sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in both.items()}
        self.put(parquet)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.github_headers.append({k.lower(): v for k, v in handler.headers.items()})
                handler.send_response(200 if self.github else 404)
                handler.end_headers()
                handler.wfile.write(self.github or b"404: Not Found")

            def log_message(handler, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.github_url = f"http://127.0.0.1:{self.server.server_port}/val.jsonl"

    def put(self, parquet: bytes) -> None:
        """Make this the Hub's file, at the commit that is asked for; the branch moves on."""
        repo = self.hub.put("Rowan/hellaswag", {HUB_FILE: parquet}, "dataset")
        repo.tags["218ec52e09a7e7462a5400043bb9a69a41d06b76"] = repo.sha
        self.hub.put("Rowan/hellaswag", {HUB_FILE: b"another"}, "dataset")

    @property
    def hits(self) -> tuple[int, int]:
        """Requests that GitHub and the Hub had; a redirect on the Hub counts once."""
        return len(self.github_headers), sum("/resolve/" in path for _, path, _ in self.hub.requests)


@pytest.fixture
def places(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """The two places on this machine, each with the examples as it publishes them."""
    with LoopbackHub() as hub:
        places = Places(hub, data.read_bytes(), as_on_the_hub(RECORDS))
        hub.patch(monkeypatch, tmp_path)
        monkeypatch.delenv("HF_ENDPOINT")  # the client knows the address already, as that of the real Hub
        monkeypatch.setattr(hellaswag_data, "GITHUB", places.github_url)
        monkeypatch.setattr(hellaswag_data, "FOLDER", tmp_path / "data")
        monkeypatch.setattr(hellaswag_data, "SHA256", places.sha256)
        yield places
        places.server.shutdown()
        places.server.server_close()


def test_the_file_is_fetched_once(places: Places, data: Path) -> None:
    assert hellaswag.load() == hellaswag.load() == hellaswag.load(data)
    assert places.hits == (1, 0)
    assert "authorization" not in places.github_headers[0]
    path = hellaswag_data.FOLDER / "hellaswag_val.jsonl"
    assert {p.name for p in hellaswag_data.FOLDER.iterdir()} - {".lock"} == {path.name}
    path.write_bytes(b"damaged\n")
    with pytest.raises(UserError, match=r"val\.jsonl: not HellaSwag's .* 8 bytes.*remove it"):
        hellaswag.load()


def test_two_machines_take_turns_writing_the_file(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, write = [], files.write_atomically

    def write_atomically(path: Path, contents: bytes) -> None:
        locked.append(files.lock_folder(path.parent) is None)
        write(path, contents)

    monkeypatch.setattr(files, "write_atomically", write_atomically)
    hellaswag_data.fetch()
    assert locked == [True]
    lock = files.lock_folder(hellaswag_data.FOLDER)
    assert lock is not None  # released
    lock.release()


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_the_hub_has_the_same_examples(places: Places, data: Path, style: str) -> None:
    places.github = None
    assert hellaswag.load(style=style) == hellaswag.load(data, style)
    assert hellaswag.load(style=style, limit=3) == hellaswag.load(data, style, limit=3)
    assert places.hits == (1, 1)
    path = hellaswag_data.FOLDER / "hellaswag_val.parquet"
    assert {p.name for p in hellaswag_data.FOLDER.iterdir()} - {".lock"} == {path.name}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"val\.parquet: not HellaSwag's .*remove it"):
        hellaswag.load()


def test_a_file_with_another_hash_is_refused(places: Places, data: Path) -> None:
    places.github = places.github.replace(b"roof", b"root", 1)
    assert hellaswag_data.fetch().suffix == ".parquet"
    assert hellaswag.load() == hellaswag.load(data)


@pytest.mark.parametrize(
    "parquet",
    [
        as_on_the_hub(RECORDS[:-1]),
        as_on_the_hub([*RECORDS[:-1], {**RECORDS[-1], "label": (RECORDS[-1]["label"] + 1) % 4}]),
        as_on_the_hub([RECORDS[1], RECORDS[0], *RECORDS[2:]]),
        as_on_the_hub(RECORDS)[:-9],
    ],
    ids=["a row less", "another label", "another order", "cut short"],
)
def test_a_damaged_copy_on_the_hub_is_refused(places: Places, parquet: bytes) -> None:
    places.github = None
    places.put(parquet)
    with pytest.raises(UserError, match=rf"HTTP 404.*{HUB_FILE} .not HellaSwag's .*HF_ENDPOINT.*--data"):
        hellaswag.load()
    assert not hellaswag_data.FOLDER.exists()


def test_a_mirror_of_the_hub_comes_first(
    places: Places, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that finds the address in its environment, as a reader's does."""
    code = f"""if True:
        from pathlib import Path
        import hellaswag
        from support import hellaswag_data
        hellaswag_data.FOLDER = Path({str(tmp_path / "data")!r})
        hellaswag_data.GITHUB = {places.github_url!r}
        hellaswag_data.SHA256 = {places.sha256!r}
        print(len(hellaswag.load()))
    """
    environment = {**os.environ, **places.hub.environment(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{len(RECORDS)}\n", done.stderr
    assert places.hits == (0, 1)
    assert hellaswag.load() == hellaswag.load(data)
    tokens = [(path.split("/")[1], h.get("authorization")) for _, path, h in places.hub.requests]
    assert tokens == [("datasets", f"Bearer {TOKEN}"), ("cdn", None)]

    (hellaswag_data.FOLDER / "hellaswag_val.parquet").unlink()
    places.hub.fail("/resolve/", status=503)
    monkeypatch.setenv("HF_ENDPOINT", places.hub.endpoint)
    assert hellaswag_data.fetch().suffix == ".jsonl"
    assert places.hits == (1, 2)


def test_without_any_source_the_error_names_both(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hellaswag_data, "GITHUB", "http://127.0.0.1:9/val.jsonl")
    places.hub.fail("/cdn/", break_after=100)
    message = r"from http://127\.0\.0\.1:9/val\.jsonl \(.+refused\) or http.*parquet \(.+\): set HF_ENDPOINT"
    with pytest.raises(UserError, match=message):
        hellaswag.load()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"val\.jsonl \(.*HF_HUB_OFFLINE.* or .*\(.*HF_HUB_OFFLINE"):
        hellaswag.load()
    # The client raises ImportError for a proxy that it needs another package for.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY")
    with pytest.raises(UserError, match=r"val\.jsonl \(.+\) or .*parquet \(.+\): set"):
        hellaswag.load()
    assert not hellaswag_data.FOLDER.exists()


def test_a_run_without_network_warns_at_its_start_and_continues(
    places: Places,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(hellaswag_data, "GITHUB", "http://127.0.0.1:9/val.jsonl")
    places.hub.fail("hellaswag", status=503)
    run = train(hellaswag_interval=2)
    out = capsys.readouterr().out
    assert "warning: continuing without HellaSwag: HellaSwag cannot be fetched from http://127.0.0.1:9" in out
    assert {record["kind"] for record in metrics.read(run / "metrics.jsonl")} == {"train", "val", "event"}
    with pytest.raises(UserError, match="cannot be read"):
        train("other", hellaswag_interval=2, hellaswag_data="missing.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"label": 0}',
        json.dumps({**RECORDS[0], "label": 4}),
        json.dumps({**RECORDS[0], "ctx": ""}),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl: line 2 "):
        hellaswag.load(path)
    assert len(hellaswag.load(path, limit=1)) == 1


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        hellaswag.load(tmp_path / "none.jsonl")
    (tmp_path / "bad.parquet").write_bytes(as_on_the_hub(RECORDS)[:-9])
    with pytest.raises(UserError, match=r"bad\.parquet: damaged"):
        hellaswag.load(tmp_path / "bad.parquet")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no examples"):
        hellaswag.load(tmp_path / "empty.jsonl")


# ---------------------------------------------------------------- script and training


def test_the_script_prints_published_scores(folder: Path, data: Path) -> None:
    flags = ["--model", str(folder), "--data", str(data), "--style", "harness", "--limit", "20"]
    done = run_script("hellaswag.py", *flags)
    assert done.returncode == 0, done.stderr
    score = hellaswag.evaluate(GPT.from_pretrained(folder), hellaswag.load(data, "harness", 20), CPU)
    for shown in (
        f"{score.acc:.4f} ± ",
        f"{score.acc_norm:.4f} ± ",
        "0.2892",
        "0.3114",
        "10,042",
        "examples/s",
        "torch.float32",
    ):
        assert shown in done.stdout
    assert "20/20" in done.stderr


def short_file(folder: Path) -> Path:
    """Examples that fit into the 16 positions of a tiny run."""
    rng = np.random.default_rng(1)
    lines = []
    for _ in range(12):
        endings = [" ".join(rng.choice(["cat", "dog", "sun"], 3)) for _ in range(4)]
        lines.append(json.dumps(record(rng, ctx="one two", endings=endings)) + "\n")
    (folder / "short.jsonl").write_text("".join(lines))
    return folder / "short.jsonl"


def test_training_records_hellaswag(train: Callable[..., Path], tmp_path: Path) -> None:
    path = short_file(tmp_path)
    run = train(hellaswag_interval=4, hellaswag_data=str(path))
    records = [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "hellaswag"]
    assert [r["step"] for r in records] == [0, 4, 6]
    assert set(records[0]) == {"step", "kind", "acc", "acc_norm", "n"}
    last = GPT.from_pretrained(run / "checkpoints" / "step_000006")
    score = hellaswag.evaluate(last, hellaswag.load(path), CPU)
    assert (records[-1]["acc"], records[-1]["acc_norm"], records[-1]["n"]) == (score.acc, score.acc_norm, 12)
    baseline = train(
        "baseline", init_from=str(run), max_steps=0, hellaswag_interval=9, hellaswag_data=str(path)
    )
    assert history(baseline, ("hellaswag",)) == [{**records[-1], "step": 0}]
    # It leaves no trace in the training itself.
    assert history(train("without")) == history(run)
