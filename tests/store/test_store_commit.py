"""What a batch does to an index, and what readers get of it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from store_kit import (
    DIM,
    MODEL,
    PREPROCESSING,
    PlainDerived,
    create,
    make_index,
    numbers,
    skip,
    source,
    stamp,
    state_of,
    unit,
    upsert,
)

from mmsearch.errors import IndexMismatchError, IndexNotFoundError, StoreError, UsageError
from mmsearch.store import Batch, IndexStore, ItemState, Move, Touch, Upsert
from mmsearch.store.base import store_class
from mmsearch.types import Modality, ModelIdentity, Source


@pytest.fixture
def store(quick_path):
    with create(quick_path / "index") as opened:
        yield opened


def vectors_of(store: IndexStore, name: str) -> tuple[np.ndarray, np.ndarray]:
    with store.snapshot() as snapshot:
        known = next(k for k in snapshot.items() if k.name == name)
        image, text = (snapshot.vectors(snapshot.rows_of(known.id, m)) for m in Modality)
    return image, text


def test_what_is_committed_comes_back(store):
    """Rows, captions, metadata, sizes and times, by row and by item."""
    item = upsert("a.jpg", 3, captions=["one", "zwei ü \ud800"], album="x", rating=4.5)
    store.commit(Batch(upserts=[item]))
    with store.snapshot() as snapshot:
        (known,) = snapshot.items()
        located = snapshot.locate(snapshot.alive_rows(Modality.TEXT)[::-1])
        image = snapshot.locate(snapshot.alive_rows(Modality.IMAGE))[0]
    assert known.captions == ("one", "zwei ü \ud800")
    assert known.metadata == {"album": "x", "rating": 4.5}
    assert (known.stamp, known.content_hash) == (item.source.stamp, item.content_hash)
    assert (known.root, known.name, known.path) == (item.source.root, "a.jpg", item.source.path)
    assert [one.caption for one in located] == ["zwei ü \ud800", "one"]
    assert (image.modality, image.caption, image.item.id) == (Modality.IMAGE, None, known.id)
    images, texts = vectors_of(store, "a.jpg")
    np.testing.assert_allclose(images[0], unit(3), atol=1e-3)
    np.testing.assert_allclose(texts, [unit(1003), unit(1004)], atol=1e-3)


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", "naïve\n名前\u202e.jpg".encode(), b"x" * 255, b"a'b\"c;--.jpg"])
def test_any_file_name_survives(store, name):
    """Undecodable bytes, newlines, right-to-left marks, the longest name."""
    text = os.fsdecode(name)
    store.commit(Batch(upserts=[upsert(text, 1, captions=["c"])], skips=[skip("s" + text[:-1])]))
    with store.snapshot() as snapshot:
        assert {os.fsencode(k.name) for k in snapshot.items()} == {name}
        assert os.fsencode(snapshot.locate([0])[0].item.path).endswith(name)


def test_an_id_is_sixteen_hex_digits_and_survives_changes_and_moves(store):
    """Made of root and name once; a table may bring its own."""
    store.commit(Batch(upserts=[upsert("a", 1), Upsert(source("b"), image_vector=unit(2), id="row-7")]))
    with store.snapshot() as snapshot:
        ids = {k.name: k.id for k in snapshot.items()}
    assert len(ids["a"]) == 16
    assert int(ids["a"], 16) >= 0
    assert ids["b"] == "row-7"
    store.commit(Batch(upserts=[upsert("a", 5)], moves=[Move(numbers(store)["b"], source("c"))]))
    store.commit(Batch(moves=[Move(numbers(store)["a"], source("d"))]))
    store.commit(Batch(upserts=[upsert("a", 6), Upsert(source("e"), image_vector=unit(2), id="row-7")]))
    with store.snapshot() as snapshot:
        now = {k.name: k.id for k in snapshot.items()}
    assert now["d"] == ids["a"]
    assert now["c"] == "row-7"
    assert len({now[name] for name in "acde"}) == 4


def test_a_replaced_item_has_only_its_new_rows(store):
    """The old rows are dead, found by nobody."""
    store.commit(Batch(upserts=[upsert("a", 1, captions=["x", "y"])]))
    store.commit(Batch(upserts=[upsert("a", 2, captions=["z"])]))
    with store.snapshot() as snapshot:
        assert snapshot.alive_rows(Modality.IMAGE).tolist() == [3]
        assert snapshot.alive_rows(Modality.TEXT).tolist() == [4]
        assert snapshot.dead_rows(Modality.TEXT).tolist() == [1, 2]
        assert (snapshot.count(Modality.IMAGE), snapshot.count(Modality.TEXT)) == (1, 1)
        with pytest.raises(UsageError, match="row"):
            snapshot.locate([0])
    assert store.verify() == []


def test_a_picture_can_be_kept_while_its_texts_change_and_the_other_way_round(store):
    """Nothing is encoded twice."""
    store.commit(Batch(upserts=[upsert("a", 1, captions=["x"])]))
    new_text = Upsert(source("a", captions=["y", "z"]), keep_image=True, text_vectors=np.stack([unit(8), unit(9)]))
    store.commit(Batch(upserts=[new_text]))
    images, texts = vectors_of(store, "a")
    np.testing.assert_allclose(images, [unit(1)], atol=1e-3)
    np.testing.assert_allclose(texts, [unit(8), unit(9)], atol=1e-3)
    store.commit(Batch(upserts=[Upsert(source("a", captions=["y", "z"]), image_vector=unit(2), keep_text=True)]))
    images, texts = vectors_of(store, "a")
    np.testing.assert_allclose(images, [unit(2)], atol=1e-3)
    np.testing.assert_allclose(texts, [unit(8), unit(9)], atol=1e-3)
    assert store.verify() == []


def test_captions_that_could_not_be_embedded_are_left_out_by_position(store):
    """The rows that are there stay with their own captions."""
    texts = Upsert(source("a", captions=["bad", "good"]), text_vectors=unit(5)[None], text_parts=(1,))
    store.commit(Batch(upserts=[texts]))
    with store.snapshot() as snapshot:
        assert snapshot.locate([0])[0].caption == "good"


def test_a_copy_takes_the_row_of_the_item_it_is_a_copy_of(store):
    """Also when that item is replaced or removed by the same batch."""
    store.commit(Batch(upserts=[upsert("a", 1), upsert("b", 2)]))
    n = numbers(store)
    swapped = [Upsert(source("a"), image_from=n["b"]), Upsert(source("b"), image_from=n["a"])]
    store.commit(Batch(upserts=swapped))
    np.testing.assert_allclose(vectors_of(store, "a")[0], [unit(2)], atol=1e-3)
    np.testing.assert_allclose(vectors_of(store, "b")[0], [unit(1)], atol=1e-3)
    store.commit(Batch(removals=[n["a"]], upserts=[Upsert(source("c"), image_from=n["a"])]))
    np.testing.assert_allclose(vectors_of(store, "c")[0], [unit(2)], atol=1e-3)
    assert store.verify() == []


def test_moves_may_swap_names_and_replace_what_was_there(store):
    """Ids and rows go with the item; an item moved onto is gone."""
    store.commit(Batch(upserts=[upsert(name, i) for i, name in enumerate("abc")]))
    n = numbers(store)
    store.commit(Batch(moves=[Move(n["a"], source("b")), Move(n["b"], source("a"))]))
    assert numbers(store) == {"a": n["b"], "b": n["a"], "c": n["c"]}
    store.commit(Batch(moves=[Move(n["a"], source("c"))]))
    assert numbers(store) == {"a": n["b"], "c": n["a"]}
    np.testing.assert_allclose(vectors_of(store, "c")[0], [unit(0)], atol=1e-3)
    with pytest.raises(UsageError, match="move"):
        store.commit(Batch(moves=[Move(999, source("x"))]))
    assert store.verify() == []


def test_an_item_that_can_no_longer_be_read_is_only_remembered(store):
    """Its rows are dead; reason and detail are kept; the next success brings it back."""
    store.commit(Batch(upserts=[upsert("a", 1, captions=["x"])]))
    store.commit(Batch(skips=[skip("a")]))
    with store.snapshot() as snapshot:
        (known,) = snapshot.items(state=ItemState.SKIPPED)
        assert list(snapshot.items()) == []
        assert snapshot.count(Modality.IMAGE) == snapshot.count(Modality.TEXT) == 0
    assert (known.reason, known.detail, known.has_image) == ("truncated", "half of it", False)
    assert store.info()["skipped"] == 1
    store.commit(Batch(upserts=[upsert("a", 2)]))
    assert (store.info()["skipped"], store.info()["items"]) == (0, 1)
    assert store.verify() == []


def test_a_touched_item_only_gets_its_stamp(store):
    """No rows, nothing dead."""
    store.commit(Batch(upserts=[upsert("a", 1)]))
    store.commit(Batch(touched=[Touch(numbers(store)["a"], stamp(7))]))
    with store.snapshot() as snapshot:
        assert next(snapshot.items()).stamp == stamp(7)
        assert snapshot.row_count == 1


@pytest.mark.parametrize(
    "bad",
    [
        Upsert(source("x"), image_vector=np.full(DIM, np.nan, np.float32)),
        Upsert(source("x"), image_vector=unit(1) * 2),
        Upsert(source("x"), image_vector=np.zeros(DIM, np.float32)),
        Upsert(source("x"), image_vector=np.ones(DIM + 1, np.float32) / 3),
        Upsert(source("x"), image_vector=unit(1), keep_image=True),
        Upsert(source("x"), keep_image=True),
        Upsert(source("x"), image_from=12345),
        Upsert(source("x", captions=["a"]), text_vectors=np.stack([unit(1), unit(2)])),
        Upsert(source("x", captions=["a"]), text_vectors=unit(1)[None], text_parts=(1,)),
    ],
)
def test_a_batch_with_anything_wrong_changes_nothing(store, bad):
    """Not even its good items: rows that are no unit rows, copies of nothing, vectors for no caption."""
    store.commit(Batch(upserts=[upsert("a", 1)]))
    before, generation = numbers(store), store.generation
    with pytest.raises(UsageError):
        store.commit(Batch(upserts=[upsert("good", 2), bad]))
    assert (numbers(store), store.generation) == (before, generation)
    store.commit(Batch(upserts=[upsert("b", 3)]))
    assert store.verify() == []


def test_every_commit_is_one_generation_and_an_empty_one_is_none(store):
    """So that readers can tell whether anything happened."""
    assert store.generation == 0
    store.commit(Batch())
    assert store.generation == 0
    store.commit(Batch(upserts=[upsert("a", 1)]))
    assert (store.generation, store.row_count) == (1, 1)


def test_compaction_leaves_out_the_dead_and_nothing_else(quick_path):
    """Same items, same ids, same vectors; the old file goes; pictures come first."""
    path = make_index(quick_path / "index", 40, captions=2)
    with IndexStore.open(path, write=True) as store:
        n = numbers(store)
        store.commit(Batch(removals=[n[f"p{i}"] for i in range(0, 40, 2)], upserts=[upsert("p1", 99)]))
        before = state_of(path)
        assert not store.compact()
        assert not store.compact(share=0.9, at_least=1)
        assert store.compact(share=0.3, at_least=1)
        assert store.verify() == []
        store.update_derived(PlainDerived())
        assert store.verify() == []
        with store.snapshot() as snapshot:
            assert snapshot.ranges(Modality.IMAGE) == [(0, 20)]
            assert len(snapshot.dead_rows(Modality.TEXT)) == 0
        store.commit(Batch(upserts=[upsert("p1", 98), upsert("q", 97)]))
        store.commit(Batch(removals=[numbers(store)["q"]], upserts=[upsert("p1", 99)]))
        assert store.compact(share=0.0, at_least=1)
    assert state_of(path) == before
    assert sorted(os.listdir(path))[-1].startswith("vectors-")
    assert "vectors.f16" not in os.listdir(path)


def test_derived_files_follow_the_rows(quick_path):
    """Written when missing or stale, left alone when nothing changed, their old versions removed."""
    path = make_index(quick_path / "index", 100)
    first = sorted(os.listdir(os.path.join(path, "faiss")))
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(upserts=[upsert("one more", 1)]))
        store.update_derived(PlainDerived())
        assert sorted(os.listdir(os.path.join(path, "faiss"))) == first
        with store.snapshot() as snapshot:
            derived = snapshot.derived(Modality.IMAGE)
            assert (derived.count, derived.rows) == (100, 200)
        store.commit(Batch(upserts=[upsert(f"more{i}", i) for i in range(5)]))
        store.update_derived(PlainDerived())
        with store.snapshot() as snapshot:
            assert snapshot.derived(Modality.IMAGE).count == 106
            assert snapshot.derived(Modality.TEXT).count == 100
        assert len(os.listdir(os.path.join(path, "faiss"))) == 2


def test_an_index_of_another_model_is_refused_with_both_named(quick_path):
    """The name alone does not matter; weights, preprocessing and dimension do."""
    path = make_index(quick_path / "index")
    IndexStore.open(path, model=ModelIdentity("renamed", MODEL.weights, MODEL.preprocessing, DIM)).close()
    for other in (
        ModelIdentity("tiny", "w2", MODEL.preprocessing, DIM),
        ModelIdentity("tiny", "w1", "p2", DIM),
        ModelIdentity("tiny", "w1", MODEL.preprocessing, 9),
    ):
        for write in (False, True):
            with pytest.raises(IndexMismatchError, match=r"w1.*(w2|p2|9)"):
                IndexStore.open(path, model=other, write=write)
    IndexStore.open(path, write=True).close()


def test_what_was_set_at_creation_is_there_at_opening(quick_path):
    """Model, preprocessing (with its tuples) and settings."""
    create(quick_path / "index", settings={"model": "bundled", "n": [1, 2]}).close()
    with IndexStore.open(str(quick_path / "index")) as store:
        assert (store.model, store.preprocessing, store.dim) == (MODEL, PREPROCESSING, DIM)
        assert store.settings == {"model": "bundled", "n": [1, 2]}


def test_an_index_is_made_only_where_nothing_else_is(quick_path):
    """A folder of photos does not become an index by a slip of the hand."""
    (quick_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"photo\.jpg"):
        create(quick_path)
    (quick_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="directory"):
        create(quick_path / "file" / "index")
    path = make_index(quick_path / "a" / "b" / "index")
    with pytest.raises(StoreError, match="no index"):
        create(path)
    assert len(state_of(path)) == 4


def test_where_there_is_no_index_that_is_what_is_said(quick_path):
    """With the way to make one."""
    for path in (quick_path / "nothing", quick_path):
        assert not IndexStore.exists(str(path))
        for write in (False, True):
            with pytest.raises(IndexNotFoundError, match="mmsearch index"):
                IndexStore.open(str(path), write=write)
    assert os.listdir(quick_path) == []


def test_a_store_opened_to_read_refuses_to_write(quick_path):
    """And a closed one as well."""
    path = make_index(quick_path / "index")
    with IndexStore.open(path) as store, pytest.raises(UsageError, match="write=True"):
        store.commit(Batch(upserts=[upsert("a", 1)]))
    store = IndexStore.open(path, write=True)
    store.close()
    with pytest.raises(UsageError, match="write=True"):
        store.finish()
    with IndexStore.open(path) as store:
        snapshot = store.snapshot()
        snapshot.close()
        with pytest.raises(UsageError, match="open"):
            snapshot.alive_rows(Modality.IMAGE)


@pytest.mark.parametrize("count", [0, 1])
def test_an_index_of_nothing_and_of_one_item_has_defined_answers(quick_path, count):
    """No errors, empty arrays of the right shape."""
    path = make_index(quick_path / "index", count, captions=0)
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        assert store.verify() == []
        assert snapshot.alive_rows(Modality.IMAGE).tolist() == list(range(count))
        assert snapshot.vectors(snapshot.alive_rows(Modality.TEXT)).shape == (0, DIM)
        assert snapshot.locate([]) == []
        assert snapshot.rows_of("nobody", Modality.IMAGE).tolist() == []
        assert store.info()["items"] == count
        with pytest.raises(UsageError, match="rows"):
            snapshot.vectors(np.array([count]))


def test_a_table_row_without_a_file_is_an_item_too(store):
    """Text only, no path, no stamp."""
    row = Source("/t.csv", "1", None, None, ("words",))
    store.commit(Batch(upserts=[Upsert(row, text_vectors=unit(4)[None])]))
    with store.snapshot() as snapshot:
        (known,) = snapshot.items()
        assert (known.path, known.stamp, known.has_image) == (None, None, False)


def test_times_beyond_sixty_four_bits_are_stored(store):
    """A file dated after the year 2262."""
    far = stamp(1, mtime=1 << 64, ctime=-(1 << 70))
    store.commit(Batch(upserts=[upsert("a", 1, at=far)]))
    assert store.verify() == []


def test_stores_are_found_by_name():
    """The seam's table."""
    assert store_class() is IndexStore
    with pytest.raises(UsageError, match="directory"):
        store_class("nonsense")
