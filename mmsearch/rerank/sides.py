"""Texts and pictures of many pairs as arrays: checked once, gathered batch by batch.

Decisions:
- A side that all pairs of a batch share is gathered once: whoever runs the batch repeats it or lets it broadcast.
- Words are cut to the longest text of the batch: padding is work and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmsearch.errors import UsageError
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.tokens import Patches, dequantise
from mmsearch.types import Embeddings


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """n texts as a fusion reads them: `tokens` (n, t, w) float32, `mask` (n, t) int64, 1 for words and 0 for padding.

    Special tokens are words; padding is zeros.
    """

    tokens: NDArray[np.float32]
    mask: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


class Sides:
    """n texts, words and unit rows (n, d), and m pictures, patches and unit rows (m, d).

    `reads_tokens` False: rows alone count, words and patches may be None. `UsageError` for sizes that do not fit.
    """

    def __init__(
        self,
        text: tuple[Words | None, Embeddings],
        image: tuple[Patches | None, Embeddings],
        *,
        config: RerankConfig,
        dim: int,
        reads_tokens: bool,
    ) -> None:
        (words, self._text_rows), (patches, self._image_rows) = text, image
        for name, rows in (("text rows", self._text_rows), ("image rows", self._image_rows)):
            _fits(name, rows.shape, (len(rows), dim))
        self._words, self._patches = (words, patches) if reads_tokens else (None, None)
        if not reads_tokens:
            return
        if words is None or patches is None:
            got = "no words" if words is None else "no patches"
            raise UsageError("re-ranker", expected="words and patches", got=got, do="Read them first.")
        _fits("words", words.tokens.shape[:2], words.mask.shape)
        _fits("words", words.tokens.shape[:1], self._text_rows.shape[:1])
        _fits("patches", patches.values.shape, (len(self._image_rows), config.patches, config.patch_dim))

    @property
    def size(self) -> tuple[int, int]:
        """n, m."""
        return len(self._text_rows), len(self._image_rows)

    def usable(self) -> NDArray[np.bool_]:
        """(n,) which pictures have patches that can be read."""
        return np.ones(len(self._image_rows), bool) if self._patches is None else self._patches.intact()

    def gather(self, pairs: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """(b, 2) -> `text_rows` (b, d), `tokens` (b, t, w), `mask` (b, t), `image_rows` (b, d), `patches` (b, p, c).

        The text side has batch 1 where all pairs share it, else the image side where they share that.
        """
        texts, pictures = pairs.T
        if (texts == texts[0]).all():
            texts = texts[:1]
        elif (pictures == pictures[0]).all():
            pictures = pictures[:1]
        return self._taken(texts, pictures)

    def every(self) -> dict[str, NDArray[Any]]:
        """As `gather`, all n texts and all m pictures; marked pictures too, whose patches mean nothing."""
        return self._taken(np.arange(len(self._text_rows)), np.arange(len(self._image_rows)))

    def _taken(self, texts: NDArray[np.int64], pictures: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {
            "text_rows": np.asarray(self._text_rows[texts], np.float32),
            "image_rows": np.asarray(self._image_rows[pictures], np.float32),
        }
        if self._words is None or self._patches is None:
            nothing = np.empty((1, 0), np.float32)
            return {**found, "tokens": nothing, "mask": nothing, "patches": nothing}
        mask = self._words.mask[texts]
        longest = max(1, int(np.flatnonzero(mask.max(axis=0)).max(initial=0)) + 1)
        found["tokens"] = np.asarray(self._words.tokens[texts, :longest], np.float32)
        found["mask"] = mask[:, :longest]
        found["patches"] = dequantise(self._patches.take(pictures))
        return found


def _fits(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise UsageError(f"{name} of a re-ranker", expected=str(expected), got=str(got))


def checked_pairs(pairs: ArrayLike, *, texts: int, pictures: int) -> NDArray[np.int64]:
    """(m, 2) whole numbers, a text below `texts` and a picture below `pictures` each; `UsageError` otherwise."""
    places = np.asarray(pairs)
    if places.size == 0:
        return np.empty((0, 2), np.int64)
    if places.ndim != 2 or places.shape[1] != 2 or not np.issubdtype(places.dtype, np.integer):
        raise UsageError("pairs", expected="whole numbers (m, 2)", got=f"{places.dtype} {places.shape}")
    if (places < 0).any() or (places >= (texts, pictures)).any():
        wrong = places[((places < 0) | (places >= (texts, pictures))).any(axis=1)][0].tolist()
        raise UsageError("pairs", expected=f"texts below {texts}, pictures below {pictures}", got=str(wrong))
    return places.astype(np.int64)
