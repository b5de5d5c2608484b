"""Scores become probabilities that are honest, rise with the score, and are finite whatever the data."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import InputError, ModelError
from mmsearch.evaluate.calibration_error import expected_calibration_error, reliability
from mmsearch.rerank.calibration import (
    _CALIBRATIONS,
    Isotonic,
    Platt,
    Temperature,
    _first_fold,
    calibration_from_json,
    choose_calibration,
    probability_of,
)
from mmsearch.rerank.fitting import minimise

EVERY = pytest.mark.parametrize("kind", _CALIBRATIONS.values(), ids=list(_CALIBRATIONS))


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z)))


def drawn(n=4000, *, slope=1.0, offset=0.0, seed=0):
    """Scores, and labels that are true with probability sigmoid(slope · z + offset)."""
    random = np.random.default_rng(seed)
    z = random.normal(size=n) * 2
    return z, (random.random(n) < sigmoid(slope * z + offset)).astype(int)


def log_loss(p, y):
    return -np.mean(np.log(np.where(y == 1, p, 1 - p)))


def test_temperature_finds_the_temperature():
    """Labels drawn at half the log-odds come from a temperature of 2."""
    z, y = drawn(20_000, slope=0.5)
    assert Temperature.fit(z, y).temperature == pytest.approx(2.0, rel=0.05)
    assert Temperature(2.0)(np.array([0.0]))[0] == 0.5


def test_platt_finds_slope_and_offset():
    """Also when scores are far from 0 and of another size, as standardising inside must not show."""
    z, y = drawn(20_000, slope=1.5, offset=-1.0)
    fitted = Platt.fit(z, y)
    assert (fitted.slope, fitted.offset) == (pytest.approx(1.5, rel=0.05), pytest.approx(-1.0, abs=0.06))
    moved = Platt.fit(1000 * z + 7e4, y)
    np.testing.assert_allclose(moved(1000 * z + 7e4), fitted(z), atol=1e-6)


def test_platt_is_the_minimum():
    """No neighbour of the answer has a lower cross-entropy with the smoothed targets."""
    z, y = drawn(300, slope=0.8, offset=0.5)
    target = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / (len(y) - y.sum() + 2))
    fitted = Platt.fit(z, y)

    def loss(slope, offset):
        p = sigmoid(slope * z + offset)
        return -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))

    least = loss(fitted.slope, fitted.offset)
    for ds, do in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(fitted.slope + ds, fitted.offset + do) > least


def dumb_isotonic(z, y):
    """Isotonic means by their min-max formula: max over starts of the min over ends of the mean between."""
    y = y[np.argsort(z)].astype(float)
    mean = lambda i, j: y[i : j + 1].mean()  # noqa: E731 - a formula
    return [max(min(mean(i, j) for j in range(k, len(y))) for i in range(k + 1)) for k in range(len(y))]


def test_isotonic_blocks_are_those_of_the_min_max_formula():
    """At its points the fit says the mean label of the block, but for the ends, which never say 0 or 1."""
    z, y = drawn(40, seed=3)
    fitted = Isotonic.fit(z, y)
    expected = np.unique(np.round(np.clip(dumb_isotonic(z, y), 1 / 42, 41 / 42), 12))
    np.testing.assert_allclose(fitted(fitted.z), expected, atol=1e-9)


def test_isotonic_takes_equal_scores_together():
    """Three scores, labels half, half and all true: one block of 0.5 and one at the upper end."""
    fitted = Isotonic.fit([1, 1, 2, 2, 3, 3], [1, 0, 0, 1, 1, 1])
    assert fitted.z == (1.5, 3.0)
    np.testing.assert_allclose(fitted([1.5, 3.0]), [0.5, 7 / 8])


@EVERY
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 60), sign=st.sampled_from([-1, 0, 1]))
def test_every_calibration_rises_strictly_and_stays_inside(kind, seed, n, sign):
    """Labels that rise with the score, fall with it or ignore it: no reversal, no plateau, nothing outside (0, 1)."""
    random = np.random.default_rng(seed)
    z = np.round(random.normal(size=n), 1)  # ties are common
    y = (sign * z + random.normal(size=n) > 0).astype(int)
    y[:2], z[:2] = (0, 1), (-0.5, 0.5)
    fitted = kind.fit(z, y)
    grid = np.linspace(-5, 5, 301)
    assert (np.diff(fitted.log_odds(grid)) > 0).all()
    p = fitted(np.append(grid, [-1e6, 1e6]))
    assert ((p > 0) & (p < 1)).all() and (np.diff(p[:-2]) >= 0).all()


@EVERY
def test_a_score_that_speaks_against_the_truth_says_next_to_nothing(kind):
    """Labels that fall with the score: the order stays, and every usual probability is that of a coin."""
    z, y = drawn(slope=-2.0)
    np.testing.assert_allclose(kind.fit(z, y)(np.linspace(-4, 4, 9)), 0.5, atol=0.05)


@EVERY
def test_what_is_fitted_is_honest(kind):
    """Labels from the scores' own odds: the calibration error on other pairs is that of a small sample."""
    fitted = kind.fit(*drawn(seed=1))
    z, y = drawn(20_000, seed=2)
    assert expected_calibration_error(fitted(z), y) < 0.03


