"""A dual encoder as a training step runs it: precision, memory format, padding and frozen first stages.

Decisions:
- Backbones run in half precision under autocast, projection heads and everything after them in float32: that is
  little work, and cosines times a logit_scale of 100 need the digits.
- On a CPU the captions of a batch are encoded in pieces of similar length. Padding changes no row, but in a batch of
  128 captions it is more than half of the work.
- bfloat16 is chosen by itself only where the processor computes in it; elsewhere it would be slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mmsearch.errors import UsageError
from mmsearch.towers.dual_encoder import DualEncoder
from mmsearch.train.depthwise import fast_depthwise
from mmsearch.train.prefix import FrozenPrefix

_PIECE, _AT_ONCE = 32, 256
_SWITCHES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
_CPU_FLAGS = Path("/proc/cpuinfo")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str) -> torch.device:
    """`device`, or the first GPU, or the CPU for "auto"; `UsageError` when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError("device", expected="cpu, cuda or cuda:N", got=repr(device)) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError("device", expected="cpu, or a CUDA device that torch can use", got=device)
    return found


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type behind "fp32", "bf16" or "fp16"; for "auto" bfloat16 where the hardware computes in it."""
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("precision", expected="fp32 or bf16 on a CPU", got="fp16")
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in _CPU_FLAGS.read_text() or "amx_bf16" in _CPU_FLAGS.read_text()
    except OSError:
        return False


class TowerPass:
    """Rows of pictures and captions with gradients, as `dtype` on `device`.

    `prefix`: pictures then arrive as the outputs of its stages. `feature_dropout`: of pooled picture features, before
    the projection head; the anchors' classifier sees them whole. `compiled`: what runs the prefix, if not torch.
    """

    def __init__(
        self, model: DualEncoder, *, dtype: torch.dtype, device: torch.device, prefix: FrozenPrefix | None = None,
        feature_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        self.model, self.dtype, self.device, self.prefix = model.to(device), dtype, device, prefix
        self._dropout = feature_dropout
        self.compiled: Callable[[Tensor], Tensor] | None = None
        if dtype != torch.float32 and device.type in ("cpu", "cuda"):
            model.image.backbone.to(memory_format=torch.channels_last)

    def autocast(self) -> AbstractContextManager[None]:
        """What the backbones run under."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the length of a run: convolutions with the faster backward pass."""
        with fast_depthwise(self.model.image.backbone):
            yield

    def normalised(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, 3, s, s) on the device, in the memory format that is fastest there."""
        images = self.model.normalise_pixels(pixels.to(self.device, non_blocking=True))
        return images.contiguous(memory_format=torch.channels_last) if self.dtype != torch.float32 else images

    @torch.no_grad()
    def prefix_outputs(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> what the frozen stages make of them, on the CPU."""
        assert self.prefix is not None  # for the type checker
        if self.compiled is not None:
            return self.compiled(pixels)
        with self.autocast():
            return self.prefix.outputs(self.normalised(pixels)).float().cpu()

    def placed(self, outputs: Tensor) -> Tensor:
        """(b, ...) outputs of the prefix, as they are kept -> float32 on the device."""
        placed = outputs.to(self.device, torch.float32)
        return placed.contiguous(memory_format=torch.channels_last) if placed.ndim == 4 else placed

    def pooled_images(self, images: Tensor) -> Tensor:
        """(b, s, s, 3) uint8, or (b, ...) outputs of the prefix -> (b, w) float32 pooled features."""
        if self.prefix is not None and self.prefix.pools:
            return self.placed(images)
        with self.autocast():
            if self.prefix is None:
                features = self.model.image.backbone(self.normalised(images))
            else:
                features = self.prefix.rest(self.placed(images))
            pooled: Tensor = self.model.image.pooling(features)
        return pooled.float()

    def images(self, images: Tensor) -> Tensor:
        """(b, s, s, 3) uint8, or (b, ...) outputs of the prefix -> (b, d) float32 unit rows."""
        return self.embedded(self.pooled_images(images))

    def embedded(self, pooled: Tensor) -> Tensor:
        """(b, w) float32 pooled features of pictures -> (b, d) float32 unit rows."""
        tower = self.model.image
        if not (self._dropout and tower.training):
            return tower.embed(pooled)
        rows = tower.projection(functional.dropout(pooled, self._dropout))
        if tower.anchors is not None:
            rows = functional.normalize(rows, dim=-1) + tower.anchors(pooled)
        return functional.normalize(rows, dim=-1)

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64 each -> (b, d) float32 unit rows. Floats (b, w) in the place of ids are pooled features."""
        pooled = ids.to(self.device) if ids.is_floating_point() else self.pooled_texts(ids, mask)
        tower: Any = self.model.text
        rows: Tensor = tower.embed(pooled.float())
        return rows

    def pooled_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64 each -> (b, w): what the text backbone makes of them, before projection."""
        if self.device.type != "cpu" or len(ids) <= _PIECE:
            return self._pooled(ids, mask)
        order = mask.sum(dim=1).argsort(stable=True)
        rows = torch.cat([self._pooled(ids[part], mask[part]) for part in torch.split(order, _PIECE)])
        return rows[order.argsort()]

    def _pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        tower: Any = self.model.text
        longest = max(1, int(mask.sum(dim=1).max())) if len(mask) else 1
        ids, mask = ids[:, :longest].to(self.device), mask[:, :longest].to(self.device)
        with self.autocast():
            pooled: Tensor = tower.pooled(ids, mask)
        return pooled


