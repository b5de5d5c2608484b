"""What a model directory says of its re-ranker before anything of it is loaded: a search asks this on its cold path."""

from __future__ import annotations

import json
from pathlib import Path

RERANK = "rerank.json"
_MOST_BYTES = 1 << 24


def has_reranker(directory: Path) -> bool:
    """Whether a model directory has a re-ranker beside its towers."""
    return (directory / RERANK).is_file()


def reads_tokens(directory: Path) -> bool:
    """Whether the re-ranker there reads patch tokens: False for a fusion of unit rows alone, True where nobody says."""
    try:
        with (directory / RERANK).open("rb") as file:
            values = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError):
        return True  # whoever loads it says what is wrong
    return not isinstance(values, dict) or values.get("reads_tokens") is not False
