from __future__ import annotations

import errno
import os
import socket
import threading
import time

import pytest
import xxhash

from mmsearch.data.reading import file_digest, read_file
from mmsearch.errors import ImageError
from mmsearch.types import SkipReason, Stamp


def refusal(path, **options) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_file(str(path), **options)
    return caught.value


def test_bytes_and_stamp_belong_together(tmp_path):
    """Known values: what was written, its size and its times."""
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    data, stamp = read_file(str(path))
    assert data == b"hello"
    assert stamp == Stamp(5, 1_700_000_000_123_456_789, path.stat().st_ctime_ns)
    assert file_digest(str(path)) == (xxhash.xxh3_128_digest(b"hello"), stamp)


def test_an_mtime_in_the_future_or_before_1970_is_just_a_number(tmp_path):
    """Row 30."""
    path = tmp_path / "a"
    path.write_bytes(b"x")
    for seconds in (4_000_000_000, -1000):
        os.utime(path, (0, seconds))
        assert read_file(str(path))[1].mtime_ns == seconds * 10**9


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path):
    """Row 19: written once between our opening and our reading; the second reading is whole."""
    path = tmp_path / "a"
    path.write_bytes(b"old " * 10)
    times = iter([True, False, False])

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags)
        if next(times):  # after the reader's descriptor exists, before it looks at it, then grow
            threading.Timer(0, lambda: None).start()
            path.write_bytes(b"new " * 20)
        return descriptor

    assert read_file(str(path), opener=opener)[0] == b"new " * 20


class Growing:
    """Appends to a file for as long as it is used."""

    def __init__(self, path):
        self.stop, self.path = threading.Event(), path
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        with open(self.path, "ab", buffering=0) as file:
            while not self.stop.is_set():
                file.write(b"x" * 10)

    def __enter__(self):
        self.thread.start()
        time.sleep(0.05)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def test_a_file_that_never_stops_changing_is_skipped_as_such(tmp_path):
    """Row 19: a download in progress: no half of it is taken for a picture, and we do not wait for ever."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * 8_000_000)
    with Growing(path):
        assert refusal(path).reason == SkipReason.CHANGING


def test_a_file_that_is_gone_has_vanished(tmp_path):
    """Row 20: also when its folder is gone, or has become a file."""
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none", tmp_path / "no" / "none", tmp_path / "file" / "none"):
        assert refusal(path).reason == SkipReason.VANISHED


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EPERM])
def test_a_file_that_may_not_be_read_is_unreadable(tmp_path, code):
    """Row 21, as any user (root may read everything)."""
    path = tmp_path / "a"
    path.write_bytes(b"x")

    def opener(name: str, flags: int) -> int:
        raise OSError(code, os.strerror(code), name)

    error = refusal(path, opener=opener)
    assert (error.reason, error.detail) == (SkipReason.UNREADABLE, os.strerror(code))


def test_what_is_no_file_is_never_opened(tmp_path):
    """Row 23: pipes, sockets, devices and folders: refused at once, without blocking."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        started = time.monotonic()
        for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/null", tmp_path):
            assert refusal(path, opener=_must_not_open).reason == SkipReason.NOT_A_FILE
    assert time.monotonic() - started < 1


def _must_not_open(name: str, flags: int) -> int:
    raise AssertionError(name)


def test_a_pipe_put_there_at_the_last_moment_does_not_block(tmp_path):
    """Row 23: between the look and the opening the file is replaced by a pipe without a writer."""
    path = tmp_path / "a"
    path.write_bytes(b"x")

    def opener(name: str, flags: int) -> int:
        os.unlink(name)
        os.mkfifo(name)
        return os.open(name, flags)

    assert refusal(path, opener=opener).reason == SkipReason.NOT_A_FILE


def test_files_without_bytes_or_with_too_many_are_refused(tmp_path):
    """Rows 1 and 23: the limit counts, also for files of /proc, which say they are empty."""
    path = tmp_path / "a"
    path.write_bytes(b"")
    assert refusal(path).reason == SkipReason.EMPTY
    assert refusal("/proc/self/status").reason == SkipReason.EMPTY
    path.write_bytes(b"12345")
    assert read_file(str(path), max_bytes=5)[0] == b"12345"
    error = refusal(path, max_bytes=4)
    assert (error.reason, error.detail) == (SkipReason.TOO_LARGE, "5 bytes, limit 4")


def test_impossible_names_are_unreadable_not_a_crash(tmp_path):
    """Row 24: a NUL, a name that is too long, a loop of links."""
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    for path in ("a\0b", str(tmp_path / ("x" * 300)), str(tmp_path / "a")):
        assert refusal(path).reason == SkipReason.UNREADABLE


def test_no_descriptor_is_left_open(tmp_path):
    """Whatever happens, the file is closed."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "good").write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("empty", "good"):
        try:
            read_file(str(tmp_path / name))
        except ImageError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
