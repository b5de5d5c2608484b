"""One writer, any number of readers, and places where nothing can be written."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from store_kit import Batch, IndexStore, PlainDerived, create, in_child, make_index, numbers, state_of, unit, upsert

from mmsearch.errors import IndexDamagedError, IndexLockedError, ResourceError, StoreError, UsageError
from mmsearch.types import Modality


def test_a_second_writer_is_told_who_and_since_when(quick_path):
    """In the same process or another; readers are not disturbed."""
    path = make_index(quick_path / "index")
    with IndexStore.open(path, write=True):
        with pytest.raises(IndexLockedError, match=rf"pid {os.getpid()} since \d{{4}}-\d\d-\d\dT") as caught:
            IndexStore.open(path, write=True)
        assert caught.value.exit_code == 6

        def other(tell):
            try:
                IndexStore.open(path, write=True)
            except IndexLockedError as error:
                tell(str(os.getppid()) in str(error))

        assert in_child(other)[1] == ["True"]
        assert len(state_of(path)) == 4
    IndexStore.open(path, write=True).close()
    assert not os.path.exists(os.path.join(path, "lock.json"))


def test_the_lock_of_a_dead_writer_is_free(quick_path):
    """Its note is still there, its process is not."""
    path = make_index(quick_path / "index")

    def die(tell):
        IndexStore.open(path, write=True)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(die)[0]) == signal.SIGKILL
    assert os.path.exists(os.path.join(path, "lock.json"))
    IndexStore.open(path, write=True).close()


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": "x"}', "x" * 100_000])
def test_a_broken_lock_note_changes_nothing(quick_path, note):
    """The lock counts, the note is for people."""
    path = make_index(quick_path / "index")
    with IndexStore.open(path, write=True):
        Path(path, "lock.json").write_text(note)
        with pytest.raises(IndexLockedError, match="another process"):
            IndexStore.open(path, write=True)


def test_a_failed_opening_gives_the_lock_back(quick_path):
    """Refused for damage, the next try is not refused for a lock."""
    path = make_index(quick_path / "index")
    rows = Path(path, "vectors.f16").read_bytes()
    Path(path, "vectors.f16").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(IndexDamagedError):
            IndexStore.open(path, write=True)
    Path(path, "vectors.f16").write_bytes(rows)
    IndexStore.open(path, write=True).close()


def test_a_snapshot_sees_one_generation_whatever_happens_meanwhile(quick_path):
    """Commits, removals, compaction and the removal of the file it has mapped."""
    path = make_index(quick_path / "index", 50)
    before = state_of(path)
    reader = IndexStore.open(path)
    with reader.snapshot() as old, IndexStore.open(path, write=True) as writer:
        rows = old.alive_rows(Modality.IMAGE)
        names = [one.item.path for one in old.locate(rows)]
        vectors = old.vectors(rows)
        n = numbers(writer)
        writer.commit(Batch(removals=[n[f"p{i}"] for i in range(40)], upserts=[upsert("p45", 1)]))
        assert writer.compact(share=0.0, at_least=1)
        writer.update_derived(PlainDerived())
        writer.commit(Batch(upserts=[upsert("new", 2)]))
        assert old.alive_rows(Modality.IMAGE).tolist() == rows.tolist()
        assert [one.item.path for one in old.locate(rows)] == names
        assert (old.vectors(rows) == vectors).all()
        assert len(list(old.items())) == len(before)
        with reader.snapshot() as new:
            assert new.generation == old.generation + 3
            assert len(list(new.items())) == 11
        assert reader.generation == writer.generation


def test_readers_beside_a_busy_writer_never_see_half_a_batch(quick_path):
    """Each batch replaces three items together; every snapshot finds all three of one batch."""
    path = str(quick_path / "index")
    with create(path) as store:
        store.commit(Batch(upserts=[upsert(name, 1) for name in "abc"]))
        store.finish()
    stop, wrong, seen = threading.Event(), [], set()

    def read():
        try:
            with IndexStore.open(path) as store:
                while not stop.is_set():
                    with store.snapshot() as snapshot:
                        rows = [int(snapshot.rows_of(k.id, Modality.IMAGE)[0]) for k in snapshot.items()]
                        vectors = snapshot.vectors(rows)
                        located = [one.item.id for one in snapshot.locate(rows)]
                        seen.add(snapshot.generation)
                        if len(set(located)) != 3 or (vectors != vectors[0]).any():
                            wrong.append(snapshot.generation)
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the test
            wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    with IndexStore.open(path, write=True) as writer:
        until = time.monotonic() + 2
        number = 0
        while time.monotonic() < until:
            number += 1
            writer.commit(Batch(upserts=[upsert(name, number) for name in "abc"]))
            if number % 5 == 0:
                writer.update_derived(PlainDerived())
            if number % 7 == 0:
                writer.compact(share=0.1, at_least=1)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert len(seen) > 5


def test_one_snapshot_serves_many_threads(quick_path):
    """Searches of a server share it."""
    path = make_index(quick_path / "index", 100)
    wrong = []
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)

        def ask(start):
            for _ in range(50):
                some = rows[start : start + 10]
                if [one.row for one in snapshot.locate(some)] != some.tolist():
                    wrong.append(start)

        threads = [threading.Thread(target=ask, args=(10 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_reading_leaves_the_folder_as_it_was(quick_path):
    """No side files of SQLite stay behind, and not a byte changes."""
    path = make_index(quick_path / "index")
    before = {p.name: p.read_bytes() for p in Path(path).iterdir() if p.is_file()}
    state_of(path)
    assert {p.name: p.read_bytes() for p in Path(path).iterdir() if p.is_file()} == before


READ = """
import sys
from store_kit import state_of, IndexStore, Batch, upsert
from mmsearch.errors import MmsearchError
print(sorted(state_of(sys.argv[1])))
print(IndexStore.open(sys.argv[1]).verify())
try:
    IndexStore.open(sys.argv[1], write=True)
