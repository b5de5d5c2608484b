"""Two models on the same pairs: what changed, and what is only chance."""

import json

import numpy as np
import pytest

from mmsearch.errors import UsageError
from mmsearch.evaluate.comparison import Difference, Verdict, compare
from mmsearch.evaluate.metrics import Ranked
from mmsearch.evaluate.report import Evaluation, summarise


def evaluation(ranks, *, model="m", clusters=None) -> Evaluation:
    """Queries whose one relevant candidate has these ranks, the same in both directions."""
    groups = np.arange(len(ranks)) if clusters is None else np.array(clusters)
    way = summarise(Ranked.of([[rank] for rank in ranks]), clusters=groups)
    return Evaluation(model, len(ranks), len(ranks), way, way)


def hit_at_one(before, after, **options) -> Difference:
    found = compare(evaluation(before, **options), evaluation(after, **options))
    return found.differences["text_to_image"]["hit@1"]


def test_a_model_does_not_differ_from_itself():
    """Known value: every difference is 0 with the interval (0, 0)."""
    one = evaluation([1, 2, 7, 50])
    for way in compare(one, one).differences.values():
        assert {(d.change, d.low, d.high, d.verdict) for d in way.values()} == {(0.0, 0.0, 0.0, Verdict.UNCLEAR)}


def test_every_query_better_rises_and_the_other_way_round_falls():
    """All of 40 queries move from rank 2 to rank 1: by 1.0, without doubt; beyond 5 nothing changes."""
    worse, better = [2] * 40, [1] * 40
    up, down = hit_at_one(worse, better), hit_at_one(better, worse)
    assert (up.before, up.after, up.change, up.low, up.high, up.verdict) == (0.0, 1.0, 1.0, 1.0, 1.0, Verdict.RISES)
    assert (down.change, down.verdict) == (-1.0, Verdict.FALLS)
    assert compare(evaluation(worse), evaluation(better)).differences["image_to_text"]["hit@5"].change == 0.0


def test_as_many_gains_as_losses_is_no_clear_change():
    """The averages are the same, and so is the verdict of two models that differ in every query."""
    found = hit_at_one([1, 9] * 50, [9, 1] * 50)
    assert found.change == 0.0
    assert found.low < 0 < found.high
    assert found.verdict is Verdict.UNCLEAR


def test_pairing_sees_what_two_intervals_would_not():
    """20 of 200 queries better and none worse is clear, though each model's own interval is ± 7 points."""
    before, after = [1] * 100 + [9] * 100, [1] * 120 + [9] * 80
    found = hit_at_one(before, after)
    assert found.verdict is Verdict.RISES
    one, other = evaluation(before), evaluation(after)
    assert one.text_to_image.intervals["hit@1"][1] > other.text_to_image.intervals["hit@1"][0]


def test_captions_of_one_picture_count_as_one_observation():
    """Ten captions that improve together are one lucky picture, not ten improvements."""
    before, after = [2] * 10 + [1] * 30, [1] * 40
    assert hit_at_one(before, after).verdict is Verdict.RISES
    together = hit_at_one(before, after, clusters=[0] * 10 + list(range(1, 31)))
    assert together.change == 0.25
    assert together.verdict is Verdict.UNCLEAR


def test_the_interval_of_the_difference_has_a_known_width():
    """1.96 standard errors of the mean of independent differences (n = 400, a tenth of them 1)."""
    found = hit_at_one([1] * 360 + [2] * 40, [1] * 400)
    expected = 1.96 * np.sqrt(0.1 * 0.9 / 400)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("other", [evaluation([1, 1]), evaluation([1, 1, 1], clusters=[0, 1, 3])])
def test_other_queries_are_refused(other):
    """A picture that one model could not use makes its gallery another one."""
    with pytest.raises(UsageError, match="the same pictures and captions"):
        compare(evaluation([1, 2, 3]), other)


def test_json_has_both_models_and_their_differences():
    """Shares between 0 and 1 and plain values."""
    read = json.loads(json.dumps(compare(evaluation([2] * 9, model="a"), evaluation([1] * 9, model="b")).to_json()))
    assert (read["before"]["model"], read["after"]["model"]) == ("a", "b")
    assert read["differences"]["text_to_image"]["hit@1"] == {
        "before": 0.0, "after": 1.0, "difference": 1.0, "ci95": [1.0, 1.0], "verdict": "rises",
    }  # fmt: skip
    assert list(read["differences"]["image_to_text"]) == ["hit@1", "hit@5", "hit@10"]


def test_the_table_names_the_models_and_says_which_way_it_went():
    """Per cent, the sign of the difference, and a word."""
    lines = list(compare(evaluation([2] * 9, model="a"), evaluation([1] * 9, model="b")).lines())
    assert lines[0] == "before: a, after: b"
    row = next(line for line in lines if line.startswith("hit@1 "))
    assert row.split() == ["hit@1", "0.0", "100.0", "+100.0", "±", "0.0", "rises"]
    assert sum(line.startswith(("text -> image", "image -> text")) for line in lines) == 2
