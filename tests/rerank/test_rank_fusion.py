"""Merging lists: known totals, ties by id, nothing lost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsearch.errors import UsageError
from mmsearch.rerank.rank_fusion import reciprocal_rank_fusion, weighted_fusion

IDS = st.lists(st.sampled_from("abcdefgh"), max_size=12)


def test_reciprocal_ranks_have_their_known_totals():
    """1 / 61 for each first place, 1 / 62 for each second."""
    fused = dict(reciprocal_rank_fusion([["a", "b"], ["a", "c"]]))
    assert fused == {"a": pytest.approx(2 / 61), "b": pytest.approx(1 / 62), "c": pytest.approx(1 / 62)}
    assert reciprocal_rank_fusion([["b"], ["a"]], constant=0) == [("a", 1.0), ("b", 1.0)]


def test_an_id_that_comes_twice_counts_once_and_takes_one_rank():
    """Two captions of one picture: the second adds nothing, nor does it push the next one down."""
    assert reciprocal_rank_fusion([["a", "a", "b"]]) == reciprocal_rank_fusion([["a", "b"]])


@given(st.lists(IDS, max_size=4), st.randoms(use_true_random=False))
def test_every_id_comes_back_once_best_first_and_the_order_of_lists_is_no_matter(lists, random):
    """Whatever the lists."""
    fused = reciprocal_rank_fusion(lists)
    assert sorted(one for one, _ in fused) == sorted({one for ids in lists for one in ids})
    assert [total for _, total in fused] == sorted((total for _, total in fused), reverse=True)
    random.shuffle(lists)
    again = dict(reciprocal_rank_fusion(lists))
    assert all(math.isclose(again[one], total) for one, total in fused)


def test_an_id_high_in_both_lists_beats_one_that_is_first_of_one():
    """What rank fusion is for."""
    assert reciprocal_rank_fusion([["a", "b"], ["c", "b"]])[0][0] == "b"


def test_min_max_takes_each_list_to_the_unit_interval():
    """Best 1, worst 0, absent 0; a list of equal scores says found or not."""
    fused = weighted_fusion([{"a": 10.0, "b": 20.0, "c": 15.0}, {"c": -0.1}], [1.0, 2.0])
    assert fused == [("c", 2.5), ("b", 1.0), ("a", 0.0)]


def test_standard_scores_have_mean_0_and_absent_ids_the_lowest():
    """1, 2, 3 have the standard scores -√1.5, 0, √1.5."""
    fused = dict(weighted_fusion([{"a": 1.0, "b": 2.0, "c": 3.0}, {"d": 7.0}], normalise="z"))
    edge = math.sqrt(1.5)
    assert fused == {"a": pytest.approx(-edge), "b": 0.0, "c": pytest.approx(edge), "d": pytest.approx(-edge)}


def test_comparable_scores_are_added_as_they_are():
    """An absent id gets the list's lowest, not 0, which may be a good score."""
    assert weighted_fusion([{"a": -1.0, "b": -2.0}, {"a": 3.0}], normalise="none") == [("a", 2.0), ("b", 1.0)]


def test_units_do_not_matter_once_normalised():
    """A list times 1000 and moved by 7 says the same."""
    lists = [{"a": 0.1, "b": 0.4, "c": 0.2}, {"a": 3.0, "d": 1.0}]
    moved = [{one: 1000 * score + 7 for one, score in lists[0].items()}, lists[1]]
    for normalise in ("min-max", "z"):
        first, second = (weighted_fusion(some, [0.3, 0.7], normalise=normalise) for some in (lists, moved))
        assert [one for one, _ in first] == [one for one, _ in second]
        assert [total for _, total in first] == pytest.approx([total for _, total in second])


def test_a_weight_of_0_silences_a_list_and_no_lists_are_an_empty_answer():
    """Its ids are still there, at the end."""
    assert weighted_fusion([{"a": 1.0, "b": 2.0}, {"a": 9.0, "c": 1.0}], [1, 0])[0] == ("b", 1.0)
    assert weighted_fusion([]) == reciprocal_rank_fusion([]) == []
    assert weighted_fusion([{}, {"a": 1.0}]) == [("a", 1.0)]


def test_what_cannot_be_merged_is_refused():
    """Unknown normalisers, weights that are none, scores without an order."""
    for call in (
        lambda: reciprocal_rank_fusion([["a"]], constant=-1),
        lambda: weighted_fusion([{"a": 1.0}], normalise="softmax"),
        lambda: weighted_fusion([{"a": 1.0}], [1.0, 2.0]),
        lambda: weighted_fusion([{"a": 1.0}], [-1.0]),
        lambda: weighted_fusion([{"a": 1.0}], [float("nan")]),
        lambda: weighted_fusion([{"a": float("nan")}]),
    ):
        with pytest.raises(UsageError):
            call()
