"""Does this picture match this text: a probability for pairs, from the towers and the re-ranker of one model.

    matcher = Matcher.load("checkpoints/mine")
    matcher.match([Path("photo.jpg")], ["a dog on a beach"])     # array([0.93])

Decisions:
- The probability is the one that a re-ranked hit shows: cosine and logit, weighted and calibrated.
- A table's pairs are answered in its order, a batch at a time, so that a table may be longer than memory. In a batch
  every picture is decoded and every text encoded once.
- Rows are pairs as they stand: nothing is joined, and a row's label is its own.
- A picture that cannot be read costs its own pairs only; they are reported, and the others are answered. Asked for
  alone or in a list, such a picture is an error: there is nothing to put in its place.
- A column that is called `label` and holds something else (names of classes) is no label. It is said once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.data import formats
from mmsearch.data.loading import Failed, Loader
from mmsearch.data.pairs import read_pairs
from mmsearch.data.records import Record, locate
from mmsearch.data.texts import OnSkip
from mmsearch.encoder import file_pixels, to_pixels
from mmsearch.errors import InputError, ModelError, UsageError
from mmsearch.evaluate.matching import evaluate_matching
from mmsearch.hits import check_words
from mmsearch.rerank.calibration import probability_of
from mmsearch.rerank.commonness import rarity as rarity_of
from mmsearch.rerank.scores import Evidence
from mmsearch.second_stage import shown_parts
from mmsearch.types import Pixels, Skipped, SkipReason

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmsearch.encoder import Encodes
    from mmsearch.evidence import Reranks

AT_ONCE = 64
"""Pairs in a batch."""

_LABELS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "match"), True),
    **dict.fromkeys(("0", "0.0", "false", "no"), False),
}
LABEL_COLUMNS = ("label", "match")


@dataclass(frozen=True, slots=True)
class PairToMatch:
    """A picture's path (or address, `data.packed`) and a text; `label`: whether they match, where the data says so."""

    image: str
    text: str
    label: bool | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """An answer: `probability` in (0, 1) that the two match, and the `parts` it is made of (see `second_stage`).

    `cut`: the text is longer than the model reads, and only its beginning was used.
    """

    pair: PairToMatch
    probability: float
    parts: dict[str, float]
    cut: bool = False

    def to_json(self, *, threshold: float = 0.5) -> dict[str, Any]:
        """JSON values; `match`: whether the probability reaches the threshold."""
        label = {} if self.pair.label is None else {"label": self.pair.label}
        return {
            "image": self.pair.image,
            "text": self.pair.text,
            "probability": round(self.probability, 6),
            "match": self.probability >= threshold,
            **label,
            **({"cut": True} if self.cut else {}),
            "parts": {name: round(value, 6) for name, value in self.parts.items()},
        }


