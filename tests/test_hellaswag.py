"""HellaSwag against a model of transformers, lm-evaluation-harness' rules written out, and brute force."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import TINY, T, as_flags, history, run_script

import hellaswag
from hellaswag import Example
from model import GPT, GPTConfig
from support import metrics, tokenizer
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
    record(RNG, endings=["[title]", "is cleaned", "to nothing", "first"]),  # loss over length is infinite
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights, large enough ones that endings differ, and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
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


def test_harness_style_is_the_harness_example_by_example(folder: Path, data: Path) -> None:
    encode = transformers.AutoTokenizer.from_pretrained(folder).encode
    for record, example in zip(RECORDS, hellaswag.load(data, "harness"), strict=True):
        requests, lengths = harness_requests(record, encode)
        assert [(example.context, ending) for ending in example.endings] == requests
        assert example.lengths == lengths
        assert example.label == int(record["label"])


def test_completion_style_takes_the_text_as_it_is(folder: Path, data: Path) -> None:
    encode = transformers.AutoTokenizer.from_pretrained(folder).encode
    for record, example in zip(RECORDS, hellaswag.load(data), strict=True):
        assert example.context == encode(record["ctx"])
        assert example.endings == [encode(" " + ending) for ending in record["endings"]]
        assert example.lengths == [len(ending) for ending in example.endings]


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_accuracy_by_brute_force(
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


def test_processes_share_the_examples_out(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = GPT.from_pretrained(folder), hellaswag.load(data)
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 300)
    whole = hellaswag.evaluate(model, examples, CPU)
    monkeypatch.setattr(Runtime, "all_reduce", lambda self, tensor: tensor)
    parts = [hellaswag.evaluate(model, examples, Runtime(CPU.device, CPU.dtype, r, r, 3)) for r in range(3)]
    assert sum(part.acc for part in parts) == pytest.approx(whole.acc)
    assert sum(part.acc_norm for part in parts) == pytest.approx(whole.acc_norm)
    assert all(part.acc < whole.acc for part in parts)


def test_batches_hold_each_example_once(data: Path) -> None:
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


def test_nothing_is_compiled_anew(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture
def site(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A web server in place of the published address; `content` is what it serves, `hits` its visitors."""
    state: dict[str, object] = {"content": data.read_bytes(), "hits": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["hits"] += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(state["content"])

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    monkeypatch.setattr(hellaswag, "CACHE", tmp_path / "data" / "val.jsonl")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(data.read_bytes()).hexdigest())
    yield state
    server.shutdown()
    server.server_close()


def test_the_file_is_fetched_once(site: dict[str, object], data: Path) -> None:
    assert hellaswag.load() == hellaswag.load() == hellaswag.load(data)
    assert site["hits"] == 1
    assert [path.name for path in hellaswag.CACHE.parent.iterdir()] == ["val.jsonl"]
    hellaswag.CACHE.write_bytes(b"damaged\n")
    with pytest.raises(UserError, match=r"val\.jsonl: not HellaSwag's .* \(1 lines.*remove it"):
        hellaswag.load()


def test_another_file_is_not_kept(site: dict[str, object]) -> None:
    site["content"] = site["content"][:-9]
    with pytest.raises(UserError, match="not HellaSwag's validation file"):
        hellaswag.load()
    assert not hellaswag.CACHE.parent.exists()


def test_without_a_network_a_run_says_so_at_its_start_and_goes_on(
    site: dict[str, object],
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/val.jsonl")
    run = train(hellaswag_interval=2)
    assert "warning: continuing without HellaSwag: http://127.0.0.1:9" in capsys.readouterr().out
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
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl: line 2 "):
        hellaswag.load(path)
    assert len(hellaswag.load(path, limit=1)) == 1


def test_no_file_and_no_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        hellaswag.load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no examples"):
        hellaswag.load(tmp_path / "empty.jsonl")


# ---------------------------------------------------------------- script and training


def test_the_script_prints_ours_beside_the_published(folder: Path, data: Path) -> None:
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


@pytest.mark.slow
def test_two_processes_record_the_same_hellaswag(data_dir: Path, tmp_path: Path) -> None:
    flags = {"data_dir": data_dir, "hellaswag_interval": 2, "hellaswag_data": short_file(tmp_path)}
    found = []
    for nproc in (0, 2):
        out = tmp_path / f"run{nproc}"
        values = {**TINY, **flags, "out_dir": out, "max_steps": 2, "sequence_length": T}
        done = run_script("train_gpt2.py", "--preset", "demo", *as_flags(values), nproc=nproc)
        assert done.returncode == 0, done.stderr
        found.append(history(out, ("hellaswag",)))
    assert found[0] == found[1]
    assert len(found[0]) == 2
