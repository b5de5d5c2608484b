"""What a score rests on: parts of a picture are covered one after the other, and what the score loses is measured.

Occlusion sensitivity (Zeiler and Fergus 2014, arXiv:1311.2901, section 4.2), of a whole text and of each of its words
asked alone. It works for every fusion, and for what a network does with a patch before any attention: one whose words
all look at the same patch can still know where the dog is.

Decisions:
- A cover is a grey square of the picture's mean colour, wider than the step from one to the next, so that neighbours
  overlap and a small thing is covered whole at least once.
- Words that only hold a sentence together are not asked alone: what they would light up says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Pixels

SIDE = 7
"""Places of the cover along each side."""
COVER = 0.3
"""Its side, as a share of the picture's."""
MOST_WORDS = 12

_HOLD_TOGETHER = (
    "a an and are as at be by for from has have he her his i in into is it its my of on onto or our she that the their "
    "them these they this those to was were what where which who with you your"
)
_PLAIN = frozenset(_HOLD_TOGETHER.split())
_WORD = re.compile(r"[^\W\d_]{2,}|\d+")

Scores: TypeAlias = NDArray[np.float64]


def words_of(text: str) -> tuple[str, ...]:
    """What is asked alone: the first 12 different words, without those like "the" and "of".

    Known value: "A dog, and the dog's ball" -> dog, ball.
    """
    found = dict.fromkeys(word for word in _WORD.findall(text.lower()) if word not in _PLAIN)
    return tuple(found)[:MOST_WORDS]


def covered(pixels: Pixels) -> Pixels:
    """(s, s, 3) uint8 -> (1 + 49, s, s, 3): as it is, then covered place by place, row by row."""
    size = len(pixels)
    half = max(1, round(COVER * size / 2))
    centres = [round((place + 0.5) * size / SIDE) for place in range(SIDE)]
    found = np.repeat(pixels[None], 1 + SIDE * SIDE, axis=0)
    grey = np.rint(pixels.mean(axis=(0, 1))).astype(np.uint8)
    for place, one in enumerate(found[1:]):
        y, x = (centres[part] for part in divmod(place, SIDE))
        one[max(0, y - half) : y + half, max(0, x - half) : x + half] = grey
    return found


def falls(
    pixels: Pixels, texts: Sequence[str], *, score: Callable[[Sequence[str], Pixels], Scores]
) -> NDArray[np.float32] | None:
    """(t, 7, 7): by how much each text's score falls where the picture is covered; below 0 where it rises.

    `score`: (t) texts, (n, s, s, 3) pictures -> (t, n). None where a score is no number.
    """
    found = score(texts, covered(pixels))
    if not np.isfinite(found).all():
        return None
    return (found[:, :1] - found[:, 1:]).reshape(len(texts), SIDE, SIDE).astype(np.float32)
