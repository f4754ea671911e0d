"""Parse the flags of a script, and report a user's mistakes in one line."""

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
    """A mistake in a flag or an input file. The text names the flag or file, the problem and the fix."""


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that a flag accepts, noted beside its field. Without a note: all of at least 0.

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
    """Fill the dataclass `settings` from the command line (from `args` instead of sys.argv, if given).

    The docstring of a field is its help text. `default` holds the values of fields without a flag. Fields of
    a nested dataclass become flags without a prefix, in a group of their own.
    Raises UserError on a flag that does not parse, or a number out of its Bounds.
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
    """Return the value of a flag on the command line, before the others are parsed; None without the flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?")  # `parse` reports a missing value
    return getattr(parser.parse_known_args(args)[0], name)


def flag(name: str, value: object) -> str:
    """Format a setting as the user types it: ("n_layer", 2) -> "--n-layer 2"."""
    return f"--{name.replace('_', '-')} {value}"


def flags(values: Mapping[str, object]) -> list[str]:
    """Format settings as flags: {"n_layer": 2, "resume": False} -> ["--n-layer", "2", "--no-resume"].

    Settings whose value is None are left out.
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
    """Extract the error message of a script that failed: the last line of its stderr."""
    lines = stderr.strip().splitlines() or ["no message"]
    return lines[-1].removeprefix("error: ")


class Unheard:
    """A text stream that drops output when its reader is gone.

    The terminal may close, the reader of a pipe may die, the disk under a log file may be full.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write as much as possible. Returns the length of the text."""
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

    Output is flushed line by line, so that a log file or `| tee` shows each line immediately. Characters that
    the console cannot show, such as one of Windows in cp1252, become a ?.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by `>&-`, or under pythonw
            # It takes the number of the closed stream. Otherwise the next file would, and C libraries print
            # into it.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream (%run) has no such method
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    # Progress and warnings may be lost, but the output of a script may not.
    for name in ("stdout", "stderr") if must_finish else ("stderr",):
        if not isinstance(getattr(sys, name), Unheard):
            setattr(sys, name, Unheard(getattr(sys, name)))


def run(main: Callable[[], int | None], must_finish: bool = False) -> NoReturn:
    """Call the `main` of a script and exit with its status. A UserError is one line on stderr and status 2.

    must_finish: keep working when nobody can read the output any more; otherwise the script ends then.
    Ctrl-C exits with status 130 and no traceback.
    """
    open_streams(must_finish)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by launch.prepare
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, such as `| head`
        _discard_output()
        sys.exit(1)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in ENVIRONMENT_ERRORS:
            raise
        if isinstance(error, OSError) and error.filename is None:  # of an open file, or of our output
            error.filename = "the disk" if must_finish else "standard output"
            _discard_output()
        if os.environ.get("RANK", "0") != "0":
            # Under torchrun every rank makes the same mistake. Rank 0 reports it, and the launcher ends the
            # others meanwhile. An error of this rank alone is still reported, a moment later.
            time.sleep(2)
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)


def _discard_output() -> None:
    """Send buffered output nowhere, because the interpreter's own flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
