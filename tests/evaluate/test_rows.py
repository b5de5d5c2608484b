"""Rows that are already encoded, measured: what training does between epochs."""

import numpy as np
import pytest

from mmsearch.errors import UsageError
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.similarity import normalise

AXES = np.eye(4, dtype=np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def run(texts, images, *, text_groups=None, image_groups=None):
    return evaluate_rows(
        texts,
        images,
        text_groups=np.arange(len(texts)) if text_groups is None else text_groups,
        image_groups=np.arange(len(images)) if image_groups is None else image_groups,
        model="rows",
    )


def test_rows_of_their_own_hit_and_shifted_ones_do_not():
    """Known values: the identity is right everywhere at 1, a rotation nowhere."""
    right, wrong = run(AXES, AXES), run(AXES, np.roll(AXES, 1, axis=0))
    assert right.text_to_image.values["hit@1"] == right.image_to_text.values["hit@1"] == 1.0
    assert wrong.text_to_image.values["hit@1"] == wrong.image_to_text.values["hit@1"] == 0.0
    assert (right.model, right.images, right.texts, right.skipped) == ("rows", 4, 4, ())


def test_a_group_is_a_name_not_a_position():
    """Any integers in any order; several captions of one picture are all right answers."""
    found = run(AXES[[1, 0, 1]], AXES[:2], text_groups=ints(-5, 90, -5), image_groups=ints(90, -5))
    assert found.text_to_image.values["hit@1"] == 1.0
    assert found.image_to_text.values["recall@1"] == 0.75


def test_the_order_of_the_rows_changes_nothing():
    """Shuffled captions with their groups give the same figures and the same intervals."""
    random = np.random.default_rng(0)
    texts, images = normalise(random.normal(size=(20, 6))), normalise(random.normal(size=(10, 6)))
    groups, order = np.repeat(np.arange(10), 2), random.permutation(20)
    once = run(texts, images, text_groups=groups)
    again = run(texts[order], images, text_groups=groups[order])
    assert once.figures() == pytest.approx(again.figures())
    assert once.text_to_image.intervals["hit@5"] == pytest.approx(again.text_to_image.intervals["hit@5"])


def test_figures_are_one_flat_mapping():
    """What a journal logs: every metric of both directions under one name each."""
    figures = run(AXES, AXES).figures()
    assert figures["text_to_image/hit@1"] == figures["image_to_text/mrr@10"] == 1.0
    assert len(figures) == 2 * len(run(AXES, AXES).text_to_image.values)


def test_ranks_are_kept_but_are_no_part_of_json():
    """A comparison needs them query by query; a report does not."""
    found = run(AXES, AXES)
    assert found.image_to_text.ranked.first.tolist() == [1, 1, 1, 1]
    assert "ranked" not in str(found.to_json())
    assert found == run(AXES, AXES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"texts": AXES * 2}, "captions, row 0"),
        ({"texts": np.eye(4, 3, dtype=np.float32)}, "captions"),
        ({"images": AXES * np.nan}, "pictures, row 0"),
        ({"text_groups": ints(0, 1, 2)}, "groups of the captions"),
        ({"image_groups": ints(0, 1, 2, 2)}, "relevant"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(change, says):
    """Forgotten normalisation, wrong counts, a caption without its picture: named, not averaged over."""
    with pytest.raises(UsageError, match=says):
        run(**{"texts": AXES, "images": AXES, **change})
