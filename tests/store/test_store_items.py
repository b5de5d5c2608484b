"""What an item keeps, takes over and is called when a batch changes it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import create, numbers, skip, source, stamp, unit, upsert

from mmsearch.store import Batch, Move, Upsert

FACTS = {"width": 640, "height": 480, "taken_at": "2020-05-06T07:08:09", "note": "first of 12 frames"}


@pytest.fixture
def store(quick_path):
    with create(quick_path / "index") as opened:
        yield opened


def named(name: str, wanted: str | None = None, **kwargs) -> Upsert:
    return Upsert(source(name), image_vector=unit(1), id=wanted, **kwargs)


def facts_of(store, name: str) -> dict[str, object]:
    with store.snapshot() as snapshot:
        columns = ", ".join(("hash", *FACTS))
        (row,) = snapshot.execute(f"SELECT {columns} FROM items WHERE name = ?", (name.encode(),))
    return dict(zip(("hash", *FACTS), row, strict=True))


def ids_of(store) -> dict[str, str]:
    with store.snapshot() as snapshot:
        return {known.name: known.id for known in snapshot.items(state=None)}


def test_new_texts_erase_nothing_that_is_known_of_the_picture(store):
    """Hash, size, time and note stay with the kept picture; captions, metadata and stamp are the new ones."""
    store.commit(Batch(upserts=[replace(upsert("a", 7), **FACTS)]))
    before = facts_of(store, "a")
    new = source("a", captions=["new"], at=stamp(7), album="x")
    store.commit(Batch(upserts=[Upsert(new, keep_image=True, text_vectors=unit(3)[None])]))
    assert facts_of(store, "a") == before == {"hash": (7).to_bytes(16, "little"), **FACTS}
    known = store.find("/photos", "a")
    assert (known.captions, known.metadata, known.stamp) == (("new",), {"album": "x"}, stamp(7))
    assert store.find_copy((7).to_bytes(16, "little")).name == "a"


@pytest.mark.parametrize("fact", [{"width": 1}, {"height": 2}, {"taken_at": "1999"}, {"note": "n"}])
def test_a_fact_that_is_given_replaces_the_one_that_was_kept_or_copied(store, fact):
    """One by one."""
    store.commit(Batch(upserts=[replace(upsert("a", 7), **FACTS)]))
    store.commit(Batch(upserts=[Upsert(source("b"), image_from=numbers(store)["a"], **fact)]))
    store.commit(Batch(upserts=[Upsert(source("a"), keep_image=True, content_hash=b"h" * 16, **fact)]))
    assert facts_of(store, "a") == {"hash": b"h" * 16, **FACTS, **fact}
    assert facts_of(store, "b") == {"hash": None, **FACTS, **fact}


def test_a_copy_takes_over_what_is_known_of_the_picture(store):
    """As it was before the batch, also when the other item is replaced or removed by it."""
    other = {"width": 1, "height": 2, "taken_at": None, "note": ""}
    store.commit(Batch(upserts=[replace(upsert("a", 7), **FACTS), replace(upsert("b", 8), **other)]))
    n = numbers(store)
    swapped = [Upsert(source("a"), image_from=n["b"], content_hash=b"8"), Upsert(source("b"), image_from=n["a"])]
    store.commit(Batch(upserts=swapped))
    assert facts_of(store, "a") == {"hash": b"8", **other}
    assert facts_of(store, "b") == {"hash": None, **FACTS}
    store.commit(Batch(removals=[n["b"]], upserts=[Upsert(source("c"), image_from=n["b"])]))
    assert facts_of(store, "c") == {"hash": None, **FACTS}


@pytest.mark.parametrize("now", [upsert("a", 8), Upsert(source("a", captions=["t"]), text_vectors=unit(1)[None])])
def test_another_picture_or_none_keeps_nothing_of_the_old_one(store, now):
    """What was known of it is not true any more."""
    store.commit(Batch(upserts=[replace(upsert("a", 7), **FACTS)]))
    store.commit(Batch(upserts=[now]))
    assert facts_of(store, "a") == {"hash": now.content_hash, **dict.fromkeys(FACTS), "note": ""}


def test_an_id_that_a_table_changed_is_changed(store):
    """With the same rows; without one it stays, also through other changes."""
    store.commit(Batch(upserts=[named("a"), named("b", "two")]))
    number, first = numbers(store), ids_of(store)
    store.commit(Batch(upserts=[Upsert(source("a"), keep_image=True, id="one")]))
    assert ids_of(store) == {"a": "one", "b": "two"} != first
    store.commit(Batch(upserts=[Upsert(source("a"), keep_image=True), named("b", "")]))
    store.commit(Batch(moves=[Move(number["a"], source("c"))], skips=[skip("b")]))
    assert ids_of(store) == {"c": "one", "b": "two"}
    assert numbers(store) == {"c": number["a"], "b": number["b"]}
    assert store.verify() == []


def test_an_id_that_another_item_keeps_is_not_taken(store):
    """Nor by a new item; who asks for it keeps its own."""
    store.commit(Batch(upserts=[named("a", "1"), named("b", "2")]))
    store.commit(Batch(upserts=[named("a", "2"), named("c", "1")]))
    ids = ids_of(store)
    assert (ids["a"], ids["b"]) == ("1", "2")
    assert len(ids["c"]) == 16
    store.commit(Batch(removals=[numbers(store)["b"]], upserts=[named("a", "2"), named("c", "1")]))
    assert ids_of(store) == {"a": "2", "c": "1"}


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ({"x": "2", "y": "1"}, {"x": "2", "y": "1", "z": "3"}),
        ({"x": "2", "y": "3", "z": "1"}, {"x": "2", "y": "3", "z": "1"}),
        ({"x": "2", "y": "3", "z": "4"}, {"x": "2", "y": "3", "z": "4"}),
        ({"x": "2", "y": "3"}, {"x": "1", "y": "2", "z": "3"}),
        ({"x": "2", "y": "3", "z": None}, {"x": "1", "y": "2", "z": "3"}),
        ({"x": "2", "y": "2"}, {"x": "1", "y": "2", "z": "3"}),
        ({"x": "4", "y": "4", "z": "2"}, {"x": "4", "y": "2", "z": "3"}),
        ({"x": "2", "y": "1", "z": "1"}, {"x": "2", "y": "1", "z": "3"}),
        ({"x": "2", "y": "4", "new": "1"}, {"x": "2", "y": "4", "z": "3", "new": "1"}),
    ],
)
def test_ids_may_be_swapped_and_shifted_within_a_batch(store, asked, right):
    """Who cannot have the new one keeps the old one; of two that ask for one id the first gets it."""
    store.commit(Batch(upserts=[named("x", "1"), named("y", "2"), named("z", "3")]))
    number = numbers(store)
    store.commit(Batch(upserts=[named(name, wanted) for name, wanted in asked.items()]))
    assert ids_of(store) == right
    assert number.items() <= numbers(store).items()
    assert store.verify() == []


NAMES = st.sampled_from("abcde")
ASKED = st.dictionaries(NAMES, st.sampled_from(["1", "2", "3", "4", "5", "6", None]), max_size=5)


def by_trial(before: dict[str, str], asked: dict[str, str | None]) -> dict[str, str]:
    """The ids afterwards, the slow way: everybody gets what it asks for, then one that collides gives way."""
    wanted: dict[str, str] = {}
    for name, new in asked.items():
        if new is not None and new != before[name] and new not in wanted.values():
            wanted[name] = new
    while True:
        after = {**before, **wanted}
        kept = {after[name] for name in after if name not in wanted}
        losers = [name for name in wanted if wanted[name] in kept]
        if not losers:
            return after
        del wanted[losers[0]]


@settings(max_examples=60, deadline=None)
@given(before=st.permutations("12345"), history=st.lists(ASKED, min_size=1, max_size=3))
def test_any_ids_asked_for_end_as_by_trial(before, history):
    """Every batch against a loop that tries; ids are one each."""
    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="mmsearch-test-", dir=shared if shared.is_dir() else None)
    try:
        with create(Path(folder, "index")) as store:
            store.commit(Batch(upserts=[named(name, public) for name, public in zip("abcde", before, strict=True)]))
            right = ids_of(store)
            for asked in history:
                store.commit(Batch(upserts=[named(name, wanted) for name, wanted in asked.items()]))
                right = by_trial(right, asked)
                assert ids_of(store) == right
                assert len(set(right.values())) == 5
    finally:
        shutil.rmtree(folder)
