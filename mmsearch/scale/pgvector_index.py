"""HNSW in pgvector: whether it is there, how far a search looks, and how far it must look to find what there is.

Decisions:
- `ef_search` is the least of a few steps whose answers overlap enough with exact search, on rows of the collection: for
  pictures the queries are its captions' rows, because people ask in words and word vectors lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from mmsearch.errors import UsageError
from mmsearch.scale.address import Address
from mmsearch.scale.pgvector_sql import Tables
from mmsearch.types import Modality

STEPS = (40, 80, 160, 320, 640, 1000)
MOST = 1000
"""pgvector's own limit of `hnsw.ef_search`."""
SAMPLE = 48
_K = 10
_TIE = 1e-5


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found: `overlap` of the 10 best with exact search at `ef`, mean over `queries` rows of kind `asked`."""

    ef: int
    overlap: float
    queries: int
    asked: Modality

    def words(self, modality: Modality) -> str:
        """One line for the user."""
        return (
            f"HNSW over {modality.value} rows: ef_search {self.ef} finds {self.overlap:.3f} of the {_K} best"
            f" ({self.queries} {self.asked.value} queries)"
        )


def target_of(address: Address) -> float:
    """The overlap wanted, from the address; 0.95 by default."""
    text = address.options.get("overlap", "0.95")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= 1.0:
        raise UsageError(address.shown, expected="overlap=0.5 to 1", got=repr(text)[:40])
    return value


def there(db: psycopg.Connection[Any], tables: Tables, modality: Modality) -> bool:
    """Whether one modality has its index."""
    found = db.execute("SELECT to_regclass(%s) IS NOT NULL", [f'"{tables.index_name(modality)}"']).fetchone()
    return bool(found and found[0])


def look(db: psycopg.Connection[Any], ef: int, *, iterative: bool) -> None:
    """For the rest of the transaction: HNSW is used, and looks at `ef` rows (`iterative`: at more, until it has k)."""
    settings = {"hnsw.ef_search": str(ef), "enable_seqscan": "off", "enable_bitmapscan": "off"}
    if iterative:
        settings["hnsw.iterative_scan"] = "strict_order"
    for name, value in settings.items():
        db.execute("SELECT set_config(%s, %s, true)", [name, value])


def tuned(
    db: psycopg.Connection[Any],
    tables: Tables,
    modality: Modality,
    *,
    nearest: Callable[..., list[tuple[float, str, int]]],
    iterative: bool,
    target: float,
) -> Tuned:
    """The least `ef_search` of STEPS whose overlap with exact search is `target` or more, else the largest."""
    other = Modality.TEXT if modality is Modality.IMAGE else Modality.IMAGE
    asked, queries = other, _sample(db, tables, other)
    if not queries:
        asked, queries = modality, _sample(db, tables, modality)
    if not queries:
        return Tuned(STEPS[0], 1.0, 0, asked)

    def scores(query: np.ndarray, *, exact: bool) -> list[float]:
        return [score for score, _, _ in nearest(db, query, _K, modality=modality, exact=exact)]

    wanted = [scores(query, exact=True) for query in queries]
    for ef in STEPS:
        with db.transaction():
            look(db, ef, iterative=iterative)
            found = [scores(query, exact=False) for query in queries]
        overlap = float(np.mean([_overlap(*pair) for pair in zip(found, wanted, strict=True)]))
        if overlap >= target:
            break
    return Tuned(ef, overlap, len(queries), asked)


def _overlap(found: list[float], wanted: list[float]) -> float:
    """The share of the best that was found; by score, so that of equal ones any will do."""
    if not wanted:
        return 1.0
    return sum(score >= wanted[-1] - _TIE for score in found[: len(wanted)]) / len(wanted)


def _sample(db: psycopg.Connection[Any], tables: Tables, modality: Modality) -> list[np.ndarray]:
    """Some rows of a modality, the same ones each time: (d,) float32 of norm 1."""
    query = sql.SQL("SELECT embedding::text FROM {} WHERE modality = %s ORDER BY md5(id), part LIMIT %s")
    found = db.execute(query.format(tables.rows), [modality.value, SAMPLE]).fetchall()
    rows = [np.array(text.strip("[]").split(","), np.float32) for (text,) in found]
    return [row / np.linalg.norm(row) for row in rows]
