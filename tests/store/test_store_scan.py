"""What a scan says of each file: new, changed, suspect, same, gone."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from store_kit import LONG_AGO, create, numbers, skip, source, stamp, unit, upsert

from mmsearch.errors import UsageError
from mmsearch.store import Batch, ChangeKind, Touch, Upsert
from mmsearch.types import SkipReason, Source

ROOT = "/photos"
OTHER = LONG_AGO + 1


@pytest.fixture
def store(quick_path):
    with create(quick_path / "index") as opened:
        yield opened


def scan(store, *sources, roots=(ROOT,), keep_below=()):
    """Kinds by name of one scan."""
    store.begin_scan()
    store.seen(sources)
    return {
        (change.source or change.known).name: change.kind
        for change in store.changes(scanned_roots=roots, keep_below=keep_below)
    }


def test_a_scan_of_nothing_known_is_all_new(store):
    """In order of root and name, whatever order they came in."""
    store.begin_scan()
    assert store.seen([source("b"), source("a"), source("a"), source("c", root="/an")]) == 3
    found = list(store.changes(scanned_roots=[ROOT]))
    assert [(c.source.root, c.source.name) for c in found] == [("/an", "c"), (ROOT, "a"), (ROOT, "b")]
    assert {c.kind for c in found} == {ChangeKind.NEW}
    assert found[1].source == source("a")


@pytest.mark.parametrize(
    ("now", "kind"),
    [
        (source("a"), ChangeKind.UNCHANGED),
        (source("a", at=stamp(101)), ChangeKind.CHANGED),
        (source("a", at=stamp(mtime=OTHER)), ChangeKind.CHANGED),
        (source("a", at=stamp(mtime=LONG_AGO - 10**18)), ChangeKind.CHANGED),
        (source("a", at=stamp(ctime=OTHER)), ChangeKind.SUSPECT),
        (source("a", captions=["new"]), ChangeKind.TEXT_CHANGED),
        (source("a", album="x"), ChangeKind.TEXT_CHANGED),
        (Source(ROOT, "a", "/elsewhere", stamp()), ChangeKind.CHANGED),
        (Source(ROOT, "a", None, None, ("text",)), ChangeKind.CHANGED),
    ],
)
def test_a_known_file_is_judged_by_its_stamp_and_its_texts(store, now, kind):
    """Size or mtime: changed (also back in time). Only ctime: its hash must tell. Captions or metadata: text."""
    store.commit(Batch(upserts=[upsert("a", 1)]))
    assert scan(store, now) == {"a": kind}


@pytest.mark.parametrize("age_s", [-3600, -1, 0, 1])
def test_a_file_written_about_when_it_was_read_is_suspect_until_seen_again(store, age_s):
    """It may have been written to once more within a clock tick; a time in the future stays suspect."""
    fresh = stamp(mtime=time.time_ns() - age_s * 10**9)
    store.begin_scan()
    store.commit(Batch(upserts=[upsert("a", 1, at=fresh)]))
    assert scan(store, source("a", at=fresh)) == {"a": ChangeKind.SUSPECT}


def test_a_suspect_that_was_checked_later_is_trusted(store):
    """Touching records when it was read."""
    early = stamp(mtime=time.time_ns() - 1_900_000_000)
    store.begin_scan()
    store.commit(Batch(upserts=[upsert("a", 1, at=early)]))
    time.sleep(0.15)
    assert scan(store, source("a", at=early)) == {"a": ChangeKind.SUSPECT}
    store.commit(Batch(touched=[Touch(numbers(store)["a"], early)]))
    assert scan(store, source("a", at=early)) == {"a": ChangeKind.UNCHANGED}


def test_a_change_of_texts_is_told_whatever_else_changed(store):
    """So that nothing is encoded for a file that turns out the same."""
    store.commit(Batch(upserts=[upsert("a", 1), upsert("b", 2)]))
    store.begin_scan()
    store.seen([source("a", at=stamp(7), captions=["x"]), source("b", at=stamp(7))])
    told = {c.source.name: c.text_changed for c in store.changes(scanned_roots=[ROOT])}
    assert told == {"a": True, "b": False}


def test_a_skipped_file_is_not_tried_again_until_it_changes(store):
    """Unless the reason can pass by itself, or its texts changed."""
    store.commit(Batch(skips=[skip("bad"), skip("gone", SkipReason.VANISHED), skip("busy", SkipReason.CHANGING)]))
    assert scan(store, source("bad"), source("gone"), source("busy")) == {
        "bad": ChangeKind.UNCHANGED,
        "gone": ChangeKind.CHANGED,
        "busy": ChangeKind.CHANGED,
    }
    assert scan(store, source("bad", at=stamp(101)))["bad"] is ChangeKind.CHANGED
    assert scan(store, source("bad", at=stamp(ctime=OTHER)))["bad"] is ChangeKind.SUSPECT
    assert scan(store, source("bad", captions=["x"]))["bad"] is ChangeKind.CHANGED


def test_only_items_of_scanned_roots_are_gone(store):
    """An unmounted disk, or a folder that could not be read, loses nothing."""
    names = ["x/a", "x/b", "xy/c", "z"]
    store.commit(Batch(upserts=[upsert(name, i) for i, name in enumerate(names)] + [upsert("m", 9, root="/usb")]))
    assert scan(store, source("z")) == {
        "z": ChangeKind.UNCHANGED,
        **dict.fromkeys(["x/a", "x/b", "xy/c"], ChangeKind.GONE),
    }
    assert scan(store, source("z"), roots=[]) == {"z": ChangeKind.UNCHANGED}
    assert scan(store, source("z"), keep_below=["/photos/x"]) == {"z": ChangeKind.UNCHANGED, "xy/c": ChangeKind.GONE}
    assert scan(store, source("z"), keep_below=["/photos"]) == {"z": ChangeKind.UNCHANGED}
    assert scan(store, roots=[ROOT, "/usb"])["m"] is ChangeKind.GONE


def test_batches_may_be_committed_while_changes_are_read(store):
    """Everything is told exactly once, a moved item is not gone."""
    store.commit(Batch(upserts=[upsert(f"old{i:04}", i % 50) for i in range(2500)]))
    n = numbers(store)
    store.begin_scan()
    store.seen([source(f"old{i:04}") for i in range(2000)] + [source(f"new{i:04}") for i in range(1500)])
    told = []
    for change in store.changes(scanned_roots=[ROOT]):
        told.append((change.kind, (change.source or change.known).name))
        if change.kind is ChangeKind.NEW and len(told) <= 300:
            from mmsearch.store import Move

            moved = n[f"old{2000 + len(told) - 1:04}"]
            store.commit(Batch(moves=[Move(moved, change.source)]))
    assert len(told) == len(set(told)) == 1500 + 2000 + 200
    kinds = [kind for kind, _ in told]
    assert (kinds.count(ChangeKind.NEW), kinds.count(ChangeKind.GONE)) == (1500, 200)


def test_what_was_seen_and_what_content_is_known_can_be_asked(store):
    """For moves and copies without encoding."""
    store.commit(Batch(upserts=[upsert("a", 1, at=stamp(777)), upsert("b", 1), upsert("c", 2)]))
    store.begin_scan()
    store.seen([source("a")])
    same = store.find_content((1).to_bytes(16, "little"))
    assert [known.name for known in same] == ["a", "b"]
    assert [store.was_seen(known) for known in same] == [True, False]
    assert store.find_content(b"nothing") == []
    assert store.known_size(777)
    assert not store.known_size(778)
    assert store.find(ROOT, "c").content_hash == (2).to_bytes(16, "little")
    assert store.find(ROOT, "d") is None


def test_metadata_that_is_no_number_does_not_change_by_itself(store):
    """NaN is not equal to itself, but it is the same text."""
    item = source("a", depth=float("nan"), nested={"b": [1, None], "a": "\ud800"})
    store.commit(Batch(upserts=[Upsert(item, image_vector=unit(1))]))
    assert scan(store, item) == {"a": ChangeKind.UNCHANGED}


def test_changes_before_a_scan_are_refused(store):
    """With what is missing."""
    with pytest.raises(UsageError, match="begin_scan"):
        store.seen([source("a")])


def test_a_scan_streams_in_bounded_memory(store):
    """Twenty thousand files through some hundred kilobytes each way."""
    store.begin_scan()
    tracemalloc.start()
    store.seen(source(f"{i:07}.jpg") for i in range(20_000))
    count = sum(1 for _ in store.changes(scanned_roots=[ROOT]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 6 << 20
    assert np.isfinite(peak)
