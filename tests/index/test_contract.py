"""The contract of every index kind, and of the stored index made of derived files and rows."""

from __future__ import annotations

import numpy as np
import pytest

from mmsearch.errors import IndexDamagedError, UsageError
from mmsearch.index.base import _KINDS, index_kind
from mmsearch.index.derived import Positions, neighbours
from mmsearch.index.exact import ExactIndex
from mmsearch.index.faiss import FaissFlat
from mmsearch.similarity import normalise, top_k

KINDS = sorted(_KINDS)


def unit_rows(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    """Unit rows that half precision holds exactly enough: what a store hands out."""
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return normalise(rows).astype(np.float16).astype(np.float32) if n else rows


def same_answers(found, expected, scores_of_all) -> None:
    """Equal scores, and equal rows wherever a score is nobody else's."""
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
    for line, (rows, right) in enumerate(zip(found[1], expected[1], strict=True)):
        for row, other in zip(rows, right, strict=True):
            if row != other:
                assert abs(scores_of_all[line, row] - scores_of_all[line, other]) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (300, 10), (300, 300), (5000, 20)])
def test_it_agrees_with_the_dumb_search(kind, n, k):
    """Every row against every query, sorted: the same scores and, but for ties, the same rows."""
    rows, queries = unit_rows(n), unit_rows(5, seed=1)
    scores = queries @ rows.T
    same_answers(index_kind(kind).build(rows).search(queries, k), top_k(scores, k), scores)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_come_with_the_lower_row_first(kind):
    """All duplicates are there, in order."""
    rows = np.repeat(unit_rows(3), 4, axis=0)
    _, found = index_kind(kind).build(rows).search(rows[:1], 12)
    assert found[0, :4].tolist() == [0, 1, 2, 3]
    assert sorted(found[0].tolist()) == list(range(12))


