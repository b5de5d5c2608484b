"""SQLite's locks outlive everything that is read beside a connection: nobody takes a log away from under a writer."""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_kit import Batch, IndexStore, PlainDerived, create, in_child, make_index, upsert

from mmsearch.errors import MmsearchError
from mmsearch.store import connections
from mmsearch.store.check import verify
from mmsearch.store.checksums import file_digest
from mmsearch.store.connections import connect, copy_database, database_digest
from mmsearch.store.sqlite import ReaderConnection

READ = """
import sys
from mmsearch.store import IndexStore
with IndexStore.open(sys.argv[1]) as store, store.snapshot() as snapshot:
    print(snapshot.row_count)
"""
PLAIN_READ = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(db.execute("SELECT count(*) FROM items").fetchone()[0])
db.close()
"""


def elsewhere(program: str, path: str) -> int:
    """What a program in a process of its own prints: forked ones would share what SQLite knows."""
    done = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True)
    return int(done.stdout)


def open_files(folder: Path) -> int:
    """Descriptors of this process that lead below `folder`; what other tests leave open is none of ours."""
    found, below = 0, os.path.realpath(folder) + os.sep
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself has gone
            found += os.readlink(f"/proc/self/fd/{name}").startswith(below)
    return found


@pytest.mark.parametrize("reader", ["mmsearch", "another program"])
def test_readers_of_other_processes_leave_the_writer_its_log(quick_path, reader):
    """`mmsearch query` during `mmsearch index`: each reader sees all that is committed, and so does the next."""
    path = str(quick_path / "index")
    items = os.path.join(path, "items.sqlite")

    def seen() -> int:
        return elsewhere(READ, path) if reader == "mmsearch" else elsewhere(PLAIN_READ, items)

    with create(path) as store:
        for number in range(3):
            store.commit(Batch(upserts=[upsert(str(number))]))
            log = os.stat(items + "-wal")
            assert seen() == number + 1
            assert os.stat(items + "-wal").st_ino == log.st_ino
            store.finish()  # takes a checksum of items.sqlite
        store.commit(Batch(upserts=[upsert("last")]))
        assert seen() == 4
        store.update_derived(PlainDerived())
        with store.snapshot() as snapshot:
            assert snapshot.row_count == 4
    assert verify(path) == []


def test_checks_leave_an_open_reader_its_locks(quick_path):
    """A service that opens an index a second time, or verifies it, still holds the generation it searches."""
    path = make_index(quick_path / "index")
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        IndexStore.open(path).close()
        assert verify(path) == []
        seen = elsewhere(PLAIN_READ, os.path.join(path, "items.sqlite"))  # whose close would clean up
        assert seen == snapshot.row_count // 2
        assert os.path.exists(os.path.join(path, "items.sqlite-wal"))
        with IndexStore.open(path, write=True) as writer:
            writer.commit(Batch(upserts=[upsert("new")]))
        assert elsewhere(READ, path) == snapshot.row_count + 1


def test_a_digest_is_that_of_the_file_open_or_not(quick_path):
    """Known value: the checksum of its bytes. Nothing stays open when the last connection has gone."""
    path, before = str(quick_path / "a.sqlite"), open_files(quick_path)
    db = connect(path)
    db.execute("CREATE TABLE t (x)")
    db.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,) for _ in range(3000)])  # more than one piece
    plain = file_digest(path)
    first = open_files(quick_path)
    assert [database_digest(path) for _ in range(5)] == [plain] * 5
    assert open_files(quick_path) == first + 1  # one descriptor, shared
    copy_database(path, path + ".copy")
    assert file_digest(path + ".copy") == plain
    db.close()
    db.close()
    assert open_files(quick_path) == before
    assert database_digest(path) == plain
    assert open_files(quick_path) == before
    assert not connections._files


def test_files_are_told_apart_by_what_they_are_not_by_name(quick_path):
    """Another name of an open file is that file; another file of the same name is not."""
    path = str(quick_path / "a.sqlite")
    db = connect(path)
    db.execute("CREATE TABLE t (x)")
    os.link(path, path + ".link")
    descriptors = open_files(quick_path)
    assert database_digest(path + ".link") == file_digest(path)
    assert open_files(quick_path) == descriptors + 1  # kept: closing it would unlock the other name
    os.replace(path, path + ".old")
    other = connect(path)
    other.execute("CREATE TABLE other (y)")
    assert database_digest(path) == file_digest(path) != database_digest(path + ".old")
    other.close()
    db.close()
    assert not connections._files


def test_an_attached_database_is_held_until_the_connection_closes(quick_path):
    """A nested index that is read through the writer's connection, when its own connection has gone."""
    outer, inner = (connect(str(quick_path / name)) for name in ("a.sqlite", "b.sqlite"))
    inner.execute("PRAGMA journal_mode = WAL")
    inner.execute("CREATE TABLE items (x)")
    outer.hold(str(quick_path / "b.sqlite"))
    outer.execute("ATTACH DATABASE ? AS inner", (str(quick_path / "b.sqlite"),))
    assert outer.execute("SELECT count(*) FROM inner.items").fetchall() == [(0,)]
    database_digest(str(quick_path / "b.sqlite"))
    inner.close()
    assert elsewhere(PLAIN_READ, str(quick_path / "b.sqlite")) == 0
    assert os.path.exists(quick_path / "b.sqlite-wal")
    outer.close()
    assert not connections._files


