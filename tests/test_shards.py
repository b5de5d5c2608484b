"""Several indexes searched as one answer as one index that holds everything."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmsearch.builder import build
from mmsearch.errors import IndexDamagedError, IndexMismatchError, IndexNotFoundError, UsageError
from mmsearch.index.exact import ExactIndex
from mmsearch.opened import directories
from mmsearch.rerank.request import Rerank
from mmsearch.reshard import merge, split
from mmsearch.searcher import Searcher
from mmsearch.shards import ShardedIndex
from mmsearch.similarity import normalise
from mmsearch.store import Batch, IndexStore, Upsert
from mmsearch.store.base import ItemState
from mmsearch.store.sharded import ShardedSnapshot
from mmsearch.store.tokens import TokenStore
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker
from mmsearch.types import Modality, Source

DIM = 8
EXACT = np.array([np.roll([s, 0.5, 0, t, 0, 0.5, 0, 0], r) for s in (0.5, -0.5) for t in (0.5, -0.5) for r in range(6)])
"""Unit rows whose inner products are exact in any arithmetic, many of them equal: ties are ties, not rounding."""
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class Thing:
    """An item to be: rows of its picture and captions, by number in a pool; `gone`: removed again."""

    name: str
    picture: int | None = None
    captions: tuple[int, ...] = ()
    gone: bool = False
    id: str | None = None
    pool: np.ndarray = field(default_factory=lambda: EXACT, repr=False, compare=False)

    def upsert(self) -> Upsert:
        texts = tuple(f"{self.name}.{place}" for place in range(len(self.captions)))
        return Upsert(
            Source("table", self.name, None, None, texts),
            image_vector=None if self.picture is None else self.pool[self.picture].astype(np.float32),
            text_vectors=self.pool[list(self.captions)].astype(np.float32) if texts else None,
            id=self.id,
        )


def index(path: Path, *groups: Sequence[Thing], model: ColorEncoder | None = None, **settings_: object) -> Path:
    """An index of these things, a commit a group; those that are gone are removed afterwards."""
    encoder = model or ColorEncoder()
    made = IndexStore.create(str(path), model=encoder.identity, preprocessing=encoder.preprocessing, settings=settings_)
    with made as store:
        for group in groups:
            store.commit(Batch(upserts=[thing.upsert() for thing in group]))
        gone = {thing.name for group in groups for thing in group if thing.gone}
        with store.snapshot() as snapshot:
            numbers = [known.item for known in snapshot.items(state=None) if known.name in gone]
        store.commit(Batch(removals=numbers))
        store.finish()
    return path


def things(count: int, *, seed: int = 0, first: int = 0) -> list[Thing]:
    """Pictures with a caption each, no two rows alike."""
    pool = normalise(np.random.default_rng(seed).standard_normal((2 * count, DIM)))
    return [Thing(f"t{first + i}", i, (count + i,), pool=pool) for i in range(count)]


@contextmanager
def folder() -> Iterator[Path]:
    made = tempfile.mkdtemp(prefix="mmsearch-test-", dir=MEMORY)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made)


def shown(hits: Sequence) -> list[tuple]:
    return [(hit.rank, hit.score, hit.item.id, hit.modality, hit.caption) for hit in hits]


def row(seed: int) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((1, DIM)))


POOL = st.integers(0, len(EXACT) - 1)
THING = st.tuples(st.none() | POOL, st.lists(POOL, max_size=3), st.booleans(), st.integers(0, 4))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(THING, max_size=24), st.integers(1, 5), POOL, st.integers(1, 40),
    st.sampled_from([None, -0.25, 0.25, 1.0]),
)  # fmt: skip
def test_any_partition_answers_as_one_index(drawn, count, asked, k, threshold):
    """Whatever is in which shard, with equal rows, removed items, thresholds and k beyond all of it."""
    groups: list[list[Thing]] = [[] for _ in range(count)]
    for number, (picture, captions, gone, shard) in enumerate(drawn):
        groups[shard % count].append(Thing(f"i{number}", picture, tuple(captions), gone))
    query = EXACT[asked].astype(np.float32)
    with folder() as at:
        one = index(at / "one", *groups)
        several = [index(at / f"s{number}", group) for number, group in enumerate(groups)]
        with Searcher.open(one) as single, Searcher.open(several) as sharded:
            for to in ("image", "text", "any"):
                expected = single.search_vector(query, k=k, to=to, threshold=threshold)
                found = sharded.search_vector(query, k=k, to=to, threshold=threshold)
                assert shown(found) == shown(expected)
                assert found.notes == expected.notes


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(20)), st.lists(st.integers(0, 4), min_size=20, max_size=20), st.integers(0, 1000))
def test_the_order_of_items_and_shards_changes_nothing_where_no_two_score_alike(order, shards, seed):
    """Not a property of ties: the same ids with the same scores from any order."""
    every = things(20)
    groups = [[every[place] for place in order if shards[place] == shard] for shard in range(5)]
    with folder() as at:
        one = index(at / "one", every)
        several = [index(at / f"s{number}", group) for number, group in enumerate(groups)]
        with Searcher.open(one) as single, Searcher.open(several) as sharded:
            for to in ("image", "text", "any"):
                expected, found = (s.search_vector(row(seed), k=9, to=to) for s in (single, sharded))
                assert [hit.item.id for hit in found] == [hit.item.id for hit in expected]
                assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_words_are_encoded_once_and_notes_are_those_of_one_index(tmp_path):
    """A sharded searcher has the methods and notes of a plain one."""

    class Counting(ColorEncoder):
        calls = 0

        def encode_texts(self, texts, **options):
            self.calls += 1
            return super().encode_texts(texts, **options)

    paths = [index(tmp_path / f"s{i}", things(5, first=5 * i, seed=i)) for i in range(3)]
    encoder = Counting()
    with Searcher.open(paths, encoder=encoder) as searcher:
        hits = searcher.search_text("red " * 40, k=4)
        assert len(hits) == 4 and "longer than" in hits.notes[0]
        assert encoder.calls == 1
        assert searcher.model == encoder.identity and searcher.encoder is encoder
        assert searcher.preprocessing == encoder.preprocessing


def test_of_one_id_in_two_shards_the_first_named_counts(tmp_path):
    """The other one is not there at all, whatever else it has; nothing else is lost to it."""
    mine = Thing("mine", 0, (), id="same")
    theirs = Thing("theirs", 0, (3,), id="same")
    others = [Thing(f"o{i}", i, (i,)) for i in range(1, 4)]
    first, second = index(tmp_path / "a", [mine]), index(tmp_path / "b", [theirs, *others])
    query = EXACT[0].astype(np.float32)
    with Searcher.open([first, second]) as searcher, Searcher.open(index(tmp_path / "c", [mine], others)) as expected:
        for to in ("image", "text", "any"):
            assert shown(searcher.search_vector(query, k=9, to=to)) == shown(expected.search_vector(query, k=9, to=to))
        assert searcher.search_vector(query, k=1)[0].item.captions == ()
    with Searcher.open([second, first]) as searcher:
        assert searcher.search_vector(query, k=1)[0].item.captions == ("theirs.0",)


def test_hidden_items_never_push_others_out(tmp_path):
    """A shard that repeats another one whole costs no hit: the search goes on until there are k."""
    best = [Thing(f"best{i}", 0) for i in range(60)]
    rest = [Thing(f"rest{i}", 1) for i in range(5)]
    paths = [index(tmp_path / "a", best), index(tmp_path / "b", best), index(tmp_path / "c", rest)]
    with Searcher.open(paths) as searcher:
        hits = searcher.search_vector(EXACT[0].astype(np.float32), k=64)
    assert len({hit.item.id for hit in hits}) == 64 and sum(hit.score > 0.99 for hit in hits) == 60


def test_shards_of_two_models_are_refused_in_one_line_with_both_names(tmp_path):
    """Rows of two models are never compared, partial or not."""
    first = index(tmp_path / "a", things(2))
    other = index(tmp_path / "b", things(2), model=ColorEncoder(name="other"))
    for partial in (False, True):
        with pytest.raises(IndexMismatchError, match=r"b, searched together with .*a: .*colors.*other") as caught:
            Searcher.open([first, other], partial=partial)
        assert "\n" not in str(caught.value)
    with pytest.raises(IndexMismatchError, match="other"):
        Searcher.open([first, first, index(tmp_path / "c", things(2))], encoder=ColorEncoder(name="other"))


def test_shards_whose_item_vectors_differ_are_refused(tmp_path):
    """A row of a picture and one of a picture with its captions are not the same kind of thing."""
    paths = [index(tmp_path / "a", things(2)), index(tmp_path / "b", things(2), item_vectors="fused")]
    with pytest.raises(IndexMismatchError, match=r"expected separate item vectors.*got fused"):
        Searcher.open(paths)


def test_a_shard_that_is_not_there_is_an_error_or_with_partial_a_note(tmp_path):
    """By default nothing is left out in silence; on request the others answer and say what is missing."""
    here = index(tmp_path / "here", things(4))
    with pytest.raises(IndexNotFoundError, match="nowhere"):
        Searcher.open([here, tmp_path / "nowhere"])
    with pytest.raises(IndexNotFoundError, match="nowhere"):
        Searcher.open([tmp_path / "nowhere", tmp_path / "neither"], partial=True)
    with Searcher.open([tmp_path / "nowhere", here], partial=True) as searcher:
        hits = searcher.search_vector(row(0), k=9)
        assert len(hits) == 4
        assert hits.notes[0].startswith("1 of 2 indexes missing from this answer: ") and "nowhere" in hits.notes[0]
        assert hits.partial
        assert list(searcher.info()["missing"]) == [str(tmp_path / "nowhere")]


def test_a_damaged_shard_is_an_error_or_with_partial_a_note(tmp_path):
    """Damage found on opening is treated like absence, and never answered from."""
    paths = [index(tmp_path / name, things(4, seed=i, first=4 * i)) for i, name in enumerate("ab")]
    vectors = paths[1] / "vectors.f16"
    raw = bytearray(vectors.read_bytes())
    raw[3] ^= 64
    vectors.write_bytes(raw)
    with pytest.raises(IndexDamagedError, match=r"vectors\.f16"):
        Searcher.open(paths)
    with Searcher.open(paths, partial=True) as searcher:
        hits = searcher.search_vector(row(0), k=9)
        assert {hit.item.captions[0] for hit in hits} == {f"t{i}.0" for i in range(4)}
        assert "vectors.f16" in hits.notes[0]


def test_refresh_takes_up_new_generations_and_shards_that_came_back(tmp_path):
    """Until then one state of all shards is searched; shards that did not change stay open as they are."""
    paths = [index(tmp_path / name, things(3, seed=i, first=3 * i)) for i, name in enumerate("ab")]
    late = tmp_path / "late"
    with Searcher.open([*paths, late], partial=True) as searcher:
        before = searcher._view
        assert searcher.refresh() == searcher.refresh() and searcher._view is before
        with IndexStore.open(str(paths[1]), write=True) as store:
            store.commit(Batch(upserts=[Thing("new", 0).upsert()]))
            store.finish()
        assert len(searcher.search_vector(row(0), k=20)) == 6
        searcher.refresh()
        assert len(searcher.search_vector(row(0), k=20)) == 7
        assert searcher._view.shards[0] is before.shards[0]
        assert searcher._view.shards[1] is not before.shards[1]
        index(late, [Thing("late", 1)])
        searcher.refresh()
        hits = searcher.search_vector(row(0), k=20)
        assert len(hits) == 8 and not hits.notes and not hits.partial


def test_refresh_refuses_a_shard_that_another_model_took_over(tmp_path):
    """The old encoder must not ask new vectors; the searcher goes on with what it has."""
    paths = [index(tmp_path / name, things(3, seed=i, first=3 * i)) for i, name in enumerate("ab")]
    other = ColorEncoder(name="other")
    with Searcher.open(paths) as searcher:
        IndexStore.replace(str(paths[1]), model=other.identity, preprocessing=other.preprocessing).close()
        with pytest.raises(IndexMismatchError, match="other"):
            searcher.refresh()
        assert len(searcher.search_vector(row(0), k=20)) == 6


def test_a_closed_searcher_says_so_and_lets_its_shards_go(tmp_path):
    """Views are held while they are searched, not longer."""
    paths = [index(tmp_path / name, things(3, seed=i)) for i, name in enumerate("ab")]
    searcher = Searcher.open(paths)
    parts = [view.snapshot for view in searcher._view.shards]
    searcher.close()
    with pytest.raises(UsageError, match="closed"):
        searcher.search_vector(row(0))
    for part in parts:
        with pytest.raises(UsageError):
            part.count(Modality.IMAGE)


def test_a_directory_named_twice_counts_once(tmp_path):
    """Also by another name for the same place."""
    path = index(tmp_path / "a", things(3))
    (tmp_path / "link").symlink_to(path)
    with Searcher.open([path, tmp_path / "link", path]) as searcher:
        assert len(searcher.search_vector(row(0), k=20)) == 3
        assert searcher.info()["paths"] == [str(path)]


def test_info_sums_up_and_says_what_each_shard_has(tmp_path):
    """Counts and bytes of all together, and every index's own facts."""
    paths = [index(tmp_path / name, things(3 + i, seed=i, first=9 * i)) for i, name in enumerate("ab")]
    with Searcher.open(paths) as searcher:
        info = searcher.info()
    assert (info["items"], info["image_rows"], info["text_rows"], info["missing"]) == (7, 7, 7, {})
    assert info["roots"] == {"table": 7} and info["bytes"] > 0
    assert [facts["items"] for facts in info["shards"].values()] == [3, 4]
    assert list(info["shards"]) == info["paths"] == [str(path) for path in paths]


