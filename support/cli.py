"""How every script parses its flags and reports a user's mistakes."""

import argparse
import contextlib
import dataclasses
import errno
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn, TextIO, TypeVar

import tyro

T = TypeVar("T")
Dtype = Literal["auto", "bfloat16", "float16", "float32"]  # of every script's --dtype

# Errors of the machine, not bugs: reported in one line without a traceback.
ENVIRONMENT_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
}  # fmt: skip


class UserError(Exception):
    """A mistake in a flag or an input file. The text names the flag or file, what is wrong, what to do."""


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that a flag takes, noted beside its field; without a note, those of at least 0.

    top_p: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise UserError if the setting `name` has a value out of bounds."""
        if not (self.at_least <= value <= self.at_most and self.above < value < self.below):
            limits = {word.replace("_", " "): limit for word, limit in vars(self).items()}
            texts = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
            texts = texts if math.isfinite(value) else ["finite", *texts]
            raise UserError(f"{flag(name, value)}: must be {' and '.join(texts)}")


AtLeast1 = Annotated[int, Bounds(at_least=1)]
Above0 = Annotated[float, Bounds(above=0)]
Below1 = Annotated[float, Bounds(at_least=0, below=1)]
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]
Seed = Annotated[int, Bounds(at_least=0, below=2**63)]


def parse(
    settings: type[T], description: str, default: T | None = None, args: Sequence[str] | None = None
) -> T:
    """Fill the dataclass `settings` from the command line (from `args` rather than sys.argv, if given).

    A field's docstring is its help text; `default` holds the values of fields that no flag sets. The fields
    of a nested dataclass become flags without a prefix, shown as a group of their own.
    Raises UserError on a flag that does not parse, or a number out of its field's Bounds.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            kwargs = {} if default is None else {"default": default}
            parsed = tyro.cli(
                settings, description=description, args=args, config=(tyro.conf.OmitArgPrefixes,), **kwargs
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise UserError(_message_of_tyro(captured.getvalue())) from None
    _check_bounds(parsed)
    return parsed


def _message_of_tyro(output: str) -> str:
    # tyro draws a box: a title (in ASCII with a rule below), the message, a rule, advice.
    lines = [line.strip("│ ") for line in output.splitlines()[1:]]
    is_rule = [not line.strip("─-") for line in lines]
    begin = is_rule.index(False)
    end = is_rule.index(True, begin)
    return f"{' '.join(lines[begin:end]).removesuffix('.')}: see --help"


def _check_bounds(settings: object) -> None:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            _check_bounds(value)
        elif isinstance(value, int | float):
            noted = [note for note in getattr(field.type, "__metadata__", ()) if isinstance(note, Bounds)]
            (noted or [Bounds(at_least=0)])[0].check(field.name, value)


def given(name: str, args: Sequence[str] | None = None) -> str | None:
    """The value of a flag on the command line, where it decides how the others are read; None without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?")  # one without a value is left for `parse` to report
    return getattr(parser.parse_known_args(args)[0], name)


def flag(name: str, value: object) -> str:
    """A setting as the user types it: ("n_layer", 2) -> "--n-layer 2"."""
    return f"--{name.replace('_', '-')} {value}"


def flags(values: Mapping[str, object]) -> list[str]:
    """Settings as a command line: {"n_layer": 2, "resume": False} -> ["--n-layer", "2", "--no-resume"].

    One whose value is None is left out.
    """
    found = []
    for name, value in values.items():
        own = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{own}" if value else f"--no-{own}")
        elif value is not None:
            found += [f"--{own}", str(value)]
    return found


def last_error(stderr: str) -> str:
    """The message of a script that failed: the last line of its stderr."""
    lines = stderr.strip().splitlines() or ["no message"]
    return lines[-1].removeprefix("error: ")


class Unheard:
    """A text stream whose reader may go away: whatever it cannot take is dropped.

    The terminal may close, the reader of a pipe may die, the disk under a log file may be full.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write as far as possible; returns the length of the text."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def open_streams(must_finish: bool) -> None:
    """Make sys.stdin, sys.stdout and sys.stderr usable however this process was started.

    Output is flushed line by line, so that a log file or `| tee` shows each line as it is printed; a console
    that cannot show a character, such as one of Windows in cp1252, shows a ?.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us, as by `>&-`, or pythonw
            # It takes the closed stream's number: else the next file would, and C libraries print into it.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream (%run) has no such method
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    # Nobody runs a script for its progress and warnings, so they may be lost. Its output may not.
    for name in ("stdout", "stderr") if must_finish else ("stderr",):
        if not isinstance(getattr(sys, name), Unheard):
            setattr(sys, name, Unheard(getattr(sys, name)))


def run(main: Callable[[], int | None], must_finish: bool = False) -> NoReturn:
    """Call a script's `main` and exit with its status; a UserError is one line on stderr and status 2.

    must_finish: keep working when nobody can read the output any more. Otherwise the script ends then.
    Ctrl-C exits with status 130 and no traceback.
    """
    open_streams(must_finish)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # scripts set it so while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        _discard_output()
        sys.exit(1)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in ENVIRONMENT_ERRORS:
            raise
        if isinstance(error, OSError) and error.filename is None:  # of an open file, or of our output
            error.filename = "the disk" if must_finish else "standard output"
            _discard_output()
        if os.environ.get("RANK", "0") != "0":
            # Under torchrun every rank hits the same mistake. Rank 0 reports it for all, and the launcher
            # ends the others meanwhile; an error of this rank alone is still reported, a moment later.
            time.sleep(2)
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)


def _discard_output() -> None:
    """Send what is still buffered nowhere: the interpreter's own flush at its exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