@pytest.mark.parametrize("kind", KINDS)
def test_k_beyond_the_rows_is_padded(kind):
    """Row -1 and score -inf, also for an index of nothing and for no queries."""
    index = index_kind(kind).build(unit_rows(3))
    scores, rows = index.search(unit_rows(2, seed=1), 5)
    assert rows.shape == scores.shape == (2, 5)
    assert (rows[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    assert np.isfinite(scores[:, :3]).all()
    assert index.search(np.empty((0, 16), np.float32), 5)[1].shape == (0, 5)
    empty = index_kind(kind).build(np.empty((0, 16), np.float32))
    assert (empty.search(unit_rows(1), 2)[1] == -1).all()
    assert (empty.size, empty.dim) == (0, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_queries_that_nobody_normalised_are_refused(kind):
    """Their inner products would look like cosines."""
    with pytest.raises(UsageError, match="norm"):
        index_kind(kind).build(unit_rows(4) * 2)
    index = index_kind(kind).build(unit_rows(4))
    with pytest.raises(UsageError, match="norm"):
        index.search(unit_rows(1) * 3, 1)
    with pytest.raises(UsageError, match="shape"):
        index.search(unit_rows(1, d=8), 1)
    with pytest.raises(UsageError):
        index.search(np.full((1, 16), np.nan, np.float32), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, -1, 10**9])
def test_a_k_that_means_nothing_is_refused(kind, k):
    """k = 0, negative, or an answer of gigabytes."""
    with pytest.raises(UsageError, match="k"):
        index_kind(kind).build(unit_rows(4)).search(unit_rows(1), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_only_allowed_rows_are_returned(kind, share):
    """The best of them, and padding when there are fewer than k; rows that do not exist are no harm."""
    rows, queries = unit_rows(500), unit_rows(4, seed=1)
    allowed = np.flatnonzero(np.random.default_rng(2).random(500) < share)
    scores = queries @ rows.T
    hidden = scores.copy()
    hidden[:, np.setdiff1d(np.arange(500), allowed)] = -np.inf
    expected = top_k(hidden, 20)
    expected[1][np.isneginf(expected[0])] = -1
    found = index_kind(kind).build(rows).search(queries, 20, allowed=np.append(allowed, [-4, 10_000]))
    same_answers(found, expected, scores)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_answers_the_same(kind, tmp_path):
    """Save, load, search."""
    queries = unit_rows(3, seed=1)
    index = index_kind(kind).build(unit_rows(200))
    index.save(tmp_path / "file")
    loaded = index_kind(kind).load(tmp_path / "file")
    assert (loaded.kind, loaded.dim, loaded.size) == (kind, 16, 200)
    np.testing.assert_array_equal(loaded.search(queries, 9)[1], index.search(queries, 9)[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [[], [3], list(range(0, 500, 7)), list(range(0, 500, 2)), list(range(500))])
@pytest.mark.parametrize("allowed", [None, list(range(100, 400))])
def test_excluded_rows_are_never_returned(kind, gone, allowed):
    """Whether few or many are excluded, alone or beside rows that are allowed; one array after another."""
    rows, queries, excluded = unit_rows(500), unit_rows(4, seed=1), np.array(gone, np.int64)
    scores = queries @ rows.T
    hidden = scores.copy()
    hidden[:, excluded] = -np.inf
    if allowed is not None:
        hidden[:, np.setdiff1d(np.arange(500), allowed)] = -np.inf
    expected = top_k(hidden, 20)
    expected[1][np.isneginf(expected[0])] = -1
    index = index_kind(kind).build(rows)
    for _ in range(2):
        same_answers(index.search(queries, 20, allowed=allowed, excluded=excluded), expected, scores)
        others = expected[1][:, 0][expected[1][:, 0] >= 0]
        assert not np.isin(index.search(queries, 20, excluded=np.unique(others))[1], others).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["empty", "text", "short"])
def test_a_file_that_is_no_index_is_named_as_damaged(kind, damage, tmp_path):
    """Never a crash, and the file's name is in the message."""
    path = tmp_path / "file"
    index_kind(kind).build(unit_rows(50)).save(path)
    path.write_bytes({"empty": b"", "text": b"hello" * 50, "short": path.read_bytes()[:60]}[damage])
    with pytest.raises(IndexDamagedError, match="file"):
        index_kind(kind).load(path)


def test_a_search_does_not_depend_on_the_number_of_queries():
    """One query alone and the same among others: the same rows."""
    rows, queries = unit_rows(2000), unit_rows(40, seed=1)
    for kind in KINDS:
        index = index_kind(kind).build(rows)
        together = index.search(queries, 10)[1]
        alone = np.concatenate([index.search(queries[i : i + 1], 10)[1] for i in range(40)])
        np.testing.assert_array_equal(together, alone)


def test_the_derived_file_is_written_without_holding_the_rows(tmp_path):
    """Header and rows, piece by piece: byte for byte what FAISS itself writes."""
    rows = unit_rows(1000)
    blocks = [rows[:300].astype("<f2"), rows[300:].astype("<f2")]
    pieces = list(FaissFlat.chunks(iter(blocks), dim=16, count=1000))
    assert len(pieces) == 3
    FaissFlat.build(rows).save(tmp_path / "whole")
    assert b"".join(pieces) == (tmp_path / "whole").read_bytes()
    with pytest.raises(UsageError, match="1001"):
        list(FaissFlat.chunks(iter(blocks), dim=16, count=1001))


def test_positions_and_rows_are_each_others_inverse():
    """Over ranges with gaps, also for rows in no range."""
    positions = Positions([(2, 5), (9, 10), (20, 24)])
    rows = np.array([2, 3, 4, 9, 20, 21, 22, 23])
    assert positions.rows(np.arange(8)).tolist() == rows.tolist()
    assert positions.of(rows).tolist() == list(range(8))
    assert positions.of(np.array([0, 1, 5, 8, 10, 19, 24, 99])).tolist() == []
    assert positions.rows(np.array([-1, 3])).tolist() == [-1, 9]


class FakeSnapshot:
    """A store's snapshot, as much of it as a search needs: pictures at `spans`, some of them dead."""

    dim = 16

    def __init__(self, spans, dead=(), derived=None, path=None):
        self._rows = unit_rows(spans[-1][1] if spans else 0)
        self.row_count = len(self._rows)
        self._spans, self._dead, self._derived, self._path = spans, np.array(dead, np.int64), derived, path

    def ranges(self, modality):
        return self._spans

    def dead_rows(self, modality):
        return self._dead

    def block(self, start, stop):
        return self._rows[start:stop].astype(np.float16)

    def scattered(self):
        return self.block(0, self.row_count)

    def vectors(self, rows):
        return self._rows[rows]

    def derived(self, modality):
        return self._derived

    def intact(self, derived):
        return self._path


class Covers:
    def __init__(self, rows, count, kind="faiss-flat", facts=None):
        self.rows, self.count, self.kind, self.facts = rows, count, kind, facts or {}


def derived_file(path, snapshot, rows):
    """A derived file of the snapshot's rows below `rows`."""
    spans = [(a, min(b, rows)) for a, b in snapshot.ranges(None) if a < rows]
    held = np.concatenate([snapshot.block(a, b) for a, b in spans])
    path.write_bytes(b"".join(FaissFlat.chunks([held], dim=16, count=len(held))))
    snapshot._derived, snapshot._path = Covers(rows, len(held)), str(path)


SPANS = [(0, 100), (150, 250), (300, 9000)]


@pytest.mark.parametrize("covered", [None, 9000, 5000, 200, 50])
@pytest.mark.parametrize("dead", [[], [1, 160, 8999], list(range(0, 9000, 2))])
@pytest.mark.parametrize("allowed", [None, [0, 1, 2, 120, 160, 161, 8998, 8999, 9999], list(range(0, 9000, 3))])
def test_a_stored_index_answers_as_if_only_the_living_rows_existed(covered, dead, allowed, tmp_path):
    """With, without, or with a stale derived file; with any rows dead; with any rows allowed."""
    spans = [0, 1, 2]
    dead = [row for row in dead if any(a <= row < b for a, b in SPANS)]
    snapshot = FakeSnapshot(SPANS, dead)
    if covered is not None:
        derived_file(tmp_path / "file", snapshot, covered)
    there = np.concatenate([np.arange(a, b) for a, b in SPANS])
    there = np.setdiff1d(there, dead)
    if allowed is not None:
        there = np.intersect1d(there, allowed)
    queries = unit_rows(len(spans), seed=3)
    scores = queries @ snapshot.vectors(np.arange(9000)).T
    hidden = np.full_like(scores, -np.inf)
    hidden[:, there] = scores[:, there]
    expected = top_k(hidden, 12)
    expected[1][np.isneginf(expected[0])] = -1
    index = neighbours(snapshot, "image", small=0)
    found = index.search(queries, 12, allowed=None if allowed is None else np.array(allowed))
    same_answers(found, expected, scores)
    assert index.kind == ("exact" if covered is None else "faiss-flat")
    assert index.size == sum(b - a for a, b in SPANS) - len(dead)


@pytest.mark.parametrize("n", [0, 1])
def test_a_stored_index_of_nothing_or_one_row_has_answers(n):
    """Padding, not errors."""
    index = neighbours(FakeSnapshot([(0, n)] if n else []), "image")
    scores, rows = index.search(unit_rows(2, seed=1), 3)
    assert rows.tolist() == ([[0, -1, -1]] * 2 if n else [[-1] * 3] * 2)
    assert np.isneginf(scores[:, n:]).all()


@pytest.mark.parametrize("how", ["count", "garbage", "missing", "other dimension"])
def test_a_derived_file_that_cannot_be_relied_on_is_passed_over(how, tmp_path):
    """The rows themselves answer, and nobody sees an error."""
    snapshot = FakeSnapshot([(0, 50)])
    derived_file(tmp_path / "file", snapshot, 50)
    if how == "count":
        snapshot._derived = Covers(50, 49)
    elif how == "garbage":
        (tmp_path / "file").write_bytes(b"IxSQ" + bytes(300))
    elif how == "missing":
        snapshot._path = None
    else:
        (tmp_path / "file").write_bytes(b"".join(FaissFlat.chunks([unit_rows(50, 8).astype("<f2")], dim=8, count=50)))
    index = neighbours(snapshot, "image", small=0)
    assert index.kind == "exact"
    assert index.search(snapshot.vectors(np.array([7])), 1)[1].tolist() == [[7]]


def test_a_small_index_is_searched_without_the_derived_file(tmp_path):
    """Importing faiss takes longer than the search."""
    snapshot = FakeSnapshot([(0, 50)])
    derived_file(tmp_path / "file", snapshot, 50)
    assert neighbours(snapshot, "image").kind == "exact"


def test_scores_never_leave_the_range_of_a_cosine():
    """Rows rounded to half precision can be a little longer than 1."""
    snapshot = FakeSnapshot([(0, 2000)])
    rows = snapshot.vectors(np.arange(2000))
    scores, _ = neighbours(snapshot, "image").search(normalise(rows), 1)
    assert scores.max() <= 1.0


def test_unknown_kinds_are_named():
    """With the names there are."""
    with pytest.raises(UsageError, match="exact or faiss-flat"):
        index_kind("nonsense")


def test_exact_rows_on_disk_and_in_memory_give_the_same(monkeypatch):
    """Half-precision rows too big to keep are looked at block by block."""
    rows = unit_rows(3000)
    queries = unit_rows(3, seed=1)
    whole = ExactIndex(rows).search(queries, 10)
    monkeypatch.setattr("mmsearch.index.exact._KEEP_BYTES", 0)
    monkeypatch.setattr("mmsearch.index.exact._BLOCK_BYTES", 16 * 4 * 700)
    blocks = ExactIndex(rows.astype(np.float16)).search(queries, 10)
    np.testing.assert_array_equal(whole[1], blocks[1])
    np.testing.assert_allclose(whole[0], blocks[0], atol=1e-6)