def test_a_sharded_snapshot_numbers_rows_on_and_on(tmp_path):
    """Every question about rows has the answer of the shard they are of, in the order asked for."""
    paths = [index(tmp_path / name, things(3, seed=i, first=3 * i)) for i, name in enumerate("ab")]
    with IndexStore.open(str(paths[0])) as one, IndexStore.open(str(paths[1])) as two:
        parts = [one.snapshot(), two.snapshot()]
        with ShardedSnapshot(parts) as both:
            rows = both.alive_rows(Modality.IMAGE)
            assert rows.tolist() == [0, 1, 2, 6, 7, 8] and both.row_count == 12
            assert both.ranges(Modality.TEXT) == [(3, 6), (9, 12)]
            mixed = rows[[5, 0, 3]]
            stored = np.concatenate([parts[1].vectors(np.array([2])), parts[0].vectors(np.array([0]))])
            assert np.array_equal(both.vectors(mixed)[:2], stored)
            assert [one.item.captions[0] for one in both.locate(mixed)] == ["t5.0", "t0.0", "t3.0"]
            assert [one.row for one in both.locate(mixed)] == mixed.tolist()
            assert np.array_equal(both.block(5, 7), np.concatenate([parts[0].block(5, 6), parts[1].block(0, 1)]))
            assert len(both.block(4, 4)) == 0
            located = both.locate([7])[0].item
            assert both.rows_of(located.id, Modality.TEXT).tolist() == [10]
            assert both.rows_of("nobody", Modality.TEXT).tolist() == []
            assert [known.name for known in both.items()] == [f"t{i}" for i in range(6)]
            assert both.present(["nobody", located.id]) == {located.id}
            with pytest.raises(UsageError):
                both.vectors(np.array([12]))


