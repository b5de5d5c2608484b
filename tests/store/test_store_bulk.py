"""Many new items in one batch: written together, they are what they would be one by one."""

import pytest
from store_kit import create, numbers, state_of, unit, upsert

from mmsearch.errors import UsageError
from mmsearch.store import Batch, IndexStore, Upsert
from mmsearch.store.apply import item_id
from mmsearch.types import Source


def named(name: str, seed: int, public: str | None = None) -> Upsert:
    return Upsert(Source("/r", name, None, None), image_vector=unit(seed), id=public)


def ids(path) -> dict[str, str]:
    """Public id by name."""
    with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
        return {known.name: known.id for known in snapshot.items()}


def test_one_batch_is_what_many_batches_are(tmp_path):
    """Numbers, ids, rows and captions do not depend on how items were put together."""
    upserts = [upsert(f"p{i}", i, captions=[f"c{i}.{j}" for j in range(i % 3)]) for i in range(1200)]
    for name, size in (("one", 1200), ("many", 100)):
        with create(tmp_path / name) as store:
            for start in range(0, 1200, size):
                store.commit(Batch(upserts=upserts[start : start + size]))
            store.finish()
            assert store.verify() == []
    assert state_of(str(tmp_path / "one")) == state_of(str(tmp_path / "many"))
    assert ids(tmp_path / "one") == ids(tmp_path / "many")
    with IndexStore.open(str(tmp_path / "one")) as one, IndexStore.open(str(tmp_path / "many")) as many:
        assert numbers(one) == numbers(many)


def test_new_and_known_items_mix(tmp_path):
    """In one batch some are replaced and some are new; numbers that were given are never given again."""
    with create(tmp_path / "i") as store:
        store.commit(Batch(upserts=[named(f"n{i}", i) for i in range(5)]))
        store.commit(Batch(removals=[5]))
        store.commit(Batch(upserts=[named(f"n{i}", 100 + i) for i in (7, 1, 8, 3)]))
        store.finish()
        assert store.verify() == []
        assert numbers(store) == {"n0": 1, "n1": 2, "n2": 3, "n3": 4, "n7": 6, "n8": 7}
        with store.snapshot() as snapshot:
            rows = {known.name: snapshot.rows_of(known.id, "image") for known in snapshot.items()}
            assert {n: snapshot.vectors(r)[0].round(2).tolist() for n, r in rows.items()} == {
                n: unit(seed).round(2).tolist()
                for n, seed in (("n0", 0), ("n1", 101), ("n2", 2), ("n3", 103), ("n7", 107), ("n8", 108))
            }


def test_ids_that_are_asked_for_are_given_once(tmp_path):
    """Of two that ask for one id the first gets it; one that is taken stays where it is; nobody is left without."""
    with create(tmp_path / "i") as store:
        store.commit(Batch(upserts=[named("old", 0, "taken"), named("plain", 1)]))
        batch = [named("a", 2, "mine"), named("b", 3, "mine"), named("c", 4, "taken"), named("plain", 5, "late")]
        store.commit(Batch(upserts=[*batch, named("d", 6, "late")]))
        store.finish()
    found = ids(tmp_path / "i")
    assert {name: found[name] for name in ("old", "a", "plain")} == {"old": "taken", "a": "mine", "plain": "late"}
    assert all(found[name] == item_id(b"/r", name.encode()) for name in "bcd")


def test_an_id_that_looks_like_a_made_one_disturbs_nobody(tmp_path):
    """A table may bring the very id that would be made for another new item of the batch."""
    clash = item_id(b"/r", b"b")
    with create(tmp_path / "i") as store:
        store.commit(Batch(upserts=[named("a", 0, clash), named("b", 1)]))
        store.finish()
    assert ids(tmp_path / "i") == {"a": clash, "b": item_id(b"/r", b"b", counter=1)}


def test_an_item_twice_in_a_batch_is_refused(tmp_path):
    """Two rows for one picture would both be found; nothing of such a batch is kept."""
    with create(tmp_path / "i") as store:
        with pytest.raises(UsageError, match="one upsert an item"):
            store.commit(Batch(upserts=[named("a", 0), named("b", 1), named("a", 2)]))
        assert numbers(store) == {}


def test_one_bad_vector_among_many_is_named(tmp_path):
    """Checked together, refused by name."""
    with create(tmp_path / "i") as store:
        upserts = [named(f"n{i}", i) for i in range(50)]
        upserts[33] = Upsert(upserts[33].source, image_vector=unit(33) * 2)
        with pytest.raises(UsageError, match=r"n33.*norm 2"):
            store.commit(Batch(upserts=upserts))


def test_facts_are_committed_with_the_rows(tmp_path):
    """What a batch says of the index as a whole is there exactly when its rows are."""
    with create(tmp_path / "i") as store:
        store.commit(Batch(upserts=[named("a", 0)], facts={"told": "1"}))
        with pytest.raises(UsageError):
            store.commit(Batch(upserts=[named("b", 1), named("b", 2)], facts={"told": "2"}))
        with store.snapshot() as snapshot:
            assert snapshot.meta["told"] == "1"
