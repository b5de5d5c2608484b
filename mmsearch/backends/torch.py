"""The towers run by torch: CUDA in bf16 or fp16, CPUs with bf16 instructions in bf16, all others in float32.

Decisions:
- Autocast, not a half model: norms and the last normalisation stay in float32, and rows agree with float32
  to a cosine of 0.999.
- Texts on the CPU run in float32: one short text gains nothing from bf16.
- Pictures travel as uint8 from pinned memory, asynchronously; convolutions run channels-last.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmsearch.errors import ModelError, UsageError

if TYPE_CHECKING:
    from mmsearch.backends.base import Tokens
    from mmsearch.types import Pixels

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPUINFO = Path("/proc/cpuinfo")
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


class Towers(Protocol):
    """What this backend runs: a `DualEncoder` or a model of transformers behind the same two methods."""

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t), (b, t) -> (b, d)."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, d)."""
        ...


class TorchBackend:
    """Runs `model` on `device` ("auto", "cpu", "cuda", "cuda:1") in `precision` ("auto", "fp32", "bf16", "fp16")."""

    name = "torch"

    def __init__(
        self, model: Towers, *, device: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        self.device = pick_device(device)
        self.precision = pick_precision(precision, device=self.device)
        self._dtype = _PRECISIONS[self.precision]
        if threads is not None:
            torch.set_num_threads(threads)
        assert isinstance(model, nn.Module)  # for the type checker
        module = model.eval().to(self.device)
        self._model: Any = module.to(memory_format=torch.channels_last)
        self._lock = threading.Lock()

    def encode_tokens(self, ids: Tokens, mask: Tokens) -> NDArray[np.float32]:
        """(b, t) int64, (b, t) of 0/1 -> (b, d) float32."""
        half = self.device != "cpu" and self.precision != "fp32"
        return self._run(self._model.encode_texts, (ids, mask), half=half)

    def encode_pixels(self, pixels: Pixels) -> NDArray[np.float32]:
        """(b, s, s, 3) uint8 -> (b, d) float32."""
        return self._run(self._model.encode_images, (pixels,), half=self.precision != "fp32")

    def _run(self, encode: Any, arrays: tuple[Any, ...], *, half: bool) -> NDArray[np.float32]:  # noqa: ANN401 - a bound method of the model
        kind = torch.device(self.device).type
        autocast = torch.autocast(kind, dtype=self._half(), enabled=half)
        with memory_errors(), self._lock, torch.inference_mode(), autocast:
            rows: NDArray[np.float32] = encode(*map(self._send, arrays)).float().cpu().numpy()
        return rows

    def _half(self) -> torch.dtype:
        return torch.bfloat16 if self._dtype == torch.float32 else self._dtype

    def _send(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """What torch raises when memory runs out, on the CPU or a GPU, leaves as a `MemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise MemoryError(str(error)[:200]) from error
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
            raise MemoryError(str(error)[:200]) from error
        raise


def pick_device(device: str) -> str:
    """ "auto" becomes "cuda" where there is a GPU and "cpu" elsewhere; a GPU that is not there is a `ModelError`."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError("device", expected="auto, cpu, cuda or cuda:N", got=repr(device)) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError("device", expected="a CUDA GPU", got="none", do="Use device='cpu' or 'auto'.")
    return device


def pick_precision(precision: str, *, device: str) -> str:
    """ "auto" becomes bf16 where the device computes in it, fp16 on older GPUs, fp32 elsewhere."""
    if precision != "auto":
        if precision not in _PRECISIONS:
            raise UsageError("precision", expected=f"one of auto, {', '.join(_PRECISIONS)}", got=repr(precision))
        return precision
    if device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16(cpuinfo: Path = _CPUINFO) -> bool:
    """True when the processor multiplies bf16 natively (AVX512-BF16 or AMX); False where nobody can say."""
    try:
        flags = cpuinfo.read_text("utf-8", "replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