def test_threads_and_kinds_that_only_estimate_give_the_same_answers(tmp_path):
    """What is merged is the cosine of the stored row, and shards side by side are shards one after another."""
    from concurrent.futures import ThreadPoolExecutor

    class Rough(ExactIndex):
        """Finds the right rows and says wrong scores, as an index of compressed rows does."""

        def search(self, queries, k, **which):
            scores, rows = super().search(queries, k, **which)
            return scores * np.float32(0.9), rows

    paths = [index(tmp_path / name, [Thing(f"{name}{i}", None, (i,)) for i in range(20)]) for name in "abc"]
    stores = [IndexStore.open(str(path)) for path in paths]
    with ShardedSnapshot([store.snapshot() for store in stores]) as snapshot, ThreadPoolExecutor(2) as pool:
        blocks = [part.block(0, 20) for part in snapshot.parts]
        kinds = [Rough(blocks[0]), ExactIndex(blocks[1]), Rough(blocks[2])]
        plain = ExactIndex(snapshot.block(0, 60))
        queries = EXACT[:4].astype(np.float32)
        for k in (1, 7, 60, 80):
            expected = plain.search(queries, k)
            for found in (
                ShardedIndex(kinds, snapshot).search(queries, k),
                ShardedIndex(kinds, snapshot, pool=pool).search(queries, k),
            ):
                assert np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0])
        some = np.array([3, 21, 22, 59])
        found = ShardedIndex(kinds, snapshot).search(queries, 9, allowed=some)
        assert np.array_equal(found[1], plain.search(queries, 9, allowed=some)[1])
        found = ShardedIndex(kinds, snapshot).search(queries, 60, excluded=some)
        assert np.array_equal(found[1], plain.search(queries, 60, excluded=some)[1])


