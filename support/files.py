"""Files and folders on disk: replaced atomically, flushed, hashed, locked, removed.

Network disks, folders shared with a virtual machine and the layers of a container do not support all of it.
There we leave out what is only a precaution.
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

# How a file system says that it lacks an operation, as opposed to an operation that has failed.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF}


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replace a file's contents at once: a reader or a crash finds the old ones or the new, never a part.

    The new contents are on the disk itself when this returns; text in the same bytes on every system, without
    line ends translated.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(contents.encode("utf-8") if isinstance(contents, str) else contents)
        file.flush()
        fsync(file.fileno())
    replace(temporary, path)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Replace a JSON file at once, indented for people to read."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def replace(source: Path, target: Path) -> None:
    """Give a flushed file or folder its name, in place of any other; returns once the name is on the disk.

    Windows refuses while anyone has the file open, such as a virus scanner that looks at every new one: tries
    again for about a second before it raises PermissionError. Where a name cannot be changed, as that of a
    folder in a lower layer of a container, copies the contents, of which a crash may leave a part.
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
    """Remove a file, a folder with all that is in it, or a link, but never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, where they are missing; returns once they are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's or a folder's contents are on the disk itself.

    Windows does not open folders, and flushes only files that are open for writing.
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
    """Wait until an open file is on the disk itself, if its disk can tell."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def check_regular(path: Path) -> None:
    """Raise UserError if the path is anything but a file: opening a named pipe would wait for a writer.

    Where there is nothing, the error is left to whoever opens it.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file, but a folder, a pipe or a device: move it away")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal. Raises UserError if it is not a regular file."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def lock_folder(folder: Path, wait: bool = False) -> FileLock | None:
    """Lock a folder, across processes and machines that share the disk; None if another process has it.

    The lock lasts until it is released, garbage-collected, or its process ends in any way. With `wait`,
    blocks until the folder is free. Where the disk cannot lock, warns and returns a lock that holds nothing.
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
    """True if a file is the pointer that a clone without Git LFS has in its place."""
    start = b"version https://git-lfs.github.com/spec/v1"
    try:
        with open(path, "rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False
