"""Encoding on a cluster, what can be known without one: who does what, where shards go, what ends a build."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ray_kit import photos

from mmsearch import __version__
from mmsearch.builder import SilentProgress, build
from mmsearch.data.images import DEFAULT_LIMITS, Limits
from mmsearch.data.loading import Failed
from mmsearch.errors import IndexMismatchError, InputError, ModelError, ResourceError, UsageError
from mmsearch.pictures import Encoded, Request
from mmsearch.scale import ray_session
from mmsearch.scale.ray_encode import Plan, RayPictures, place_of, plan_for
from mmsearch.scale.ray_workers import EncodeShards, Task, from_columns, to_columns
from mmsearch.similarity import normalise
from mmsearch.store import IndexStore
from mmsearch.testing import ColorEncoder
from mmsearch.types import Modality, Skipped, SkipReason, Stamp

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mmsearch[ray]'")


class FakeRay:
    """A cluster of the nodes it is told of."""

    def __init__(self, *nodes):
        self.found = [{"Alive": True, "Resources": resources} for resources in nodes]
        self.exceptions = SimpleNamespace(RayError=ConnectionError)

    def nodes(self):
        return [*self.found, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def shutdown(self):
        """Nothing to end."""


def task(place, **more):
    encoder = ColorEncoder()
    known = {"identity": encoder.identity, "preprocessing": encoder.preprocessing, "version": __version__}
    spread = {"batch_size": 4, "workers": 1, "limits": DEFAULT_LIMITS}
    return Task(**{"load": ColorEncoder, "place": str(place), **known, **spread, **more})


class Cluster(RayPictures):
    """`RayPictures` whose answers are those of one worker in this process, or what a test says."""

    def __init__(self, place, *, answers=None):
        session = SimpleNamespace(ray=FakeRay({"CPU": 1.0}), close=lambda: None)
        super().__init__(session, Plan(1, 1), task(place), told=SilentProgress(), shard_rows=2, wave=5)
        self.asked, self._said = [], answers
        self.worker = EncodeShards(self._task)

    def _answers(self, requests):
        self.asked.append([request.key for request in requests])
        if self._said is not None:
            yield from self._said(self, requests)
            return
        for start in range(0, len(requests), 2):
            yield self.answer(requests[start : start + 2])

    def answer(self, requests):
        return {name: values[0] for name, values in self.worker(to_columns(requests)).items()}


class InThisProcess:
    """The engine of a build whose cluster is `Cluster`."""

    def __init__(self, place):
        self.place = place

    def pictures(self, encoder, **options):
        return Cluster(self.place)


class Joining(ColorEncoder):
    """Joins an item's picture and texts by their sum."""

    joins_items = True

    def item_rows(self, images, texts, *, has_image, has_text):
        return normalise(images * has_image[:, None] + texts * has_text[:, None])


def texts(count):
    return [Request(i, "t", f"row {i}", None, None, ("red",)) for i in range(count)]


def keys(lists):
    return sorted(one.key for outcomes in lists for one in outcomes)


@pytest.mark.parametrize(
    ("nodes", "plan"),
    [
        ([{"CPU": 1.0}, {"CPU": 1.0}, {}], Plan(2, 1)),
        ([{"CPU": 16.0}], Plan(4, 4)),
        ([{"CPU": 2.0}, {"CPU": 9.0}], Plan(5, 2)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], Plan(2, 1, gpus=1, decoders=16)),
    ],
)
def test_every_core_or_gpu_gets_its_share(nodes, plan):
    """CPUs: actors of up to four cores. GPUs: one actor each, and all cores decode. Dead nodes do not count."""
    assert plan_for(FakeRay(*nodes), gpus=True) == plan


def test_gpus_can_be_left_alone_and_a_cluster_without_cpus_is_refused():
    """--device cpu; a head alone encodes nothing and would wait for ever."""
    assert plan_for(FakeRay({"CPU": 4.0, "GPU": 1.0}), gpus=False) == Plan(1, 4)
    with pytest.raises(ResourceError, match="at least one CPU"):
        plan_for(FakeRay({}), gpus=True)