@EVERY
def test_data_that_can_be_told_apart_has_a_finite_answer(kind):
    """Four pairs in order: neither 0 nor 1 nor an endless slope."""
    p = kind.fit([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1])(np.array([-2.0, 2.0]))
    assert 0.01 < p[0] < 0.3 and 0.7 < p[1] < 0.99


@EVERY
@pytest.mark.parametrize(
    ("z", "y", "said"),
    [
        ([0.0, 1.0, 2.0], [1, 1, 1], "some 0 and some 1"),
        ([3.0, 3.0, 3.0], [0, 1, 0], "scores that differ"),
        ([0.0, np.nan, 1.0], [0, 1, 1], "finite"),
        ([0.0, np.inf], [0, 1], "finite"),
        ([0.0, 1.0], [0, 2], "some 0 and some 1"),
        ([0.0, 1.0], [0, 1, 1], "a label for each"),
        ([], [], "a label for each"),
    ],
)
def test_nothing_to_learn_from_is_said(kind, z, y, said):
    """One class, one score, NaN: an error, not a calibration."""
    with pytest.raises(InputError, match=said):
        kind.fit(z, y)


@EVERY
def test_json_brings_back_an_equal_calibration(kind):
    """Through text, as it is stored."""
    fitted = kind.fit(*drawn(200))
    assert calibration_from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"kind": "beta"},
        {"kind": ["platt"]},
        {"kind": "temperature", "temperature": 0},
        {"kind": "temperature", "temperature": float("nan")},
        {"kind": "temperature", "temperature": True},
        {"kind": "temperature", "temperature": 1.0, "more": 1},
        {"kind": "platt", "slope": -1.0, "offset": 0.0},
        {"kind": "platt", "slope": 1.0},
        {"kind": "platt", "slope": "1", "offset": 0.0},
        {"kind": "isotonic", "z": [], "odds": [], "slope": 1.0},
        {"kind": "isotonic", "z": [0, 1], "odds": [0], "slope": 1.0},
        {"kind": "isotonic", "z": [0, 0], "odds": [0, 1], "slope": 1.0},
        {"kind": "isotonic", "z": [0, 1], "odds": [1, 0], "slope": 1.0},
        {"kind": "isotonic", "z": [0, 1], "odds": [0, float("inf")], "slope": 1.0},
        {"kind": "isotonic", "z": [0, 1], "odds": [0, 1], "slope": 0.0},
    ],
)
def test_json_that_cannot_be_is_refused(values):
    """A file comes from anywhere; a calibration that falls or divides by 0 is none."""
    with pytest.raises(ModelError):
        calibration_from_json(values)


def test_the_choice_follows_the_data():
    """An offset needs Platt; a bend needs isotonic; neither needs more than the temperature."""
    groups = np.arange(4000) // 2
    assert choose_calibration(*drawn(offset=1.5), groups)[0].kind == "platt"
    random = np.random.default_rng(0)
    z = random.uniform(-4, 4, 4000)
    steps = (random.random(4000) < np.where(z < -1, 0.05, np.where(z < 2, 0.5, 0.95))).astype(int)
    assert choose_calibration(z, steps, groups)[0].kind == "isotonic"
    losses = {kind: log_loss(made.fit(*drawn(seed=5))(drawn(seed=6)[0]), drawn(seed=6)[1])
              for kind, made in _CALIBRATIONS.items()}  # fmt: skip
    assert losses["temperature"] < losses["isotonic"]


