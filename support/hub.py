"""The Hugging Face Hub: its errors in a user's words, and retries of those that go away."""

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

from support.cli import UserError

T = TypeVar("T")

# The client's base class of everything that can go wrong with a request: httpx's, or httpx2's from version 2.
HTTPError = HfHubHTTPError.__bases__[0]
CONFLICTS = (409, 412)  # someone else has committed in the meantime
SERVER_ERRORS = (500, 502, 503, 504)
RETRYABLE = (408, 429, *SERVER_ERRORS)
MAX_WAIT = 300  # seconds; the Hub counts requests over windows of five minutes


@contextlib.contextmanager
def user_errors(
    what: str, when_unreachable: str = "try again later", when_busy: str = "run the same command again"
) -> Iterator[None]:
    """Turn the Hub's errors into a UserError that starts with `what`: a flag and its value, or a file.

    when_unreachable, when_busy: what to do without a network, and about errors that go away. No message
    contains the token.
    """
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else "no network"
        raise UserError(f"{what}: the Hub cannot be reached ({reason}): {when_unreachable}") from error
    except HFValidationError as error:
        raise UserError(f"{what}: not a valid Hub name: {str(error).splitlines()[0]}") from error
    except (HTTPError, RuntimeError) as error:
        # The client wraps errors that occur while it uploads a file.
        cause = error if isinstance(error, HTTPError) else error.__cause__
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            raise UserError(f"{what}: HTTP {status}: {_advice(status, when_busy)}") from error
        if isinstance(cause, HTTPError):
            reason = type(cause).__name__
            raise UserError(f"{what}: the Hub cannot be reached ({reason}): {when_unreachable}") from error
        raise


def _advice(status: int, when_busy: str) -> str:
    if status in (401, 404):
        return "not on the Hub, or not visible to this login: check the name, or set HF_TOKEN"
    if status == 403:
        return "this token may not write there: use one with write access, or another name"
    if status == 429:
        return "too many requests: wait five minutes; HF_TOKEN raises the limit"
    if status in CONFLICTS:
        return f"someone else keeps changing it: {when_busy}"
    return f"the Hub is having problems: {when_busy}"


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is likely to go away: no network or a busy Hub, but not a bad token."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code in (*RETRYABLE, *CONFLICTS)
        if isinstance(error, HTTPError | OfflineModeIsEnabled | LocalEntryNotFoundError):
            return True
        error = error.__cause__
    return False


def with_retries(call: Callable[[], T], tries: int = 5, retry_on: tuple[int, ...] = RETRYABLE) -> T:
    """The result of `call`, repeated while the Hub answers with a status that tends to go away.

    Waits as long as the Hub's Retry-After asks, else 1, 2, 4, … seconds.
    """
    for attempt in range(tries):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in retry_on or attempt == tries - 1:
                raise
            retry_after = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(retry_after) if retry_after.isdigit() else 2**attempt, MAX_WAIT))
    raise AssertionError("unreachable")
