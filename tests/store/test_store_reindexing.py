"""A new model put in place: killed, out of space or out of power at any operation, the old index or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_kit import (
    PREPROCESSING,
    CountingDisk,
    DyingDisk,
    FailingDisk,
    PlainDerived,
    PowerLossDisk,
    in_child,
    make_index,
    numbers,
    skip,
    state_of,
    upsert,
)

from mmsearch.errors import IndexDamagedError, ResourceError, UsageError
from mmsearch.store import Batch, IndexStore, Upsert
from mmsearch.store.connections import database_digest
from mmsearch.store.reindexing import Reindexing, abort
from mmsearch.types import Modality, ModelIdentity

NEW = ModelIdentity("new", weights="w2", preprocessing=PREPROCESSING.digest(), dim=4)
AXES = np.eye(4, dtype=np.float32)


def make(path: object, count: int = 4) -> str:
    """An index with all there can be: pictures with captions, a remembered skip, dead rows."""
    path = make_index(path, count)
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(upserts=[upsert("p1", 51, captions=["one", "two"])], skips=[skip("broken")]))
        store.commit(Batch(removals=[numbers(store)["p0"]]))
        store.finish()
    return path


def anew(task, *, content: bytes | None = None) -> Upsert:
    """The item of a task, encoded by the new model: an axis a row."""
    axis = AXES[task.known.item % 4]
    texts = np.stack([axis] * len(task.known.captions)) if task.known.captions else None
    row = None if task.same_picture else axis
    digest = content or task.known.content_hash
    return Upsert(task.source, content_hash=digest, image_vector=row, keep_image=row is None, text_vectors=texts)


def begin(store: IndexStore, model: ModelIdentity = NEW) -> Reindexing:
    return Reindexing.begin(store, model=model, preprocessing=PREPROCESSING, settings={"model": "new"})


def encode(work: Reindexing, *, most: int = 100, tell=lambda what: None) -> int:
    """Encode `most` items, each in a commit of its own; how many there were."""
    done = 0
    for task in work.pending():
        if done == most:
            break
        tell("encode")
        work.fresh.commit(Batch(upserts=[anew(task)]))
        tell("commit")
        done += 1
    return done


def run(path: str, disk=None, tell=lambda what: None) -> None:
    """All that a reindexing does, from wherever the last one stopped."""
    with IndexStore.open(path, write=True, disk=disk) as store:
        new = store
        if not store.model.same_space(NEW):
            with begin(store) as work:
                encode(work, tell=tell)
                new = work.switch(settings={"model": "new"})
        with new:
            new.update_derived(PlainDerived())
            new.finish()


class LosingPower(PowerLossDisk):
    """Second names and renamed folders are lost, too, unless their folder was synced."""

    def step(self, operation, path):
        super().step(operation, path)
        if operation == "link":
            self._undo.setdefault(os.path.dirname(path), []).append(lambda: Path(path).unlink(missing_ok=True))
        elif operation == "rename_dir":
            back = os.path.join(os.path.dirname(path), "reindex")
            self._undo.setdefault(os.path.dirname(path), []).append(
                lambda: os.path.isdir(path) and os.rename(path, back)
            )


@pytest.fixture(scope="module")
def story(quick_base):
    """(path of the index before, its state then and after, operations of the whole work)."""
    base = quick_base / "reindexing"
    start = make(base / "start", 3)
    whole = shutil.copytree(start, base / "whole")
    disk = CountingDisk()
    run(str(whole), disk)
    return start, [state_of(start), state_of(str(whole))], disk.log


def check_recovers(path: str, states: list, told: list[str]) -> int:
    """The old index or the new one; the next run encodes what was not committed. Which of the states it was."""
    after = state_of(path)
    assert after in states, "half of a switch is there"
    with IndexStore.open(path) as store:
        assert store.verify() == []
    again: list[str] = []
    run(path, tell=again.append)
    assert told.count("commit") + again.count("encode") <= 2 + 1, "more than one batch was encoded twice"
    assert state_of(path) == states[1]
    with IndexStore.open(path) as store:
        assert store.verify() == []
    left = {name for name in os.listdir(path) if not name.startswith("vectors")}
    assert left == {"faiss", "items.sqlite", "lock", "manifest.json"}
    assert len(os.listdir(path)) == len(left) + 1
    return states.index(after)


def run_all(story, folder, make_disk, *, only: str = "") -> set[int]:
    start, states, log = story
    seen = set()
    for at in range(1, len(log) + 1):
        if only and log[at - 1][0] != only:
            continue
        path = str(shutil.copytree(start, folder / "run"))
        status, told = in_child(lambda tell, path=path, at=at: run(path, make_disk(at), tell))
        assert os.WTERMSIG(status) == signal.SIGKILL, f"operation {at} did not happen"
        seen.add(check_recovers(path, states, told))
        shutil.rmtree(path)
    return seen


def test_killed_at_any_operation_the_index_is_the_old_or_the_new_one(story, quick_path):
    """SIGKILL before the Nth operation, N = 1..all; running it again finishes and leaves nothing behind."""
    assert len(story[2]) > 30
    assert run_all(story, quick_path, DyingDisk) == {0, 1}


def test_killed_in_the_middle_of_a_write_the_half_is_never_seen(story, quick_path):
    """Half of the Nth write is on the disk when the process dies."""
    run_all(story, quick_path, lambda at: DyingDisk(at, torn=True), only="write")


def test_losing_power_at_any_operation_loses_no_index(story, quick_path):
    """What was not synced is dropped: writes, new names, the second name of the vector file."""
    assert run_all(story, quick_path, LosingPower) == {0, 1}


def test_a_disk_that_refuses_any_operation_leaves_an_index(story, quick_path):
    """The Nth operation fails once with 'no space left': exit code 5, and the next run finishes."""
    start, states, log = story
    for at in range(1, len(log) + 1):
        path = str(shutil.copytree(start, quick_path / "run"))
        with pytest.raises(ResourceError) as caught:
            run(path, FailingDisk(at))
        assert caught.value.exit_code == 5
        check_recovers(path, states, [])
        shutil.rmtree(path)


def test_only_rows_and_model_are_new(quick_path):
    """Numbers, ids, stamps, captions, metadata and skips stay; dead rows are left behind."""
    path = make(quick_path / "index")

    def lines():
        with IndexStore.open(path) as store, store.snapshot() as snapshot:
            return snapshot.execute(
                "SELECT item, id, root, name, path, size, mtime_ns, ctime_ns, read_ns, hash, state, reason, detail,"
                " width, height, taken_at, note, captions, metadata FROM items ORDER BY item"
            )

    before = lines()
    run(path)
    assert lines() == before
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        assert (store.model, store.row_count, len(snapshot.dead_rows(Modality.IMAGE))) == (NEW, 3 + 4, 0)


def test_a_reader_keeps_its_generation_over_the_switch(quick_path):
    """What was opened before goes on answering with the old rows; what is opened after has the new ones."""
    path = make(quick_path / "index")
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)
        before = snapshot.vectors(rows)
        run(path)
        assert np.array_equal(snapshot.vectors(rows), before)
        assert [one.item.id for one in snapshot.locate(rows)]
        with store.snapshot() as newest:
            assert newest.dim == 4


def test_nothing_is_dropped_unasked(quick_path):
    """Items that the nested index lacks keep the switch from happening, unless so many may go; then only they do."""
    path = make(quick_path / "index")
    before = state_of(path)
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        assert (work.left(), encode(work, most=2), work.left(), work.items()) == (3, 2, 1, 3)
        with pytest.raises(UsageError, match="at most 0 items not encoded, got 1"):
            work.switch(settings={})
        assert state_of(path) == before
        work.switch(settings={}, drop=1).close()
    after = state_of(path)
    assert len(after) == len(before) - 1
    assert "broken" in after


def test_changes_between_two_runs_are_found_by_asking_both_databases(quick_path):
    """New content, new captions, a new item, a removed one: just those are pending, and the outdated rows are dead."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store:
        with begin(store) as work:
            encode(work)
        known = numbers(store)
        store.commit(
            Batch(
                removals=[known["p2"]],
                upserts=[
                    upsert("p1", 77, captions=["one", "two"]),
                    Upsert(upsert("p3", 3, captions=["other"]).source, keep_image=True, text_vectors=AXES[:1] @ EIGHT),
                    upsert("new", 9),
                ],
            )
        )
        with begin(store) as work:
            tasks = {task.known.name: task for task in work.pending()}
            assert set(tasks) == {"p1", "p3", "new"}
            assert [tasks[name].same_picture for name in ("p1", "p3", "new")] == [False, True, False]
            encode(work)
            with work.switch(settings={}) as new:
                assert new.verify() == []
    assert set(state_of(path)) == {"p1", "p3", "new", "broken"}


