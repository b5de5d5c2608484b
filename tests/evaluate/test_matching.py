"""Binary matching: known values, dumb references, intervals, and the picture of how honest a probability is."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.calibration_error import expected_calibration_error, reliability
from mmsearch.evaluate.matching import average_precision, evaluate_matching, roc_auc
from mmsearch.evaluate.metrics import interval
from mmsearch.evaluate.reliability_picture import draw_reliability


def measured(p, y, *, clusters=None, draws=50, **options):
    clusters = np.arange(len(y)) if clusters is None else clusters
    return evaluate_matching(p, y, clusters=clusters, model="m", draws=draws, **options)


def pairs(n=400, *, seed=0):
    """Honest probabilities and their labels."""
    random = np.random.default_rng(seed)
    p = random.random(n)
    return p, (random.random(n) < p).astype(int)


def dumb_auc(p, y):
    wins = [(a > b) + (a == b) / 2 for a in p[y == 1] for b in p[y == 0]]
    return float(np.mean(wins))


def dumb_average_precision(p, y):
    """Precision among all that score at least as high, averaged over true pairs."""
    return float(np.mean([y[p >= score].mean() for score in p[y == 1]]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 40))
def test_auc_and_average_precision_agree_with_their_definitions(seed, n):
    """Pair by pair, ties included."""
    random = np.random.default_rng(seed)
    p, y = np.round(random.random(n), 1), random.integers(0, 2, n)
    y[:2] = 0, 1
    assert roc_auc(p, y) == pytest.approx(dumb_auc(p, y))
    assert average_precision(p, y) == pytest.approx(dumb_average_precision(p, y))


def test_perfect_and_empty_answers_have_their_known_values():
    """Certain and right: 1, 1, 1, 0. The same for all: AUC a half, precision the share of true pairs, 0.5 is a yes."""
    y = np.array([1, 1, 0, 0])
    assert measured(y, y).values == {"accuracy": 1, "roc_auc": 1, "average_precision": 1, "ece": 0}
    assert measured(np.full(4, 0.5), y).values == {"accuracy": 0.5, "roc_auc": 0.5, "average_precision": 0.5, "ece": 0}
    assert measured(1 - y, y).values["roc_auc"] == 0
    assert measured(np.full(4, 0.5), [1, 1, 1, 0]).values["accuracy"] == 0.75


def test_values_are_those_of_the_single_functions():
    """Weighted sums over sorted pairs are only the fast way."""
    p, y = pairs()
    found = measured(p, y).values
    assert found["accuracy"] == pytest.approx(np.mean((p >= 0.5) == (y == 1)))
    assert found["ece"] == pytest.approx(expected_calibration_error(p, y))
    assert (found["roc_auc"], found["average_precision"]) == (roc_auc(p, y), average_precision(p, y))


def test_the_order_of_pairs_changes_nothing():
    """A permutation of the pairs gives the same report, intervals included."""
    p, y = pairs()
    clusters, order = np.arange(400) // 4, np.random.default_rng(1).permutation(400)
    one, other = measured(p, y, clusters=clusters), measured(p[order], y[order], clusters=clusters[order])
    assert one.values == pytest.approx(other.values)
    assert np.allclose(list(one.intervals.values()), list(other.intervals.values()))


def test_intervals_are_those_of_the_retrieval_metrics():
    """Accuracy is a mean: its interval is the one that hit@k would get from the same seed."""
    p, y = pairs()
    clusters = np.arange(400) // 4
    found = measured(p, y, clusters=clusters, draws=200, seed=3).intervals["accuracy"]
    assert found == pytest.approx(interval(((p >= 0.5) == (y == 1)).astype(float), clusters, draws=200, seed=3))


def test_pairs_of_one_picture_do_not_count_as_independent():
    """Five copies of every pair leave the interval as wide as it was."""
    p, y = pairs()
    alone = measured(p, y, draws=300).intervals["roc_auc"]
    copies = measured(np.repeat(p, 5), np.repeat(y, 5), clusters=np.repeat(np.arange(400), 5), draws=300)
    assert copies.intervals["roc_auc"] == pytest.approx(alone, abs=1e-9)


def test_the_interval_holds_the_value_and_narrows_with_more_pairs():
    """Both ends, four figures."""
    few, many = measured(*pairs(100), draws=200), measured(*pairs(10_000), draws=100)
    for name in ("accuracy", "roc_auc", "average_precision"):
        low, high = few.intervals[name]
        assert low < few.values[name] < high
        assert many.intervals[name][1] - many.intervals[name][0] < (high - low) / 3


def test_few_pairs_are_still_measured():
    """Samples without true or without false pairs are left out, not NaN."""
    found = measured([0.9, 0.1], [1, 0])
    assert found.intervals["roc_auc"] == (1.0, 1.0)


def test_the_report_is_json_and_readable():
    """Counts, shares between 0 and 1 in JSON, per cent for people."""
    p, y = pairs()
    found = measured(p, y)
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["pairs"] == 400 and plain["true_pairs"] == y.sum()
    assert set(plain["ci95"]) == {"accuracy", "roc_auc", "average_precision", "ece"}
    assert sum(one["count"] for one in plain["reliability"]) == 400
    assert plain["reliability"] == [one.to_json() for one in reliability(p, y)]
    text = "\n".join(found.lines())
    assert "400 pairs" in text and f"{100 * found.values['roc_auc']:.1f}" in text


@pytest.mark.parametrize(
    ("p", "y"),
    [
        ([0.1, 1.2], [0, 1]), ([np.nan, 0.2], [0, 1]), ([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, 3]), ([0.1], [0, 1]),
        ([], []),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(p, y):
    """Logits passed for probabilities, one kind of pairs, different lengths."""
    for call in (lambda: measured(p, y), lambda: roc_auc(p, y), lambda: average_precision(p, y)):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="clusters"):
        measured([0.1, 0.9], [0, 1], clusters=np.arange(3))
    with pytest.raises(UsageError, match="bins"):
        reliability([0.1], [1], bins=0)


def drawn(path, p, y, **options) -> np.ndarray:
    draw_reliability(p, y, path / "reliability.png", **options)
    assert [file.name for file in path.iterdir()] == ["reliability.png"]
    with Image.open(path / "reliability.png") as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_the_picture_shows_the_numbers(tmp_path):
    """The same pairs give the same picture, others another one; one pair is enough to draw."""
    p, y = pairs()
    honest = drawn(tmp_path, p, y)
    assert (honest == drawn(tmp_path, p, y)).all()
    assert (honest != drawn(tmp_path, p**3, y)).any()
    drawn(tmp_path, [0.5], [1], title="a single pair")


def test_nothing_is_drawn_of_what_is_no_probability(tmp_path):
    """No file is left behind."""
    with pytest.raises(InputError):
        draw_reliability([7.0], [1], tmp_path / "reliability.png")
    assert not list(tmp_path.iterdir())
