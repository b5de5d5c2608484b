"""Metrics where their values are known, and ranks against the dumb loop that cannot be wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import UsageError
from mmsearch.evaluate.metrics import (
    Ranked,
    hit_at,
    interval,
    ndcg_at,
    rank_groups,
    recall_at,
    reciprocal_rank_at,
)
from mmsearch.similarity import normalise


def unit_rows(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((n, d)))


def groups(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def dumb_ranks(queries, candidates, query_groups, candidate_groups) -> list[list[int]]:
    """Sort every list in full; rivals that tie stand before relevant candidates."""
    out = []
    for query, group in zip(queries, query_groups, strict=True):
        scores = [float(query @ candidate) for candidate in candidates]
        order = sorted(range(len(scores)), key=lambda c: (-round(scores[c], 5), candidate_groups[c] == group))
        out.append([rank for rank, c in enumerate(order, 1) if candidate_groups[c] == group])
    return out


def as_lists(ranked: Ranked) -> list[list[int]]:
    return [ranked.ranks[a:b].tolist() for a, b in zip(ranked.starts[:-1], ranked.starts[1:], strict=True)]


def test_hit_and_recall_differ_where_several_candidates_are_relevant():
    """hit@k asks for one of the five captions, recall@k for all of them."""
    ranked = Ranked.of([[1, 4, 9, 20, 30], [6]])
    assert hit_at(ranked, 5).tolist() == [1.0, 0.0]
    assert recall_at(ranked, 5).tolist() == [0.4, 0.0]
    assert recall_at(ranked, 30).tolist() == [1.0, 1.0]


def test_reciprocal_rank_is_zero_beyond_its_depth():
    """MRR@10 counts rank 10 as a tenth and rank 11 as nothing."""
    assert reciprocal_rank_at(Ranked.of([[2, 3], [10], [11]]), 10).tolist() == [0.5, 0.1, 0.0]


def test_ndcg_has_its_textbook_values():
    """1 for a perfect list, 1 / log2(4) = 0.5 for one relevant candidate at rank 3, 0 beyond the depth."""
    assert ndcg_at(Ranked.of([[1, 2, 3], [3], [11]]), 10).tolist() == [1.0, 0.5, 0.0]


def test_ndcg_is_perfect_when_more_are_relevant_than_fit():
    """Twelve relevant candidates at ranks 1..12 fill the first ten: nothing better is possible."""
    assert ndcg_at(Ranked.of([list(range(1, 13))]), 10).tolist() == [pytest.approx(1.0)]


@pytest.mark.parametrize("metric", [hit_at, recall_at, reciprocal_rank_at, ndcg_at])
def test_a_depth_below_one_is_refused(metric):
    """k = 0 is a mistake, not a score of zero."""
    with pytest.raises(UsageError):
        metric(Ranked.of([[1]]), 0)


def test_a_query_without_relevant_candidates_is_refused():
    """It has no rank; leaving it out silently would raise every mean."""
    with pytest.raises(UsageError, match="query 1"):
        Ranked.of([[1], []])
    with pytest.raises(UsageError):
        rank_groups(unit_rows(2), unit_rows(1), query_groups=groups(0, 1), candidate_groups=groups(0))


def test_the_own_embedding_comes_first():
    """Queries equal to their candidates rank 1, whatever the order of the candidates."""
    rows = unit_rows(50)
    shuffled = np.random.default_rng(1).permutation(50)
    ranked = rank_groups(rows, rows[shuffled], query_groups=np.arange(50), candidate_groups=shuffled.astype(np.int64))
    assert ranked.ranks.tolist() == [1] * 50


def test_equal_scores_get_the_worst_rank():
    """A model that cannot tell anything apart hits nothing at 1, instead of everything."""
    same = np.repeat(unit_rows(1), 4, axis=0)
    ranked = rank_groups(same, same, query_groups=np.arange(4), candidate_groups=np.arange(4))
    assert ranked.ranks.tolist() == [4, 4, 4, 4]


def test_relevant_candidates_that_tie_do_not_push_each_other_out():
    """Two identical captions of one image take ranks 1 and 2: neither is the other's rival."""
    rows = unit_rows(2)
    ranked = rank_groups(rows[:1], rows[[0, 0, 1]], query_groups=groups(0), candidate_groups=groups(0, 0, 1))
    assert ranked.ranks.tolist() == [1, 2]


def test_a_rounding_error_is_a_tie():
    """Scores 3e-8 apart come from the shape of the matrix product, not from the model."""
    query = np.array([[1.0, 0.0]], np.float32)
    half = np.float32(0.5)
    candidates = np.array([[half, 0.8660254], [np.nextafter(half, np.float32(0)), 0.8660254]], np.float32)
    for own in (0, 1):
        ranked = rank_groups(query, candidates, query_groups=groups(own), candidate_groups=groups(0, 1))
        assert ranked.ranks.tolist() == [2]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 7),
    captions=st.lists(st.integers(1, 4), min_size=7, max_size=7),
    block=st.integers(1, 9),
)
def test_ranks_agree_with_the_full_sort_for_every_block_size(seed, images, captions, block):
    """Blocks, several captions, ties and both directions give what sorting whole lists gives."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), captions[:images]).astype(np.int64)
    few = normalise(np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]], float))  # ties are common
    image_rows = few[random.integers(0, 4, images)]
    text_rows = few[random.integers(0, 4, len(owners))]
    for q, c, qg, cg in (
        (image_rows, text_rows, np.arange(images), owners),
        (text_rows, image_rows, owners, np.arange(images)),
    ):
        ranked = rank_groups(q, c, query_groups=qg, candidate_groups=cg, block=block)
        assert as_lists(ranked) == dumb_ranks(q, c, qg, cg)


def test_the_interval_of_equal_values_is_that_value():
    """Nothing varies, so nothing is uncertain."""
    assert interval(np.ones(20), np.arange(20)) == (1.0, 1.0)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    """Of 200 samples of a coin with p = 0.3, about 95 % of the intervals hold 0.3 (at least 88 % here)."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        values = (random.random(150) < 0.3).astype(float)
        low, high = interval(values, np.arange(150), draws=200, seed=trial)
        held += low <= 0.3 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_captions_of_one_image_do_not_count_as_independent():
    """Five copies of every value leave the interval as wide as it was; unclustered it would shrink by √5."""
    values = (np.random.default_rng(3).random(200) < 0.5).astype(float)
    alone = interval(values, np.arange(200))
    copies = interval(np.repeat(values, 5), np.repeat(np.arange(200), 5))
    naive = interval(np.repeat(values, 5), np.arange(1000))
    width = [high - low for low, high in (alone, copies, naive)]
    assert width[1] == pytest.approx(width[0], rel=0.01)
    assert width[2] < 0.6 * width[0]


def test_values_without_their_clusters_are_refused():
    """A shorter list of clusters would silently pair values with other images."""
    with pytest.raises(UsageError):
        interval(np.ones(3), np.arange(2))
