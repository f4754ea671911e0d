"""HellaSwag's published validation examples: fetch them once, from GitHub or the Hub, and read them.

GitHub has the authors' file. The Hub has a copy as parquet with the same rows, except that labels are text.
HF_ENDPOINT names a mirror of the Hub for those who cannot reach GitHub. Each file never changes and is
verified by its hash.
"""

import hashlib
import json
import os
from pathlib import Path

from support import files, hub
from support.cli import UserError

FOLDER = Path(__file__).parent.parent / "data"

GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HUB = {
    "repo_id": "Rowan/hellaswag",
    "filename": "data/validation-00000-of-00001.parquet",
    # A commit, because the file of a branch may change.
    "revision": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
}
SHA256 = {
    "hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "hellaswag_val.parquet": "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
}

BY_HAND = "name a copy of either file with --data (in training --hellaswag-data)"

# Seconds to connect, read, write and wait for a connection, because a blocked host may never answer.
TIMEOUT = (10, 60, 60, 10)


def fetch() -> Path:
    """Return the path of the file with all examples, after fetching it if it is not on the disk.

    Tries GitHub, then the Hub; a mirror of the Hub comes before GitHub.
    Raises UserError if neither has the file, or if the one on the disk is damaged.
    """
    try:
        return _on_disk() or _fetch()
    except OSError as error:
        raise UserError(f"{FOLDER}: cannot be read or written ({hub.reason(error)}): {BY_HAND}") from error


def _on_disk() -> Path | None:
    for path in (FOLDER / name for name in SHA256):
        if path.exists():
            if problem := _difference(path.name, path.read_bytes()):
                raise UserError(f"{path}: {problem}: remove it to fetch it again")
            return path
    return None


def _fetch() -> Path:
    hub.check_environment()
    from huggingface_hub import hf_hub_url

    places = [
        ("hellaswag_val.jsonl", GITHUB),
        ("hellaswag_val.parquet", hf_hub_url(**HUB, repo_type="dataset")),
    ]
    if os.environ.get("HF_ENDPOINT"):
        places.reverse()
    problems = []
    for name, url in places:
        try:
            content = _download(name, url)
        except UserError as error:
            problems.append(str(error))
            continue
        files.make_folder(FOLDER)
        lock = files.lock_folder(FOLDER, wait=True)  # machines that share the disk may fetch at the same time
        try:
            files.write_atomically(FOLDER / name, content)
        finally:
            lock.release()
        return FOLDER / name
    raise UserError(
        f"HellaSwag cannot be fetched from {' or '.join(problems)}: set HF_ENDPOINT to a mirror of the Hub, "
        f"or {BY_HAND}"
    )


def _download(name: str, url: str) -> bytes:
    """Download a file. Raises UserError if that fails, or if the content is not the published one."""
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        # GitHub needs no token, and must not see it.
        headers = {} if url == GITHUB else build_hf_headers(token=hub.token())
        # Not urllib, which finds no certificates in python.org's Python for macOS.
        response = get_session().get(url, headers=headers, timeout=TIMEOUT)
    except UserError as error:
        raise UserError(f"{url} ({error})") from error
    except Exception as error:  # whatever it is, training continues without HellaSwag
        raise UserError(f"{url} ({hub.way_reason(error)})") from error
    if response.is_success:
        problem = _difference(name, response.content)
    else:
        problem = f"HTTP {response.status_code}" if url == GITHUB else hub.refusal(response)
    if problem:
        raise UserError(f"{url} ({problem})")
    return response.content


def _difference(name: str, content: bytes) -> str:
    """Describe how the content of a file differs from the published one; empty if it does not."""
    digest = hashlib.sha256(content).hexdigest()
    if digest == SHA256[name]:
        return ""
    return f"not HellaSwag's validation file: {len(content):,} bytes, sha256 {digest}, not {SHA256[name]}"


def read(path: Path) -> list[str]:
    """Read the lines of a file of examples, blank ones too. A .parquet is turned into the lines of a .jsonl.

    Raises OSError, UnicodeDecodeError, or UserError if it cannot be read.
    """
    if path.suffix.lower() != ".parquet":
        # Not str.splitlines(), which also divides at separators that JSON allows within a string.
        with open(path, encoding="utf-8-sig") as file:
            return list(file)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return [json.dumps(row) + "\n" for row in file.read().to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}): fetch it again") from error