def test_the_chosen_calibration_is_fitted_on_all_and_its_error_on_the_other_half():
    """The fit is that of all pairs; the error is larger than on the pairs it was fitted on; a seed gives one answer."""
    z, y = drawn(100, offset=1.5)
    chosen, error = choose_calibration(z, y, np.arange(100), seed=1)
    assert chosen == Platt.fit(z, y)
    assert expected_calibration_error(chosen(z), y) < error < 0.3
    assert choose_calibration(z, y, np.arange(100), seed=1) == (chosen, error)


def test_pairs_of_one_picture_are_never_in_both_folds():
    """Both halves are there, and the seed says which pictures are in which."""
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(31), 4))
    folds = [_first_fold(groups, np.zeros(124), seed=seed) for seed in range(3)]
    for fold in folds:
        assert not set(groups[fold]) & set(groups[~fold])
        assert len(set(groups[fold])) in (15, 16)
    assert (folds[0] != folds[1]).any()


def test_too_few_pairs_for_folds_are_calibrated_without_an_error():
    """One picture: Platt's calibration, and nobody claims to have measured it."""
    chosen, error = choose_calibration([0.0, 1.0, 2.0], [0, 1, 1], [7, 7, 7])
    assert (chosen.kind, error) == ("platt", None)
    with pytest.raises(InputError, match="groups"):
        choose_calibration([0.0, 1.0], [0, 1], [7])


def test_calibration_error_has_its_known_values():
    """0 where what is said is true, 0.5 where certainty is a coin, 0 for honest pairs in large numbers."""
    y = np.tile([0, 1], 500)
    assert expected_calibration_error(y, y) == 0
    assert expected_calibration_error(np.ones(1000), y) == 0.5
    assert expected_calibration_error(np.full(1000, 0.5), y) == 0
    p = np.random.default_rng(0).random(100_000)
    assert expected_calibration_error(p, np.random.default_rng(1).random(100_000) < p) < 0.01


def test_the_reliability_table_counts_every_pair_once():
    """Borders belong to the bin below them, 0 to the first; empty bins are left out."""
    table = reliability([0.0, 0.5, 0.50001, 1.0], [0, 1, 1, 1], bins=2)
    assert [(one.low, one.high, one.count, one.share) for one in table] == [(0.0, 0.5, 2, 0.5), (0.5, 1.0, 2, 1.0)]
    assert [one.mean for one in table] == [0.25, pytest.approx(0.750005)]
    assert [one.low for one in reliability([0.9], [1], bins=10)] == [0.8]


def test_probabilities_never_reach_their_ends():
    """0 and 1 would be certainty; infinity of log-odds is none."""
    p = probability_of([-np.inf, -800.0, 0.0, 800.0])
    assert p[2] == 0.5 and ((p > 0) & (p < 1)).all()


def test_bounds_hold_and_the_minimum_between_them_is_found():
    """(w - 2)² + (v + 1)²: 3 where w must be 3 at least, 0 where v must not be negative, both at once."""

    def bowl(w):
        return float((w[0] - 2) ** 2 + (w[1] + 1) ** 2), 2 * (w - np.array([2, -1])), 2 * np.eye(2)

    free = np.full(2, -np.inf)
    np.testing.assert_allclose(minimise(bowl, np.array([9.0, 9.0]), lowest=free), [2, -1], atol=1e-6)
    np.testing.assert_allclose(minimise(bowl, np.zeros(2), lowest=np.array([3.0, 0.0])), [3, 0], atol=1e-6)


def test_a_bound_moves_the_other_weight_too():
    """They depend on each other: clipping the free minimum (1, -1) would give (1, 0); the answer is (0.1, 0)."""
    curvature = np.array([[1.0, 0.9], [0.9, 1.0]])

    def valley(w):
        off = w - np.array([1.0, -1.0])
        return float(off @ curvature @ off / 2), curvature @ off, curvature

    np.testing.assert_allclose(minimise(valley, np.zeros(2), lowest=np.zeros(2)), [0.1, 0.0], atol=1e-6)
