"""How every script parses its flags and reports a user's mistakes."""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NoReturn, TypeVar

import tyro

T = TypeVar("T")
Dtype = Literal["auto", "bfloat16", "float16", "float32"]  # of every script's --dtype

# What the machine refuses, as opposed to a bug: worth one line, not a traceback.
ENVIRONMENT_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """A mistake in a flag or an input file. The text names the flag or file, what is wrong, what to do."""


def parse(
    settings: type[T], description: str, default: T | None = None, args: Sequence[str] | None = None
) -> T:
    """Fill the dataclass `settings` from the command line (from `args` rather than sys.argv, if given).

    A field's docstring is its help text; `default` holds the values of fields that no flag sets. The fields
    of a nested dataclass become flags without a prefix, shown as a group of their own.
    Raises UserError on a flag that does not parse.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            kwargs = {} if default is None else {"default": default}
            return tyro.cli(
                settings, description=description, args=args, config=(tyro.conf.OmitArgPrefixes,), **kwargs
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # tyro draws a box: a title (in ASCII with a rule below), the message, a rule, advice.
    lines = [line.strip("│ ") for line in captured.getvalue().splitlines()[1:]]
    is_rule = [not line.strip("─-") for line in lines]
    begin = is_rule.index(False)
    end = is_rule.index(True, begin)
    raise UserError(f"{' '.join(lines[begin:end]).removesuffix('.')}: see --help")


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


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a script's `main` and exit with its status; a UserError is one line on stderr and status 2.

    Output is flushed line by line, so that a log file or `| tee` shows each line as it is printed; a console
    that cannot show a character, such as one of Windows in cp1252, shows a ?.
    Ctrl-C exits with status 130 and no traceback.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # scripts set it so while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output is gone, as with `| head`; the interpreter's own flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in ENVIRONMENT_ERRORS:
            raise
        if os.environ.get("RANK", "0") != "0":
            # Under torchrun every rank hits the same mistake. Rank 0 reports it for all, and the launcher
            # ends the others meanwhile; an error of this rank alone is still reported, a moment later.
            time.sleep(2)
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