def test_requests_travel_whole():
    """Names of any bytes, stamps, texts; what has none has none on the other side."""
    given = [Request(7, "/r", "caf\udce9", "/r/caf\udce9", Stamp(1, 2, 3), ("a", "b")), *texts(1)]
    assert from_columns(to_columns(given)) == given


def test_every_request_has_one_outcome_and_committed_shards_go(tmp_path):
    """Waves and batches of any size change nothing; the work folder is empty once all is committed."""
    pictures = Cluster(tmp_path / "work" / "job")
    found = list(pictures.encode(iter(texts(12))))
    assert keys(found) == list(range(12)) and [len(wave) for wave in pictures.asked] == [5, 5, 2]
    assert all(one.texts.shape == (1, 8) for outcomes in found for one in outcomes)
    assert len(pictures._folder.names()) > 1
    pictures.committed()
    assert pictures._folder.names() == []
    pictures.close()
    assert not (tmp_path / "work").exists()


def test_shards_stay_until_they_are_committed(tmp_path):
    """A build that is cut off before its commit finds all of them again and asks the cluster for nothing."""
    first = Cluster(tmp_path / "job")
    list(first.encode(iter(texts(4))))
    first.close()
    again = Cluster(tmp_path / "job")
    assert keys(again.encode(iter(texts(4)))) == [0, 1, 2, 3] and again.asked == []


def test_a_failure_of_the_moment_is_not_taken_from_an_old_shard(tmp_path):
    """A picture that had vanished for a worker is asked for again; one that is truncated stays so."""
    gone, cut = (Request(i, "", f"/p/{i}.jpg", f"/p/{i}.jpg", Stamp(1, 1, 1)) for i in range(2))
    pictures = Cluster(tmp_path / "job")
    reasons = {gone: SkipReason.VANISHED, cut: SkipReason.TRUNCATED}
    failed = [Failed(one.key, Skipped(str(one.path), reason), None, None) for one, reason in reasons.items()]
    pictures._folder.write([gone, cut], failed, dim=8)
    list(pictures.encode(iter([gone, cut])))
    assert pictures.asked == [[0]]


def test_what_comes_twice_counts_once_and_what_does_not_come_is_asked_for_again(tmp_path):
    """Ray may repeat a batch or lose one: neither doubles a picture nor costs one."""

    def repeats_one_and_forgets_the_rest(pictures, requests):
        yield pictures.answer(requests[:2])
        yield pictures.answer(requests[:2])
        yield pictures.answer(requests[1:3])

    pictures = Cluster(tmp_path / "job", answers=repeats_one_and_forgets_the_rest)
    assert keys(pictures.encode(iter(texts(5)))) == [0, 1, 2, 3, 4]
    assert pictures.asked == [[0, 1, 2, 3, 4], [3, 4]]


def test_a_lost_cluster_ends_the_build_and_says_how_to_go_on(tmp_path):
    """After four rounds; what came is in shards and stays."""

    def dies(pictures, requests):
        yield pictures.answer(requests[:1])
        raise ConnectionError("all nodes are gone")

    pictures = Cluster(tmp_path / "job", answers=dies)
    with pytest.raises(ResourceError, match=r"none for 1 of them \(ConnectionError: all nodes are gone\).*again"):
        list(pictures.encode(iter(texts(5))))
    assert len(pictures.asked) == 4 and len(pictures._folder.names()) == 4


def test_a_batch_that_failed_for_once_is_repeated(tmp_path):
    """A full disk on one node is trouble, not the end."""
    said = json.dumps({"kind": "OSError", "where": "", "expected": "", "got": "OSError: no space", "do": ""})

    def fails_at_first(pictures, requests):
        if len(pictures.asked) == 1:
            yield {"shard": "", "error": said, "node": "one"}
        else:
            yield pictures.answer(requests)

    assert keys(Cluster(tmp_path / "job", answers=fails_at_first).encode(iter(texts(2)))) == [0, 1]


