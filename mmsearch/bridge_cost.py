"""What a bridge costs: hit@k of the old model, of the new one, and of new queries over bridged rows.

Decisions:
- Captions of pictures are the queries that have a right answer. Other texts have none, so what is measured with them is
  how often the new model's first hit is found again.
- Every figure is of rows that the map was not fitted on (`bridge.fit` makes them in folds), over the sample as gallery.
  A gallery of 2,000 is easier than a large index: it is the differences that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.bridge import LEAST, Map, fit
from mmsearch.evaluate.metrics import TIE, Floats, Ints, Ranked, hit_at, interval, rank_groups
from mmsearch.types import Embeddings, Modality, Rows

DEPTHS = (1, 5, 10)
_COLUMNS = ("old", "new", "bridged", "bridged - new", "bridged - old")
_TITLES = {"text_to_image": "text -> image", "image_to_text": "image -> text", "found_again": "new model's first hit"}


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows of both models for the same things: (n, d_old), (n, d_new). `groups` (n,): what belongs together.

    `rows` (n,): of the index.
    """

    old: Embeddings
    new: Embeddings
    groups: Ints
    rows: Rows

    def only(self, which: NDArray[np.bool_]) -> Pairs:
        """Those where (n,) `which` is True."""
        return Pairs(self.old[which], self.new[which], self.groups[which], self.rows[which])

    def and_also(self, more: Pairs) -> Pairs:
        """These, and those after them."""
        rows = np.concatenate([self.old, more.old]), np.concatenate([self.new, more.new])
        return Pairs(*rows, np.concatenate([self.groups, more.groups]), np.concatenate([self.rows, more.rows]))


def fitted(
    pictures: Pairs, texts: Pairs, *, others: Pairs, asked: Embeddings | None = None
) -> tuple[dict[Modality, Map], dict[str, Any]]:
    """A map for pictures, one for texts where there are enough, and what the bridge costs (JSON values).

    `texts`: captions of these pictures; `others`: further texts to fit on; `asked` (q, d_new): texts to measure with.
    """
    maps: dict[Modality, Map] = {}
    cost: dict[str, Any] = {}
    asking = texts.new if asked is None else np.concatenate([texts.new, asked])
    queries = asking if len(asking) else pictures.new
    maps[Modality.IMAGE], held = fit(pictures.old, pictures.new, queries=queries, groups=pictures.groups)
    if len(texts.old):
        cost["text_to_image"] = _cost(texts, pictures, held)
    every = texts.and_also(others)
    if len(np.unique(every.groups)) >= LEAST:
        maps[Modality.TEXT], held_texts = fit(every.old, every.new, queries=pictures.new, groups=every.groups)
        described = pictures.only(np.isin(pictures.groups, texts.groups))  # the others have no right answer
        if len(described.old):
            cost["image_to_text"] = _cost(described, texts, held_texts[: len(texts.old)])
    if asked is not None or not cost:
        own = asked is None
        cost["found_again"] = found_again(pictures.new if asked is None else asked, pictures.new, held, own=own)
    return maps, cost


def _cost(queries: Pairs, gallery: Pairs, bridged: Embeddings) -> dict[str, Any]:
    """hit@k of the old model, the new one, and new queries over bridged rows, with the differences it makes."""
    ways = {"old": (queries.old, gallery.old), "new": (queries.new, gallery.new), "bridged": (queries.new, bridged)}
    hits: dict[str, Mapping[str, Floats]] = {}
    for name, (asking, rows) in ways.items():
        ranked = rank_groups(asking, rows, query_groups=queries.groups, candidate_groups=gallery.groups)
        hits[name] = _hits(ranked)
    for other in ("new", "old"):
        hits[f"bridged - {other}"] = {k: hits["bridged"][k] - hits[other][k] for k in hits[other]}
    shares = {name: _shares(values, queries.groups) for name, values in hits.items()}
    return {"queries": len(queries.new), "gallery": len(gallery.new), **shares}


def found_again(queries: Embeddings, true: Embeddings, bridged: Embeddings, *, own: bool) -> dict[str, Any]:
    """How often what the new model finds first is among the first k of the bridged rows.

    (q, d) queries, (n, d) rows of the new model and (n, d) bridged ones. `own`: query i is picture i, which is not to
    find itself. Equal scores count as found later.
    """
    ranks = np.empty(len(queries), np.int64)
    for place, query in enumerate(queries):
        scores, guessed = true @ query, bridged @ query
        if own:
            scores[place] = guessed[place] = -np.inf
        first = int(np.argmax(scores))
        ranks[place] = np.count_nonzero(guessed >= guessed[first] - TIE)
    hits = _hits(Ranked(ranks, np.arange(len(ranks) + 1)))
    return {"queries": len(queries), "gallery": len(true), "bridged": _shares(hits, np.arange(len(ranks)))}


def _hits(ranked: Ranked) -> dict[str, Floats]:
    return {f"hit@{k}": hit_at(ranked, k) for k in DEPTHS}


def _shares(hits: Mapping[str, Floats], clusters: NDArray[np.int64]) -> dict[str, list[float]]:
    """[mean, low, high] of each, the interval by resampling pictures."""
    return {name: [float(values.mean()), *interval(values, clusters)] for name, values in hits.items()}


def cost_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    """A table for people of what `fitted` measured: per cent, ± half of the 95 % interval."""
    for name, part in cost.items():
        columns = [column for column in _COLUMNS if column in part]
        yield f"{_TITLES.get(name, name):<22}" + "".join(f"{column:>16}" for column in columns)
        for k in DEPTHS:
            yield f"hit@{k:<18}" + "".join(f"{_shown(part[column][f'hit@{k}'], column):>16}" for column in columns)
    yield "In per cent over the sample; ± is half of the 95 % interval (bootstrap over pictures)."


def _shown(share: Sequence[float], column: str) -> str:
    mean, low, high = share
    return f"{100 * mean:{'+' if '-' in column else ''}.1f} ± {50 * (high - low):.1f}"