class Matcher:
    """Matches pictures with texts. Make one with `Matcher.load`, or of an encoder and its re-ranker.

    Raises `ModelError` when the two are not of the same towers.
    """

    def __init__(self, encoder: Encodes, reranker: Reranks) -> None:
        if not encoder.identity.same_space(reranker.towers):
            raise ModelError(
                "re-ranker",
                expected=f"one of the towers {encoder.identity.name} ({encoder.identity.weights[:12]})",
                got=f"one of {reranker.towers.name} ({reranker.towers.weights[:12]})",
            )
        self.encoder, self.reranker = encoder, reranker

    @classmethod
    def load(cls, model: str | Path | None = None, *, device: str = "auto") -> Matcher:
        """The towers and the re-ranker of a model directory; None: the bundled model.

        Raises `ModelError` when the model is not there, damaged, or has no re-ranker.
        """
        from mmsearch.encoder import Encoder
        from mmsearch.rerank.reranker import Reranker

        reranker = Reranker.load(model, device=device)  # first: it says that there is none before towers are read
        return cls(Encoder.load(model, device=device), reranker)

    def match(
        self, pictures: Sequence[Image | Pixels | str | os.PathLike[str]], texts: Sequence[str]
    ) -> NDArray[np.float64]:
        """(n) pictures and (n) texts, pair by pair -> (n,) probabilities in (0, 1) that they match.

        A picture is a PIL image, (h, w, 3) uint8 pixels, a `Path`, or a str: a path or an address (see `match_one`).
        Raises `ImageError` for one that cannot be read, `ModelError` for one that the model gives no numbers for,
        `UsageError` for lists of unequal length, one str in the place of a list, empty texts, and what is no picture.
        """
        for name, given in (("pictures", pictures), ("texts", texts)):
            if isinstance(given, str):
                raise UsageError(name, expected="a list", got="one str")
        if len(pictures) != len(texts):
            got = f"{len(pictures)} pictures and {len(texts)} texts"
            raise UsageError("pairs", expected="two lists of one length", got=got)
        found = np.empty(len(texts))
        for low in range(0, len(texts), AT_ONCE):
            part = slice(low, low + AT_ONCE)
            pixels = [self._pixels(picture) for picture in pictures[part]]
            evidence, usable = self._evidence(np.stack(pixels), np.arange(len(pixels)), texts[part])
            _require(usable, [f"picture {low + place}" for place in range(len(usable))])
            found[part] = self._final(evidence)
        return probability_of(found)

    def match_one(self, picture: str | os.PathLike[str], text: str) -> Match:
        """The answer for one picture and one text. Raises as `match`.

        The picture is at a path or an address (`data.remote`, `data.packed`), as text: a `Path` of one loses a slash.
        """
        pair = PairToMatch(os.fspath(picture), text)
        pixels = self._pixels(pair.image)
        evidence, usable = self._evidence(pixels[None], np.zeros(1, np.int64), [text])
        _require(usable, [pair.image])
        cut = self.encoder.truncated([text])[0]
        return Match(pair, float(probability_of(self._final(evidence))[0]), self._parts(evidence)[0], cut)

    def match_pairs(
        self, pairs: Iterable[PairToMatch], *, workers: int | None = None, batch_size: int = AT_ONCE
    ) -> Iterator[Match | Skipped]:
        """Answers in the order of `pairs`, streaming; a pair that cannot be answered comes as `Skipped`."""
        rest = iter(pairs)
        with Loader(preprocessing=self.encoder.preprocessing, workers=workers, ahead=batch_size) as loader:
            while batch := list(islice(rest, batch_size)):
                yield from self._answered(batch, loader)

    def _pixels(self, picture: Image | Pixels | str | os.PathLike[str]) -> Pixels:
        if isinstance(picture, str):
            return file_pixels(picture, self.encoder.preprocessing)
        return to_pixels(picture, self.encoder.preprocessing)

    def _answered(self, batch: Sequence[PairToMatch], loader: Loader) -> Iterator[Match | Skipped]:
        paths = list(dict.fromkeys(pair.image for pair in batch if pair.text.strip()))
        wrong: dict[str, Skipped] = {}
        pixels: dict[str, Pixels] = {}
        for loaded in loader.load(enumerate(paths)):
            if isinstance(loaded, Failed):
                wrong[paths[loaded.key]] = loaded.skipped
            else:
                pixels[paths[loaded.key]] = loaded.pixels
        able = [pair for pair in batch if pair.image in pixels and pair.text.strip()]
        answers: dict[int, Match] = {}
        if able:
            places = {path: place for place, path in enumerate(pixels)}
            which = np.array([places[pair.image] for pair in able], np.int64)
            evidence, usable = self._evidence(np.stack(list(pixels.values())), which, [pair.text for pair in able])
            good = np.flatnonzero(usable)
            evidence = evidence.take(good)
            p, parts = probability_of(self._final(evidence)), self._parts(evidence)
            cut = self.encoder.truncated([pair.text for pair in able])
            for row, place in enumerate(good.tolist()):
                answers[id(able[place])] = Match(able[place], float(p[row]), parts[row], cut[place])
        for pair in batch:
            if (answer := answers.get(id(pair))) is not None:
                yield answer
            elif not pair.text.strip():
                yield Skipped(pair.image, SkipReason.BAD_ROW, "no text")
            else:
                yield wrong.get(pair.image) or Skipped(pair.image, SkipReason.BAD_EMBEDDING)

    def _evidence(
        self, pixels: Pixels, which: NDArray[np.int64], texts: Sequence[str]
    ) -> tuple[Evidence, NDArray[np.bool_]]:
        """(n, s, s, 3) pictures, (m,) each pair's picture, (m) texts -> evidence on m pairs, (m,) which is whole."""
        for text in texts:
            check_words(text, where="text")
        single = list(dict.fromkeys(texts))
        number = {text: place for place, text in enumerate(single)}
        rows, usable = self.encoder.encode_pixels(pixels)
        text_rows = self.encoder.encode_texts(single)
        pairs = np.stack([np.array([number[text] for text in texts], np.int64), which], axis=1)
        cosines = np.clip(np.einsum("md,md->m", text_rows[pairs[:, 0]], rows[which]), -1.0, 1.0)
        words, patches = None, None
        if self.reranker.reads_tokens:
            words, patches = self.reranker.read_texts(single), self.reranker.read_pixels(pixels)
        logits = np.full(len(pairs), np.nan)
        good = np.flatnonzero(usable[which])  # a row of zeros is no row
        logits[good] = self.reranker.logits(words, text_rows, patches, rows, pairs=pairs[good])
        rarity = rarity_of(rows, self.reranker.caption_bank)[which]
        return Evidence.of(cosine=cosines, logit=logits, rarity=rarity), np.isfinite(logits)

    def _final(self, evidence: Evidence) -> NDArray[np.float64]:
        return self.reranker.scoring.final(evidence)

    def _parts(self, evidence: Evidence) -> list[dict[str, float]]:
        return shown_parts(evidence, self.reranker.scoring)


