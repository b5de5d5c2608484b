"""Final scores: weights that rank best, cases that are comparable, parts that add up."""

import json

import numpy as np
import pytest

from mmsearch.errors import InputError, ModelError
from mmsearch.rerank.calibration import Isotonic, Platt, Temperature, probability_of
from mmsearch.rerank.cutoff import Cutoff
from mmsearch.rerank.score_fitting import CandidateLists, MatchPairs, fit_scoring, fit_weights, listwise
from mmsearch.rerank.scores import CASES, PARTS, Case, Evidence, Scoring

THREE = PARTS[:3]
"""Without the rarity, which is 0 where nobody says otherwise."""


def lists_of(random, *, queries=600, k=20, weights=(1.0, 2.0, 0.0), directions=None):
    """Parts of usual sizes; the relevant one is drawn by the softmax of `weights` · standardised parts."""
    parts = random.normal(size=(queries, k, 3))
    relevant = np.zeros((queries, k), bool)
    best = (parts @ np.asarray(weights) + random.gumbel(size=(queries, k))).argmax(axis=1)
    relevant[np.arange(queries), best] = True
    query = np.repeat(np.arange(queries), k)
    directions = np.arange(queries) % 2 if directions is None else directions
    return CandidateLists(query, evidence(parts.reshape(-1, 3)), relevant.ravel(), np.repeat(directions, k))


def evidence(standard, *, keep=THREE) -> Evidence:
    """(m, 3) standard normal numbers as cosines and logits."""
    cosine, logit, text = standard.T
    parts = {"cosine": 0.3 + 0.05 * cosine, "logit": 3 * logit - 1, "text_cosine": 0.5 + 0.1 * text}
    return Evidence.of(**{name: parts[name] for name in keep})


