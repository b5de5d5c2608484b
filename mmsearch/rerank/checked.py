"""Numbers from a model's JSON, checked one by one: a file comes from anywhere.

Decisions:
- Every refusal is a `ModelError` that names the field: these values sit in a model directory.
- JSON knows no NaN; Python's reader does. Neither NaN nor infinity gets in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from mmsearch.errors import ModelError

MOST = 100_000
"""Longest list of numbers that is read."""


def fields(values: object, names: Collection[str], *, where: str) -> Mapping[str, Any]:
    """`values` when it is an object with exactly these names."""
    if not isinstance(values, Mapping) or set(values) != set(names):
        got = ", ".join(sorted(map(str, values)))[:80] if isinstance(values, Mapping) else repr(values)[:60]
        raise ModelError(where, expected=f"an object with {', '.join(names)}", got=got or "an empty one")
    return values


def number(value: object, *, where: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> float:
    """A finite number from `low` to `high`; with `above`, `low` itself is too little."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not low <= value <= high or (above and value == low):  # type: ignore[operator]  # a number when fine
        said = "a finite number"
        if low > -math.inf:
            said += f" above {low:g}" if above else f" from {low:g}"
        raise ModelError(where, expected=said + (f" to {high:g}" if high < math.inf else ""), got=repr(value)[:60])
    return float(value)  # type: ignore[arg-type]  # a number: see above


def numbers(
    values: object, *, where: str, length: int | None = None, low: float = -math.inf, above: bool = False
) -> tuple[float, ...]:
    """A list of `length` (any, but not 0, when None) finite numbers."""
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= MOST or length not in (None, len(values)):
        got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else repr(values)[:60]
        raise ModelError(where, expected=f"a list of {length or '1 or more'} numbers", got=got)
    return tuple(number(value, where=where, low=low, above=above) for value in values)
