"""Locks of folders."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest
from helpers.launch import without_privileges
from helpers.tiny_files import tree
from helpers.tiny_models import refusal

from runtime.files import Lock

OPTIONS = "at work in", "--out"


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path):
    held = Lock(tmp_path, *OPTIONS)
    before = tree(tmp_path)
    with refusal(f"Another process is at work in {tmp_path}, expected", "choose another --out"):
        Lock(tmp_path, *OPTIONS)
    assert tree(tmp_path) == before
    held.close()
    assert not tree(tmp_path)
    Lock(tmp_path, *OPTIONS).close()


def test_a_lock_that_is_dropped_is_closed(tmp_path):
    Lock(tmp_path, *OPTIONS)
    assert not tree(tmp_path)
    Lock(tmp_path, *OPTIONS).close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_lock_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        Lock(tmp_path / "file", *OPTIONS)
    assert str(tmp_path / "file") in caught.value.filename


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(number, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    first, second = (Lock(tmp_path, *OPTIONS) for _ in range(2))
    assert not first.held.is_locked and not second.held.is_locked


def in_fork(action):
    """Call `action()` in a forked process and return its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_does_not_release_the_lock_of_its_parent(tmp_path):
    held = Lock(tmp_path, *OPTIONS)
    assert in_fork(held.close) == 0
    with refusal("Another process is at work"):
        Lock(tmp_path, *OPTIONS)
    held.close()


def test_a_kill_releases_the_lock_although_a_worker_lives_on(tmp_path):
    reading, writing = os.pipe()

    def hold():
        held = Lock(tmp_path, *OPTIONS)
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        os.write(writing, str(worker.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        held.close()

    assert in_fork(hold) == -signal.SIGKILL
    worker = int(os.read(reading, 20))
    try:
        Lock(tmp_path, *OPTIONS).close()  # of the file that the kill left behind
        os.kill(worker, 0)  # it is alive
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reading)
        os.close(writing)
    assert not tree(tmp_path)


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path):
    def without_permission():
        without_privileges()
        Lock(tmp_path, *OPTIONS).close()

    tmp_path.chmod(0o555)
    assert in_fork(without_permission) == 0 and not tree(tmp_path)
    tmp_path.chmod(0o755)
