"""From rows to the content of their pictures, and all pictures by content."""

from store_kit import Batch, IndexStore, create, make_index, numbers, source, upsert

from mmsearch.types import Modality


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_rows_lead_to_the_content_of_their_pictures(quick_path):
    """In the order asked for, twice if asked twice; captions to their item's picture, rows that are dead to None."""
    path = make_index(quick_path / "index", 3, captions=1)
    with IndexStore.open(path, write=True) as store:
        store.commit(Batch(removals=[numbers(store)["p1"]]))
        with store.snapshot() as snapshot:
            rows = {k.name: {m: int(snapshot.rows_of(k.id, m)[0]) for m in Modality} for k in snapshot.items()}
            p0, p2 = rows["p0"], rows["p2"]
            wanted = [p2[Modality.IMAGE], p0[Modality.TEXT], 1, p2[Modality.IMAGE], p0[Modality.IMAGE], 10_000]
            assert snapshot.content_hashes(wanted) == [key(2), key(0), None, key(2), key(0), None]
            assert snapshot.content_hashes([]) == []


def test_pictures_come_by_content_with_their_copies_together(quick_path, monkeypatch):
    """Page by page, each item once; texts alone, skipped and removed ones are not among them."""
    from mmsearch.store import snapshot as module

    monkeypatch.setattr(module, "_PAGE", 2)
    with create(quick_path / "index") as store:
        ups = [upsert(f"p{i}", i % 3, captions=["x"]) for i in range(7)]
        words = upsert("words", 9, captions=["only words"])
        words = type(words)(
            source=type(words.source)("/t", "words", None, None, ("only words",)), text_vectors=words.text_vectors
        )
        store.commit(Batch(upserts=[*ups, words]))
        store.commit(Batch(removals=[numbers(store)["p4"]]))
        with store.snapshot() as snapshot:
            found = list(snapshot.pictures())
    assert [k for k, _ in found] == [key(n) for n in (0, 0, 0, 1, 2, 2)]
    assert sorted(p for _, p in found) == [source(f"p{i}").path for i in (0, 1, 2, 3, 5, 6)]
