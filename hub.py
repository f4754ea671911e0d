"""The Hugging Face Hub's refusals in a user's words, and patience with those that pass."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from cli import UserError

T = TypeVar("T")

# The client's own base of all that can go wrong with a request: of httpx, or from version 2 on of httpx2.
HTTPError = HfHubHTTPError.__bases__[0]
CONFLICTS = (409, 412)  # somebody else has committed meanwhile
SERVER_TROUBLE = (500, 502, 503, 504)
PASSING = (408, 429, *SERVER_TROUBLE)
LONGEST_WAIT = 300  # seconds; the Hub counts requests in windows of five minutes


@contextlib.contextmanager
def explained(what: str, when_unreachable: str = "try again later") -> Iterator[None]:
    """Turn the Hub's errors into a UserError that begins with `what`, a flag and its value or a file.

    when_unreachable: what to do where there is no network. No message holds the token.
    """
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else "no network"
        raise UserError(f"{what}: the Hub cannot be reached ({reason}): {when_unreachable}") from error
    except HFValidationError as error:
        raise UserError(f"{what}: not a name on the Hub: {str(error).splitlines()[0]}") from error
    except (HTTPError, RuntimeError) as error:
        # The client wraps what goes wrong while it uploads a file.
        cause = error if isinstance(error, HTTPError) else error.__cause__
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            raise UserError(f"{what}: HTTP {status}: {_advice(status)}") from error
        if isinstance(cause, HTTPError):
            reason = type(cause).__name__
            raise UserError(f"{what}: the Hub cannot be reached ({reason}): {when_unreachable}") from error
        raise


def _advice(status: int) -> str:
    if status in (401, 404):
        return "not on the Hub, or not open to this login: check the name, or set HF_TOKEN"
    if status == 403:
        return "this token has no right to it: use one with write access, or another name"
    if status == 429:
        return "the Hub asks for fewer requests: wait five minutes; HF_TOKEN raises the limit"
    if status in CONFLICTS:
        return "somebody else keeps changing it: run the same command again"
    return "the Hub is in trouble: run the same command again later"


def patiently(call: Callable[[], T], tries: int = 5, retry_on: tuple[int, ...] = PASSING) -> T:
    """The result of `call`, made again when the Hub answers with a status that passes.

    Waits as long as the Hub asks for with Retry-After, else 1, 2, 4, … seconds.
    """
    for attempt in range(tries):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in retry_on or attempt == tries - 1:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(asked) if asked.isdigit() else 2**attempt, LONGEST_WAIT))
    raise AssertionError("unreachable")
