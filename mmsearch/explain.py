"""Why a hit is where it is: what the score is made of, which parts of the picture it rests on, where words look.

Decisions:
- What is drawn is what the score loses when a part of the picture is covered (`occlusion`): it is true of any fusion.
  Attention says where a word looks, which need not be where its thing is; it is given as numbers.
- A picture is read from its file: the photo is drawn anyway, and what is shown is what is there now.
- A word that the model reads in pieces is shown as one, with the mean of its pieces; the model's own marks ([CLS],
  [SEP]) look at patches too, but mean nothing to people: they are left out.
- A hit without a picture has its score parts alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoder import file_pixels
from mmsearch.errors import ImageError, ResourceError
from mmsearch.occlusion import falls, words_of
from mmsearch.rerank.commonness import rarity
from mmsearch.rerank.scores import Evidence
from mmsearch.types import NO_PARTS, Embeddings, Hit, Pixels, Preprocessing

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.evidence import Reranks

FAINT = 1.0
"""Log-odds: a word that loses less wherever the picture is covered is drawn more faintly."""
_MARK = re.compile(r"\[[A-Z]+\]|<[^<>]+>")
_PIECE = "##"
_SPACES = ("\u0120", "\u2581")
"""How tokenisers of other kinds than BERT's write the space before a word."""


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """Of one hit: `parts` of the score, the picture's path, and how words and picture meet.

    `falls` (1 + t, 7, 7): what the log-odds lose where the picture is covered, of the whole text and of each of the
    `asked` (t) words alone; None: nothing was read together. `words` (u) as they were read, `grid` (u, g, g) each
    one's attention over the patches of the picture, row by row, summing to 1; None for a fusion without attention.
    """

    words: tuple[str, ...] = ()
    grid: NDArray[np.float32] | None = None
    parts: Mapping[str, float] = field(default_factory=lambda: NO_PARTS)
    picture: str | None = None
    asked: tuple[str, ...] = ()
    falls: NDArray[np.float32] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values: words, the shares of each as g rows of g numbers, the score's parts, and what covers cost."""
        return {
            "words": list(self.words),
            "attention": None if self.grid is None else _rounded(self.grid),
            "parts": dict(self.parts),
            "occlusion": None if self.falls is None else self._occlusion(self.falls),
        }

    def _occlusion(self, falls: NDArray[np.float32]) -> dict[str, Any]:
        words = dict(zip(self.asked, map(_rounded, falls[1:]), strict=True))
        return {"text": _rounded(falls[0]), "words": words}


def explain(
    hit: Hit, *, reranker: Reranks, encoder: Encodes, text: str | None = None, picture: str | None = None
) -> Explanation:
    """Words over a picture: those of the query `text` over the hit's picture, or those of the hit's caption over the
    query `picture` (a file). Parts of the score alone where there is no picture, or none that can be read, or no words.
    Takes both image towers through 50 pictures.
    """
    words, path = (text, hit.item.path) if text is not None else (hit.caption, picture)
    if not words or path is None:
        return Explanation(parts=hit.parts)
    try:
        pixels = file_pixels(path, reranker.preprocessing)
    except ImageError:
        return Explanation(parts=hit.parts)
    asked = words_of(words)
    score = _Scored(hit.parts, of_text=text is not None, reranker=reranker, encoder=encoder)
    lost = falls(pixels, [words, *asked], score=score.log_odds)
    found = Explanation(parts=hit.parts, picture=path, asked=asked if lost is not None else (), falls=lost)
    looks = _attention(words, pixels, reranker=reranker, encoder=encoder)
    if looks is None:
        return found
    shown, shares = whole_words(reranker.words_of(words), looks)
    side = reranker.config.grid
    return replace(found, words=tuple(shown), grid=shares.reshape(len(shown), side, side))


def _attention(words: str, pixels: Pixels, *, reranker: Reranks, encoder: Encodes) -> NDArray[np.float32] | None:
    """(u, p) of one text and one picture."""
    if not reranker.reads_tokens:
        return None
    return reranker.attention(
        reranker.read_texts([words]),
        encoder.encode_texts([words]),
        reranker.read_pixels(pixels[None]),
        encoder.encode_images([pixels]),
    )


class _Scored:
    """Final scores as the search of a hit has them. `parts`: of that hit; `of_text`: words asked for pictures."""

    def __init__(self, parts: Mapping[str, float], *, of_text: bool, reranker: Reranks, encoder: Encodes) -> None:
        self._parts, self._of_text, self._reranker, self._encoder = parts, of_text, reranker, encoder

    def log_odds(self, texts: Sequence[str], pictures: Pixels) -> NDArray[np.float64]:
        """(t) texts, the hit's whole one first, and (n, s, s, 3) -> (t, n); NaN where the scoring covers none."""
        reranker, encoder = self._reranker, self._encoder
        rows, (image_rows, _) = encoder.encode_texts(texts), encoder.encode_pixels(pictures)
        pairs = np.stack(np.divmod(np.arange(len(texts) * len(pictures)), len(pictures)), axis=1)
        logits = reranker.logits(
            reranker.read_texts(texts) if reranker.reads_tokens else None,
            rows,
            reranker.read_pixels(pictures) if reranker.reads_tokens else None,
            image_rows,
            pairs=pairs,
        )
        captions = np.full((len(texts), len(pictures)), np.nan)
        captions[0] = self._parts.get("text_cosine", np.nan)  # the item's own text stays; no word was compared with it
        evidence = Evidence.of(
            cosine=np.clip(rows @ image_rows.T, -1.0, 1.0).ravel(),
            logit=logits,
            text_cosine=captions.ravel(),
            rarity=self._rarity(rows, image_rows).ravel(),
        )
        found = np.full(len(evidence), np.nan)
        covers = reranker.scoring.covers(evidence)
        found[covers] = reranker.scoring.final(evidence.take(covers))
        return found.reshape(len(texts), len(pictures))

    def _rarity(self, rows: Embeddings, image_rows: Embeddings) -> NDArray[np.float64]:
        """(t, n): of what is searched, pictures for words, captions for a picture."""
        shape = (len(rows), len(image_rows))
        if self._of_text:
            return np.broadcast_to(rarity(image_rows, self._reranker.caption_bank)[None], shape)
        return np.broadcast_to(rarity(rows, self._reranker.picture_bank)[:, None], shape)


def _rounded(numbers: NDArray[np.float32]) -> Any:  # noqa: ANN401 - lists of lists of float
    return np.round(numbers.astype(np.float64), 5).tolist()


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
    """Write the contact sheet of an explanation as a PNG; False when nothing was read together or its photo is gone.

    Raises `ResourceError` when the file cannot be written.
    """
    if explanation.falls is None or explanation.picture is None:
        return False
    from mmsearch.data.images import open_image
    from mmsearch.rerank.heatmap import TILE, contact_sheet

    try:
        photo, _ = open_image(explanation.picture, target=TILE)
    except ImageError:
        return False
    lost = np.clip(explanation.falls, 0.0, None)
    sheet = contact_sheet(photo, explanation.asked, lost[1:], whole=lost[0], least=FAINT, preprocessing=preprocessing)
    draft = target.with_name(target.name + ".draft")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(draft, format="PNG")
        os.replace(draft, target)
    except OSError as error:
        raise ResourceError(str(target), got=error.strerror or str(error), do="Choose another folder.") from error
    return True