def test_a_skipped_item_hides_nobody(tmp_path):
    """Only what is there counts: a file that one shard could not read may be found in another."""
    from mmsearch.store import Skip
    from mmsearch.types import Skipped, SkipReason

    source = Source("table", "t0", None, None)
    broken = index(tmp_path / "broken", [Thing("other", 1)])
    with IndexStore.open(str(broken), write=True) as store:
        store.commit(Batch(skips=[Skip(source, Skipped("t0", SkipReason.DAMAGED))]))
        store.finish()
    fine = index(tmp_path / "fine", [Thing("t0", 0)])
    with Searcher.open([broken, fine]) as searcher:
        assert len(searcher.search_vector(EXACT[0].astype(np.float32))) == 2
    with IndexStore.open(str(broken)) as store, store.snapshot() as snapshot:
        assert sum(known.state is ItemState.SKIPPED for known in snapshot.items(state=None)) == 1


PAIRS = tuple(itertools.combinations(COLORS, 2))


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory) -> tuple[list[Path], Path]:
    """Pictures of two colours, some with captions, in three indexes with stored tokens, and all in one."""
    at = tmp_path_factory.mktemp("stages")
    for number, (left, right) in enumerate(PAIRS):
        path = at / f"photos{number % 3}" / f"{left}-{right}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.new("RGB", (20, 20), COLORS[left])
        image.paste(COLORS[right], (10, 0, 20, 20))
        image.save(path)
        if number % 4 == 0:
            path.with_suffix(".txt").write_text(f"{left} and {right}\n{right} words\n")
    for number in range(3):
        build(
            [at / f"photos{number}"], at / f"s{number}", encoder=ColorEncoder(), workers=1, tokens=True,
            reranker=ColorReranker(),
        )  # fmt: skip
    several = [at / f"s{number}" for number in range(3)]
    merge(several, at / "one")
    return several, at / "one"


