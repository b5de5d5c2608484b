"""Killed, out of space or out of power at any operation: the old generation or the new one, never a mixture."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
from store_kit import (
    CountingDisk,
    DyingDisk,
    FailingDisk,
    PlainDerived,
    PowerLossDisk,
    create,
    in_child,
    make_index,
    numbers,
    skip,
    source,
    state_of,
    upsert,
)

from mmsearch.errors import ResourceError
from mmsearch.store import Batch, IndexStore, Move, Upsert


def first_batch(store: IndexStore) -> Batch:
    known = numbers(store)
    return Batch(
        removals=[known["p0"]],
        moves=[Move(known["p1"], source("moved"))],
        upserts=[upsert("p2", 70, captions=["other"]), upsert("new", 71, captions=["one", "two"])],
        skips=[skip("p3")],
    )


def second_batch(store: IndexStore) -> Batch:
    copy = Upsert(source("copy"), content_hash=b"c" * 16, image_from=numbers(store)["p2"])
    return Batch(upserts=[upsert("new", 72), copy, upsert("last", 73, captions=["x"])])


def work(path: str, disk=None, tell=lambda what: None) -> None:
    """Everything a build does, in eight durable steps or so."""
    with IndexStore.open(path, write=True, disk=disk) as store:
        for number, make in enumerate((first_batch, second_batch), 1):
            store.commit(make(store))
            tell(number)
        store.update_derived(PlainDerived())
        store.compact(share=0.0, at_least=1)
        store.update_derived(PlainDerived())
        store.finish()
        tell(9)


@pytest.fixture(scope="module")
def story(quick_base):
    """(path of the index before, its states after 0, 1 and 2 commits, operations of the whole work)."""
    base = quick_base / "story"
    start = make_index(base / "start", 6)
    path = shutil.copytree(start, base / "run")
    states = [state_of(str(path))]
    with IndexStore.open(str(path), write=True) as store:
        for make in (first_batch, second_batch):
            store.commit(make(store))
            states.append(state_of(str(path)))
    whole = shutil.copytree(start, base / "whole")
    disk = CountingDisk()
    work(str(whole), disk)
    assert state_of(str(whole)) == states[2]
    return start, states, disk.log


def check_recovers(path: str, states: list, told: list[str]) -> None:
    committed = min(max([int(n) for n in told], default=0), 2)
    after = state_of(path)
    assert after in states[committed:], "a committed batch is lost, or half a batch is there"
    with IndexStore.open(path) as store:
        assert store.verify() == []
    at = states.index(after)
    with IndexStore.open(path, write=True) as store:
        for make in (first_batch, second_batch)[at:]:
            store.commit(make(store))
        store.update_derived(PlainDerived())
        store.finish()
        assert store.verify() == []
    assert state_of(path) == states[2]
    left = {"faiss", "items.sqlite", "lock", "manifest.json"}
    assert {name for name in os.listdir(path) if not name.startswith("vectors")} == left
    assert len([name for name in os.listdir(path) if name.startswith("vectors")]) == 1
    assert len(os.listdir(os.path.join(path, "faiss"))) == 2


def run_all(story, folder, make_disk, *, only: str = "") -> int:
    start, states, log = story
    for at in range(1, len(log) + 1):
        if only and log[at - 1][0] != only:
            continue
        path = str(shutil.copytree(start, folder / "run"))
        status, told = in_child(lambda tell, path=path, at=at: work(path, make_disk(at), tell))
        assert os.WTERMSIG(status) == signal.SIGKILL, f"operation {at} did not happen"
        check_recovers(path, states, told)
        shutil.rmtree(path)
    return len(log)


def test_killed_at_any_operation_the_index_is_its_old_or_its_new_generation(story, quick_path):
    """SIGKILL before the Nth operation, N = 1..all: nothing committed lost, none twice, verify clean, work goes on."""
    assert run_all(story, quick_path, DyingDisk) > 25


def test_killed_in_the_middle_of_a_write_the_half_is_never_seen(story, quick_path):
    """Half of the Nth write is on the disk when the process dies."""
    run_all(story, quick_path, lambda at: DyingDisk(at, torn=True), only="write")


def test_losing_power_at_any_operation_loses_nothing_that_was_committed(story, quick_path):
    """What was not synced is dropped, names included, as by a machine that loses power."""
    run_all(story, quick_path, PowerLossDisk)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_any_operation_leaves_the_index_intact(story, quick_path, code):
    """The Nth operation fails once: exit code 5, the old or new generation whole, and the same store can go on."""
    start, states, log = story
    every = 1 if code == errno.ENOSPC else 7
    for at in range(1, len(log) + 1, every):
        path = str(shutil.copytree(start, quick_path / "run"))
        disk = FailingDisk(at, code)
        with pytest.raises(ResourceError) as caught:
            work(path, disk)
        assert caught.value.exit_code == 5
        if disk.log[-1][0] == "write" and code == errno.ENOSPC:
            assert "bytes free" in caught.value.expected
            assert "bytes free" in caught.value.got
        check_recovers(path, states, [])
        shutil.rmtree(path)


def test_a_store_whose_commit_failed_can_commit_again(quick_path):
    """Also when the failure came after the commit: what is committed is looked up, not remembered."""
    for at in range(1, 5):
        path = str(quick_path / f"index{at}")
        make_index(path, 1)
        disk = FailingDisk(at)
        with IndexStore.open(path, write=True, disk=disk) as store:
            with pytest.raises(ResourceError):
                store.commit(Batch(upserts=[upsert("a", 1)]))
            store.commit(Batch(upserts=[upsert("b", 2)]))
            store.finish()
            assert store.verify() == []
        assert set(state_of(path)) - {"a"} == {"p0", "b"}


def test_a_creation_that_is_killed_leaves_no_index_or_an_empty_one(quick_path):
    """And the next one simply works."""
    disk = CountingDisk()
    create(quick_path / "count", disk=disk).close()
    for at in range(1, len(disk.log) + 1):
        path = str(quick_path / f"index{at}")
        status, _ = in_child(lambda tell, path=path, at=at: create(path, disk=DyingDisk(at)))
        assert os.WTERMSIG(status) == signal.SIGKILL
        if IndexStore.exists(path):
            assert state_of(path) == {}
            with IndexStore.open(path) as store:
                assert store.verify() == []
            store = IndexStore.open(path, write=True)
        else:
            store = create(path)
        with store:
            store.commit(Batch(upserts=[upsert("a", 1)]))
            store.finish()
            assert store.verify() == []
        assert set(state_of(path)) == {"a"}


def test_replacing_the_model_is_one_step(quick_path):
    """Killed before it: the old index, whole. After it: an empty one."""
    start = make_index(quick_path / "start", 3)
    before = state_of(start)

    def work_of(path, disk):
        from store_kit import MODEL, PREPROCESSING

        IndexStore.replace(path, model=MODEL, preprocessing=PREPROCESSING, disk=disk).close()

    disk = CountingDisk()
    work_of(str(shutil.copytree(start, quick_path / "count")), disk)
    outcomes = []
    for at in range(1, len(disk.log) + 1):
        path = str(shutil.copytree(start, quick_path / f"run{at}"))
        in_child(lambda tell, path=path, at=at: work_of(path, DyingDisk(at)))
        outcomes.append(state_of(path))
        with IndexStore.open(path) as store:
            assert store.verify() == []
    assert outcomes == [before] * outcomes.count(before) + [{}] * outcomes.count({})
    assert before in outcomes
    assert {} in outcomes


def test_a_full_database_is_an_error_that_leaves_the_index_intact(quick_path):
    """SQLite's own 'disk is full', made real by a limit on its pages."""
    path = make_index(quick_path / "index", 2)
    before = state_of(path)
    with IndexStore.open(path, write=True) as store:
        db = store._writing().db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ResourceError, match="bytes free"):
            store.commit(Batch(upserts=[upsert(f"n{i}", i, captions=["long " * 2000]) for i in range(50)]))
        assert state_of(path) == before
        db.execute("PRAGMA max_page_count = 1000000")
        store.commit(Batch(upserts=[upsert("n", 1)]))
        store.finish()
        assert store.verify() == []
    assert set(state_of(path)) == {*before, "n"}


def test_a_file_size_limit_of_the_system_is_a_clear_error(quick_path):
    """A real refusal by the kernel (RLIMIT_FSIZE), not an emulated one."""
    path = make_index(quick_path / "index", 2)
    before = state_of(path)
    script = (
        "import resource, signal, sys\n"
        "from store_kit import *\n"
        "from mmsearch.errors import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = IndexStore.open(sys.argv[1], write=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try: store.commit(Batch(upserts=[upsert(f'n{i}', i) for i in range(1000)]))\n"
        "except ResourceError as error: print(error); sys.exit(5)\n"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    paths = os.pathsep.join([here, os.path.dirname(os.path.dirname(here))])
    done = subprocess.run(
        [sys.executable, "-c", script, path], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 5, done.stderr
    assert "file size limit" in done.stdout
    assert state_of(path) == before