def test_a_connection_that_nobody_closed_is_not_counted_for_ever(quick_path):
    """One that is dropped is let go, with what was kept for it."""
    path, before = str(quick_path / "a.sqlite"), open_files(quick_path)
    db = connect(path)
    db.execute("CREATE TABLE t (x)")
    database_digest(path)
    del db
    gc.collect()
    assert not connections._files
    assert open_files(quick_path) == before


def test_a_name_that_changes_hands_while_it_is_opened_does_not_mix_files(quick_path, monkeypatch):
    """What was opened counts as what it is, not as what had the name a moment before."""
    path, old = str(quick_path / "a.sqlite"), str(quick_path / "old.sqlite")
    with contextlib.closing(connect(path)) as db:
        db.execute("CREATE TABLE t (x)")
        before = os.stat(path)
        os.replace(path, old)
        with contextlib.closing(connect(path)) as other:
            other.execute("CREATE TABLE u (y, z)")
        real = os.stat
        monkeypatch.setattr(connections.os, "stat", lambda name: before if name == path else real(name))
        found = database_digest(path)
        monkeypatch.undo()
        assert found == file_digest(path)
        assert database_digest(old) == file_digest(old) != found
    assert not connections._files


def test_a_file_that_goes_while_it_is_opened_is_an_error_of_sqlite(quick_path, monkeypatch):
    """Callers know SQLite's errors; what they make of them says which file it was."""
    real = os.stat

    def gone(path, **rest):
        if str(path).endswith("items.sqlite"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, **rest)

    path = make_index(quick_path / "index")
    monkeypatch.setattr(connections.os, "stat", gone)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        connect(os.path.join(path, "items.sqlite"))
    with pytest.raises(MmsearchError, match=r"items\.sqlite"):
        ReaderConnection(os.path.join(path, "items.sqlite"))
    monkeypatch.undo()
    assert not connections._files


def test_a_forked_child_begins_anew(quick_path):
    """It has none of the locks, waits for no thread of its parent, and closing what it inherited does no harm."""
    path = make_index(quick_path / "index")
    db = connect(os.path.join(path, "items.sqlite"))

    def child(tell):
        db.close()
        with IndexStore.open(path) as store, store.snapshot() as snapshot:
            tell(snapshot.row_count)

    busy, done = threading.Event(), threading.Event()

    def opening():
        with connections._lock:
            busy.set()
            done.wait()

    thread = threading.Thread(target=opening)
    thread.start()
    busy.wait()
    try:
        assert in_child(child) == (0, ["8"])
    finally:
        done.set()
        thread.join()
    db.close()
    assert not connections._files


def test_threads_may_open_and_check_at_once(quick_path):
    """All digests agree, and nothing is left."""
    path, before = str(quick_path / "a.sqlite"), open_files(quick_path)
    with contextlib.closing(connect(path)) as db:
        db.execute("CREATE TABLE t (x)")
    right = file_digest(path)

    def work(_):
        with contextlib.closing(connect(path)) as db:
            db.execute("SELECT * FROM t").fetchall()
            return database_digest(path)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(200))) == {right}
    assert not connections._files
    assert open_files(quick_path) == before


def test_a_file_that_cannot_be_opened_is_not_counted(quick_path):
    """An error leaves nothing behind."""
    with pytest.raises(FileNotFoundError):
        database_digest(str(quick_path / "none"))
    assert not connections._files