def test_pictures_that_a_node_does_not_see_end_the_build(tmp_path):
    """Else every picture of a folder that is not shared would be reported as vanished."""
    (tmp_path / "a.jpg").write_bytes(b"here")
    here = Request(0, "", "a", str(tmp_path / "a.jpg"), Stamp(4, 1, 1))

    def does_not_see_it(pictures, requests):
        failed = Failed(0, Skipped(str(here.path), SkipReason.VANISHED), None, None)
        yield {"shard": pictures._folder.write([here], [failed], dim=8), "error": "", "node": "one"}

    with pytest.raises(InputError, match="a file that every node sees"):
        list(Cluster(tmp_path / "job", answers=does_not_see_it).encode(iter([here])))


class NoModel(ColorEncoder):
    """A model directory that is not on the node."""

    def __init__(self):
        raise ModelError("/models/a", expected="a model", got="no such directory", do="Copy it there.")


@pytest.mark.parametrize(
    ("told", "kind", "words"),
    [
        ({"load": lambda: ColorEncoder(name="other")}, IndexMismatchError, "got model other"),
        ({"load": NoModel}, ModelError, "/models/a: expected a model, got no such directory. Copy it there."),
        ({"version": "0.0.1"}, IndexMismatchError, "expected mmsearch 0.0.1, as the driver has"),
    ],
)
def test_a_node_that_would_answer_wrongly_ends_the_build(tmp_path, told, kind, words):
    """Another model, none, or another version of the program: said at once, in the words of the node."""
    unfit = EncodeShards(task(tmp_path / "job", **told))

    def refuses(pictures, requests):
        yield {name: values[0] for name, values in unfit(to_columns(requests)).items()}

    with pytest.raises(kind, match=words):
        list(Cluster(tmp_path / "job", answers=refuses).encode(iter(texts(1))))


def test_a_worker_lets_one_bad_batch_go_and_takes_the_next(tmp_path):
    """An error inside a batch is an answer, and nothing of that batch comes with the next one."""
    worker = EncodeShards(task(tmp_path / "job"))
    assert "error" in json.loads(worker({"request": [b"no JSON"]})["error"][0])["kind"].lower()
    assert worker(to_columns(texts(1)))["error"] == [""]


@pytest.mark.parametrize("item_vectors", ["separate", "fused"])
def test_captions_go_with_their_pictures_whatever_the_item_vectors(tmp_path, item_vectors):
    """New captions of known pictures too; the items are those of a build without a cluster."""
    folder = photos(tmp_path / "photos", 7)
    for number in range(4):
        (folder / f"{number:04d}.txt").write_text("red\nblue sky")
    (tmp_path / "rows.csv").write_text("caption\ngreen grass\n")

    def run(index, **options):
        given = {"encoder": Joining(), "item_vectors": item_vectors, "workers": 1}
        return build([folder, tmp_path / "rows.csv"], index, **given, **options)

    spread = {"engine": InThisProcess(tmp_path / "job")}
    reports = [[run(tmp_path / "spread", **spread), run(tmp_path / "alone")]]
    (folder / "0000.txt").write_text("yellow")
    (folder / "0006.txt").write_text("black")
    reports.append([run(tmp_path / "spread", **spread), run(tmp_path / "alone")])
    for mine, other in reports:
        assert replace(mine, index=other.index, seconds=0) == replace(other, seconds=0)
    assert reports[1][0].changed == 2
    mine, other = rows_of(tmp_path / "spread"), rows_of(tmp_path / "alone")
    assert mine.keys() == other.keys()
    worst = min(float(mine[key] @ other[key]) for key in mine)
    assert worst > (0.9999 if item_vectors == "fused" else 0.99999)