EIGHT = np.eye(8, dtype=np.float32)[:4]


def test_a_changed_file_brings_its_hash_with_its_row(quick_path):
    """The row is of what was read, so the hash must be, too; it counts as done nevertheless."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        for task in work.pending():
            work.fresh.commit(Batch(upserts=[anew(task, content=b"z" * 16 if task.known.name == "p3" else None)]))
        assert work.left() == 0
        with work.switch(settings={}) as new:
            assert [known.name for known in new.find_content(b"z" * 16)] == ["p3"]


def test_without_hard_links_the_rows_are_copied(quick_path):
    """Network and FAT disks: the switch works, the file is the index's own."""

    class WithoutLinks(CountingDisk):
        def step(self, operation, path):
            super().step(operation, path)
            if operation == "link":
                raise OSError(errno.EOPNOTSUPP, "no links here")

    path = make(quick_path / "index")
    run(path, WithoutLinks())
    with IndexStore.open(path) as store:
        assert store.model == NEW
        assert store.verify() == []


def test_damage_in_what_was_encoded_is_found_before_the_switch(quick_path):
    """A flipped byte: verify names the file, the next run encodes that block again, nothing wrong gets in."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        encode(work)
        flip(os.path.join(path, "reindex", "vectors.f16"), 3)
        with pytest.raises(IndexDamagedError, match="not those written"):
            work.switch(settings={})
    with IndexStore.open(path) as store:
        assert [problem.file for problem in store.verify()] == ["reindex/vectors.f16"]
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        assert work.left() == 1
    run(path)
    with IndexStore.open(path) as store:
        assert (store.model, store.verify()) == (NEW, [])


def flip(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


def test_what_was_begun_is_told_and_can_be_given_up(quick_path):
    """`info` says how far it is; `abort` removes it, also when nothing of it can be read."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store:
        with begin(store) as work:
            encode(work, most=2)
        assert store.info()["reindex"]["items"] == 2
    assert abort(path)
    assert not abort(path)
    assert not os.path.exists(os.path.join(path, "reindex"))
    os.makedirs(os.path.join(path, "reindex"))
    Path(path, "reindex", "items.sqlite").write_bytes(b"nothing of ours" * 300)
    with IndexStore.open(path, write=True) as store, pytest.raises(IndexDamagedError, match="--abort"):
        begin(store)
    assert abort(path)
    run(path)


