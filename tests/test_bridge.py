"""Queries of one model over rows of another: what the map is, what it costs, and that searches use it rightly."""

from __future__ import annotations

import numpy as np
import pytest
from reindex_kit import turn

from mmsearch.bridge import Map, agreement, fit, procrustes, reduced, ridge
from mmsearch.bridge_cost import Pairs, fitted, found_again
from mmsearch.bridged import BridgedIndex
from mmsearch.errors import UsageError
from mmsearch.index.exact import ExactIndex
from mmsearch.similarity import normalise


def rows(count: int, dim: int = 8, *, seed: int = 0) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((count, dim)))


def noisy(clean: np.ndarray, share: float, *, seed: int = 1) -> np.ndarray:
    """Rows with noise of `share` of their length."""
    noise = np.random.default_rng(seed).standard_normal(clean.shape) * share / np.sqrt(clean.shape[1])
    return normalise(clean + noise)


def plain(matrix: np.ndarray) -> Map:
    lengths = np.linalg.norm(rows(500, matrix.shape[1], seed=9) @ matrix.T, axis=1)
    return Map(matrix.astype(np.float32), "given", 0, 0, 1.0, float(lengths.min()), float(lengths.max()))


def each(count: int) -> np.ndarray:
    return np.arange(count)


# The map


def test_a_rotation_is_found_exactly():
    """Rows that were only turned come back as they are, whatever the two dimensions."""
    old = rows(60)
    for dim in (8, 12):
        new = old @ turn(dim).T
        found, held = fit(old, new, queries=rows(20, dim), groups=each(60))
        assert found.method == "rotation"
        assert np.abs(found.matrix - turn(dim)).max() < 1e-4
        assert np.abs(held - new).max() < 1e-4
        assert found.agreement == pytest.approx(1.0, abs=1e-4)


def test_a_smaller_space_is_reached_as_well():
    """From 12 axes to 8: the rows lie in 8 of them."""
    small = rows(60)
    found, _ = fit(small @ turn(12).T, small, queries=rows(20), groups=each(60))
    assert found.matrix.shape == (8, 12)
    assert np.abs(found.carry(small @ turn(12).T) - small).max() < 1e-4


def test_few_noisy_pairs_get_a_rotation_and_a_stretched_space_a_regression():
    """What holds up on rows it was not fitted on is used, not what fits best."""
    few = rows(24, 16)
    assert fit(few, noisy(few, 0.3), queries=rows(40, 16, seed=5), groups=each(24))[0].method == "rotation"
    stretch = np.diag(np.linspace(0.2, 3.0, 16)).astype(np.float32)
    many = rows(400, 16)
    stretched = normalise(many @ stretch)
    assert fit(many, stretched, queries=rows(40, 16, seed=5), groups=each(400))[0].method.startswith("ridge")


def test_a_reduced_map_is_the_nearest_of_its_rank_where_the_rows_are():
    """Nearer than the map cut to its largest directions, which may be such that no row lies in."""
    flat = rows(80, 12) * np.linspace(0.05, 2.0, 12).astype(np.float32)
    matrix = np.random.default_rng(4).standard_normal((9, 12)).astype(np.float32)
    kept = reduced(matrix, flat, rank=3)
    left, sizes, right = np.linalg.svd(matrix)
    cut = (left[:, :3] * sizes[:3]) @ right[:3]
    assert np.linalg.matrix_rank(kept, tol=1e-4) == 3
    assert np.linalg.norm(flat @ (kept - matrix).T) < 0.9 * np.linalg.norm(flat @ (cut - matrix).T)


def test_the_families_are_what_their_names_say():
    """Procrustes keeps lengths; ridge without strength is least squares, with much of it next to nothing."""
    old, new = rows(50), rows(50, 6, seed=5)
    orthogonal = procrustes(old, new)
    assert np.allclose(orthogonal @ orthogonal.T, np.eye(6), atol=1e-5)
    assert np.allclose(ridge(old, new, strength=0.0), np.linalg.lstsq(old, new, rcond=None)[0].T, atol=1e-4)
    assert np.linalg.norm(ridge(old, new, strength=1e6)) < 1e-4


def test_what_a_fold_gets_was_not_fitted_on_it():
    """Rows without any relation are not learned by heart: on rows it never saw the map agrees with nothing."""
    old, new = rows(40, 32), rows(40, 32, seed=7)
    found, held = fit(old, new, queries=rows(50, 32, seed=8), groups=each(40))
    assert abs(found.agreement) < 0.3
    assert agreement(rows(50, 32, seed=8), held, new) == pytest.approx(found.agreement)
    assert np.einsum("nd,nd->n", found.carry(old), new).mean() > np.einsum("nd,nd->n", held, new).mean() + 0.2


