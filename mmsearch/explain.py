"""Why a hit is where it is: which words look at which patches, and what the score is made of.

Decisions:
- A picture is read from its file: the photo is drawn anyway, and what is shown is what is there now.
- A word that the model reads in pieces is shown as one, with the mean of its pieces; the model's own marks ([CLS],
  [SEP]) look at patches too, but mean nothing to people: they are left out.
- A hit without a picture, or a fusion without attention, has its score parts alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoder import file_pixels
from mmsearch.errors import ImageError, ResourceError
from mmsearch.types import NO_PARTS, Hit, Preprocessing

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.evidence import Reranks

_MARK = re.compile(r"\[[A-Z]+\]|<[^<>]+>")
_PIECE = "##"
_SPACES = ("\u0120", "\u2581")
"""How tokenisers of other kinds than BERT's write the space before a word."""


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """Of one hit: `words` (t) as they were read, `grid` (t, g, g) each word's shares over the patches of the picture,
    row by row, summing to 1 (None: nothing was read together), `parts` of the score, and the picture's path.
    """

    words: tuple[str, ...] = ()
    grid: NDArray[np.float32] | None = None
    parts: Mapping[str, float] = field(default_factory=lambda: NO_PARTS)
    picture: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values: words, the shares of each as g rows of g numbers, and the score's parts."""
        grid = None if self.grid is None else np.round(self.grid.astype(np.float64), 5).tolist()
        return {"words": list(self.words), "attention": grid, "parts": dict(self.parts)}

    def top_patch(self, word: int) -> tuple[int, int, float]:
        """(row, column, share) of the patch that a word looks at most; `ValueError` without attention."""
        if self.grid is None:
            raise ValueError("no attention")
        place = int(self.grid[word].argmax())
        row, column = divmod(place, self.grid.shape[2])
        return row, column, float(self.grid[word, row, column])


def explain(
    hit: Hit, *, reranker: Reranks, encoder: Encodes, text: str | None = None, picture: str | None = None
) -> Explanation:
    """Words over a picture: those of the query `text` over the hit's picture, or those of the hit's caption over the
    query `picture` (a file). Parts of the score alone where there is no picture, or none that can be read, or no words.
    """
    words, path = (text, hit.item.path) if text is not None else (hit.caption, picture)
    if not words or path is None or not reranker.reads_tokens:
        return Explanation(parts=hit.parts)
    try:
        pixels = file_pixels(path, reranker.preprocessing)
    except ImageError:
        return Explanation(parts=hit.parts)
    looks = reranker.attention(
        reranker.read_texts([words]),
        encoder.encode_texts([words]),
        reranker.read_pixels(pixels[None]),
        encoder.encode_images([pixels]),
    )
    if looks is None:
        return Explanation(parts=hit.parts, picture=path)
    shown, shares = whole_words(reranker.words_of(words), looks)
    side = reranker.config.grid
    return Explanation(tuple(shown), shares.reshape(len(shown), side, side), hit.parts, path)


def whole_words(pieces: Sequence[str], looks: NDArray[np.float32]) -> tuple[list[str], NDArray[np.float32]]:
    """(t) pieces and their (t, p) shares -> (w) words and (w, p); known value: "rain", "##bow" -> "rainbow", the mean.

    Marks such as [CLS] are left out; where there is nothing else, all pieces are kept as they are.
    """
    words: list[str] = []
    rows: list[list[int]] = []
    for place, piece in enumerate(pieces[: len(looks)]):
        if _MARK.fullmatch(piece):
            continue
        if piece.startswith(_PIECE) and words and rows[-1][-1] == place - 1:
            words[-1] += piece.removeprefix(_PIECE)
            rows[-1].append(place)
        else:
            words.append(piece.lstrip("".join(_SPACES)) or piece)
            rows.append([place])
    if not words:
        return list(pieces[: len(looks)]), looks
    return words, np.stack([looks[own].mean(axis=0) for own in rows])


def draw(explanation: Explanation, target: Path, *, preprocessing: Preprocessing) -> bool:
    """Write the contact sheet of an explanation as a PNG; False when it has no attention or its photo is gone.

    Raises `ResourceError` when the file cannot be written.
    """
    if explanation.grid is None or explanation.picture is None:
        return False
    from mmsearch.data.images import open_image
    from mmsearch.rerank.heatmap import TILE, contact_sheet

    try:
        photo, _ = open_image(explanation.picture, target=TILE)
    except ImageError:
        return False
    sheet = contact_sheet(photo, explanation.words, explanation.grid, preprocessing=preprocessing)
    draft = target.with_name(target.name + ".draft")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(draft, format="PNG")
        os.replace(draft, target)
    except OSError as error:
        raise ResourceError(str(target), got=error.strerror or str(error), do="Choose another folder.") from error
    return True
