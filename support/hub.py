"""The Hugging Face Hub: check the way there, translate its errors, and retry those that go away.

Everything that needs the Hub happens within `user_errors`, which checks the environment first. Some variables
break the import of the client, so that import belongs there too.
"""

import contextlib
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from support.cli import UserError

if TYPE_CHECKING:
    from httpx import Response

T = TypeVar("T")

# Base class of all errors of a request: httpx's, or httpx2's from version 2 of the client.
HTTPError = HfHubHTTPError.__bases__[0]
CONFLICTS = (409, 412)  # someone else has committed meanwhile
SERVER_ERRORS = (500, 502, 503, 504)
RETRYABLE = (408, 429, *SERVER_ERRORS)
MAX_WAIT = 300  # seconds; the Hub counts requests over windows of five minutes

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # in capitals or not
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
TIMEOUTS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)  # all that may follow "Bearer " (RFC 6750)
# Matches the address of a repository's page within that of a request.
PAGE = re.compile(
    r"(https?://[^/]+)(?:/api)?(?:/models)?"
    r"((?:/datasets)?/[^/?]+(?:/(?!(?:resolve|revision|tree)/)[^/?]+)?)"
)


class NoWay(UserError):
    """This machine's environment stops the client, so retries are useless until someone fixes it."""


# ---------------------------------------------------------------- the way there


def check_environment() -> None:
    """Raise NoWay if the environment leaves no way to the Hub. Corrects what can only mean one thing."""
    for name, value in list(os.environ.items()):
        if name.startswith("HF_") and not value.strip():
            del os.environ[name]  # set empty by a container
        elif name.upper() in PROXIES and value.lower().startswith("socks://"):
            os.environ[name] = "socks5" + value[len("socks") :]  # GNOME's spelling of SOCKS 5
    for name in TIMEOUTS:
        try:
            int(os.environ.get(name, "0"))
        except ValueError as error:
            value = os.environ[name]
            raise NoWay(f"{name} {value}: not a whole number of seconds: correct or unset it") from error
    if endpoint := os.environ.get("HF_ENDPOINT", "").strip():
        if not _is_address(endpoint):
            raise NoWay(f"HF_ENDPOINT {endpoint}: not of the form https://HOST: correct or unset it")
        os.environ["HF_ENDPOINT"] = endpoint
    try:
        from huggingface_hub import get_session

        get_session()  # creates the client, with its proxies and certificates
    except Exception as error:
        names = _set(*CERTIFICATES) if isinstance(error, OSError) else _set(*PROXIES, "NO_PROXY")
        names = names or "the system's settings"
        raise NoWay(f"{names}: no way to the Hub ({reason(error)}): correct or unset") from error


def _is_address(text: str) -> bool:
    try:
        address = urlsplit(text)
        return address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # of a port or an IPv6 address
        return False


def _set(*names: str) -> str:
    """Name those of these variables that are set, as spelled in the environment."""
    return ", ".join(name for name, value in os.environ.items() if name.upper() in names and value)


def token() -> str | None:
    """Return the user's token, or None. Raises UserError if it cannot be read, or is not a token."""
    check_environment()
    from huggingface_hub import constants, get_token

    source = next((name for name in TOKENS if os.environ.get(name)), constants.HF_TOKEN_PATH)
    try:
        found = get_token()
    except Exception as error:  # of a file, or of a login without a token in a CI
        raise UserError(f"{source}: no token can be read ({reason(error)}): set HF_TOKEN") from error
    if found and not TOKEN.fullmatch(found):
        raise UserError(f"{source}: not a token: paste it anew, with nothing before or after it")
    return found


def require_token(what: str) -> None:
    """Raise UserError without a token."""
    if not token():
        raise UserError(f"{what}: no token: set HF_TOKEN to one with write access, or run `hf auth login`")


