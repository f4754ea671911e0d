"""Sampling as a user meets it: flags, streams, the prompt loop, what it says of mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, command, environment, posix, run_script
from torch.utils._python_dispatch import TorchDispatchMode

import generate
from model import GPT, GPTConfig
from support import cli, sampling, tokenizer
from support.cli import UserError
from support.linear import cast_once

PROMPT = "Hello, I'm a language model,"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)).save_pretrained(folder)
    return folder


def sample(folder: Path, *flags: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command("generate.py", "--model", str(folder), *flags),
        env=environment(), capture_output=True, encoding="utf-8", input=stdin, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_json_and_streams_give_the_same_samples(folder: Path) -> None:
    """Drawn together or one by one, from a flag or from standard input, and as GPT.generate draws them."""
    flags = ["--max-new-tokens", "40", "--seed", "7", "--dtype", "float32"]
    told = json.loads(sample(folder, "--prompt", PROMPT, "--json", "--num-samples", "3", *flags).stdout)
    streamed = sample(folder, "--prompt", "-", "--num-samples", "2", *flags, stdin=PROMPT + "\n").stdout
    texts = [PROMPT + drawn["text"] for drawn in told["samples"]]
    assert streamed == f"{texts[0]}\n---\n{texts[1]}\n"
    assert told["prompt"] == PROMPT
    enc = tokenizer.get_encoding()
    ids = enc.encode_ordinary(PROMPT)
    for number, drawn in enumerate(told["samples"]):
        generator = torch.Generator().manual_seed(7 + number)
        model = GPT.from_pretrained(folder)
        steps = model.stream([ids], 40, 0.8, 50, 1.0, [generator], tokenizer.END_OF_TEXT_ID)
        assert drawn["tokens"] == [step[0] for step in steps]
        assert (drawn["finish_reason"], len(drawn["tokens"])) == ("length", 40)
        assert drawn["text"] == enc.decode(drawn["tokens"], errors="replace")


def test_generate_mentions_an_unread_pipe(folder: Path) -> None:
    done = sample(folder, "--num-samples", "1", "--max-new-tokens", "2", stdin=PROMPT)
    assert "--prompt - reads standard input" in done.stderr and PROMPT not in done.stdout


class Casts(TorchDispatchMode):
    """Counts the matrices that are cast to another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = 0

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        is_cast = func.name() in ("aten::to.dtype", "aten::_to_copy")
        self.matrices += is_cast and args[0].dim() == 2 and len(args[0]) >= 16
        return func(*args, **kwargs or {})


