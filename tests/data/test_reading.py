from __future__ import annotations

import errno
import gc
import itertools
import os
import socket
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


def changing(path, times: int, monkeypatch) -> None:
    """Append to `path` between the reader's look before and its look after, this many times."""
    fstat, calls = os.fstat, itertools.count()

    def look(descriptor: int) -> os.stat_result:
        if (call := next(calls)) % 2 and call // 2 < times:
            with open(path, "ab") as file:
                file.write(b"more")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", look)


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """Row 19: what comes out is whole, and its stamp is that of what came out."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    changing(path, 2, monkeypatch)
    data, stamp = read_file(str(path))
    assert (data, stamp.size) == (b"oldmoremore", 11)


def test_a_file_that_never_stops_changing_is_skipped_as_such(tmp_path, monkeypatch):
    """Row 19: a download in progress: no half of it is taken for a picture, and we do not wait for ever."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    changing(path, 1000, monkeypatch)
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
    gc.collect()  # what earlier tests dropped is closed now, not between two counts
    before = len(os.listdir("/proc/self/fd"))
    for name in ("empty", "good"):
        try:
            read_file(str(tmp_path / name))
        except ImageError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