def check_name(what: str, repo_id: str) -> None:
    """Raise UserError unless this can name a repository to write to. To read, some names have no user."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise UserError(f"{what}: not of the form USER/NAME: give the user or organization, and the name")


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def user_errors(
    what: str, when_unreachable: str = "try again later", when_busy: str = "run the same command again"
) -> Iterator[None]:
    """Turn errors of the Hub into a UserError that starts with `what`: a flag and its value, or a file.

    when_unreachable, when_busy: the advice without a network, and for errors that go away. No message
    contains the token. Checks the environment and the token first.
    """
    token()
    with translated_errors(what, when_unreachable, when_busy):
        yield


@contextlib.contextmanager
def translated_errors(
    what: str, when_unreachable: str = "try again later", when_busy: str = "run the same command again"
) -> Iterator[None]:
    """`user_errors` without the checks, for files that may be on the Hub or on this disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = _causes(error)
        for cause in causes:
            if isinstance(cause, HfHubHTTPError):
                raise UserError(f"{what}: {refusal(cause.response, when_busy)}") from error
            if isinstance(cause, HFValidationError):
                text = str(cause).splitlines()[0]
                raise UserError(f"{what}: not a name of the form USER/NAME ({text})") from error
            if isinstance(cause, HTTPError | OfflineModeIsEnabled):
                offline = isinstance(cause, OfflineModeIsEnabled)
                why = "HF_HUB_OFFLINE is set" if offline else way_reason(cause)
                raise UserError(f"{what}: the Hub cannot be reached ({why}): {when_unreachable}") from error
        if isinstance(error, LocalEntryNotFoundError):
            why = way_reason(causes[-1]) if len(causes) > 1 else "no network"
            raise UserError(f"{what}: the Hub cannot be reached ({why}): {when_unreachable}") from error
        if not _is_from_client(error):
            raise
        if isinstance(error, OSError) and error.strerror:
            place = f"{error.filename}: " if error.filename else ""
            advice = "free some space, or name another folder (HF_HOME for the Hub's cache)"
            raise NoWay(f"{what}: {place}{error.strerror}: {advice}") from error
        raise NoWay(f"{what}: the Hub's client failed ({way_reason(error)}): {when_unreachable}") from error


def _causes(error: BaseException | None) -> list[BaseException]:
    """List an error and the chain of errors that caused it. The client wraps some errors in others."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__
    return found


def _is_from_client(error: BaseException) -> bool:
    """True if the Hub's client raised the error. Others are bugs of this project."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("huggingface_hub") for frame, _ in frames)


def reason(error: BaseException) -> str:
    """Shorten an error to its type and its first line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


def way_reason(error: BaseException) -> str:
    """`reason` of a failed request, and the variables that decided where it went."""
    names = _set("HF_ENDPOINT", *PROXIES)
    return f"{reason(error)}; set: {names}" if names else reason(error)


def refusal(response: "Response", when_busy: str = "run the same command again") -> str:
    """Explain an error status of the Hub, with advice."""
    return f"HTTP {response.status_code}: {_advice(response, when_busy)}"


def _advice(response: "Response", when_busy: str) -> str:
    status, request = response.status_code, response.request
    if response.headers.get("X-Error-Code") == "GatedRepo":
        page = "".join(PAGE.match(str(request.url)).groups())
        return f"gated: accept its conditions on {page}, and set HF_TOKEN to a token of that account"
    if response.headers.get("X-Error-Message") == "Access to this resource is disabled.":
        return "disabled by the Hub: name another"
    if status in (401, 404):
        return "not on the Hub, or not visible to this login: check the name, or set HF_TOKEN"
    if status == 403:
        if request.method in ("GET", "HEAD") and "/auth-check/" not in request.url.path:
            return "this token may not read there: use one with read access, or another name"
        return "this token may not write there: use one with write access, or another name"
    if status == 429:
        return "too many requests: wait five minutes; HF_TOKEN raises the limit"
    if status in CONFLICTS:
        return f"someone else keeps changing it: {when_busy}"
    return f"the Hub is having problems: {when_busy}"


def is_transient(error: BaseException | None) -> bool:
    """True if an error is likely to go away, such as no network or a busy Hub, but not a bad token."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (*RETRYABLE, *CONFLICTS)
    return any(isinstance(c, HTTPError | OfflineModeIsEnabled | LocalEntryNotFoundError) for c in causes)


def with_retries(call: Callable[[], T], tries: int = 5, retry_on: tuple[int, ...] = RETRYABLE) -> T:
    """Return the result of `call`, repeating it while the Hub answers with a status that tends to go away.

    Waits for the seconds of the Hub's Retry-After header, otherwise 1, 2, 4, … seconds.
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
