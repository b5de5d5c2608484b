"""The seam: something that runs both towers of one model on arrays."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.types import Pixels

Tokens = NDArray[np.int64]


class Backend(Protocol):
    """Runs both towers. Thread-safe. Raises `MemoryError`, whatever its library raises, when a batch does not fit.

    `name`: "onnx" or "torch"; `device`: "cpu", "cuda", "cuda:1"; `precision`: "fp32", "bf16" or "fp16".
    Rows come back as the model made them: whoever calls checks that they are finite and of norm 1.
    """

    name: str
    device: str
    precision: str

    def encode_tokens(self, ids: Tokens, mask: Tokens) -> NDArray[np.float32]:
        """(b, t) int64, (b, t) of 0/1 -> (b, d) float32."""
        ...

    def encode_pixels(self, pixels: Pixels) -> NDArray[np.float32]:
        """(b, s, s, 3) uint8 -> (b, d) float32."""
        ...


_BACKENDS: dict[str, tuple[str, str]] = {
    "onnx": ("mmsearch.backends.onnx", "OnnxBackend"),
    "torch": ("mmsearch.backends.torch", "TorchBackend"),
}


def backend_class(name: str) -> Any:  # noqa: ANN401 - the table holds classes with different constructors
    """The class behind a backend's name, imported now."""
    if name not in _BACKENDS:
        raise UsageError("backend", expected=f"one of auto, {', '.join(_BACKENDS)}", got=repr(name))
    module, cls = _BACKENDS[name]
    return getattr(import_module(module), cls)
