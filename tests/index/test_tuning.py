"""Parameters reach the overlap that is asked for, with the queries that are asked, and it is told how far that is."""

from __future__ import annotations

import numpy as np
import pytest
from index_kit import RowsOfFile, Told, clustered, off

from mmsearch.index.approximate import ApproximateIndex, Parameters
from mmsearch.index.building import build
from mmsearch.index.exact_answers import exact_answers, in_pieces, overlap
from mmsearch.index.layouts import layout_of
from mmsearch.index.tuning import Judged, Questions, tune, without_own

NONE = np.empty(0, np.int64)


def judged(rows, queries, *, own=None, dead=NONE):
    own = np.full(len(queries), -1) if own is None else own
    found = exact_answers(queries, rows.blocks(), 11, dead=dead)[1]
    return Judged(Questions(queries, own, "test"), without_own(found, own, 10))


def opened(rows, kind="ivf-pq-fs"):
    layout = layout_of(kind, n=rows.count, d=rows.dim)
    index = build(layout, rows, told=Told()).index
    stored, row_of = (rows.all if layout.rescore else None), rows.numbers
    return ApproximateIndex(index, kind=kind, parameters=Parameters(), stored=stored, row_of=row_of), layout.rescore


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return RowsOfFile(tmp_path_factory.mktemp("rows"), clustered(6000))


@pytest.mark.parametrize("kind", ["ivf-pq-fs", "ivf-flat", "hnsw-sq8", "rabitq"])
@pytest.mark.parametrize("target", [0.8, 0.97])
def test_the_target_is_reached_on_queries_that_took_no_part(rows, kind, target):
    """Within what 96 queries can tell (three standard errors)."""
    index, rescore = opened(rows, kind)
    found = tune(index, {"text": judged(rows, off(192, seed=4))}, target=target, excluded=NONE, rescore=rescore)
    assert found.reached
    assert found.overlap["text"] >= target - (0.12 if target == 0.8 else 0.04)
    assert index.parameters == found.parameters
    assert found.microseconds > 0


def test_texts_need_more_than_the_rows_themselves(rows):
    """The reason for all this: tuned on stored rows, the index misses what texts ask for."""
    index, _ = opened(rows, "ivf-flat")
    own = rows.sample(128, seed=3)
    stored = judged(rows, rows.vectors(own), own=own)
    by_rows = tune(index, {"image": stored}, target=0.95, excluded=NONE, rescore=False)
    texts = judged(rows, off(192, seed=4))
    missed = overlap(index.search(texts.questions.vectors, 10)[1], texts.right)
    by_texts = tune(index, {"text": texts}, target=0.95, excluded=NONE, rescore=False)
    assert missed < 0.95 <= by_texts.overlap["text"] + 0.03
    assert by_texts.parameters.probes > by_rows.parameters.probes


def test_the_hardest_sort_of_query_decides(rows):
    """Both reach the target, and both are told."""
    index, rescore = opened(rows)
    own = rows.sample(192, seed=3)
    asked = {"text": judged(rows, off(192, seed=4)), "image": judged(rows, rows.vectors(own), own=own)}
    found = tune(index, asked, target=0.9, excluded=NONE, rescore=rescore)
    assert min(found.overlap.values()) >= 0.86
    assert set(found.to_json()["overlap"]) == {"text", "image"}


def test_what_cannot_be_reached_is_said(rows):
    """Codes without rows to score again have a ceiling; the best that there is stands."""
    index, _ = opened(rows)
    index._stored = index._refined = None
    found = tune(index, {"text": judged(rows, off(192, seed=4))}, target=0.999, excluded=NONE, rescore=False)
    assert not found.reached
    assert index.parameters == found.parameters


def test_without_queries_it_looks_as_hard_as_it_can(rows):
    """Nobody can say then what less would miss."""
    index, rescore = opened(rows, "ivf-flat")
    tune(index, {}, target=0.95, excluded=NONE, rescore=rescore)
    assert overlap(index.search(off(50), 10)[1], exact_answers(off(50), rows.blocks(), 10, dead=NONE)[1]) == 1.0


def test_dead_rows_count_neither_as_right_nor_as_found(rows):
    """An index with half of its rows deleted is judged on the others."""
    index, rescore = opened(rows)
    dead = rows.numbers[::2]
    found = tune(index, {"text": judged(rows, off(192, seed=4), dead=dead)}, target=0.9, excluded=dead, rescore=rescore)
    assert found.overlap["text"] >= 0.86


def test_a_query_is_not_its_own_answer():
    """Wherever it stands among the answers; without it the last one goes."""
    found = np.array([[5, 1, 2], [1, 5, 2], [1, 2, 3]])
    assert without_own(found, np.array([5, 5, 5]), 2).tolist() == [[1, 2], [1, 2], [1, 2]]
    assert without_own(np.array([[5, -1, -1]]), np.array([5]), 2).tolist() == [[-1, -1]]


def test_exact_answers_come_from_all_blocks_whatever_their_size():
    """Joined to pieces or cut to them, dead rows left out, padded when there are too few."""
    rows = clustered(500)
    blocks = [(0, rows[:3].astype("<f2")), (3, rows[3:450].astype("<f2")), (700, rows[450:].astype("<f2"))]
    numbers = np.concatenate([np.arange(450), np.arange(700, 750)])
    for most in (1, 7, 10_000):
        pieces = list(in_pieces(blocks, most))
        assert np.concatenate([p[0] for p in pieces]).tolist() == numbers.tolist()
        assert max(len(p[0]) for p in pieces) <= most
    queries, dead = off(4), numbers[::3]
    scores, found = exact_answers(queries, blocks, 600, dead=dead)
    order = np.argsort(-(queries @ rows.T), axis=1)
    for line in range(4):
        right = [numbers[i] for i in order[line] if numbers[i] not in dead]
        assert found[line, : len(right)].tolist() == right
        assert (found[line, len(right) :] == -1).all()
    assert scores.shape == (4, 600)


def test_overlap_counts_what_is_there():
    """Known values; padding does not count."""
    assert overlap(np.array([[1, 2, 3]]), np.array([[3, 2, 9]])) == pytest.approx(2 / 3)
    assert overlap(np.array([[1, -1]]), np.array([[1, -1]])) == 1.0
