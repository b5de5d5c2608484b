"""What is known of a query and its candidates beyond the first stage's cosine: words and patches read together.

Decisions:
- A picture is read from its stored tokens, found by the content of its file; only without them, and only where that is
  allowed, is the file itself read. The picture's row is the stored one: the image tower never runs for a search.
- What cannot be read costs itself only: it keeps the cosine it came with, and is counted in `unread`.
- A list of captions that words asked for holds nothing to read together: texts are compared with texts.
- In an index of fused item vectors the row of an item stands for its picture as well: it is what the first stage saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoder import file_pixels
from mmsearch.errors import ImageError
from mmsearch.rerank.commonness import rarity as rarity_of
from mmsearch.rerank.scores import Evidence, Scoring
from mmsearch.rerank.tokens import Patches, unpack
from mmsearch.types import Embeddings, Hit, Modality, ModelIdentity, Pixels, Preprocessing

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.rerank.config import RerankConfig
    from mmsearch.store.base import Snapshot

Floats = NDArray[np.float64]


class Reranks(Protocol):
    """What a second stage needs of a re-ranker: `rerank.reranker.Reranker`, or `testing.ColorReranker`."""

    @property
    def name(self) -> str:
        """What a report shows."""
        ...

    @property
    def tokens_identity(self) -> str:
        """What stored patch tokens depend on."""
        ...

    @property
    def towers(self) -> ModelIdentity:
        """Which unit rows belong to it."""
        ...

    @property
    def reads_tokens(self) -> bool:
        """False for a fusion of unit rows alone: patches may be None."""
        ...

    @property
    def config(self) -> RerankConfig:
        """Says p and c."""
        ...

    @property
    def scoring(self) -> Scoring:
        """How evidence becomes a probability."""
        ...

    @property
    def caption_bank(self) -> Embeddings:
        """(m, d) rows of captions that say how rare a picture is, see `rerank.commonness`."""
        ...

    @property
    def picture_bank(self) -> Embeddings:
        """(m, d) rows of pictures that say how rare a caption is."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become its input."""
        ...

    def read_texts(self, texts: Sequence[str]) -> Any:  # noqa: ANN401 - handed back to `logits` as it is
        """(n) texts -> their words."""
        ...

    def read_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> Patches:
        """(n, s, s, 3) uint8 -> n pictures' patch tokens, those without finite ones marked."""
        ...

    def logits(
        self,
        words: Any,  # noqa: ANN401 - what `read_texts` gave
        text_rows: Embeddings,
        patches: Patches | None,
        image_rows: Embeddings,
        *,
        pairs: NDArray[np.int64],
        batch_size: int = 64,
    ) -> NDArray[np.float32]:
        """(m, 2) pairs of (text, picture) -> (m,) "they match"."""
        ...

    def attention(
        self,
        words: Any,  # noqa: ANN401 - what `read_texts` gave
        text_rows: Embeddings,
        patches: Patches | None,
        image_rows: Embeddings,
    ) -> NDArray[np.float32] | None:
        """One text, one picture -> (t, p), rows summing to 1; None: it reads no patches."""
        ...

    def words_of(self, text: str) -> list[str]:
        """The t words as they are read."""
        ...


class HoldsTokens(Protocol):
    """Patch tokens by content hash: `store.tokens.TokenStore`."""

    def get(self, hashes: Iterable[bytes | None]) -> dict[bytes, bytes]:
        """Those that there are."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One query: its unit row (1, d), and what it was made of, `text` or `pixels` (1, s, s, 3) uint8."""

    row: Embeddings
    text: str | None = None
    pixels: Pixels | None = None


@dataclass(frozen=True, slots=True)
class Means:
    """What evidence is gathered with. `tokens` None: nothing is stored. `decode`: files may be read."""

    reranker: Reranks
    encoder: Encodes
    snapshot: Snapshot
    tokens: HoldsTokens | None = None
    decode: bool = True


