"""The towers run by onnxruntime from a checkpoint's graphs, on the CPU, in float32.

Decisions:
- A session is made when it is first needed: a query never pays for the image tower, nor a build for text.
- One thread for texts: single queries are short, and a barrier between threads on a busy machine costs more
  than the second core brings. Pictures take all the cores there are.
- Threads do not spin while they wait: the decoding processes beside them need the cores.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import ModelError
from mmsearch.towers.checkpoint import IMAGE_GRAPH, TEXT_GRAPH

if TYPE_CHECKING:
    from mmsearch.backends.base import Tokens
    from mmsearch.types import Pixels

_OUT_OF_MEMORY = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory")


class Sessions:
    """Graphs of `directory`, each opened when it is first run. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, feeds: dict[str, Any], *, threads: int) -> list[NDArray[np.float32]]:
        """Outputs of the graph in the file named `graph`, in its order. `threads`: of the session that is opened now.

        Raises `MemoryError` when a batch does not fit, `ModelError` for a graph that cannot be opened.
        """
        with self._lock:
            if graph not in self._open:
                self._open[graph] = open_session(self._directory / graph, threads=threads)
            session = self._open[graph]
        try:
            found: list[NDArray[np.float32]] = session.run(None, feeds)
        except Exception as error:
            if any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
                raise MemoryError(str(error)[:200]) from error
            raise
        return found


class OnnxBackend:
    """Runs text.onnx and image.onnx of `directory`. `threads`: for pictures, None means every core allowed."""

    name, device, precision = "onnx", "cpu", "fp32"

    def __init__(self, directory: Path, *, threads: int | None = None) -> None:
        self._sessions, self._threads = Sessions(directory), threads

    def encode_tokens(self, ids: Tokens, mask: Tokens) -> NDArray[np.float32]:
        """(b, t) int64, (b, t) of 0/1 -> (b, d) float32."""
        return self._sessions.run(TEXT_GRAPH, {"ids": ids, "mask": mask}, threads=self._threads or 1)[0]

    def encode_pixels(self, pixels: Pixels) -> NDArray[np.float32]:
        """(b, s, s, 3) uint8 -> (b, d) float32."""
        return self._sessions.run(IMAGE_GRAPH, {"pixels": pixels}, threads=self._threads or cores())[0]


def open_session(graph: Path, *, threads: int) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """An inference session over one graph; `ModelError` when onnxruntime refuses it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(
            str(graph), expected="a graph onnxruntime can run", got=str(error)[:200], do="Use backend='torch'."
        ) from error


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
