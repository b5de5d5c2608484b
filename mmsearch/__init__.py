"""mmsearch: find pictures by words and words by pictures.

    from mmsearch import Searcher, build

    build(["./photos"], "indexes/photos")
    with Searcher.open("indexes/photos") as searcher:
        for hit in searcher.search_text("a dog on a beach", k=5):
            print(hit.score, hit.item.path)

Names are imported when first used (PEP 562), so that `import mmsearch` stays free of torch, faiss and numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmsearch.builder import build as build
    from mmsearch.encoder import Encoder as Encoder
    from mmsearch.errors import MmsearchError as MmsearchError
    from mmsearch.matcher import Matcher as Matcher
    from mmsearch.rerank.reranker import Reranker as Reranker
    from mmsearch.searcher import Searcher as Searcher
    from mmsearch.searcher import find_index as find_index
    from mmsearch.types import BuildReport as BuildReport
    from mmsearch.types import Hit as Hit
    from mmsearch.types import Item as Item
    from mmsearch.types import Modality as Modality
    from mmsearch.types import Skipped as Skipped
    from mmsearch.types import SkipReason as SkipReason
    from mmsearch.types import Source as Source

__version__ = "0.1.0"

_PUBLIC = {
    "build": "mmsearch.builder",
    "Encoder": "mmsearch.encoder",
    "MmsearchError": "mmsearch.errors",
    "Matcher": "mmsearch.matcher",
    "Reranker": "mmsearch.rerank.reranker",
    "Searcher": "mmsearch.searcher",
    "find_index": "mmsearch.searcher",
    "BuildReport": "mmsearch.types",
    "Hit": "mmsearch.types",
    "Item": "mmsearch.types",
    "Modality": "mmsearch.types",
    "SkipReason": "mmsearch.types",
    "Skipped": "mmsearch.types",
    "Source": "mmsearch.types",
}

__all__ = [
    "BuildReport",
    "Encoder",
    "Hit",
    "Item",
    "Matcher",
    "MmsearchError",
    "Modality",
    "Reranker",
    "Searcher",
    "SkipReason",
    "Skipped",
    "Source",
    "__version__",
    "build",
    "find_index",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute can be anything
    """Import a public name on first use."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mmsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
