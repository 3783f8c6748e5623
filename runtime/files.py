"""Atomic writes, locks of folders, and digests."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # raised by file systems without locks
UMASK = os.umask(0)
os.umask(UMASK)


# ---- writing -------------------------------------------------------------------------------------


def atomic_write(path: str | os.PathLike, write: Callable[[Path], object]):
    """Call `write(temporary path)`, then move the file to `path`.

    The file appears complete or not at all, and is on the disk on return. Its folder is made if absent. An OSError names
    `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with path_in_errors(path):
        try:
            write(temporary)
            temporary.chmod(0o666 & ~UMASK)  # some writers make private files
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def append_text(path: str | os.PathLike, text: str):
    """Append text to a file; an OSError names the file."""
    with path_in_errors(path), open(path, "a") as file:
        file.write(text)


@contextmanager
def path_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Add `path` to an OSError that names no file, as on a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(path: str | os.PathLike):
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def nearest_existing(path: str | os.PathLike) -> Path:
    """Return `path` if it exists, or else the nearest folder above it that does."""
    path = Path(path)
    return next(each for each in (path, *path.absolute().parents) if each.exists())


# ---- locks ---------------------------------------------------------------------------------------


class Lock:
    """Keep other launches out of a folder until it is closed or this process ends.

    folder  an existing folder
    doing   what another process does there, for the message: "sampling into"
    choose  the flag that names another folder, for the message

    The kernel holds the lock on a file .lock in the folder, so kill -9 releases it too, and leaves the file behind.
    Forked processes do not hold it. On a file system without locks, or in a folder that cannot be written, nobody is
    kept out.

    Raises ValueError if another process holds it.
    """

    def __init__(self, folder: Path, doing: str, choose: str):
        self.path = folder / LOCK_FILE
        self.held = FileLock(self.path, thread_local=False, preserve_lock_file=True)
        try:
            self.held.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"Another process is {doing} {folder}, expected one at a time: wait for it or choose another {choose}."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS and os.access(folder, os.W_OK):
                raise

    def close(self):
        if self.held.is_locked:  # never in a forked process
            self.path.unlink(missing_ok=True)
        self.held.release()

    __del__ = close


# ---- digests -------------------------------------------------------------------------------------


def sha256(path: str | os.PathLike) -> str:
    """Return the hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
