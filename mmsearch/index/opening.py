"""A FAISS index as it is searched, from what a manifest records of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.index.approximate import ApproximateIndex, Parameters, lists_of
from mmsearch.types import Rows


def open_index(
    index: Any,  # noqa: ANN401 - faiss has no types
    facts: Mapping[str, Any],
    *,
    kind: str,
    stored: NDArray[np.float16],
    row_of: Callable[[], Rows],
) -> ApproximateIndex:
    """`facts`: see `indexes/README.md`. `stored`: (rows, d), the vector file. `row_of`: rows by position, if needed."""
    parameters = parameters_of(facts)
    return ApproximateIndex(
        index, kind=kind, parameters=parameters, stored=stored if facts.get("rescore") else None,
        row_of=None if lists_of(index) else row_of(),
    )  # fmt: skip


def parameters_of(facts: Mapping[str, Any]) -> Parameters:
    """The tuned parameters; sensible ones where nothing was tuned. Raises `TypeError` for facts that cannot be."""
    found = facts.get("tuned", {}).get("parameters")
    if found is None:
        return Parameters(probes=32, effort=64, factor=8 if facts.get("rescore") else 1)
    return Parameters(**{name: int(value) for name, value in found.items()})
