"""What an index directory is: items, rows, a manifest; crash-safe, checked, one writer, many readers.

`indexes/README.md` is the specification of the format.
"""

from mmsearch.store.base import (
    Batch,
    Change,
    ChangeKind,
    Derived,
    ItemState,
    Known,
    Located,
    Move,
    Problem,
    Skip,
    Touch,
    Upsert,
)
from mmsearch.store.directory import IndexStore

__all__ = [
    "Batch",
    "Change",
    "ChangeKind",
    "Derived",
    "IndexStore",
    "ItemState",
    "Known",
    "Located",
    "Move",
    "Problem",
    "Skip",
    "Touch",
    "Upsert",
]
