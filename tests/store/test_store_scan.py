"""What a scan says of each file: new, changed, suspect, same, gone."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from store_kit import LONG_AGO, create, numbers, skip, source, stamp, unit, upsert

from mmsearch.errors import UsageError
from mmsearch.store import Batch, ChangeKind, Move, Touch, Upsert
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


PASSING = {SkipReason.VANISHED, SkipReason.CHANGING, SkipReason.OUT_OF_MEMORY, SkipReason.UNREADABLE}


@pytest.mark.parametrize("retry", [(), {SkipReason.TOO_LARGE}, [SkipReason.TIMEOUT, SkipReason.BAD_ROW], SkipReason])
def test_skips_are_tried_again_when_their_reason_may_be_gone(store, retry):
    """Always when it passes by itself (rights, an I/O error), else when the build's settings say so."""
    store.commit(Batch(skips=[skip(reason.name, reason) for reason in SkipReason], upserts=[upsert("fine", 1)]))
    store.begin_scan()
    store.seen([source(reason.name) for reason in SkipReason] + [source("fine")])
    found = {c.source.name: c.kind for c in store.changes(scanned_roots=[ROOT], retry=retry)}
    again = {name for name, kind in found.items() if kind is ChangeKind.CHANGED}
    assert again == {reason.name for reason in PASSING | set(retry)}
    assert {found[name] for name in found.keys() - again} == {ChangeKind.UNCHANGED}
    gone = list(store.changes(scanned_roots=[ROOT], retry=retry))
    assert len(gone) == len(SkipReason) + 1


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
            moved = n[f"old{2000 + len(told) - 1:04}"]
            store.commit(Batch(moves=[Move(moved, change.source)]))
    assert len(told) == len(set(told)) == 1500 + 2000 + 200
    kinds = [kind for kind, _ in told]
    assert (kinds.count(ChangeKind.NEW), kinds.count(ChangeKind.GONE)) == (1500, 200)


def test_what_was_seen_and_what_content_is_known_can_be_asked(store):
    """One by one, or whether there is any at all."""
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


def digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_a_moved_item_is_looked_for_among_those_that_were_not_found(store):
    """With a picture, of that content; not those found, skipped, text only, or moved since."""
    text = Upsert(source("text", captions=["t"]), content_hash=digest(1), text_vectors=unit(5)[None])
    bad = replace(skip("bad"), content_hash=digest(1))
    store.commit(Batch(upserts=[upsert(n, 1) for n in "abcd"] + [upsert("e", 2), text], skips=[bad]))
    store.begin_scan()
    store.seen([source("a"), source("new1"), source("new2")])
    assert [known.name for known in store.find_moved(digest(1))] == ["b", "c", "d"]
    assert [known.name for known in store.find_moved(digest(2))] == ["e"]
    assert store.find_moved(digest(3)) == []
    n = numbers(store)
    assert [known.name for known in store.find_moved(digest(1), after=n["b"])] == ["c", "d"]
    store.commit(Batch(moves=[Move(n["b"], source("new1"))], removals=[n["c"]], upserts=[upsert("new2", 1)]))
    assert [known.name for known in store.find_moved(digest(1))] == ["d"]
    store.commit(Batch(upserts=[upsert("d", 7)]))
    assert store.find_moved(digest(1)) == []
    store.begin_scan()
    assert [known.name for known in store.find_moved(digest(1))] == ["a", "new1", "new2"]


def test_any_number_of_moved_duplicates_is_found_sixteen_at_a_time(store):
    """Going on after the last one taken, although nothing of it is committed yet."""
    store.commit(Batch(upserts=[upsert(f"old{i:02}", 1) for i in range(40)]))
    store.begin_scan()
    store.seen([source("old03")])
    found, after = [], 0
    while some := store.find_moved(digest(1), after=after):
        assert len(some) <= 16
        found += [known.name for known in some]
        after = some[-1].item
    assert found == [f"old{i:02}" for i in range(40) if i != 3]
    assert [known.name for known in store.find_moved(digest(1))] == found[:16]


def test_a_copy_is_made_of_any_item_with_a_picture(store):
    """Found or not; not of a skipped one, nor of texts."""
    text = Upsert(source("text", captions=["t"]), content_hash=digest(2), text_vectors=unit(5)[None])
    store.commit(Batch(upserts=[upsert("a", 1), text], skips=[replace(skip("bad"), content_hash=digest(3))]))
    assert store.find_copy(digest(1)).name == "a"
    assert [store.find_copy(digest(number)) for number in (2, 3, 4)] == [None, None, None]
    store.commit(Batch(skips=[skip("a")]))
    assert store.find_copy(digest(1)) is None


def steps(store, work) -> int:
    """How many hundreds of SQLite's steps `work` takes."""
    counted = []
    store._writing().db.set_progress_handler(lambda: counted.append(1), 100)
    work()
    store._writing().db.set_progress_handler(None, 100)
    return len(counted)


@pytest.mark.parametrize("kind", ["found", "moved", "skipped"])
def test_a_look_for_content_costs_the_same_however_many_duplicates_there_are(store, kind):
    """Found ones, ones that moved meanwhile, skipped ones: counted in SQLite's own steps."""
    names = [f"n{i:04}" for i in range(3000)]
    if kind == "skipped":
        store.commit(Batch(skips=[replace(skip(name), content_hash=digest(1)) for name in names]))
    else:
        store.commit(Batch(upserts=[upsert(name, 1) for name in names]))
    store.begin_scan()
    if kind != "skipped":
        store.seen(source(f"m{name}" if kind == "moved" else name) for name in names)
    first = steps(store, lambda: store.find_moved(digest(1)))
    assert (first < 20) if kind == "skipped" else (first > 100)
    if kind == "moved":
        n = numbers(store)
        store.commit(Batch(moves=[Move(n[name], source(f"m{name}")) for name in names[:2000]]))
        assert store.find_moved(digest(1))[0].item == n[names[2000]]
    assert steps(store, lambda: store.find_moved(digest(1))) < 20
    assert steps(store, lambda: store.find_moved(digest(1), after=1500)) < 20
    assert steps(store, lambda: store.find_copy(digest(1))) < 5
    assert steps(store, lambda: store.known_size(100)) < 5
    assert steps(store, lambda: store.known_size(101)) < 5


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
