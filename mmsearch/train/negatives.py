"""Mined hard negatives: for every pair, the pictures of other groups that its captions are closest to.

Decisions:
- Only the direction text -> image is searched. Put into one batch, a pair and its negative contrast both ways, and
  pictures closest to the negative's captions are in the negative's own line.
- Distances are the business of `mmsearch.index`: this file only asks for the best rows, drops those that may not be
  negatives, and asks deeper where too few were left. The answer is the exact one whenever the index kind is.
- Blocks are cut by the cells of an answer, so memory stays bounded however deep a question has to go.
- A picture that fits far better than the own one is rather another picture of the same thing than a negative:
  `margin` leaves it out (the positive-aware mining of Moreira et al. 2024, arXiv:2407.15831), `skip` blindly the first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.index.base import NeighbourIndex, index_kind
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Rows, Scores

_CELLS = 1 << 20
"""Answers (queries times k) that are held at a time: some 100 MB with all that is derived from them."""
_MOST_QUERIES = 512
"""Queries an index is asked at a time: the exact kind scores them against blocks of 16 MB of rows."""
_DEEPER = 4


def mine(
    texts: Embeddings, images: Embeddings, *, groups: Sequence[Hashable], count: int, owners: Rows | None = None,
    skip: int = 0, margin: float | None = None, kind: str = "exact",
) -> Rows:  # fmt: skip
    """For every pair the hardest other pairs: (n_pairs, count) int64 rows, hardest first, -1 where none is left.

    `images`: (n_pairs, d) unit rows. `texts`: (n, d) unit rows, and `owners` (n,) the pair of each caption; without
    `owners` text i is that of pair i. `groups`: one a pair; a pair of the same group is never a negative.
    A pair's score for a picture is the best cosine of its captions; equal scores: the lower row first. `skip` leaves
    out that many of the hardest, `margin` those scored more than `margin` above the pair's own picture (it may be
    negative). `kind` is one of `mmsearch.index`. Raises `UsageError` for counts that cannot mean anything, for rows
    that are not unit rows, and for lengths that do not fit.
    """
    images = check_embeddings(images, where="image rows")
    texts = check_embeddings(texts, dim=images.shape[1], where="text rows")
    miner = _Miner(
        index_kind(kind).build(images), texts, images,
        owners=_checked_owners(owners, texts=len(texts), pairs=len(images)),
        groups=_numbered(groups, pairs=len(images)), margin=margin,
    )  # fmt: skip
    if count < 1 or skip < 0:
        raise UsageError("hard negatives", expected="count of 1 or more, skip of 0 or more", got=f"{count}, {skip}")
    found = np.full((len(images), count), -1, dtype=np.int64)
    open_pairs, depth = np.unique(miner.owners), min(count + skip + 1, len(images))
    while len(open_pairs):  # the own group and near duplicates take places: ask deeper for the pairs that came short
        short = [miner.fill(found, block, depth=depth, skip=skip) for block in miner.blocks(open_pairs, depth)]
        open_pairs = np.concatenate(short) if depth < len(images) else np.empty(0, dtype=np.int64)
        depth = min(depth * _DEEPER, len(images))
    return found


class _Miner:
    """The rows of one call. `owners`: (n,) int64, the pair of each text; `groups`: (n_pairs,) int64."""

    def __init__(
        self, index: NeighbourIndex, texts: Embeddings, images: Embeddings, *, owners: Rows, groups: Rows,
        margin: float | None,
    ) -> None:  # fmt: skip
        self.index, self.texts, self.owners, self.groups = index, texts, owners, groups
        self.captions = np.bincount(owners, minlength=len(images))
        own = np.full(len(images), -np.inf, dtype=np.float32)
        np.maximum.at(own, owners, np.einsum("nd,nd->n", texts, images[owners]))
        self.highest = own + np.float32(margin) if margin is not None else np.full_like(own, np.inf)

    def blocks(self, pairs: Rows, depth: int) -> Iterator[Rows]:
        """`pairs` (ascending) in pieces whose answers at this depth fit; a piece has one pair at least."""
        piece = (np.cumsum(self.captions[pairs]) - 1) // max(1, min(_MOST_QUERIES, _CELLS // depth))
        yield from np.split(pairs, np.flatnonzero(np.diff(piece)) + 1)

    def fill(self, found: Rows, pairs: Rows, *, depth: int, skip: int) -> Rows:
        """Write the negatives of `pairs` into `found`; return the pairs for which `depth` was not deep enough."""
        wanted = found.shape[1] + skip
        asking = np.flatnonzero(np.isin(self.owners, pairs))
        scores, rows = self.index.search(self.texts[asking], depth)  # (q, depth)
        owners = np.repeat(self.owners[asking], depth).reshape(rows.shape)
        best, first = _best_of_pair(owners, rows, scores)
        fits = (rows >= 0) & (self.groups[rows] != self.groups[owners]) & (best <= self.highest[owners])
        keep = np.flatnonzero((fits & first).ravel())
        pair, row, score = owners.ravel()[keep], rows.ravel()[keep], best.ravel()[keep]
        order = np.lexsort((row, -score, pair))
        pair, row = pair[order], row[order]
        place = np.arange(len(pair)) - np.searchsorted(pair, pair, "left") - skip  # 0 for the first after the skipped
        taken = (place >= 0) & (place < found.shape[1])
        found[pairs] = -1  # a deeper answer may leave out what a shallower one let through
        found[pair[taken], place[taken]] = row[taken]
        # Deep enough is what each single caption says: one that ran out of answers may know a harder one further down.
        return np.unique(self.owners[asking][fits.sum(axis=1) < wanted])


def _best_of_pair(owners: Rows, rows: Rows, scores: Scores) -> tuple[Scores, NDArray[np.bool_]]:
    """Of answers (q, k): a row's best score among one pair's captions, and True at one answer of each such row."""
    keys = owners * (rows.max(initial=0) + 2) + rows + 1
    _, first, same = np.unique(keys, return_index=True, return_inverse=True)
    best = np.full(len(first), -np.inf, dtype=np.float32)
    np.maximum.at(best, same.ravel(), scores.ravel())
    marked = np.zeros(keys.size, dtype=np.bool_)
    marked[first] = True
    return best[same].reshape(keys.shape), marked.reshape(keys.shape)


def _checked_owners(owners: Rows | None, *, texts: int, pairs: int) -> Rows:
    if owners is None:
        owners = np.arange(pairs, dtype=np.int64)
    owners = np.asarray(owners, dtype=np.int64)
    if owners.shape != (texts,) or (texts and not 0 <= owners.min() <= owners.max() < pairs):
        got = f"{owners.shape} for {texts} texts and {pairs} images"
        raise UsageError("owners of the text rows", expected="for each text the row of its image", got=got)
    return owners


def _numbered(groups: Sequence[Hashable], *, pairs: int) -> Rows:
    """Any names of groups as int64 numbers, equal for equal names."""
    if len(groups) != pairs:
        raise UsageError("groups", expected=f"{pairs}, one an image", got=str(len(groups)))
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
