"""Nothing found is an answer: absent queries are turned away, present ones are kept, and the tail is cut."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import InputError, ModelError, UsageError
from mmsearch.rerank.cutoff import DEPTH, MARGIN, Cutoff, fit_cutoff


def queries(count, *, lead, seed, k=64):
    """Ranked scores on a level of each query's own; `lead`: how far one answer stands above the crowd, None: none."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        scores = random.normal(size=k) + 3 * random.normal()
        if lead is not None:
            scores[0] = np.median(scores) + lead + random.normal()
        found.append(np.sort(scores)[::-1])
    return found


@pytest.fixture(scope="module")
def cutoff() -> Cutoff:
    return fit_cutoff(queries(400, lead=5.0, seed=0), queries(400, lead=None, seed=1))


def shown(cutoff, lists) -> float:
    return float(np.mean([cutoff.decide(scores) > 0 for scores in lists]))


def test_present_queries_are_kept_and_absent_ones_turned_away(cutoff):
    """On queries it never saw, although the best score alone tells them apart badly (levels differ by query)."""
    present, absent = queries(400, lead=5.0, seed=2), queries(400, lead=None, seed=3)
    assert shown(cutoff, present) > 0.85
    assert shown(cutoff, absent) < 0.15
    best = [[scores[0] for scores in lists] for lists in (present, absent)]
    assert np.mean(np.array(best[1]) > np.quantile(best[0], 0.1)) > 0.3


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.97, 1.0])
def test_the_stated_share_of_present_queries_is_kept(keep):
    """At least `keep`, and the shares that it reports are what it does to the queries it was fitted on."""
    present, absent = queries(150, lead=3.0, seed=4), queries(90, lead=None, seed=5)
    fitted = fit_cutoff(present, absent, keep=keep)
    assert keep <= fitted.kept <= keep + 1 / 150
    assert (fitted.kept, fitted.rejected) == (shown(fitted, present), pytest.approx(1 - shown(fitted, absent)))


def test_keeping_more_turns_fewer_away():
    """One dial, one price."""
    present, absent = queries(200, lead=3.0, seed=4), queries(200, lead=None, seed=5)
    rejected = [fit_cutoff(present, absent, keep=keep).rejected for keep in (0.7, 0.9, 0.99)]
    assert rejected == sorted(rejected, reverse=True) and rejected[0] > rejected[-1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 100), more=st.floats(0, 5))
def test_a_better_best_hit_never_looks_more_absent(cutoff, seed, k, more):
    """Lists of any length; the rest of the list stays."""
    scores = np.sort(np.random.default_rng(seed).normal(size=k))[::-1]
    better = np.concatenate(([scores[0] + more], scores[1:]))
    assert cutoff.presence(better) >= cutoff.presence(scores)


def test_hits_stay_while_they_are_near_the_best():
    """A tenth of the best one's odds, where no labels say better; a prefix of the list."""
    sure = Cutoff((0.0,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0), 0.0, MARGIN, DEPTH, 1.0, 1.0)
    assert sure.decide([3.0, 3.0 - MARGIN + 1e-6, 3.0 - MARGIN - 1e-6, -9.0]) == 2
    assert sure.decide([3.0]) == 1
    assert sure.decide([0.0]) == 1
    assert sure.decide([-0.1]) == 0
    assert sure.decide([]) == 0


def test_the_margin_is_as_wide_as_right_hits_need():
    """Best right hits 0, 1, ..., 9 below the top: nine tenths of the queries need a margin of 8."""
    present = [np.array([20.0, 20.0 - below, 5.0, 4.0, 3.0, 2.0]) for below in range(10)]
    relevant = [np.array([below == 0, below > 0, False, False, False, True]) for below in range(10)]
    nothing = [np.zeros(6, bool)]
    fitted = fit_cutoff([*present, present[0]], queries(9, lead=None, seed=1, k=6), relevant=relevant + nothing)
    assert fitted.margin == pytest.approx(8.0)
    assert fit_cutoff(present, present, relevant=[np.zeros(6, bool)] * 10).margin == MARGIN


def test_scores_below_the_fitted_depth_are_not_looked_at(cutoff):
    """A longer list has a lower median; it must not make every query look present."""
    scores = np.sort(np.random.default_rng(0).normal(size=DEPTH))[::-1]
    longer = np.concatenate([scores, np.full(500, scores[-1] - 3)])
    assert cutoff.presence(longer) == cutoff.presence(scores)


def test_short_and_flat_lists_are_judged_by_what_they_have(cutoff):
    """One hit, equal scores: a number, no warning, no NaN."""
    with np.errstate(all="raise"):
        for scores in ([1.0], [2.0, 1.0], [1.0] * 70):
            assert np.isfinite(cutoff.presence(scores))
        short = [[float(level)] for level in range(20)]
        fitted = fit_cutoff(short[8:], short[:12])
    assert fitted.decide([19.0]) == 1 and fitted.decide([0.0]) == 0


def test_what_nothing_tells_apart_keeps_its_share():
    """The same queries as present and absent: no crash, and present queries still come first."""
    same = queries(50, lead=None, seed=0)
    fitted = fit_cutoff(same, same)
    assert fitted.kept >= 0.9 and fitted.rejected == pytest.approx(1 - fitted.kept)


def test_where_all_speaks_against_it_the_best_score_alone_decides():
    """Absent queries with the better lists in every respect: not believed backwards, and still one of the three."""
    fitted = fit_cutoff([[1.0, 1.0, 1.0, 1.0, 0.9]], [[9.0, 1.0, 1.0, 1.0, 0.9]])
    assert fitted.weights == (1.0, 0.0, 0.0)
    assert fitted.decide([1.0, 1.0, 1.0, 1.0, 0.9]) == 5 and fitted.decide([0.5, 0.1, 0.1, 0.1, 0.1]) == 0


def test_lists_that_cannot_be_judged_are_refused(cutoff):
    """Not ranked, not finite, no queries of a kind, a share that is none."""
    good = queries(3, lead=None, seed=0)
    for scores in ([1.0, 2.0], [np.nan], [np.inf, 1.0], [[1.0]]):
        with pytest.raises(InputError, match="best first"):
            cutoff.decide(scores)
    for present, absent in (([], good), (good, [])):
        with pytest.raises(InputError, match="without"):
            fit_cutoff(present, absent)
    with pytest.raises(InputError, match="best first"):
        fit_cutoff([[]], good)
    for wrong in ({"keep": 0.0}, {"keep": 1.1}, {"keep": float("nan")}, {"depth": 0}):
        with pytest.raises(UsageError):
            fit_cutoff(good, good, **wrong)
    for relevant in ([[True]], [[True]] * 3):
        with pytest.raises(InputError, match="relevant"):
            fit_cutoff(good, good, relevant=relevant)


def test_json_brings_back_an_equal_cutoff(cutoff):
    """Through text, as it is stored."""
    assert Cutoff.from_json(json.loads(json.dumps(cutoff.to_json()))) == cutoff


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 0}, {"depth": 1.5}, {"depth": True}, {"kept": 1.5}, {"margin": -1.0}, {"weights": [1.0, 2.0]},
        {"weights": [1.0, 2.0, -1.0]}, {"scale": [1.0, 1.0, 0.0]}, {"threshold": float("nan")}, {"centre": None},
        {"more": 1},
    ],
)  # fmt: skip
def test_json_that_cannot_be_is_refused(cutoff, wrong):
    """The field is named; no error of another kind gets out."""
    with pytest.raises(ModelError, match="cut-off"):
        Cutoff.from_json({**cutoff.to_json(), **wrong})