class Texts:
    """A list of texts that is encoded again and again, in order of length.

    `keep`: the text backbone does not learn, so its pooled features are made once and only the head runs anew.
    """

    def __init__(
        self, texts: Sequence[str], passes: TowerPass, tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]], *,
        keep: bool = False,
    ) -> None:  # fmt: skip
        self.texts, self._passes, self._tokens, self._keep = texts, passes, tokens, keep
        self._pooled: Tensor | None = None

    @torch.no_grad()
    def rows(self) -> NDArray[np.float32]:
        """(n, d) float32 unit rows, as the model stands; call it in evaluation mode."""
        if self._keep:
            return self._passes.texts(self.pooled(), self.pooled()).float().cpu().numpy()
        return self._run(self._passes.texts, self._passes.model.config.dim).numpy()

    def forget(self) -> None:
        """Make what is kept anew the next time."""
        self._pooled = None

    @torch.no_grad()
    def pooled(self) -> Tensor:
        """(n, w) float32 features before projection, made once; call it in evaluation mode."""
        if self._pooled is None:
            self._pooled = self._run(self._passes.pooled_texts, int(self._passes.model.text.width))
        return self._pooled

    def _run(self, encode: Callable[[Tensor, Tensor], Tensor], width: int) -> Tensor:
        order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i]))
        rows = torch.empty(len(order), width)
        for start in range(0, len(order), _AT_ONCE):
            part = order[start : start + _AT_ONCE]
            rows[part] = encode(*self._tokens([self.texts[i] for i in part])).float().cpu()
        return rows


def checkpoint_activations(model: DualEncoder) -> list[str]:
    """Recompute activations in the backward pass where a backbone knows how; -> the sides that do not know."""
    unable: list[str] = []
    text, image = model.text.backbone, getattr(model.image.backbone, "model", model.image.backbone)
    # transformers 5 renamed it, and warns of the old name
    enable = next((getattr(text, name) for name in _SWITCHES if hasattr(text, name)), None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        unable.append("text")
    switch = getattr(image, "set_grad_checkpointing", None)
    if not callable(switch) or not _switched(switch):
        unable.append("image")
    return unable


def _switched(switch: object) -> bool:
    try:
        switch(True)  # type: ignore[operator]
    except (AssertionError, NotImplementedError):  # timm's way of saying that a model has none
        return False
    return True