def test_a_nested_index_of_the_index_s_own_model_is_removed_by_the_next_writer(quick_path):
    """What a kill after the switch left behind; also where the index was rebuilt for that model."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        encode(work, most=2)
    IndexStore.replace(path, model=NEW, preprocessing=PREPROCESSING).close()
    assert not os.path.exists(os.path.join(path, "reindex"))


def test_a_link_out_of_the_index_is_not_followed(quick_path):
    """Removing the nested index removes nothing elsewhere."""
    path = make(quick_path / "index")
    other = quick_path / "other"
    other.mkdir()
    (other / "kept").write_text("x")
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        encode(work, most=1)
    os.symlink(other, os.path.join(path, "reindex", "away"))
    assert abort(path)
    assert (other / "kept").exists()


def test_an_index_has_one_model_at_a_time(quick_path):
    """The model that it has already is not begun."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store, pytest.raises(UsageError, match="another model"):
        begin(store, store.model)
    assert not os.path.exists(os.path.join(path, "reindex"))


def test_the_new_rows_are_held_while_the_writer_reads_them(quick_path):
    """`mmsearch info` of another process does not take the log of what grows in the index away."""
    path = make(quick_path / "index")
    with IndexStore.open(path, write=True) as store, begin(store) as work:
        encode(work, most=1)
        items = os.path.join(work.fresh.path, "items.sqlite")
        database_digest(items)
        work.fresh.close()  # as the switch does before its last step
        assert work.left()
        code = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM items'))"
        subprocess.run([sys.executable, "-c", code, items], check=True, capture_output=True)
        assert os.path.exists(items + "-wal")
