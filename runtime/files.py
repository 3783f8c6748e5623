"""Files that appear whole or not at all, locks, digests."""

import fcntl
import hashlib
import os
import weakref
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path, write):
    """Call `write(temporary path)`, then move the file to `path`: it appears whole or not at all, and stays."""
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


def append_text(path, text):
    """Add to a file."""
    with path_in_errors(path), open(path, "a") as file:
        file.write(text)


@contextmanager
def path_in_errors(path):
    """Have an OSError tell this path where it tells none: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


UMASK = os.umask(0)
os.umask(UMASK)


def fsync(path):
    """Have a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """Keeps other launches from a folder, or a file that is made, until it is closed or this process has ended.

    `doing`, `choose`: for the ValueError where another process has it: what that does there, and the flag that names
    another place. Where a file system knows no locks nobody is kept away.
    """

    handle = None

    def __init__(self, path, doing, choose):
        self.handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        held = weakref.ref(self)  # the workers of a DataLoader outlive a killed process for seconds: without its lock
        os.register_at_fork(after_in_child=lambda: held() and held().close())
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = path if path.is_dir() else path.parent
            raise ValueError(
                f"Another process is {doing} {folder}, expected one at a time: wait for it or choose another {choose}."
            ) from None
        except OSError:
            pass

    def close(self):
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    __del__ = close


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
