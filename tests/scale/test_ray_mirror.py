"""Shards behind Ray that are changed: an id that two of them have, pushes that are killed, locks, and who may join."""

import json

import pytest
from engine_kit import entry, make_index, opened, small_ray, unit, with_settings

from mmsearch.errors import IndexMismatchError, StoreError
from mmsearch.scale.push import push
from mmsearch.scale.ray_serve import NAMESPACE, serve
from mmsearch.searcher import Searcher
from mmsearch.store.directory import IndexStore
from mmsearch.types import Modality

pytest.importorskip("ray")
pytestmark = pytest.mark.engines

OLD = [entry(f"e{i:03d}", 900 + i, path=None) for i in range(12)]
NEW = [entry(f"e{i:03d}", i, path=None) for i in range(20)]  # of the same ids, other vectors


@pytest.fixture(scope="module")
def ray():
    with small_ray() as started:
        yield started


@pytest.fixture(scope="module")
def twice(ray, tmp_path_factory):
    """Two indexes that share twelve ids, served as `twice`."""
    folder = tmp_path_factory.mktemp("twice")
    paths = [make_index(folder / "a", OLD), make_index(folder / "b", NEW)]
    serve(paths, "twice")
    return paths


@pytest.mark.parametrize("k", [1, 3, 9, 40])
def test_of_an_id_in_two_shards_the_first_named_shard_answers(twice, k):
    """Scores and items are of one shard, and the hits those of the two directories searched together."""
    with opened("ray://twice") as engine, Searcher.open(twice) as both:
        queries = unit(77, 3) if k > 1 else NEW[3].image[None]  # what stands best in the second shard is hidden
        found = engine.search(queries, k, modality=Modality.IMAGE)
        for number, query in enumerate(queries):
            wanted = [(hit.item.id, round(hit.score, 4)) for hit in both.search_vector(query, k=k)]
            scores = [round(float(score), 4) for score in found.scores[number][: len(found.ids[number])]]
            assert list(zip(found.ids[number], scores, strict=True)) == wanted
        assert engine.fetch(["e003"])["e003"].width == OLD[3].item.width
        assert engine.digests(["e003"]) == {"e003": OLD[3].digest()}


def test_a_change_leaves_an_item_in_one_shard_only(ray, tmp_path):
    """The copy in a later shard would come to light when the first one goes."""
    serve([make_index(tmp_path / "a", OLD), make_index(tmp_path / "b", NEW)], "change")
    with opened("ray://change") as engine:
        engine.upsert([entry("e000", 555)])
        assert engine.count(Modality.IMAGE) == len(OLD) + len(NEW) - 1
        assert engine.digests(["e000"]) == {"e000": entry("e000", 555).digest()}


def test_a_shard_that_does_not_answer_is_missed_when_items_are_looked_up_and_counted(ray, tmp_path):
    """What is fetched says what is missing; a number that would be too small is an error."""
    serve([make_index(tmp_path / "a", NEW[:5]), make_index(tmp_path / "b", NEW[5:])], "half")
    ray.kill(ray.get_actor("half/1", namespace=NAMESPACE), no_restart=True)
    with opened("ray://half") as engine:
        found = engine.fetch(["e000", "e019"])
        assert set(found) == {"e000"}
        assert len(found.missing) == 1 and "/b: " in found.missing[0]
        with pytest.raises(StoreError, match="/b: "):
            engine.count(Modality.IMAGE)
        assert engine.info()["missing"]


def test_a_push_killed_between_the_marks_of_two_shards_goes_on(ray, tmp_path):
    """Each shard's mark is judged by itself: all name this index, whatever generation; another index stays refused."""
    index, other = make_index(tmp_path / "i", NEW), make_index(tmp_path / "other", NEW[:3])
    serve([make_index(tmp_path / "a", []), make_index(tmp_path / "b", [])], "marks")
    push(index, "ray://marks")
    with opened("ray://marks") as engine:
        whole = json.loads(engine.mark())
        engine._all({0: (json.dumps({**whole, "whole": False}),)}, "set_mark")
    with pytest.raises(StoreError, match="another collection"):
        push(other, "ray://marks")
    assert push(index, "ray://marks").unchanged == len(NEW)
    with opened("ray://marks") as engine:
        assert json.loads(engine.mark()) == whole


def test_shards_that_hold_only_what_the_index_holds_become_its_mirror(ray, tmp_path):
    """Those that `split` made carry no mark: nothing of them would be lost. With a stranger among them it would."""
    index, other = make_index(tmp_path / "i", NEW), make_index(tmp_path / "other", [*NEW[1:], entry("e000", 4711)])
    serve([make_index(tmp_path / "a", NEW[:9]), make_index(tmp_path / "b", NEW[9:18])], "parts")
    with pytest.raises(StoreError, match="another collection"):
        push(other, "ray://parts")
    report = push(index, "ray://parts")
    assert (report.added, report.changed, report.removed, report.unchanged) == (2, 0, 0, 18)


def test_a_shard_is_free_for_other_writers_between_two_changes(ray, tmp_path):
    """A push that is killed must not keep `mmsearch index` out for ever; `finish` still completes the index."""
    path = make_index(tmp_path / "a", [])
    serve([path], "lock")
    with opened("ray://lock") as engine:
        engine.upsert(NEW)
        engine.set_mark("half")
        IndexStore.open(path, write=True).close()
        engine.finish()
        with IndexStore.open(path, write=True) as store:
            assert json.loads((tmp_path / "a" / "manifest.json").read_text())["generation"] == store.generation
        assert engine.count(Modality.IMAGE) == len(NEW)


def test_shards_of_two_kinds_of_item_vectors_are_not_served_together(ray, tmp_path):
    """A fused row stands for picture and caption: its scores mean something else."""
    fused = with_settings(make_index(tmp_path / "b", NEW[:2]), item_vectors="fused")
    with pytest.raises(IndexMismatchError, match=r"separate item vectors.*fused"):
        serve([make_index(tmp_path / "a", OLD), fused], "kinds")
