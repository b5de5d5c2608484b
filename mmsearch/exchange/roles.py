"""What the columns of a table mean, whatever it is stored in, and the facts of its rows.

`id` (or --id-column) is the id; the first of the usual names of a picture's file is its path; `caption`, `captions`,
`title`, `text` and `caption_...` are texts; `width`, `height` and `taken_at` are the picture's. `metadata` is a JSON
object whose entries are metadata, as are all other columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmsearch.data.table import IMAGE_COLUMNS, caption_columns, plain_name
from mmsearch.data.texts import captions_in, clean, json_value, parse_json
from mmsearch.errors import InputError
from mmsearch.exchange.base import Facts
from mmsearch.types import NO_METADATA

CAPTIONS = "captions"
METADATA = "metadata"
_NUMBERS = ("width", "height")


class Roles:
    """The columns `names` by what they mean; `id_column`: the one with ids, must be there when it is named."""

    def __init__(self, names: Sequence[str], *, id_column: str | None, where: str) -> None:
        lower = {plain_name(name): place for place, name in reversed(list(enumerate(names)))}
        if id_column is not None and id_column not in names:
            raise InputError(where, expected=f"a column {id_column!r}", got=", ".join(names)[:200] or "none")
        self._id = names.index(id_column) if id_column is not None else lower.get("id")
        self._path = next((lower[name] for name in IMAGE_COLUMNS if name in lower and lower[name] != self._id), None)
        self._known = {name: lower[name] for name in (*_NUMBERS, "taken_at", METADATA, CAPTIONS) if name in lower}
        used = {self._id, self._path, *self._known.values()}
        left = {p: plain_name(name) for p, name in enumerate(names) if p not in used}
        of_captions = caption_columns(left.values())
        self._captions = [p for p, name in left.items() if name in of_captions]
        used.update(self._captions)
        self._others = [(place, clean(name)) for place, name in enumerate(names) if place not in used]

    def facts(self, values: Sequence[Any]) -> Facts:
        """The facts of one row."""
        metadata: dict[str, object] = {}
        for place, name in self._others:
            value = values[place]
            if value is not None and value != "":
                metadata[name] = json_value(value)
        found = Facts(id=None if self._id is None else _id(values[self._id]))
        for name, place in self._known.items():
            self._take(found, metadata, name, values[place])
        for place in self._captions:
            if values[place] is not None:
                found.captions += tuple(c for c in captions_in(values[place]) if c not in found.captions)
        if self._path is not None and isinstance(values[self._path], str):
            found.path = values[self._path] or None
        found.metadata = metadata or NO_METADATA
        return found

    def _take(self, found: Facts, metadata: dict[str, object], name: str, value: Any) -> None:  # noqa: ANN401
        if value is None or value == "":
            return
        if name in _NUMBERS and isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            setattr(found, name, value)
        elif name == "taken_at" and isinstance(value, str):
            found.taken_at = value
        elif name == CAPTIONS:
            found.captions = captions_in(value)
        elif name == METADATA and (entries := _object(value)) is not None:
            metadata.update((clean(str(key)), json_value(entry)) for key, entry in entries.items())
        else:
            metadata[name] = json_value(value)


def _object(value: object) -> Mapping[str, Any] | None:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    return value if isinstance(value, Mapping) else None


def _id(value: object) -> str | None:
    """An id as text; None where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return id_text(value) or None


def id_text(value: object) -> str:
    """An id as a text that can be stored: bytes that are no UTF-8 are kept, half a surrogate pair is not."""
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return clean(text)
    return text