def ranked(hits: Sequence) -> list[tuple]:
    """Hits of equal scores in one order: which of them is first is not promised."""
    return sorted(
        (-round(hit.score, 5), hit.item.id, hit.modality, str(hit.caption), sorted(hit.parts)) for hit in hits
    )


@pytest.mark.parametrize("to", ["image", "text", "any"])
@pytest.mark.parametrize("wish", [28, "auto", Rerank(28, min_probability=0.5), Rerank(28, cut="auto")], ids=str)
@pytest.mark.parametrize("words", ["red and blue", "white and black", "yellow words"])
def test_a_second_stage_over_shards_answers_as_over_one_index(two_stages, words, wish, to):
    """Candidates of all shards compete together, read from whichever shard has their tokens; no file is opened."""
    several, one = two_stages
    readers = ColorReranker(), ColorReranker()
    with (
        Searcher.open(several, encoder=ColorEncoder(), reranker=readers[0]) as sharded,
        Searcher.open(one, encoder=ColorEncoder(), reranker=readers[1]) as single,
    ):
        found, expected = (s.search_text(words, k=28, rerank=wish, to=to) for s in (sharded, single))
    assert ranked(found) == ranked(expected) and found.notes == expected.notes
    assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    assert readers[0].read == readers[1].read == 0
    if to == "image":
        assert found and all(hit.probability is not None for hit in found)