def pairs_of(random, *, n=4000, weights=(1.0, 2.0, 0.0), keep=THREE) -> MatchPairs:
    """Balanced pairs, true by the odds of `weights` · standardised parts."""
    parts = random.normal(size=(n, 3))
    match = random.random(n) < 1 / (1 + np.exp(-parts @ np.asarray(weights)))
    return MatchPairs(evidence(parts, keep=keep), match, np.arange(n) // 4)


def without(lists: CandidateLists, *parts: str) -> CandidateLists:
    kept = Evidence.of(**{part: getattr(lists.evidence, part) for part in PARTS if part not in parts})
    return CandidateLists(lists.query, kept, lists.relevant, lists.direction)


@pytest.fixture(scope="module")
def fitted() -> Scoring:
    random = np.random.default_rng(0)
    weights = (1.0, 2.0, 0.7)
    return fit_scoring(lists_of(random, weights=weights), pairs_of(random, weights=weights))


PLAIN = Temperature(1.0)


def case(*weights, calibration=PLAIN, bias=0.0) -> Case:
    size = len(weights)
    return Case((0.0,) * size, (1.0,) * size, weights, bias, calibration, None)


def test_the_weights_that_made_the_lists_are_found():
    """Per standardised part, and 0 for the part that nothing depended on."""
    random = np.random.default_rng(1)
    model = fit_scoring(lists_of(random, queries=3000), pairs_of(random)).cases["both"]
    np.testing.assert_allclose(model.weights, [1.0, 2.0, 0.0, 0.0], atol=0.12)


def test_uninformed_weights_cost_the_logarithm_of_the_lists_length():
    """Weights 0: every candidate has the share 1 / k."""
    lists = lists_of(np.random.default_rng(0), k=20)
    assert listwise(lists.evidence.columns(THREE), lists)(np.zeros(3))[0] == pytest.approx(np.log(20))


def test_several_relevant_candidates_need_only_one_of_them_first():
    """The share of the relevant ones together: log(4 / 2) for two of four at weights 0."""
    lists = CandidateLists(
        np.zeros(4, int), Evidence.of(cosine=[1, 2, 3, 4]), np.array([1, 0, 1, 0], bool), np.zeros(4, int)
    )
    assert listwise(lists.evidence.columns(("cosine",)), lists)(np.zeros(1))[0] == pytest.approx(np.log(2))


def test_the_gradient_is_that_of_the_loss():
    """Against central differences, with several relevant candidates and lists of different lengths."""
    random = np.random.default_rng(2)
    query = np.sort(random.integers(0, 9, 80))
    lists = CandidateLists(query, evidence(random.normal(size=(80, 3))), random.random(80) < 0.3, query % 2)
    objective = listwise(random.normal(size=(80, 3)), lists)
    at = np.array([0.5, 1.0, 0.2])
    slope = [(objective(at + step)[0] - objective(at - step)[0]) / 2e-5 for step in 1e-5 * np.eye(3)]
    np.testing.assert_allclose(objective(at)[1], slope, atol=1e-7)


def test_how_rare_a_candidate_is_is_a_part_like_the_others():
    """Its weight is found where relevance depends on it; left out it is 0 for all and gets no weight."""
    random = np.random.default_rng(13)
    rare, pairs = random.normal(size=600 * 20), pairs_of(random)
    lists = lists_of(random, weights=(1.0, 2.0, 0.0))
    assert fit_scoring(lists, pairs).cases["picture"].weights[2] == 0
    best = (lists.evidence.cosine * 20 + 2.0 * rare + random.gumbel(size=12_000)).reshape(600, 20).argmax(axis=1)
    relevant = (np.arange(20) == best[:, None]).ravel()
    known = Evidence.of(cosine=lists.evidence.cosine, logit=lists.evidence.logit, rarity=rare)
    picture = fit_scoring(CandidateLists(lists.query, known, relevant, lists.direction), pairs).cases["picture"]
    np.testing.assert_allclose(picture.weights, [1.0, 0.0, 2.0], atol=0.25)


def test_a_part_that_speaks_against_the_truth_gets_no_weight():
    """Never a negative one; and where no part helps, the first stage's order stays."""
    random = np.random.default_rng(3)
    model = fit_scoring(lists_of(random, weights=(1.0, -1.0, 0.0)), pairs_of(random)).cases["picture"]
    assert model.weights[0] > 0.5 and model.weights[1] == 0
    lists = lists_of(random, weights=(-1.0, -1.0, -1.0))
    assert fit_weights(lists.evidence.columns(THREE) * [20, 0.3, 10], lists).tolist() == [1, 0, 0]


def test_both_directions_count_alike():
    """Five times as many queries one way: the weights lie as near to the other direction's own ones."""
    random = np.random.default_rng(4)
    one = lists_of(random, queries=1500, weights=(2.0, 0.5, 0.0), directions=np.zeros(1500, int))
    other = lists_of(random, queries=300, weights=(0.5, 2.0, 0.0), directions=np.ones(300, int))
    both = CandidateLists(
        np.concatenate([one.query, 10_000 + other.query]),
        Evidence(*(np.concatenate([getattr(x.evidence, part) for x in (one, other)]) for part in PARTS)),
        np.concatenate([one.relevant, other.relevant]),
        np.concatenate([one.direction, other.direction]),
    )
    cosine, logit, _ = fit_scoring(both, pairs_of(random)).cases["picture"].weights
    assert cosine == pytest.approx(logit, rel=0.2)


def test_the_order_of_candidates_and_pairs_changes_nothing(fitted):
    """A permutation of all rows gives the same weights, calibration and scores, rounding aside."""
    random = np.random.default_rng(0)
    weights = (1.0, 2.0, 0.7)
    lists, pairs = lists_of(random, weights=weights), pairs_of(random, weights=weights)
    p, q = random.permutation(len(lists.query)), random.permutation(len(pairs.group))
    again = fit_scoring(
        CandidateLists(lists.query[p], lists.evidence.take(p), lists.relevant[p], lists.direction[p]),
        MatchPairs(pairs.evidence.take(q), pairs.match[q], pairs.group[q]),
    )
    some = evidence(random.normal(size=(50, 3)))
    np.testing.assert_allclose(again.final(some), fitted.final(some), atol=1e-6)
    order = random.permutation(50)
    np.testing.assert_array_equal(fitted.final(some.take(order)), fitted.final(some)[order])


def test_final_is_the_log_odds_of_the_probability(fitted):
    """So candidates of different cases are compared by what they say about the same question."""
    some = evidence(np.random.default_rng(5).normal(size=(40, 3)))
    np.testing.assert_array_equal(fitted.probability(some), probability_of(fitted.final(some)))
    p = fitted.probability(some)
    np.testing.assert_allclose(np.log(p / (1 - p)), fitted.final(some), atol=1e-6)


def test_an_even_pair_has_the_linear_score_0():
    """Whichever calibration follows: pairs' odds against the linear score go through the origin."""
    random = np.random.default_rng(12)
    lists, pairs = lists_of(random), pairs_of(random)
    rarely = MatchPairs(pairs.evidence, pairs.match & (random.random(4000) < 0.2), pairs.group)
    for some in (pairs, rarely):
        case = fit_scoring(lists, some).cases["picture"]
        line = Platt.fit(case.z(some.evidence.columns(CASES["picture"])), some.match)
        assert line.offset == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "calibration", [Temperature(3.0), Platt(0.2, 1.0), Isotonic((-1.0, 0.0, 0.1), (-2.0, 0.5, 0.6), 0.3)]
)
def test_calibration_makes_no_ties_and_no_reversals(calibration):
    """Within a case the order is that of the linear model, strictly."""
    scoring = Scoring({"picture": case(1.0, 0.5, 0.0, calibration=calibration)})
    logits = np.linspace(-8, 8, 400)
    final = scoring.final(Evidence.of(cosine=np.zeros(400), logit=logits))
    assert (np.diff(final) > 0).all()


