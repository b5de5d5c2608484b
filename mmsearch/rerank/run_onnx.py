"""A re-ranker's parts run by onnxruntime from their graphs, on the CPU, in float32: no torch.

Decisions:
- One thread for words (a query is short), every core for patches and for matching, as the towers have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.backends.onnx import Sessions, cores
from mmsearch.rerank.checkpoint import MATCH_GRAPH, MATCH_ONE_GRAPH, PATCHES_GRAPH, WORDS_GRAPH
from mmsearch.types import Pixels

_TEXT, _IMAGE = ("text_rows", "tokens", "mask"), ("image_rows", "patches")
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class OnnxRun:
    """Runs the graphs of `directory`, each opened when it is first needed. Thread-safe. `threads`: None picks.

    `reads_tokens`: False when the match graphs have the rows as their only inputs.
    """

    def __init__(self, directory: Path, *, reads_tokens: bool, threads: int | None = None) -> None:
        self._sessions, self._reads_tokens, self._threads = Sessions(directory), reads_tokens, threads

    def words(self, ids: Ints, mask: Ints) -> Floats:
        """(b, t), (b, t) -> (b, t, w)."""
        return self._sessions.run(WORDS_GRAPH, {"ids": ids, "mask": mask}, threads=self._threads or 1)[0]

    def patches(self, pixels: Pixels) -> Floats:
        """(b, s, s, 3) uint8 -> (b, p, c)."""
        return self._sessions.run(PATCHES_GRAPH, {"pixels": pixels}, threads=self._threads or cores())[0]

    def match(self, sides: dict[str, NDArray[Any]]) -> tuple[Floats, Floats | None]:
        """What `sides.Sides.gather` gives, of batch b or 1 each -> (b,) logits, (b, t, p) attention or None."""
        names = (*_TEXT, *_IMAGE) if self._reads_tokens else (_TEXT[0], _IMAGE[0])
        pairs = max(len(sides[name]) for name in names)
        one_text = len(sides["text_rows"]) == 1
        feeds = {}
        for name in names:
            repeat = len(sides[name]) < pairs and not (one_text and name in _TEXT)
            feeds[name] = np.repeat(sides[name], pairs, axis=0) if repeat else sides[name]
        graph = MATCH_ONE_GRAPH if one_text else MATCH_GRAPH
        found = self._sessions.run(graph, feeds, threads=self._threads or cores())
        return found[0], found[1] if len(found) > 1 else None
