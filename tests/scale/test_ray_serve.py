"""Shards behind Ray actors: equal answers, dead and slow shards, and who may join."""

import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from engine_kit import COLLECTION, MODEL, OTHER, change_index, entries, entry, make_index, opened, small_ray, unit

from mmsearch.errors import IndexMismatchError, IndexNotFoundError, StoreError, UsageError
from mmsearch.scale.engine import open_engine
from mmsearch.scale.engine_searcher import EngineSearcher
from mmsearch.scale.ray_serve import NAMESPACE, serve, stop
from mmsearch.types import Modality
from mmsearch.where import parse_condition

pytest.importorskip("ray")
pytestmark = pytest.mark.engines

QUERIES = unit(4242, 5)
HAVE = [*entries(40), *(entry(f"twin{i}", 7) for i in range(6))]  # six items with the same vectors: ties


@pytest.fixture(scope="module")
def ray():
    with small_ray() as started:
        yield started


@pytest.fixture(scope="module")
def folder(ray, tmp_path_factory):
    """Where the shards lie: one index of everything, and four of a quarter each, served as `one` and `four`."""
    folder = tmp_path_factory.mktemp("shards")
    for name, shards in (("one", 1), ("four", 4)):
        serve([make_index(folder / f"{name}-{n}", HAVE[n::shards]) for n in range(shards)], name)
    return folder


def kill(ray, name: str, *, restarts: bool) -> None:
    """End a shard's process, or the actor for good."""
    actor = ray.get_actor(name, namespace=NAMESPACE)
    ray.kill(actor, no_restart=not restarts)