def test_what_is_alike_is_in_one_fold():
    """Five captions of a picture would give each other's answer away."""
    old, new = np.repeat(rows(20, 32), 5, axis=0), np.repeat(rows(20, 32, seed=7), 5, axis=0)
    apart = fit(old, new, queries=rows(50, 32, seed=8), groups=each(100))[0].agreement
    together = fit(old, new, queries=rows(50, 32, seed=8), groups=each(100) // 5)[0].agreement
    assert apart > 0.8
    assert together < 0.3


def test_too_few_pairs_are_refused():
    """Fifteen pictures say nothing about a space."""
    with pytest.raises(UsageError, match="16"):
        fit(rows(15), rows(15), queries=rows(3), groups=each(15))
    with pytest.raises(UsageError, match="16"):
        fit(rows(60), rows(60), queries=rows(3), groups=each(60) // 5)


def test_agreement_is_a_mean_correlation():
    """1 for the same rows, whatever is added to all scores of a query; -1 for their opposites."""
    true, queries = rows(30), rows(10, seed=2)
    assert agreement(queries, true, true, block=3) == pytest.approx(1.0)
    assert agreement(queries, -true, true) == pytest.approx(-1.0)


# The search


@pytest.mark.parametrize("k", [1, 7, 300])
def test_searching_backwards_finds_what_searching_bridged_rows_finds(k):
    """The dumb way: carry every row over and compare. Row lengths differ by a factor of ten here."""
    matrix = np.diag(np.linspace(0.3, 3.0, 8)).astype(np.float32) @ turn(8, seed=4)
    old, queries, one = rows(3000, seed=6), rows(12, seed=7), plain(matrix)

    class Stored:
        def vectors(self, wanted):
            return old[wanted]

    found = BridgedIndex(ExactIndex(old), Stored(), one).search(queries, k)
    right = ExactIndex(one.carry(old)).search(queries, k)
    assert np.array_equal(found[1], right[1])
    assert np.allclose(found[0], right[0], atol=1e-5)


def test_searches_of_nothing_and_of_more_than_there_is_are_padded():
    """k beyond the rows, and rows that may not be returned."""
    old, one = rows(5), plain(turn(8))

    class Stored:
        def vectors(self, wanted):
            return old[wanted]

    index = BridgedIndex(ExactIndex(old), Stored(), one)
    scores, found = index.search(rows(2, seed=3), 8)
    assert (found[:, 5:] == -1).all()
    assert np.isneginf(scores[:, 5:]).all()
    assert sorted(found[0, :5].tolist()) == [0, 1, 2, 3, 4]
    assert set(index.search(rows(1, seed=3), 3, allowed=np.array([2, 4]))[1][0].tolist()) == {2, 4, -1}
    with pytest.raises(UsageError):
        index.search(rows(1, 9), 1)


# The cost


def test_a_perfect_bridge_costs_nothing_and_a_useless_one_everything():
    """hit@k of old, new and bridged, and their differences, on rows of which all is known."""
    pictures = rows(200, 16)
    texts = noisy(pictures, 0.3)

    def cost(new_pictures, new_texts):
        of = Pairs(pictures, new_pictures, each(200), each(200))
        with_texts = Pairs(texts, new_texts, each(200), 200 + each(200))
        return fitted(of, with_texts, others=with_texts.only(np.zeros(200, bool)))[1]["text_to_image"]

    spin = np.linalg.qr(np.random.default_rng(2).standard_normal((16, 16)))[0]
    perfect = cost(normalise(pictures @ spin.T), normalise(texts @ spin.T))
    assert perfect["old"] == perfect["new"] == perfect["bridged"]
    assert perfect["bridged - new"]["hit@1"] == [0.0, 0.0, 0.0]
    unrelated = rows(200, 16, seed=11)
    useless = cost(unrelated, noisy(unrelated, 0.3))
    assert useless["new"]["hit@1"][0] > 0.9
    assert useless["bridged"]["hit@10"][0] < 0.2
    assert useless["bridged - new"]["hit@10"][2] < -0.5
    low, high = useless["bridged"]["hit@10"][1:]
    assert 0.0 <= low <= useless["bridged"]["hit@10"][0] <= high


def test_the_new_model_s_first_hit_is_looked_for_among_others():
    """Pictures do not find themselves; equal scores count as found later."""
    true = rows(50)
    assert found_again(true, true, true, own=True)["bridged"]["hit@1"] == [1.0, 1.0, 1.0]
    three = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]], np.float32)
    turned = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0]], np.float32)
    assert found_again(three, three, turned, own=True)["bridged"]["hit@1"][0] == 0.0
    assert found_again(three, three, turned, own=False)["bridged"]["hit@1"][0] == pytest.approx(1 / 3)
    assert found_again(rows(20, seed=3), true, np.tile(true[:1], (50, 1)), own=False)["bridged"]["hit@10"][0] == 0.0
