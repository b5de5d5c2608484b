"""What a second stage is worth beyond order: rivals that are drawn, yes and no, and the cut-off."""

import numpy as np
import pytest

from mmsearch.evaluate.reranked import Candidates
from mmsearch.evaluate.stages import cut_off, hard_rivals, matched
from mmsearch.rerank.cutoff import Cutoff

TEXTS, IMAGES = np.array([0, 0, 1, 2]), np.array([0, 1, 2])
ROWS = np.array([[0, 1, 2], [1, 0, 2], [1, 2, 0], [0, 1, 2]])


def found(final=None) -> Candidates:
    return Candidates(ROWS, np.zeros(ROWS.shape), None if final is None else np.array(final, np.float64))


def test_rivals_are_of_other_groups_and_of_the_list_and_drawn_by_the_seed():
    """All of them come up; one of the own group never does; a list without rivals has none."""
    drawn = np.array([hard_rivals(found(), text_groups=TEXTS, image_groups=IMAGES, seed=seed) for seed in range(40)])
    for place in range(len(TEXTS)):
        groups = set(IMAGES[ROWS[place, drawn[:, place]]].tolist())
        assert groups == set(IMAGES.tolist()) - {int(TEXTS[place])}
    same = hard_rivals(found(), text_groups=TEXTS, image_groups=IMAGES, seed=3)
    assert np.array_equal(same, drawn[3])
    alone = hard_rivals(found(), text_groups=np.zeros(4, int), image_groups=np.zeros(3, int))
    assert alone.tolist() == [-1] * 4


def test_yes_and_no_are_balanced_and_leave_out_who_has_no_rival():
    """As many false pairs as true ones."""
    nan = np.nan
    one = matched(np.array([0.9, 0.8, 0.4]), np.array([0.1, nan, 0.2]), owners=np.array([0, 1, 2]), model="m")
    assert (one.pairs, one.true_pairs, one.values["accuracy"]) == (4, 2, 0.75)
    assert matched(np.array([0.9]), np.array([nan]), owners=np.array([0]), model="m") is None


def test_the_cut_off_is_asked_with_the_right_pictures_and_without():
    """A best score of 2 and more is present: what stays above it without its own picture is not turned away."""
    cutoff = Cutoff((0.0,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0), threshold=2.0, margin=1.0, depth=64, kept=1, rejected=1)
    final = [[5, 1, 0], [1, 4, 3], [0, 1, -1], [3, -2, 9]]
    groups = {"text_groups": TEXTS, "image_groups": IMAGES, "owners": np.array([0, 0, 1, 2])}
    seen = cut_off(cutoff, found(final), **groups)
    # Best of all: 5, 4, 1, 9; best of other groups: 1, 3, 0, 3.
    assert (seen.queries, seen.kept, seen.rejected) == (4, 0.75, 0.5)
    assert seen.intervals["kept"][0] <= 0.75 <= seen.intervals["kept"][1]
    assert seen.to_json()["rejected"] == 0.5 and len(list(seen.lines())) == 3
    assert cut_off(None, found(final), **groups) is None


@pytest.mark.parametrize("image_groups", [np.zeros(3, int)])
def test_a_gallery_of_one_group_has_no_absent_queries(image_groups):
    """Nothing is left to ask without the right pictures."""
    cutoff = Cutoff((0.0,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0), threshold=2.0, margin=1.0, depth=64, kept=1, rejected=1)
    final = np.zeros(ROWS.shape).tolist()
    args = {"text_groups": np.zeros(4, int), "image_groups": image_groups, "owners": np.zeros(4, int)}
    assert cut_off(cutoff, found(final), **args) is None