def rows_of(index):
    """(id, modality, caption) -> unit row."""
    found = {}
    with IndexStore.open(str(index)) as store, store.snapshot() as snapshot:
        for modality in Modality:
            alive = snapshot.alive_rows(modality)
            for one, row in zip(snapshot.locate(alive), normalise(snapshot.vectors(alive)), strict=True):
                found[one.item.id, modality, one.caption] = row
    return found


def test_other_limits_or_another_index_are_another_job():
    """Shards of one are never taken for the other's; the same build comes to the same folder."""
    encoder, other = ColorEncoder(), ColorEncoder(name="other")
    places = [
        place_of("/work", "/i/a", encoder, DEFAULT_LIMITS), place_of("/work", "/i/b", encoder, DEFAULT_LIMITS),
        place_of("/work", "/i/a", other, DEFAULT_LIMITS), place_of("/work", "/i/a", encoder, Limits(max_pixels=9)),
    ]  # fmt: skip
    assert len(set(places)) == 4 and places[0] == place_of("/work", "/i/a", encoder, DEFAULT_LIMITS)
    assert place_of(None, "/i/a", encoder, DEFAULT_LIMITS).startswith("/i/a/work/")
    assert place_of("s3://b/w/", "/i/a", encoder, DEFAULT_LIMITS).startswith("s3://b/w/encode-")
    with pytest.raises(UsageError, match="a place that all nodes share"):
        place_of("memory://w", "/i/a", encoder, DEFAULT_LIMITS)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", ":6379", "head:99999"])
def test_an_address_that_cannot_be_one_is_a_usage_error(address):
    """Said before Ray is asked, which would try for minutes."""
    with pytest.raises(UsageError, match="auto or HOST:PORT"):
        ray_session.check_address(address)


def test_an_address_where_nobody_listens_is_refused_at_once():
    """With what to do about it."""
    with pytest.raises(InputError, match="ray start --head"):
        ray_session.check_address("127.0.0.1:9")


class UnlistedError(Exception):
    """What Ray calls a RayError: none of Python's own kinds."""


@pytest.mark.parametrize(
    ("address", "error", "raised", "hint"),
    [
        (None, Exception("The node timed out.\nSee the logs."), ResourceError, "try again"),
        (None, RuntimeError("no port"), ResourceError, "try again"),
        ("auto", UnlistedError("No token was found"), InputError, "RAY_AUTH_MODE"),
        (None, TypeError("a bug"), TypeError, ""),
    ],
)
def test_a_ray_that_does_not_start_is_said_in_a_line(monkeypatch, address, error, raised, hint):
    """Also where Ray calls it a plain Exception or an error of its own; a bug stays one."""

    def init(**settings):
        raise error

    fake = SimpleNamespace(is_initialized=lambda: False, init=init, exceptions=SimpleNamespace(RayError=UnlistedError))
    monkeypatch.setattr(ray_session, "import_ray", lambda: fake)
    with pytest.raises(raised, match=f"{str(error).splitlines()[0].rstrip('.')}.*{hint}") as caught:
        ray_session.connect(address)
    assert "See the logs" not in str(caught.value)


def test_rows_that_were_encoded_together_stay_with_their_pictures():
    """A picture that failed inside a batch shifts nobody's vector."""
    from mmsearch.scale.ray_workers import with_texts

    requests = [Request(i, "", str(i), str(i), None, (word,)) for i, word in enumerate(("red", "green", "blue"))]
    outcomes = [Encoded(0, np.ones(8)), Failed(1, Skipped("1", SkipReason.EMPTY), None, None), Encoded(2, np.ones(8))]
    first, failed, last = with_texts(ColorEncoder(), requests, outcomes)
    red, blue = ColorEncoder().encode_texts(["red", "blue"])
    assert np.array_equal(first.texts[0], red) and np.array_equal(last.texts[0], blue)
    assert isinstance(failed, Failed)