def test_only_the_depth_of_all_shards_together_competes(two_stages):
    """Not the depth of each: three candidates are the three best of all, whichever shard they are in."""
    several, _ = two_stages
    with Searcher.open(several, encoder=ColorEncoder(), reranker=ColorReranker()) as searcher:
        first = [hit.item.id for hit in searcher.search_text("white and black", k=3)]
        again = [hit.item.id for hit in searcher.search_text("white and black", k=3, rerank=3)]
    assert set(again) == set(first)


def test_a_picture_finds_captions_of_all_shards_re_ranked(two_stages):
    """The other direction: one picture read with each caption."""
    several, one = two_stages
    picture = np.asarray(Image.new("RGB", (16, 16), COLORS["red"]))
    answers = []
    for paths in (several, one):
        with Searcher.open(paths, encoder=ColorEncoder(), reranker=ColorReranker()) as searcher:
            answers.append(searcher.search_image(picture, k=9, to="text", rerank=14))
    assert ranked(answers[0]) == ranked(answers[1]) and answers[0][0].probability is not None


def test_a_shard_without_tokens_has_its_files_read_where_a_depth_is_named(two_stages, tmp_path):
    """And "auto" leaves the first stage as it is, as with one index that lacks so many."""
    several, _ = two_stages
    bare = shutil.copytree(several[0], tmp_path / "bare")
    for file in bare.glob("tokens.sqlite*"):
        file.unlink()
    reader = ColorReranker()
    with Searcher.open([bare, *several[1:]], encoder=ColorEncoder(), reranker=reader) as searcher:
        assert searcher.search_text("red and blue", k=1, rerank="auto")[0].probability is None
        hits = searcher.search_text("red and blue", k=1, rerank=28)
    assert Path(str(hits[0].item.path)).stem == "red-blue"
    assert reader.read == len([number for number in range(len(PAIRS)) if number % 3 == 0])


def test_merging_copies_tokens_of_one_re_ranker_only(two_stages, tmp_path):
    """What several have from different ones is left out and said; what is copied is what it was."""
    several, one = two_stages
    kinds = [ColorReranker().tokens_identity]
    with TokenStore.open(one, identity=kinds[0]) as tokens:
        assert tokens.count == len(PAIRS)
    other = shutil.copytree(several[0], tmp_path / "other")
    with TokenStore.open(other, identity="another", write=True) as tokens:
        tokens.put([(bytes(16), b"x")])
    report = merge([several[1], other], tmp_path / "out")
    assert report.tokens == 0 and "different re-rankers" in report.notes[0]
    assert not (tmp_path / "out" / "tokens.sqlite").exists()
    parts = split(one, tmp_path / "parts", shards=2)
    assert parts.tokens == len(PAIRS)
    with Searcher.open(tmp_path / "parts", encoder=ColorEncoder(), reranker=ColorReranker()) as searcher:
        assert searcher.search_text("red and blue", k=1, rerank="auto")[0].probability is not None


def test_a_shell_may_name_everything_in_a_folder_of_shards(tmp_path):
    """`parts/*` has the list of shards among the directories; alone it is no index."""
    for name in ("shard-00", "shards.json"):
        (tmp_path / name).mkdir() if name == "shard-00" else (tmp_path / name).write_text("{}")
    both = [str(tmp_path / "shard-00"), str(tmp_path / "shards.json")]
    assert directories(both) == both[:1]
    assert directories(both[1:]) == both[1:]
