"""SQLite's locks outlive everything that is read beside a connection: nobody takes a log away from under a writer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from store_kit import Batch, IndexStore, PlainDerived, create, make_index, upsert

from mmsearch.store import connections
from mmsearch.store.check import verify
from mmsearch.store.checksums import file_digest
from mmsearch.store.connections import connect, copy_database, database_digest

READ = """
import sys
from mmsearch.store import IndexStore
with IndexStore.open(sys.argv[1]) as store, store.snapshot() as snapshot:
    print(snapshot.row_count)
"""
WRITE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(db.execute("SELECT count(*) FROM items").fetchone()[0])
db.close()
"""


def elsewhere(program: str, path: str) -> int:
    """What a program in a process of its own prints: forked ones would share what SQLite knows."""
    done = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True)
    return int(done.stdout)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("reader", ["mmsearch", "another program"])
def test_readers_of_other_processes_leave_the_writer_its_log(quick_path, reader):
    """`mmsearch query` during `mmsearch index`: each reader sees all that is committed, and so does the next."""
    path = str(quick_path / "index")
    items = os.path.join(path, "items.sqlite")

    def seen() -> int:
        return elsewhere(READ, path) if reader == "mmsearch" else elsewhere(WRITE, items)

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
        assert (
            elsewhere(WRITE, os.path.join(path, "items.sqlite")) == snapshot.row_count // 2
        )  # its close would clean up
        assert os.path.exists(os.path.join(path, "items.sqlite-wal"))
        with IndexStore.open(path, write=True) as writer:
            writer.commit(Batch(upserts=[upsert("new")]))
        assert elsewhere(READ, path) == snapshot.row_count + 1


def test_a_digest_is_that_of_the_file_open_or_not(quick_path):
    """Known value: the checksum of its bytes. Nothing stays open when the last connection has gone."""
    path, before = str(quick_path / "a.sqlite"), open_files()
    db = connect(path)
    db.execute("CREATE TABLE t (x)")
    db.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,) for _ in range(3000)])  # more than one piece
    plain = file_digest(path)
    first = open_files()
    assert [database_digest(path) for _ in range(5)] == [plain] * 5
    assert open_files() == first + 1  # one descriptor, shared
    copy_database(path, path + ".copy")
    assert file_digest(path + ".copy") == plain
    db.close()
    db.close()
    assert open_files() == before
    assert database_digest(path) == plain
    assert open_files() == before
    assert not connections._files


def test_files_are_told_apart_by_what_they_are_not_by_name(quick_path):
    """Another name of an open file is that file; another file of the same name is not."""
    path = str(quick_path / "a.sqlite")
    db = connect(path)
    db.execute("CREATE TABLE t (x)")
    os.link(path, path + ".link")
    descriptors = open_files()
    assert database_digest(path + ".link") == file_digest(path)
    assert open_files() == descriptors + 1  # kept: closing it would unlock the other name
    os.replace(path, path + ".old")
    other = connect(path)
    other.execute("CREATE TABLE other (y)")
    assert database_digest(path) == file_digest(path) != database_digest(path + ".old")
    other.close()
    db.close()
    assert not connections._files


def test_a_file_that_cannot_be_opened_is_not_counted(quick_path):
    """An error leaves nothing behind."""
    with pytest.raises(FileNotFoundError):
        database_digest(str(quick_path / "none"))
    assert not connections._files
