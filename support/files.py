"""Files and folders on disk: replaced atomically, flushed, hashed, locked, removed.

Network disks, folders shared with a virtual machine and container layers do not support everything. There we
skip what is only a precaution.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from support.cli import UserError

# Errors of file systems that lack an operation, as opposed to an operation that failed.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF}


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replace the contents of a file: a reader or a crash finds the old ones or the new, never a part.

    Returns once the new contents are on the disk. Text is UTF-8 on every system, with unchanged line ends.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(contents.encode("utf-8") if isinstance(contents, str) else contents)
        file.flush()
        fsync(file.fileno())
    replace(temporary, path)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Replace a JSON file atomically, indented for people to read."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def replace(source: Path, target: Path) -> None:
    """Give a flushed file or folder its name, replacing any other. Returns once the name is on the disk.

    Windows refuses while anyone has the file open, such as a virus scanner. So it tries again for about a
    second before it raises PermissionError. If a name cannot be changed, such as that of a folder in a lower
    container layer, it copies the contents, and a crash may leave a part of them.
    """
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8, None):
        try:
            os.replace(source, target)
            break
        except PermissionError:
            if wait is None:
                raise
            time.sleep(wait)
        except OSError as error:
            if error.errno not in {*NOT_SUPPORTED, errno.EXDEV}:
                raise
            _move_by_copying(source, target)
            break
    flush_to_disk(target.parent)


def _move_by_copying(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    for path in (*target.rglob("*"), target):
        flush_to_disk(path)
    remove(source)


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link, but never the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents. Returns once they are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until the contents of a file or folder are on the disk.

    Windows cannot open folders, and only flushes files that are open for writing.
    """
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if not is_folder:
            raise
        return
    try:
        fsync(handle)
    finally:
        os.close(handle)


def fsync(handle: int) -> None:
    """Wait until an open file is on the disk, if its disk supports that."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def check_regular(path: Path) -> None:
    """Raise UserError if the path is a folder, a pipe or a device. Opening a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file, but a folder, a pipe or a device: move it away")


def sha256_of(path: Path) -> str:
    """Hash a file with SHA-256, in hexadecimal. Raises UserError if it is not a regular file."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def lock_folder(folder: Path, wait: bool = False) -> FileLock | None:
    """Lock a folder across processes and machines that share the disk; None if another process has it.

    The lock lasts until it is released or garbage-collected, or its process ends in any way. `wait` blocks
    until the folder is free. If the disk cannot lock, warns and returns a lock that holds nothing.
    """
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=-1 if wait else 0).lock
    except Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in {*NOT_SUPPORTED, errno.ENOLCK}:
            raise
        text = "this disk cannot lock files: see to it that no second process writes there"
        print(f"warning: {folder}: {text}", file=sys.stderr)
        return lock


def is_lfs_pointer(path: Path) -> bool:
    """True if a file is a Git LFS pointer, which a clone without Git LFS contains."""
    start = b"version https://git-lfs.github.com/spec/v1"
    try:
        with open(path, "rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False
