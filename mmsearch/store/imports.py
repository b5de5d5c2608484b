"""How far each import into an index is: one fact in `meta`, written in the same step as the rows that it counts.

Decisions:
- A killed import goes on at the row after its last commit, and so ends as one that was not killed: nobody has to guess
  from the items what was read.
- The count of items says whether the record still fits: an index that was emptied or repaired meanwhile is read anew.
- The fact is optional. Without it an import compares each row with what is stored, which is slower and ends the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmsearch.store.base import Batch
from mmsearch.store.creation import first_facts
from mmsearch.store.directory import IndexStore
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import encode_json
from mmsearch.types import ModelIdentity, Preprocessing

IMPORTS = "imports"
IMPORTED = "import:"
"""Before the path of a source in the root of its items: `mmsearch index` of the same path has items of its own."""
TEXT_UNKNOWN = "text_unknown"
"""True in the metadata of an item whose texts nobody kept: its id stands for them, and nothing may encode that."""


@dataclass(frozen=True, slots=True)
class Imported:
    """How far the import of one source is. `fingerprint` says which state of it, read how.

    `rows`: read and committed; `items`: known below the source's root after them; `skipped`: rows among them that
    could not be used. `complete`: to the end. `space`: weights of the model whose vectors they were taken to be.
    """

    fingerprint: str
    rows: int = 0
    items: int = 0
    skipped: int = 0
    complete: bool = False
    space: str = ""


def imports_of(snapshot: DirectorySnapshot) -> dict[str, Imported]:
    """Root of a source -> how far it is. What cannot be read counts as not there."""
    try:
        stored = json.loads(snapshot.meta.get(IMPORTS, "{}"))
        return {root: Imported(**entry) for root, entry in stored.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def imports_fact(imports: Mapping[str, Imported]) -> dict[str, str]:
    """`imports` as the facts of a batch."""
    return {IMPORTS: encode_json({root: asdict(entry) for root, entry in imports.items()})}


def name_model(
    store: IndexStore, *, model: ModelIdentity, preprocessing: Preprocessing, settings: Mapping[str, Any]
) -> None:
    """Say whose vectors an index holds, in one durable step; its rows stay. Open it again to see it."""
    facts = first_facts(model, preprocessing, settings)
    with store.snapshot() as snapshot:
        imports = imports_of(snapshot)
    renamed = {root: replace(entry, space=model.weights) for root, entry in imports.items()}
    named = {name: facts[name] for name in ("model", "preprocessing", "settings")}
    store.commit(Batch(facts={**named, **imports_fact(renamed)}))
