"""What Milvus' engine says to Milvus: fields, rows, and filters as expressions with safe literals.

Decisions:
- milvus-lite knows no expression templates, so values are written as literals: numbers as Python prints them, texts in
  double quotes with the five characters escaped that could end or break a literal. There is no third kind.
- Names of metadata fields are never written as they are unless they are plain identifiers; others become hex digits.
- Primary keys are made of a hash of the item's id: pymilvus pastes keys into an expression as they are.
- Values of each kind lie in an object of their own (`facts["n"]["year"]`): Milvus would call true and 1 equal.
"""

from __future__ import annotations

import re
from typing import Any

import xxhash

from mmsearch.scale.engine import Entry, item_json
from mmsearch.types import Modality
from mmsearch.where import Condition, Op, Value, Where, facts_of, tag, tagged

META = "meta"
"""Key and modality of the row that holds what the collection is of."""
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})
_SIGNS = {Op.EQUAL: "==", Op.IN: "==", Op.AT_MOST: "<=", Op.AT_LEAST: ">="}


def literal(value: Value) -> str:
    """A value as Milvus reads it. Known values: 'a"b' -> "a\\"b", True -> true."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value.translate(_ESCAPES)}"' if isinstance(value, str) else repr(value)


def key_of(name: str) -> str:
    """A metadata field as a key of `facts`: itself if it is a plain identifier, else a dash and hex digits."""
    return name if _PLAIN.fullmatch(name) else "-" + name.encode("utf-8").hex()


def expression(modality: Modality, where: Where) -> str:
    """The filter of a search."""
    return " and ".join([f'modality == "{modality.value}"', *map(_condition, where)])


def _condition(condition: Condition) -> str:
    key, sign = key_of(condition.field), _SIGNS[condition.op]
    either = [f'facts["{tag(value)}"]["{key}"] {sign} {literal(value)}' for value in condition.values]
    return f"({' or '.join(either)})"


def key(item_id: str, number: int) -> str:
    """The primary key of an item's row, digits and a slash; row 0 is its head."""
    return f"{number}/{xxhash.xxh3_128_hexdigest(item_id.encode())}"


def table_rows(entry: Entry) -> list[dict[str, Any]]:
    """The rows of an item. The first, its head, says how many there are and holds the item; all have its digest."""
    facts = {t: {key_of(name): v for name, v in some.items()} for t, some in tagged(facts_of(entry.item)).items()}
    digest, rows = entry.digest(), list(entry.rows())
    return [
        {
            "key": key(entry.item.id, number),
            "id": entry.item.id,
            "modality": modality.value,
            "part": part,
            "vector": row.tolist(),
            "head": number == 0,
            "digest": digest,
            "of": len(rows),
            "facts": facts,
            "item": item_json(entry.item) if number == 0 else "",
        }
        for number, (modality, part, row) in enumerate(rows)
    ]


def meta_row(dim: int, collection: str, mark: str) -> dict[str, Any]:
    """The row that holds what the collection is of; no search finds it."""
    vector = [1.0] + [0.0] * (dim - 1)
    return {
        "key": META, "id": "", "modality": META, "part": -1, "vector": vector, "head": False, "digest": mark, "of": 1,
        "facts": {}, "item": collection,
    }  # fmt: skip