def test_probabilities_are_honest_in_every_case(fitted):
    """Fresh pairs with fewer parts: what each case says comes true, and its own error was measured across folds."""
    assert set(fitted.cases) == {"both", "picture", "text", "cosine"}
    for name, keep in (("both", THREE), ("picture", THREE[:2]), ("text", THREE[2:]), ("cosine", THREE[:1])):
        pairs = pairs_of(np.random.default_rng(6), weights=(1.0, 2.0, 0.7), keep=keep)
        p = fitted.probability(pairs.evidence)
        assert abs(p.mean() - pairs.match.mean()) < 0.03
        high = p > np.quantile(p, 0.8)
        assert p[high].mean() == pytest.approx(pairs.match[high].mean(), abs=0.05)
        assert fitted.cases[name].ece < 0.05


def test_each_item_is_scored_by_what_it_has():
    """Four kinds of items in one call, each by its own case; text without the logit is better than the cosine alone."""
    scoring = Scoring({"both": case(1, 1, 1, 1, bias=1000), "picture": case(1, 1, 1, bias=100),
                       "text": case(1, bias=10), "cosine": case(1, 1, bias=0)})  # fmt: skip
    nan = np.nan
    mixed = Evidence.of(cosine=[1, 1, nan, 1, 1], logit=[2, 2, nan, nan, nan], text_cosine=[3, nan, 3, nan, 3])
    assert scoring.final(mixed).tolist() == [1006, 103, 13, 1, 13]
    assert scoring.covers(mixed).all()


def test_what_no_case_covers_is_said():
    """Not a silent NaN at the bottom of the list."""
    scoring = Scoring({"picture": case(1, 1, 1)})
    mixed = Evidence.of(cosine=[1, 1, np.nan], logit=[2, np.nan, np.nan], text_cosine=[np.nan, np.nan, 0.5])
    assert scoring.covers(mixed).tolist() == [True, False, False]
    with pytest.raises(InputError, match=r"candidate 1: expected cosine \+ logit \+ rarity, got cosine"):
        scoring.final(mixed)
    assert scoring.final(mixed.take(scoring.covers(mixed))).tolist() == [3]
    assert scoring.final(Evidence.of()).shape == (0,)


def test_without_its_own_model_an_item_with_everything_is_scored_by_its_picture(fitted):
    """The next case whose parts are there."""
    some = evidence(np.random.default_rng(7).normal(size=(9, 3)))
    only = Scoring({"picture": fitted.cases["picture"]})
    picture = Evidence.of(cosine=some.cosine, logit=some.logit)
    np.testing.assert_array_equal(only.final(some), fitted.final(picture))


def test_parts_add_up_to_the_final_score(fitted):
    """With the bend of the calibration as a part of its own, and NaN only where a part was not read."""
    standard = np.random.default_rng(8).normal(size=(30, 3))
    some = evidence(standard)
    some.logit[:10] = np.nan
    parts = fitted.parts(some)
    assert list(parts) == ["bias", *PARTS, "calibration"]
    np.testing.assert_allclose(np.nansum(list(parts.values()), axis=0), fitted.final(some), atol=1e-9)
    assert np.isnan(parts["logit"]).tolist() == [True] * 10 + [False] * 20


def test_a_usual_candidate_contributes_nothing(fitted):
    """Parts at their stored means add 0 each."""
    centre = fitted.cases["both"].centre
    parts = fitted.parts(Evidence.of(**{part: [value] for part, value in zip(PARTS, centre, strict=True)}))
    assert [parts[part][0] for part in PARTS] == [0, 0, 0, 0]


def test_what_the_data_does_not_show_comes_from_the_fallback(fitted):
    """Pairs without texts of their own teach nothing about texts; without a fallback that case is absent."""
    random = np.random.default_rng(9)
    lists, pairs = without(lists_of(random), "text_cosine"), pairs_of(random, keep=THREE[:2])
    assert set(fit_scoring(lists, pairs).cases) == {"picture", "cosine"}
    filled = fit_scoring(lists, pairs, fallback=fitted)
    assert filled.cases["text"] == fitted.cases["text"]
    assert filled.cases["picture"] != fitted.cases["picture"]