def test_generate_casts_weights_only_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In 16 bits they are cast once, before the first token."""
    casts, decode_one_token = Casts(), sampling.decode_one_token

    def counted(*args: object) -> torch.Tensor:
        with casts:
            return decode_one_token(*args)

    monkeypatch.setattr(sampling, "decode_one_token", counted)
    flags = ["--model", str(folder), "--prompt", PROMPT, "--num-samples", "1", "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.argv", ["generate.py", *flags, "--device", "cpu", "--dtype", "bfloat16"])
    assert generate.main() == 0
    assert capsys.readouterr().out.startswith(PROMPT)
    assert casts.matrices == 0
    with torch.autocast("cpu", torch.bfloat16):  # as it would be without
        GPT.from_pretrained(folder).generate(torch.zeros(1, 1, dtype=torch.int64), 2)
    assert casts.matrices == 5  # of the single token after the prompt: four in the block, and the head


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_cast_once_equals_autocast(folder: Path, rows: int) -> None:
    model = GPT.from_pretrained(folder)
    idx = torch.randint(50257, (rows, 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(idx)[0]
        with cast_once(model):
            found = model(idx)[0]
        assert torch.equal(model(idx)[0], expected)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1.6e-2)  # bf16 has eight bits
    with torch.no_grad():
        exact = model(idx)[0]
        with cast_once(model):  # in fp32 there is nothing to cast
            assert torch.equal(model(idx)[0], exact)


def test_characters_are_printed_whole() -> None:
    """Each piece is text on its own, though a token may be a part of a character."""
    text = "naïve ✓ 語語 🙂🙃"
    ids = tokenizer.get_encoding().encode_ordinary(text)
    parts = tokenizer.get_encoding().decode_tokens_bytes(ids)
    assert "�" in "".join(part.decode("utf-8", errors="replace") for part in parts)
    pieces = list(generate.decode(iter([*ids, tokenizer.END_OF_TEXT_ID, 15])))
    assert "".join(pieces) == text
    assert "".join(generate.decode(iter(ids[:-1]))).endswith("�")


def test_a_long_prompt_is_cut_on_the_left(folder: Path) -> None:
    long = "word " * 40 + "the end"
    done = sample(folder, "--prompt", long, "--json", "--num-samples", "1")
    assert "the prompt has 42 tokens, the model reads the last 32" in done.stderr
    tail = tokenizer.get_encoding().decode(tokenizer.get_encoding().encode_ordinary(long)[-32:])
    again = sample(folder, "--prompt", tail, "--json", "--num-samples", "1")
    assert json.loads(done.stdout)["samples"] == json.loads(again.stdout)["samples"]
    assert "warning" not in again.stderr


def test_generate_ends_a_sample_at_the_end_of_text(folder: Path, tmp_path: Path) -> None:
    model = GPT.from_pretrained(folder)
    with torch.no_grad():  # whatever stands before, the end of text is the likeliest by far
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[tokenizer.END_OF_TEXT_ID] = 100.0
    model.save_pretrained(tmp_path)
    told = json.loads(sample(tmp_path, "--json", "--num-samples", "2").stdout)
    assert told["samples"] == [{"text": "", "tokens": [50256], "finish_reason": "end of text"}] * 2
    assert sample(tmp_path, "--prompt", "over", "--num-samples", "1").stdout == "over\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--temperature", "-1"], "--temperature -1.0: must be at least 0"),
        (["--temperature", "nan"], "--temperature nan: must be finite and at least 0"),
        (["--temperature", "inf"], "--temperature inf: must be finite and at least 0"),
        (["--top-k", "-1"], "--top-k -1: must be at least 0"),
        (["--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0 and below 9223372036854775808"),
    ],
)
def test_invalid_settings_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.parse(generate.Settings, "", args=flags)
    assert str(error.value) == message


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = run_script("generate.py", "--model", str(tmp_path), "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr


def test_model_resolves_runs_checkpoints_and_names(train: Callable[..., Path], tmp_path: Path) -> None:
    """No run, a run without a checkpoint, runs below the folder, a damaged checkpoint, no network."""

    def first_line(*flags: str, status: int = 2, **env: str) -> str:
        done = subprocess.run(
            command("generate.py", "--prompt", "x", "--max-new-tokens", "1", *flags),
            env={**environment(), **env}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stderr

    assert "log: no run there yet" in first_line()
    run = train("log/demo", checkpoint_interval=2, max_steps=4)
    assert "log: not a run (runs there: log/demo)" in first_line()
    weights = run / "checkpoints" / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    lines = first_line("--model", "log/demo", status=0).splitlines()
    assert "step_000004/model.safetensors: damaged" in lines[0]
    assert lines[1] == "warning: using log/demo/checkpoints/step_000002 instead"
    (run / "checkpoints").rename(run / "elsewhere")
    assert "log/demo: no checkpoint yet" in first_line("--model", "log/demo")
    assert "the Hub cannot be reached" in first_line("--model", "gpt2")
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    assert "the Hub cannot be reached" in first_line("--model", "gpt2", **offline)


class Terminal:
    """generate.py on a pseudo-terminal: what a user types, and what shows."""

    def __init__(self, *flags: str) -> None:
        import pty  # not on Windows

        master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command("generate.py", *flags), env=environment(), stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(master, False)
        self.master, self.shown = master, ""

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Wait until `text` shows behind what was waited for before."""
        deadline = time.time() + timeout
        while text not in self.shown:
            assert time.time() < deadline, self.shown
            time.sleep(0.02)
            try:
                self.shown += os.read(self.master, 65536).decode("utf-8", errors="replace")
            except (BlockingIOError, OSError):
                continue
        self.shown = self.shown.split(text, 1)[1]

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


@posix
def test_the_prompt_loop_samples_until_ctrl_d(folder: Path) -> None:
    """Two prompts, the second from the history; Ctrl-C stops a sample and not the loop; Ctrl-D leaves."""
    terminal = Terminal("--model", str(folder), "--num-samples", "1", "--max-new-tokens", "100000")
    terminal.wait_for("> ")
    terminal.type("Once upon\n")
    terminal.wait_for("Once upon")
    terminal.wait_for("Once upon")  # the sample repeats it
    time.sleep(0.5)
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("> ")
    terminal.type("\x1b[A\n")
    terminal.wait_for("Once upon")
    terminal.wait_for("Once upon")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0
    assert "Traceback" not in terminal.shown
    os.close(terminal.master)


def test_a_model_loads_without_torchs_compiler(folder: Path) -> None:
    """Its import takes a second. Drawing weights for a model without memory would need it."""
    code = (
        f"import sys, generate; generate.GPT.from_pretrained({str(folder)!r})\n"
        "assert 'torch._dynamo' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)
