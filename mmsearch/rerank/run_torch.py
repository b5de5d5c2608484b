"""A re-ranker's parts run by torch, on the CPU or a GPU.

Decisions:
- The vision tower computes in half precision on a GPU, as for the towers' rows; words and matching stay in float32:
  they are a hundredth of the work, and logits agree with onnxruntime's to rounding.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsearch.backends.torch import memory_errors, pick_device, pick_precision
from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.model import RerankModel
from mmsearch.types import Pixels

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class TorchRun:
    """Runs `model`, with its towers, on `device` ("auto", "cpu", "cuda", "cuda:1"). Thread-safe: one call at a time.

    `threads`: of the CPU, for the whole process; None leaves them. Raises `ModelError` for a GPU that is not there.
    """

    def __init__(self, model: RerankModel, *, device: str = "auto", threads: int | None = None) -> None:
        self.device = pick_device(device)
        self._kind = torch.device(self.device).type
        self._half = None if self._kind == "cpu" else _HALF[pick_precision("auto", device=self.device)]
        if threads is not None:
            torch.set_num_threads(threads)
        model.towers.eval().to(self.device)
        self._model = model.eval().to(self.device)
        self._lock = threading.Lock()

    def words(self, ids: Ints, mask: Ints) -> Floats:
        """(b, t), (b, t) -> (b, t, w)."""
        with memory_errors(), self._lock, torch.inference_mode():
            return _numpy(self._model.words(self._send(ids), self._send(mask)))

    def patches(self, pixels: Pixels) -> Floats:
        """(b, s, s, 3) uint8 -> (b, p, c)."""
        half = torch.autocast(self._kind, dtype=self._half, enabled=self._half is not None)
        with memory_errors(), self._lock, torch.inference_mode(), half:
            return _numpy(self._model.patches(self._send(pixels)))

    def match(self, sides: dict[str, NDArray[Any]]) -> tuple[Floats, Floats | None]:
        """What `sides.Sides.gather` gives, of batch b or 1 each -> (b,) logits, (b, t, p) attention or None."""
        sent = {name: self._send(side) for name, side in sides.items()}
        text = TextSide(sent["text_rows"], sent["tokens"], sent["mask"])
        with memory_errors(), self._lock, torch.inference_mode():
            logits, attention = self._model.fusion.read(text, ImageSide(sent["image_rows"], sent["patches"]))
            return _numpy(logits), None if attention is None else _numpy(attention)

    @property
    def cheap_pairs(self) -> bool:
        """Whether `matrix` costs hardly more than reading each side once."""
        return self._model.fusion.cheap_pairs

    def matrix(self, sides: dict[str, NDArray[Any]]) -> Floats:
        """What `sides.Sides.every` gives, b texts and n pictures -> (b, n) logits: each text with each picture."""
        sent = {name: self._send(side) for name, side in sides.items()}
        text = TextSide(sent["text_rows"], sent["tokens"], sent["mask"])
        with memory_errors(), self._lock, torch.inference_mode():
            return _numpy(self._model.fusion.pairwise(text, ImageSide(sent["image_rows"], sent["patches"])))

    def _send(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _numpy(tensor: Tensor) -> Floats:
    found: Floats = tensor.float().cpu().numpy()
    return found