def wait_until(holds, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


def test_one_shard_and_four_give_exactly_the_same(folder):
    """Scores to the last bit, ids and order, also of equal scores, with and without a filter."""
    with opened("ray://one") as one, opened("ray://four") as four:
        for where in ((), (parse_condition("year>=2000"),)):
            for modality in Modality:
                for k in (1, 5, 17, 200):
                    a = one.search(QUERIES, k, modality=modality, where=where)
                    b = four.search(QUERIES, k, modality=modality, where=where)
                    assert (a.ids, a.parts) == (b.ids, b.parts)
                    assert np.array_equal(a.scores, b.scores)


def test_a_shard_whose_process_dies_comes_back(ray, folder):
    """Ray starts it again, and a later search finds it whole without anybody doing anything."""
    with opened("ray://four") as engine:
        before = engine.search(QUERIES, 9, modality=Modality.IMAGE)
        kill(ray, "four/1", restarts=True)
        assert wait_until(lambda: not engine.search(QUERIES, 9, modality=Modality.IMAGE).missing)
        after = engine.search(QUERIES, 9, modality=Modality.IMAGE)
        assert after.ids == before.ids
        assert np.array_equal(after.scores, before.scores)


def test_a_slow_shard_does_not_keep_the_others_waiting(ray, folder):
    """After the deadline the answer is partial and says who was late; when it is done, it answers again."""
    with opened("ray://four?deadline_ms=1200") as engine:
        assert wait_until(lambda: not engine.search(QUERIES, 1, modality=Modality.IMAGE).missing)
        busy = ray.get_actor("four/0", namespace=NAMESPACE).ask.remote("", "wait", 5.0)
        answer = engine.search(QUERIES, 5, modality=Modality.IMAGE)
        assert not ray.wait([busy], timeout=0)[0]  # it is still busy
        assert len(answer.missing) == 1
        assert "four-0" in answer.missing[0]
        assert "1200 ms" in answer.missing[0]
        ray.get(busy)
        assert wait_until(lambda: not engine.search(QUERIES, 5, modality=Modality.IMAGE).missing)


def test_a_shard_sees_what_index_adds_to_it(folder):
    """An index that is updated while it is served answers with its newest generation."""
    new = entry("brand new", 999)
    with opened("ray://four") as engine:
        engine.search(QUERIES, 3, modality=Modality.IMAGE)
        change_index(str(folder / "four-0"), [new])
        assert engine.search(new.image[None], 1, modality=Modality.IMAGE).ids == [["brand new"]]
        change_index(str(folder / "four-0"), [], remove=["brand new"])
        assert engine.search(new.image[None], 1, modality=Modality.IMAGE).ids != [["brand new"]]


def test_a_name_in_use_is_refused(folder):
    """Two collections under one name would answer as one."""
    with pytest.raises(UsageError, match="in use"):
        serve([str(folder / "one-0")], "one")
    with pytest.raises(UsageError, match="collection"):
        serve([str(folder / "one-0")], "no/name")


def test_a_shard_of_another_model_may_not_join(ray, folder, tmp_path):
    """Both fingerprints are named, and nothing is left running."""
    theirs = make_index(tmp_path / "b", [], collection=replace(COLLECTION, model=OTHER))
    with pytest.raises(IndexMismatchError, match=f"{MODEL.weights}.*{OTHER.weights}"):
        serve([str(folder / "one-0"), theirs], "mixed")
    for name in ("mixed/0", "mixed/1", "mixed/registry"):
        with pytest.raises(ValueError, match="mixed"):
            ray.get_actor(name, namespace=NAMESPACE)
    with pytest.raises(IndexNotFoundError, match="nothing"):
        serve([str(tmp_path / "nothing")], "mixed")


def test_a_shard_that_became_another_model_s_is_refused(folder, tmp_path):
    """Rebuilt behind our back, its rows are not compared with ours: it counts as missing, with both fingerprints."""
    with opened("ray://four") as engine:
        assert not engine.search(QUERIES, 3, modality=Modality.IMAGE).missing
        path = folder / "four-3"
        os.rename(path, tmp_path / "away")
        make_index(path, [], collection=replace(COLLECTION, model=OTHER))
        os.utime(path / "manifest.json", ns=(1, 1))
        for _ in range(2):
            answer = engine.search(QUERIES, 3, modality=Modality.IMAGE)
            assert len(answer.missing) == 1
            assert OTHER.weights in answer.missing[0]
            assert MODEL.weights in answer.missing[0]
        shutil.rmtree(path)
        os.rename(tmp_path / "away", path)
        os.utime(path / "manifest.json", ns=(2, 2))
        assert not engine.search(QUERIES, 3, modality=Modality.IMAGE).missing


def test_a_dead_shard_makes_the_answer_partial_and_is_named(ray, folder):
    """The others' hits are right; nothing of the dead one is invented; asked so, it is an error instead."""
    kill(ray, "four/2", restarts=False)
    with opened("ray://four") as engine:
        answer = engine.search(QUERIES, 100, modality=Modality.IMAGE)
        assert len(answer.missing) == 1
        assert "four-2" in answer.missing[0]
        assert set(answer.ids[0]) == {one.item.id for n in (0, 1, 3) for one in HAVE[n::4]}
        with pytest.raises(StoreError, match="all shards"):
            engine.upsert([entry("new", 1)])
    with opened("ray://four?missing=error") as strict, pytest.raises(StoreError, match="four-2"):
        strict.search(QUERIES, 5, modality=Modality.IMAGE)
    with EngineSearcher.open("ray://four") as searcher:
        hits = searcher.search_vector(QUERIES[0], k=3)
    assert hits.partial
    assert len(hits) == 3
    assert any(note.startswith("partial: ") and "four-2" in note for note in hits.notes)


def test_stopped_shards_are_not_there_any_more(ray, folder):
    """Where none answers it is an error, whatever the policy; stopped ones are not found, and say how to start them."""
    kill(ray, "one/0", restarts=False)
    with opened("ray://one") as engine, pytest.raises(StoreError, match="1 shard"):
        engine.search(QUERIES, 5, modality=Modality.IMAGE)
    assert (stop("one"), stop("four")) == (1, 4)
    with pytest.raises(IndexNotFoundError, match="serve-shards"):
        open_engine("ray://four")
    with pytest.raises(IndexNotFoundError):
        stop("four")
