"""How often a text finds its item by the picture, by the item's text, by both, or among items of every kind.

Decisions:
- The query is the first caption of a pair, the item's text the first caption in other words than every query of its
  group: a group-mate found by the query's own words would count. A pair without such a caption is in no gallery, so
  that all forms are about the same queries and items.
- "picture" is the picture's row as an index without the head holds it. The others are rows of the head, as an index
  with fused item vectors holds them, also of items that have one side.
- From text to item only: that is what the head is trained for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmsearch.evaluate.metrics import Ints, hit_at, rank_groups
from mmsearch.evaluate.report import DEPTHS
from mmsearch.train.modality import another_caption
from mmsearch.types import Embeddings, Pair

ItemHits = Mapping[str, Mapping[str, float]]
"""Form of the items ("picture", "text", "both", "mixed") -> "hit@1", "hit@5", "hit@10" -> share in [0, 1]."""


def item_texts(pairs: Sequence[Pair]) -> dict[int, int]:
    """Position of each pair that can be measured -> number of the caption that is its item's text, in order.

    Caption 0 is the query. Known values: captions ("a", "b") give 1; one caption, or one in two spellings, is left out.
    """
    able = [position for position, pair in enumerate(pairs) if another_caption(pair, 0, seed=0) is not None]
    queries: dict[str, set[str]] = defaultdict(set)
    for position in able:
        queries[pairs[position].group].add(pairs[position].captions[0])
    found = {}
    for position in able:
        pair = pairs[position]
        for number in range(1, len(pair.captions)):
            if all(_in_other_words(pair, number, query) for query in queries[pair.group]):
                found[position] = number
                break
    return found


def item_forms(join: Callable[..., Tensor], images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Unit rows of n items' pictures and texts, (n, d) each -> (n, d) rows for each form of these items.

    `join`: the model's `item_rows`, in evaluation mode. "mixed": item i is a picture where i mod 3 is 0, a text where
    it is 1, both where it is 2. Known value: "both" of a head that has learned nothing is the normalised sum.
    """
    turn = torch.arange(len(images)) % 3
    yes, no = torch.ones_like(turn, dtype=torch.bool), torch.zeros_like(turn, dtype=torch.bool)
    sides = {"text": (no, yes), "both": (yes, yes), "mixed": (turn != 1, turn != 0)}  # form -> has picture, has text
    made = {form: join(images, texts, has_image=has[0], has_text=has[1]) for form, has in sides.items()}
    return {"picture": images, **made}


def item_hits(queries: Embeddings, forms: Mapping[str, Embeddings], *, groups: Ints) -> ItemHits:
    """hit@k of (n, d) queries over each form's (n, d) items, unit rows all; `groups` (n,): what belongs together.

    Query i looks for the items of its group, `groups[i]`. Known value: 1 for items that are the queries, orthogonal
    between groups; 0 at k < n for n items all alike, each of a group of its own.
    """
    found = {}
    for form, items in forms.items():
        ranked = rank_groups(queries, items, query_groups=groups, candidate_groups=groups)
        found[form] = {f"hit@{k}": float(hit_at(ranked, k).mean()) for k in DEPTHS}
    return found


def _in_other_words(pair: Pair, number: int, query: str) -> bool:
    """As the loss means it: whether a pair of these two captions would have an item text for `query`."""
    return another_caption(replace(pair, captions=(query, pair.captions[number])), 0, seed=0) is not None