class Gathers(Protocol):
    """Evidence on the candidates of one query, gathered part by part."""

    @property
    def stored(self) -> float:
        """The share of candidates that can be read without their files, in [0, 1]."""
        ...

    @property
    def unread(self) -> int:
        """Pictures among those looked at so far that could not be read."""
        ...

    def evidence(self, part: slice) -> Evidence:
        """On the candidates of a part."""
        ...


def gathering(question: Question, hits: Sequence[Hit], *, to: str, means: Means) -> Gathers | None:
    """How evidence on `hits` is gathered; None where there is nothing to read together: pictures like a picture."""
    if question.text is None:
        return PictureAndCaptions(question, hits, means) if to == "text" and question.pixels is not None else None
    return Captions(hits) if to == "text" else WordsAndItems(question, hits, means)


class Captions:
    """Words and captions: the cosine that the first stage found is all there is, and it can be calibrated."""

    stored, unread = 1.0, 0

    def __init__(self, hits: Sequence[Hit]) -> None:
        self._cosines = np.array([hit.score for hit in hits], np.float64)

    def evidence(self, part: slice) -> Evidence:
        """Text cosines."""
        return Evidence.of(text_cosine=self._cosines[part])


class PictureAndCaptions:
    """One picture read together with each of many captions."""

    stored, unread = 1.0, 0

    def __init__(self, question: Question, hits: Sequence[Hit], means: Means) -> None:
        if question.pixels is None:
            raise TypeError("a question without pixels")
        self._row, self._hits, self._means = question.row, hits, means
        self._patches = means.reranker.read_pixels(question.pixels)
        self.unread = int((~self._patches.intact()).sum())

    def evidence(self, part: slice) -> Evidence:
        """Cosines and logits."""
        hits, reranker = self._hits[part], self._means.reranker
        cosines = np.array([hit.score for hit in hits], np.float64)
        captions = [hit.caption or "" for hit in hits]
        if not hits:
            return Evidence.of(cosine=cosines)
        rows = self._rows(hits, captions)
        rarity = rarity_of(rows, reranker.picture_bank)
        if self.unread:
            return Evidence.of(cosine=cosines, rarity=rarity)
        pairs = np.stack([np.arange(len(hits)), np.zeros(len(hits), np.int64)], axis=1)
        words = reranker.read_texts(captions)
        logits = reranker.logits(words, rows, self._patches, self._row, pairs=pairs)
        return Evidence.of(cosine=cosines, logit=logits, rarity=rarity)

    def _rows(self, hits: Sequence[Hit], captions: Sequence[str]) -> Embeddings:
        """(n, d) rows of the captions: the stored ones, else made anew."""
        found = [_row_of_caption(self._means.snapshot, hit) for hit in hits]
        if any(row is None for row in found):
            return self._means.encoder.encode_texts(captions)
        return self._means.snapshot.vectors(np.array(found, np.int64))


def _row_of_caption(snapshot: Snapshot, hit: Hit) -> int | None:
    rows = snapshot.rows_of(hit.item.id, Modality.TEXT)
    if len(rows) != len(hit.item.captions) or hit.caption not in hit.item.captions:
        return None  # some captions of the item have no row: which is which, only the store knows
    return int(rows[hit.item.captions.index(hit.caption)])


