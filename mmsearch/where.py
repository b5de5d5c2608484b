"""Filters over an item's metadata: what can be asked, and the one meaning that every engine gives it.

    where = (parse_condition("year>=2020"), parse_condition('city in ["Bern", "Basel"]'))

Decisions:
- A condition compares one field with values; several conditions must all hold. More is not offered, so that a database,
  a vector engine and plain Python can all answer the same question with the same items.
- Values have one of three kinds: text, number, truth. A text that reads as a JSON number, `true` or `false` counts as
  that: a CSV table has only texts, and `year>=2020` must hold for its "2021". Numbers compare as doubles.
- Values of different kinds are never equal and never in order. A field that is missing, null, a list or an object
  fulfils nothing. Texts are ordered by code point, so that dates written 2024-05-01 are.
- Beside the metadata there are `width`, `height` and `taken_at` of the picture, unless the metadata has that name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from mmsearch.errors import UsageError
from mmsearch.types import Item

Value: TypeAlias = str | int | float | bool
"""A metadata value as filters see it, see `scalar`."""

MOST_VALUES = 1000
"""How many values one `in` may list."""
MOST_CHARACTERS = 4096
"""The longest field name or text value of a condition."""
_EXACT = 1 << 53
_LITERAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false", re.ASCII)
_IN = re.compile(r"(.+?)\s+in\s+(\[.*\])\s*", re.DOTALL)
_COMPARED = re.compile(r"(.+?)\s*(<=|>=|==|=)\s*(.*)", re.DOTALL)
_SYNTAX = 'FIELD=VALUE, FIELD<=VALUE, FIELD>=VALUE or FIELD in ["A", "B"]'


class Op(StrEnum):
    """How a field is compared."""

    EQUAL = "="
    IN = "in"
    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison. `values`: one of them, for IN up to 1000; brought to what `scalar` makes of them.

    Raises `UsageError` for an empty field, a value that is no scalar, and an order of truth values.
    """

    field: str
    op: Op
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        where = f"filter on {self.field[:60]!r}"
        if not self.field or len(self.field) > MOST_CHARACTERS:
            raise UsageError("filter", expected=f"a field of 1 to {MOST_CHARACTERS} characters", got=where)
        if not 1 <= len(self.values) <= (MOST_VALUES if self.op is Op.IN else 1):
            raise UsageError(where, expected=f"1 to {MOST_VALUES} values after in, else 1", got=str(len(self.values)))
        values = tuple(_checked(value, where) for value in self.values)
        if self.op in (Op.AT_MOST, Op.AT_LEAST) and isinstance(values[0], bool):
            raise UsageError(where, expected="a number or a text to compare with", got=str(values[0]).lower())
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "field", storable(self.field))

    def holds(self, value: Value | None) -> bool:
        """Whether the condition is fulfilled by what `scalar` made of a field; None: the field says nothing."""
        if value is None:
            return False
        if self.op in (Op.EQUAL, Op.IN):
            return any(kind(value) is kind(one) and value == one for one in self.values)
        bound = self.values[0]
        if kind(value) is not kind(bound):
            return False
        return bool(value <= bound if self.op is Op.AT_MOST else value >= bound)  # type: ignore[operator]


Where: TypeAlias = tuple[Condition, ...]
"""Conditions that must all hold; none: everything does."""


def conditions(where: Iterable[Condition]) -> Where:
    """Any conditions as they are remembered and asked; `UsageError` for what is none (a text, one without a list)."""
    lone = isinstance(where, Condition | str)
    found = () if lone else tuple(where)
    if lone or not all(isinstance(one, Condition) for one in found):
        got = repr(where if lone else found)[:80]
        do = 'Write where=(parse_condition("year>=2020"),).'
        raise UsageError("where", expected="a tuple of conditions", got=got, do=do)
    return found


def kind(value: Value) -> type[str] | type[float] | type[bool]:
    """str, float (any number) or bool."""
    if isinstance(value, bool):
        return bool
    return str if isinstance(value, str) else float


def scalar(value: object) -> Value | None:
    """What a metadata value counts as; None for what no filter can be about (null, lists, objects, NaN).

    Known values: "2020" -> 2020, 2020.0 -> 2020, "007" -> "007", "true" -> True, [1] -> None.
    """
    if isinstance(value, str):
        found = json.loads(value) if len(value) <= 64 and _LITERAL.fullmatch(value) else value
        if isinstance(found, str) or (not isinstance(found, bool) and _number(found) is None):
            return storable(value)
        return found if isinstance(found, bool) else _number(found)
    if isinstance(value, bool):
        return value
    return _number(value) if isinstance(value, int | float) else None


def _number(value: float) -> int | float | None:
    """A number as a double sees it: an int where that is exact, so that 2020 and 2020.0 are one."""
    try:
        wide = float(value)
    except OverflowError:
        return None
    if not math.isfinite(wide):
        return None
    return int(wide) if wide.is_integer() and abs(wide) <= _EXACT else wide


def storable(text: str) -> str:
    """Text that every engine can hold: undecodable bytes and NUL are shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def facts_of(item: Item) -> dict[str, Value]:
    """Everything about an item that a filter can ask for: field -> value."""
    fields: dict[str, Any] = {"width": item.width, "height": item.height, "taken_at": item.taken_at, **item.metadata}
    found = ((storable(str(name)), scalar(value)) for name, value in fields.items())
    return {name: value for name, value in found if value is not None}


_TAGS = {str: "t", float: "n", bool: "b"}


def tag(value: Value) -> str:
    """The kind of a value as one letter: "t", "n" or "b"."""
    return _TAGS[kind(value)]


def tagged(facts: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Facts sorted by kind, {"n": {"year": 2020}}: so that no engine compares values of two kinds by its own rules."""
    found: dict[str, dict[str, Value]] = {}
    for name, value in facts.items():
        found.setdefault(tag(value), {})[name] = value
    return found


def fulfils(facts: Mapping[str, Value], where: Iterable[Condition]) -> bool:
    """Whether all conditions hold."""
    return all(condition.holds(facts.get(condition.field)) for condition in where)


def parse_condition(text: str) -> Condition:
    """A condition as it is written on a command line.

    `FIELD=VALUE`, `FIELD<=VALUE`, `FIELD>=VALUE`, `FIELD in [JSON, ...]`. Raises `UsageError`.
    """
    where = f"--where {text[:80]!r}"
    if listed := _IN.fullmatch(text):
        try:
            values = json.loads(listed[2])
        except (ValueError, RecursionError) as error:
            raise UsageError(where, expected="a JSON list after in", got=str(error)) from error
        return Condition(listed[1].strip(), Op.IN, tuple(values))
    compared = _COMPARED.fullmatch(text)
    if compared is None or not compared[1].strip():
        raise UsageError(where, expected=_SYNTAX, got="something else")
    op = Op.EQUAL if compared[2] == "==" else Op(compared[2])
    return Condition(compared[1].strip(), op, (_unquoted(compared[3].strip()),))


def _unquoted(text: str) -> str:
    """`"a b"` without its quotes; anything else as it is."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _checked(value: object, where: str) -> Value:
    found = scalar(value)
    if found is None or (isinstance(found, str) and len(found) > MOST_CHARACTERS):
        raise UsageError(
            where, expected=f"a text of at most {MOST_CHARACTERS} characters, a number, true or false",
            got=str(value)[:60],
        )  # fmt: skip
    return found
