"""HellaSwag's published validation examples: fetched once, from GitHub or from the Hub, and read.

GitHub has the authors' file. The Hub has a copy of it as parquet, with the same rows, but for labels as text;
HF_ENDPOINT names a mirror of the Hub, for those who cannot reach GitHub. Each is one file that never changes,
checked by its hash: the number of rows and what is in them are the same wherever they are from.
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
    # The commit, not the name of a branch, whose file may be written anew.
    "revision": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
}
SHA256 = {
    "hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "hellaswag_val.parquet": "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
}

# Seconds to connect, read, write and wait for a connection: a host that a firewall blocks may never answer.
TIMEOUT = (10, 60, 60, 10)


def fetch() -> Path:
    """The file of all examples, on the disk; fetched first if it is not there yet.

    Tries GitHub, then the Hub; a mirror of the Hub comes before GitHub.
    Raises UserError if neither has the file, or if the one on the disk is damaged.
    """
    for path in (FOLDER / name for name in SHA256):
        if path.exists():
            if problem := _difference(path.name, path.read_bytes()):
                raise UserError(f"{path}: {problem}: remove it to fetch it again")
            return path

    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    places = [
        ("hellaswag_val.jsonl", GITHUB, {}),
        ("hellaswag_val.parquet", hf_hub_url(**HUB, repo_type="dataset"), build_hf_headers()),
    ]
    if os.environ.get("HF_ENDPOINT"):
        places.reverse()
    problems = []
    for name, url, headers in places:
        try:
            content = _download(name, url, headers)
        except UserError as error:
            problems.append(str(error))
            continue
        files.make_folder(FOLDER)
        lock = files.lock_folder(FOLDER, wait=True)  # machines that share the disk fetch it at the same time
        try:
            files.write_atomically(FOLDER / name, content)
        finally:
            lock.release()
        return FOLDER / name
    raise UserError(
        f"HellaSwag cannot be fetched from {' or '.join(problems)}: set HF_ENDPOINT to a mirror of the Hub, "
        "or name a copy of either file with --data (in training --hellaswag-data)"
    )


def _download(name: str, url: str, headers: dict[str, str]) -> bytes:
    """The file at an address. Raises UserError if it cannot be fetched, or is another one."""
    from huggingface_hub.utils import get_session

    try:
        # The Hub's client rather than urllib, which finds no certificates in python.org's Python for macOS.
        response = get_session().get(url, headers=headers, timeout=TIMEOUT)
        problem = "" if response.is_success else f"HTTP {response.status_code}"
    except (hub.HTTPError, OSError, ImportError) as error:  # ImportError: a SOCKS proxy needs a package
        problem = (str(error) or type(error).__name__).splitlines()[0]
    problem = problem or _difference(name, response.content)
    if problem:
        raise UserError(f"{url} ({problem})")
    return response.content


def _difference(name: str, content: bytes) -> str:
    """What is wrong with the contents of a file; empty if they are the published ones."""
    digest = hashlib.sha256(content).hexdigest()
    if digest == SHA256[name]:
        return ""
    return f"not HellaSwag's validation file: {len(content):,} bytes, sha256 {digest}, not {SHA256[name]}"


def read(path: Path) -> list[str]:
    """The lines of a file of examples; of a .parquet, what they would be in a .jsonl.

    Raises OSError, UnicodeDecodeError, or UserError if it cannot be read.
    """
    if path.suffix != ".parquet":
        # Not str.splitlines(), which also divides at separators that JSON allows within a string.
        with open(path, encoding="utf-8") as file:
            return list(file)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return [json.dumps(row) + "\n" for row in file.read().to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}): fetch it again") from error
