"""What is covered, what is asked alone, and what a cover costs."""

from __future__ import annotations

import numpy as np
import pytest

from mmsearch.occlusion import MOST_WORDS, SIDE, covered, falls, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog, and the dog's ball", ("dog", "ball")), ("The", ()), ("", ()),
        ("2 кошки on a mat", ("2", "кошки", "mat")),
        ("well-known", ("well", "known")),
    ],
)  # fmt: skip
def test_words_that_mean_something_alone_are_asked_once(text, words):
    """In any script, in their order."""
    assert words_of(text) == words


def test_long_texts_ask_their_first_words():
    """Each costs a look at 50 pictures."""
    assert len(words_of(" ".join(f"word{chr(97 + i)}" for i in range(26)))) == MOST_WORDS


@pytest.mark.parametrize("size", [14, 100, 260])
def test_covers_go_row_by_row_and_leave_no_gap(size):
    """The first is the picture; every pixel is covered by one of the others, and each cover is where its place says."""
    pixels = np.full((size, size, 3), 200, np.uint8)
    pixels[: size // 2] = 0
    views = covered(pixels)
    assert views.shape == (1 + SIDE * SIDE, size, size, 3) and np.array_equal(views[0], pixels)
    grey = np.rint(pixels.mean(axis=(0, 1))).astype(np.uint8)
    changed = (views[1:] == grey).all(axis=3)
    assert changed.any(axis=0).all()
    for place, one in enumerate(changed):
        y, x = (found.mean() / size for found in np.nonzero(one))
        row, column = divmod(place, SIDE)
        assert abs(y - (row + 0.5) / SIDE) < 0.1 and abs(x - (column + 0.5) / SIDE) < 0.1
    assert pixels[0, 0, 0] == 0  # what was handed over is as it was


def test_a_fall_is_what_the_score_loses():
    """A score that counts white pixels falls where there are some, and not elsewhere."""
    pixels = np.zeros((70, 70, 3), np.uint8)
    pixels[:10, :10] = 255

    def score(texts, views):
        white = (views == 255).all(axis=3).sum(axis=(1, 2)) / 100
        return np.stack([white * (1 + place) for place in range(len(texts))])

    lost = falls(pixels, ["once", "twice"], score=score)
    assert lost.shape == (2, SIDE, SIDE) and lost[0, 0, 0] == 1.0 and lost[0, 3:, 3:].max() == 0.0
    assert np.allclose(lost[1], 2 * lost[0])
    assert falls(pixels, ["x"], score=lambda texts, views: np.full((1, len(views)), np.nan)) is None
