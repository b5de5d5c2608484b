"""What a push promises of any engine, told with index directories: several indexes, kinds of vectors, marks."""

import pytest
from engine_kit import entries, entry, make_index, with_settings

from mmsearch.errors import IndexMismatchError
from mmsearch.scale.address import Address
from mmsearch.scale.engine import Items, open_engine
from mmsearch.scale.engine_searcher import EngineSearcher
from mmsearch.scale.local_engine import LocalEngine
from mmsearch.scale.push import push
from mmsearch.store.directory import IndexStore


def test_of_an_id_in_two_indexes_the_first_named_is_pushed(tmp_path):
    """As when both are searched together; a second push of the same changes nothing."""
    first, second = entry("x", 1), entry("x", 2)
    paths = [make_index(tmp_path / "a", [first]), make_index(tmp_path / "b", [second, entry("y", 3)])]
    uri = (tmp_path / "mirror").as_uri()
    report = push(paths, uri)
    assert (report.added, report.changed, report.unchanged) == (2, 0, 0)
    engine = open_engine(uri)
    assert engine.digests(["x"]) == {"x": first.digest()}
    engine.close()


def test_two_kinds_of_item_vectors_are_not_pushed_together(tmp_path):
    """Neither from two indexes, nor into a collection of the other kind."""
    plain = make_index(tmp_path / "a", entries(2))
    fused = with_settings(make_index(tmp_path / "b", []), item_vectors="fused")
    uri = (tmp_path / "mirror").as_uri()
    with pytest.raises(IndexMismatchError, match=r"separate item vectors.*fused"):
        push([plain, fused], uri)
    push(fused, uri)
    with pytest.raises(IndexMismatchError, match=r"fused item vectors.*separate"):
        push(plain, uri)


def test_a_mark_keeps_what_another_writer_noted_meanwhile(tmp_path):
    """Settings are read when the lock is held, not before."""
    path = make_index(tmp_path / "a", [])
    engine = LocalEngine.open(Address.parse((tmp_path / "a").as_uri()))
    with_settings(path, index={"kind": "exact"})
    engine.set_mark("half")
    engine.finish()
    engine.close()
    assert IndexStore.stored_settings(path) == {"index": {"kind": "exact"}, "pushed": "half"}


def test_pictures_at_addresses_are_shown_whatever_is_asked(tmp_path):
    """They are not files of this machine: no search asks the network for them, and none hides them."""
    make_index(tmp_path / "i", [entry("far", 1, path="s3://bucket/far.jpg"), entry("gone", 2)])
    with EngineSearcher.open((tmp_path / "i").as_uri()) as searcher:
        assert [hit.item.id for hit in searcher.search_vector(entry("far", 1).image)] == ["far"]


class Forgets(LocalEngine):
    """A part of it answers searches, and is gone when items are looked up."""

    def fetch(self, ids):
        return Items(missing=("shard b: not there",))


def test_hits_whose_items_cannot_be_looked_up_make_the_answer_partial(tmp_path):
    """They were found: nobody may believe that there was nothing."""
    with EngineSearcher(Forgets(make_index(tmp_path / "i", entries(3)))) as searcher:
        hits = searcher.search_vector(entries(1)[0].image)
    assert not len(hits) and hits.partial
    assert hits.notes == ("partial: shard b: not there",)