def _require(usable: NDArray[np.bool_], names: Sequence[str]) -> None:
    """`ModelError` for the first of the pictures, called `names`, that the model gives no numbers for."""
    if not usable.all():
        raise ModelError(
            names[int(np.argmin(usable))], expected="finite numbers of the model", got="NaN, infinity or no direction",
            do="Leave it out, or try --device cpu.",
        )  # fmt: skip


class Tally:
    """How good answers are, where the data has labels. `threshold`: from which probability on the answer is yes."""

    def __init__(self, model: str, *, threshold: float) -> None:
        self.answered = 0
        self._model, self._threshold = model, threshold
        self._p: list[float] = []
        self._y: list[bool] = []
        self._images: list[int] = []
        self._numbers: dict[str, int] = {}

    def add(self, answer: Match) -> None:
        """One more answer; without a label it is only counted."""
        self.answered += 1
        if answer.pair.label is not None:
            self._p.append(answer.probability)
            self._y.append(answer.pair.label)
            self._images.append(self._numbers.setdefault(answer.pair.image, len(self._numbers)))

    def lines(self) -> Iterator[str]:
        """For people; nothing without labels, and only the accuracy where all labels are of one kind."""
        if not self._y:
            return
        p, y = np.array(self._p), np.array(self._y)
        right = float(((p >= self._threshold) == y).mean())
        yield f"{len(y)} labelled pairs: {100 * right:.1f} % answered rightly at {self._threshold:g}"
        if 0 < y.sum() < len(y):
            clusters = np.array(self._images, np.int64)
            yield from evaluate_matching(p, y, clusters=clusters, model=self._model).lines()


def read_pairs_to_match(
    path: str, *, on_skip: OnSkip, on_note: Callable[[str], None] = lambda text: None
) -> Iterator[PairToMatch]:
    """Pairs of a table with a picture and a text in each row, a data set, or a folder with side-car captions.

    What `data.pairs.read_pairs` reads, row by row; a column `label` (or `match`) of 0 and 1, no and yes, false and true
    says whether they match; other values are none, which `on_note` is told once. Rows that cannot be used go to
    `on_skip`. Raises `InputError` when there is no such path, or nothing to match in it.
    """
    count = 0

    def skip(skipped: Skipped) -> None:
        nonlocal count
        count += 1
        on_skip(skipped)

    for pair in _read(path, on_skip=skip, on_note=on_note):
        count += 1
        yield pair
    if not count:
        table, folder = "Add rows with a picture and a text.", "Put captions in a.txt beside a.jpg, or name a table."
        do = folder if os.path.isdir(path) else table
        raise InputError(path, expected="pictures with texts", got="none", do=do)


def _read(path: str, *, on_skip: OnSkip, on_note: Callable[[str], None]) -> Iterator[PairToMatch]:
    absolute = os.path.abspath(path)
    kind = formats.sniff_folder(absolute) if os.path.isdir(absolute) else formats.sniff(absolute)
    if kind is None or not (os.path.lexists(absolute) or formats.is_pattern(absolute)):
        for pair in read_pairs(path, on_skip=on_skip, tell_bare=False):
            yield from (PairToMatch(pair.image, caption) for caption in pair.captions)
        return
    records, finder = formats.open_table(absolute, format=kind, on_skip=on_skip)
    told = False
    for record in records:
        where = f"{path}:{record.line}"
        if (record.image is None and record.place is None) or not record.captions:
            on_skip(Skipped(where, SkipReason.BAD_ROW, "no text" if record.captions == () else "no picture"))
            continue
        label, strange = _label_of(record)
        if strange and not told:
            told = True
            on_note(f"{where}: {strange} is no label (1 or 0, yes or no, true or false); such rows have none")
        found = locate(absolute, record, finder=finder, on_skip=on_skip)
        if found is not None:
            yield from (PairToMatch(found[0], caption, label) for caption in record.captions)


def _label_of(record: Record) -> tuple[bool | None, str]:
    """What a row says, None when it says nothing, and what it says instead ("" for nothing)."""
    strange = ""
    for name, value in record.metadata.items():
        if name.strip().lower() in LABEL_COLUMNS and value not in (None, ""):
            label = _LABELS.get(str(value).strip().lower())
            if label is not None:
                return label, ""
            strange = strange or repr(str(value)[:40])
    return None, strange