def test_queries_without_an_answer_in_their_list_change_nothing():
    """Nor such whose candidates are all right: both say nothing about the order."""
    random = np.random.default_rng(10)
    lists = lists_of(random, queries=200)
    relevant = lists.relevant.copy()
    relevant[: 20 * 20], relevant[20 * 20 : 30 * 20] = False, True
    more = CandidateLists(lists.query, lists.evidence, relevant, lists.direction)
    rest = slice(30 * 20, None)
    less = CandidateLists(lists.query[rest], lists.evidence.take(rest), lists.relevant[rest], lists.direction[rest])
    columns = lists.evidence.columns(THREE) * [20, 0.3, 10]
    np.testing.assert_allclose(fit_weights(columns, more), fit_weights(columns[rest], less), atol=1e-7)


def test_lists_and_pairs_that_teach_nothing_are_refused():
    """One direction a query, one length, something relevant, both kinds of pairs."""
    random = np.random.default_rng(11)
    lists, pairs = lists_of(random, queries=20), pairs_of(random, n=200)
    with pytest.raises(InputError, match="scoring"):
        fit_scoring(CandidateLists(lists.query, lists.evidence, lists.relevant & False, lists.direction), pairs)
    with pytest.raises(InputError, match="scoring"):
        fit_scoring(lists, MatchPairs(pairs.evidence, pairs.match | True, pairs.group))
    with pytest.raises(InputError, match="scoring"):
        fit_scoring(without(lists, "logit"), pairs)
    with pytest.raises(InputError, match="one direction"):
        CandidateLists(lists.query, lists.evidence, lists.relevant, np.arange(400))
    with pytest.raises(InputError, match="200 values"):
        MatchPairs(pairs.evidence, pairs.match[1:], pairs.group)
    with pytest.raises(InputError, match="relevant and other"):
        listwise(np.ones((400, 1)), CandidateLists(lists.query, lists.evidence, lists.relevant | True, lists.direction))


@pytest.mark.parametrize("parts", [{"cosine": [1.0], "logit": [1.0, 2.0]}, {"cosine": [[1.0]]}, {"logit": [np.inf]}])
def test_evidence_that_cannot_be_is_refused(parts):
    """Different lengths, tables, infinity."""
    with pytest.raises(InputError, match="evidence"):
        Evidence.of(**parts)


def test_json_brings_back_an_equal_scoring(fitted):
    """With and without a cut-off, through text."""
    cutoff = Cutoff((1.0, 2.0, 3.0), (1.0, 1.0, 1.0), (0.0, 1.0, 2.0), 0.5, 2.0, 64, 0.9, 0.8)
    for scoring in (fitted, Scoring(fitted.cases, cutoff), Scoring({"picture": case(1.0, 2.0, 0.5)})):
        assert Scoring.from_json(json.loads(json.dumps(scoring.to_json()))) == scoring


def broken(change) -> dict:
    """The JSON of a small scoring after `change` was made to it."""
    plain = Scoring({"picture": case(1.0, 2.0, 0.5)}).to_json()
    change(plain)
    return plain


@pytest.mark.parametrize(
    "values",
    [
        None,
        {"cases": {}},
        broken(lambda v: v.pop("cutoff")),
        broken(lambda v: v.update(cases={})),
        broken(lambda v: v.update(cases=[])),
        broken(lambda v: v.update(cutoff={})),
        broken(lambda v: v["cases"].update(sound=v["cases"]["picture"])),
        broken(lambda v: v["cases"].update(text=v["cases"]["picture"])),
        broken(lambda v: v["cases"]["picture"].update(weights=[1.0, 1.0, -1.0])),
        broken(lambda v: v["cases"]["picture"].update(weights=[1.0])),
        broken(lambda v: v["cases"]["picture"].update(scale=[1.0, 1.0, 0.0])),
        broken(lambda v: v["cases"]["picture"].update(bias=float("nan"))),
        broken(lambda v: v["cases"]["picture"].update(ece=2.0)),
        broken(lambda v: v["cases"]["picture"].update(calibration={"kind": "platt", "slope": -1, "offset": 0})),
    ],
)
def test_json_that_cannot_be_is_refused(values):
    """The first wrong field is named; no error of another kind gets out."""
    with pytest.raises(ModelError):
        Scoring.from_json(values)
