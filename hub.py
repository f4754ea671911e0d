"""The Hugging Face Hub's refusals in a user's words, and patience with those that pass."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from cli import UserError

T = TypeVar("T")

# The client's own base of all that can go wrong with a request: of httpx, or from version 2 on of httpx2.
HTTPError = HfHubHTTPError.__bases__[0]
CONFLICTS = (409, 412)  # somebody else has committed meanwhile
PASSING = (408, 429, 500, 502, 503, 504)
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
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 404):
            reason = "not on the Hub, or not open to this login: check the name, or set HF_TOKEN"
        elif status == 403:
            reason = "this token has no right to it: use one with write access, or another name"
        elif status == 429:
            reason = "the Hub asks for fewer requests: wait five minutes; HF_TOKEN raises the limit"
        elif status in CONFLICTS:
            reason = "somebody else keeps changing it: run the same command again"
        else:
            reason = "the Hub is in trouble: run the same command again later"
        raise UserError(f"{what}: HTTP {status}: {reason}") from error
    except HTTPError as error:
        reason = type(error).__name__
        raise UserError(f"{what}: the Hub cannot be reached ({reason}): {when_unreachable}") from error
    except ValueError as error:
        # The client checks names before it asks; its message says what a name may look like.
        if type(error).__name__ != "HFValidationError":
            raise
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from error


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