except MmsearchError as error:
    print(type(error).__name__, error.exit_code)
"""


def as_nobody(script: str, path: str) -> list[str]:
    """Lines printed by a process that has no right to write there."""
    here = Path(__file__).resolve().parent
    drop = "import os\nif os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    # That user may not be allowed to read where Python is: everything is imported before rights are given up.
    imports = "import store_kit, tempfile\nwith tempfile.TemporaryDirectory() as t:\n"
    imports += "    store_kit.state_of(store_kit.make_index(t + '/i'))\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + drop + script, path],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def open_place():
    """A folder whose path anybody may walk."""
    folder = Path(tempfile.mkdtemp(prefix="mmsearch-test-"))
    folder.chmod(0o755)
    yield folder
    for entry in [folder, *folder.rglob("*")]:
        if entry.is_dir():
            entry.chmod(0o755)
    shutil.rmtree(folder)


def forbid_writing(path: str) -> None:
    for entry in [*Path(path).rglob("*"), Path(path)]:
        entry.chmod(0o555 if entry.is_dir() else 0o444)


def test_an_index_that_may_not_be_written_to_can_be_searched(open_place):
    """Closed properly by its last writer: no log is needed."""
    path = make_index(open_place / "index")
    forbid_writing(path)
    lines = as_nobody(READ, path)
    assert lines[0] == "['p0', 'p1', 'p2', 'p3']"
    assert lines[1] == "[]"
    assert lines[2].startswith("StoreError")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o555


def test_an_index_left_by_a_killed_writer_on_a_read_only_disk_can_be_searched(open_place):
    """With a log full of commits, its index file gone or not."""
    for keep in (True, False):
        path = make_index(open_place / f"index{keep}")

        def die(tell, path=path):
            store = IndexStore.open(path, write=True)
            store.commit(Batch(upserts=[upsert("late", 1)]))
            os.kill(os.getpid(), signal.SIGKILL)

        in_child(die)
        assert os.path.getsize(os.path.join(path, "items.sqlite-wal")) > 0
        if not keep:
            os.unlink(os.path.join(path, "items.sqlite-shm"))
        forbid_writing(path)
        lines = as_nobody(READ, path)
        assert lines[:2] == ["['late', 'p0', 'p1', 'p2', 'p3']", "[]"]


def test_a_file_system_without_locks_is_named(quick_path, monkeypatch):
    """Rather than writing without one."""
    import errno

    from filelock import FileLock

    path = make_index(quick_path / "index")

    def refuse(self, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match="file locks"):
        IndexStore.open(path, write=True)
    assert len(state_of(path)) == 4


def test_a_reader_that_finds_its_vector_file_compacted_away_begins_again(quick_path):
    """Between reading the name and mapping the file."""
    path = make_index(quick_path / "index", 20)

    from mmsearch.store import snapshot as module

    real, calls = module.VectorFile, []

    def slow(file, **kwargs):
        if not calls:
            calls.append(file)
            with IndexStore.open(path, write=True) as writer:
                writer.commit(Batch(removals=[1]))
                assert writer.compact(share=0.0, at_least=1)
        return real(file, **kwargs)

    with IndexStore.open(path) as store:
        module.VectorFile = slow
        try:
            with store.snapshot() as snapshot:
                assert len(list(snapshot.items())) == 19
        finally:
            module.VectorFile = real
    assert len(calls) == 1


def test_an_error_of_the_system_at_opening_is_one_of_ours(quick_path):
    """No descriptors left: a clear sentence, not a traceback of SQLite's."""
    path = make_index(quick_path / "index")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # whatever is open stays so, and leaves no gap to use
    try:
        with pytest.raises((ResourceError, StoreError, UsageError)):
            IndexStore.open(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(state_of(path)) == 4
    assert unit(1).shape == (8,)


def test_scattered_rows_are_all_rows_also_when_the_file_has_gone(quick_path):
    """What candidates are scored with: the rows by their numbers, whatever a writer does meanwhile."""
    path = make_index(quick_path / "index", 6)
    with (
        IndexStore.open(path) as store,
        store.snapshot() as snapshot,
        store.snapshot() as late,
        store.snapshot() as last,
    ):
        rows = snapshot.block(0, snapshot.row_count).copy()
        early = snapshot.scattered()
        assert np.array_equal(early, rows)
        assert not early.flags.writeable
        with IndexStore.open(path, write=True) as writer:
            writer.commit(Batch(removals=[numbers(writer)["p1"]]))
            assert writer.compact(share=0.0, at_least=1)
        assert not os.path.exists(snapshot.vectors_path)
        assert np.array_equal(early, rows)
        assert np.array_equal(snapshot.scattered(), rows)
        assert np.array_equal(late.scattered(), rows)  # asked for the first time
        Path(last.vectors_path).write_bytes(bytes(rows.nbytes))
        assert np.array_equal(last.scattered(), rows)  # another file has the name
    with create(quick_path / "empty") as store, store.snapshot() as snapshot:
        assert snapshot.scattered().shape == (0, snapshot.dim)