class WordsAndItems:
    """Words read together with the picture of each item; its captions are compared with the words."""

    def __init__(self, question: Question, hits: Sequence[Hit], means: Means) -> None:
        self._question, self._hits, self._means = question, hits, means
        self._words = means.reranker.read_texts([question.text or ""])
        images = [means.snapshot.rows_of(hit.item.id, Modality.IMAGE) for hit in hits]
        self._rows = [int(rows[0]) if len(rows) else -1 for rows in images]
        shown = [row for row, hit in zip(self._rows, hits, strict=True) if row >= 0 and hit.item.path is not None]
        self._digests = dict(zip(shown, means.snapshot.content_hashes(shown), strict=True))
        wanted = self._digests.values() if means.reranker.reads_tokens else ()
        self._blobs = {} if means.tokens is None else means.tokens.get(wanted)
        self.unread = 0

    @property
    def stored(self) -> float:
        """The share of pictures whose tokens are stored; 1 where none are needed."""
        if not self._means.reranker.reads_tokens:
            return 1.0
        there = [digest in self._blobs for digest in self._digests.values()]
        return sum(there) / len(there) if there else 1.0

    def evidence(self, part: slice) -> Evidence:
        """Cosines with pictures and with captions, and logits, as far as they are there."""
        hits, rows = self._hits[part], self._rows[part]
        cosines, logits = np.full(len(hits), np.nan), np.full(len(hits), np.nan)
        there = [place for place, row in enumerate(rows) if row >= 0]
        vectors = self._means.snapshot.vectors(np.array([rows[place] for place in there], np.int64))
        cosines[there] = np.clip(vectors @ self._question.row[0], -1.0, 1.0)
        rarity = np.zeros(len(hits))
        rarity[there] = rarity_of(vectors, self._means.reranker.caption_bank)
        read, patches = self._patches([(place, rows[place], hits[place]) for place in there])
        if read:
            pairs = np.stack([np.zeros(len(read), np.int64), np.arange(len(read))], axis=1)
            image_rows = vectors[[there.index(place) for place in read]]
            logits[read] = self._means.reranker.logits(
                self._words, self._question.row, patches, image_rows, pairs=pairs
            )
        texts = [self._of_captions(hit) for hit in hits]
        return Evidence.of(cosine=cosines, logit=logits, text_cosine=texts, rarity=rarity)

    def _of_captions(self, hit: Hit) -> float:
        """The best cosine of the words with the item's captions; NaN without captions."""
        if not hit.item.captions:
            return float("nan")
        rows = self._means.snapshot.rows_of(hit.item.id, Modality.TEXT)
        if not len(rows):
            return float("nan")
        return float(np.clip((self._means.snapshot.vectors(rows) @ self._question.row[0]).max(), -1.0, 1.0))

    def _patches(self, wanted: Sequence[tuple[int, int, Hit]]) -> tuple[list[int], Patches | None]:
        """(place, row, hit) -> (places of pictures that could be read, their tokens if there is a use for them)."""
        config = self._means.reranker.config
        if not self._means.reranker.reads_tokens:
            return [place for place, row, _ in wanted if row in self._digests], None
        places: list[int] = []
        parts: list[Patches] = []
        missing: list[tuple[int, Hit]] = []
        for place, row, hit in wanted:
            digest = self._digests.get(row)
            if digest is not None and digest in self._blobs:
                places.append(place)
                parts.append(unpack(self._blobs[digest], p=config.patches, c=config.patch_dim))
            elif row in self._digests:
                missing.append((place, hit))
        opened = self._opened(missing) if self._means.decode else []
        if opened:
            places.extend(place for place, _ in opened)
            parts.append(self._means.reranker.read_pixels(np.stack([pixels for _, pixels in opened])))
        if not parts:
            self.unread += len(missing)
            return [], None
        patches = Patches.concatenate(parts)
        intact = patches.intact()
        self.unread += len(missing) - len(opened) + int((~intact).sum())
        read = [place for place, ok in zip(places, intact, strict=True) if ok]
        return read, patches.take(intact) if read else None

    def _opened(self, missing: Sequence[tuple[int, Hit]]) -> list[tuple[int, Pixels]]:
        """(place, pixels) of those whose files can be read."""
        found: list[tuple[int, Pixels]] = []
        for place, hit in missing:
            try:
                found.append((place, file_pixels(str(hit.item.path), self._means.reranker.preprocessing)))
            except ImageError:
                continue
        return found
