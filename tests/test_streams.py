"""Output that goes away: closed terminals and pipes, full disks, no streams at all, those of a notebook."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, as_flags, command, environment, history, posix

import generate
from model import GPT, GPTConfig
from support import cli
from support.stop_signal import StopSignal

# A script that prints more than a pipe or a buffer holds, and then leaves a mark.
SCRIPT = """
import sys
from pathlib import Path
from support import cli

def main():
    for number in range(20_000):
        print("step", number)
        print("warning", number, file=sys.stderr)
    print(sys.stdin.read(), end="")
    Path(sys.argv[1]).touch()

cli.run(main, must_finish=sys.argv[2] == "must finish")
"""


def script(tmp_path: Path, must_finish: bool, redirections: str) -> tuple[int, str, bool]:
    """Run SCRIPT in a shell with its streams redirected: exit status, stderr if that is kept, finished."""
    (tmp_path / "script.py").write_text(SCRIPT)
    mark = tmp_path / "finished"
    mark.unlink(missing_ok=True)
    how = "must finish" if must_finish else "may end"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" "$@" {redirections}', sys.executable, "script.py", mark, how],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr, mark.exists()


@posix
@pytest.mark.parametrize(
    "redirections",
    ["2>/dev/null >&-", "<&- >&- 2>&-", "2>/dev/null >/dev/full", "2>&1 >/dev/null </dev/null | head -1 >&2"],
)
def test_training_continues_without_a_reader_of_its_output(tmp_path: Path, redirections: str) -> None:
    status, _, finished = script(tmp_path, True, redirections)
    assert (status, finished) == (0, True)


@posix
def test_a_script_that_prints_its_result_ends_with_its_reader(tmp_path: Path) -> None:
    """Quietly, as behind `| head`; a full disk is an error of one line. Warnings may go unread."""
    assert script(tmp_path, False, "</dev/null 2>/dev/null | head -1 >/dev/null")[::2] == (1, False)
    status, errors, finished = script(tmp_path, False, "</dev/null 3>&2 2>/dev/full >/dev/null")
    assert (status, finished) == (0, True)
    status, errors, finished = script(tmp_path, False, "</dev/null >/dev/full")
    assert (status, finished) == (2, False)
    assert errors.splitlines()[-1] == "error: standard output: No space left on device"


@pytest.mark.parametrize(("must_finish", "place"), [(True, "the disk"), (False, "standard output")])
def test_a_full_disk_is_not_blamed_on_the_output(
    must_finish: bool, place: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of an open file does not say which: where output cannot fail, it is no output."""
    monkeypatch.setattr(cli, "_discard_output", lambda: None)

    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        cli.run(main, must_finish)
    assert capsys.readouterr().err == f"error: {place}: No space left on device\n"


class NotebookStream(io.TextIOBase):
    """As ipykernel's: neither `reconfigure` nor a descriptor."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def test_a_script_runs_with_the_streams_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = NotebookStream(), NotebookStream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main() -> None:
        print("loss")
        print("warning", file=sys.stderr)

    for _ in range(2):  # %run it twice
        with pytest.raises(SystemExit):
            cli.run(main, must_finish=True)
    assert (out.text, err.text) == ("loss\n" * 2, "warning\n" * 2)


@posix
def test_training_continues_when_its_terminal_closes(data_dir: Path, tmp_path: Path) -> None:
    """With SIGHUP ignored, as by nohup: to the last step, with all of it in metrics.jsonl."""
    import pty

    ours, theirs = pty.openpty()
    flags = as_flags({**QUICK, "data_dir": data_dir, "out_dir": tmp_path / "run"})
    process = subprocess.Popen(
        command("train_gpt2.py", *flags), env=environment(),
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"\nstep 3/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert [r["step"] for r in history(tmp_path / "run", kinds=("train",))] == list(range(1, 31))
    assert (tmp_path / "run" / "checkpoints" / "step_000030").is_dir()


QUICK = {
    "preset": "demo", "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "sequence_length": 16,
    "total_batch_size": 32, "max_steps": 30, "warmup_steps": 1, "val_interval": 0, "sample_interval": 0,
    "checkpoint_interval": 0, "device": "cpu", "dtype": "float32",
}  # fmt: skip


@posix
def test_sighup_stops_a_run_like_sigterm_unless_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    received = lambda stop: wait_for(lambda: stop.number)  # noqa: E731
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopSignal()
        stop.listen(announce=False, agent=0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopSignal()
        stop.listen(announce=False, agent=0)
        os.kill(os.getpid(), signal.SIGHUP)
        assert received(stop) == signal.SIGTERM
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for(value: Callable[[], object]) -> object:
    for _ in range(1000):
        if found := value():
            return found
        time.sleep(0.01)
    return None


def test_generate_without_stdin_samples_from_an_empty_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    for prompt in ([], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", None)
        flags = ["--model", str(tmp_path), "--num-samples", "1", "--max-new-tokens", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags, *prompt])
        with pytest.raises(SystemExit) as stop:
            cli.run(generate.main)
        assert stop.value.code == 0
        assert len(capsys.readouterr().out) > 1
