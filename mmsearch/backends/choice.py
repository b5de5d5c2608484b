"""Which backend runs which tower.

The rule: onnxruntime wherever the checkpoint has graphs and float32 on the CPU is what was asked for or left
open; torch otherwise. Pictures go to torch when there is a GPU and nobody said otherwise; texts never need one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmsearch.backends.base import Backend, backend_class
from mmsearch.errors import ModelError, UsageError

_GPU_SIGNS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
_BACKENDS, _PRECISIONS = ("auto", "onnx", "torch"), ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user asked for. `threads`: CPU threads, None lets the backend pick."""

    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in _BACKENDS:
            raise UsageError("backend", expected=" or ".join(_BACKENDS), got=repr(self.backend))
        if self.precision not in _PRECISIONS:
            raise UsageError("precision", expected=" or ".join(_PRECISIONS), got=repr(self.precision))
        if self.threads is not None and self.threads < 1:
            raise UsageError("threads", expected="1 or more", got=str(self.threads))
        if self.backend == "onnx" and not self.allows_onnx:
            got = f"device {self.device}, precision {self.precision}"
            raise UsageError("backend 'onnx'", expected="the CPU and fp32", got=got)

    @property
    def allows_onnx(self) -> bool:
        """True when float32 on the CPU satisfies the choice."""
        plain = self.device in ("auto", "cpu") and self.precision in ("auto", "fp32")
        return plain and self.backend != "torch"

    @property
    def needs_torch(self) -> bool:
        """True when only torch satisfies the choice."""
        return not self.allows_onnx


class Backends:
    """Makes the backends of one model when asked; one torch backend serves both sides.

    `graphs`: the directory with the ONNX graphs, None when there are none; `towers` loads the torch model.
    """

    def __init__(self, choice: Choice, *, graphs: Path | None, towers: Callable[[], Any]) -> None:
        self._choice, self._graphs, self._towers = choice, graphs, towers
        self._made: dict[str, Backend] = {}
        if choice.backend == "onnx" and graphs is None:
            raise ModelError("backend 'onnx'", expected="a checkpoint with graphs", got="none", do="Use 'torch'.")

    def text(self) -> Backend:
        """The backend for texts."""
        return self._get("onnx" if self._has_onnx() else "torch")

    def image(self) -> Backend:
        """The backend for pictures."""
        open_choice = self._choice.backend == "auto" and self._choice.device == "auto"
        return self._get("onnx" if self._has_onnx() and not (open_choice and gpu_works()) else "torch")

    def _has_onnx(self) -> bool:
        return self._graphs is not None and self._choice.allows_onnx

    def _get(self, name: str) -> Backend:
        if name not in self._made:
            cls, choice = backend_class(name), self._choice
            if name == "onnx":
                self._made[name] = cls(self._graphs, threads=choice.threads)
            else:
                self._made[name] = cls(
                    self._towers(), device=choice.device, precision=choice.precision, threads=choice.threads
                )
        return self._made[name]


def gpu_works() -> bool:
    """Looks for a driver before it imports torch: most machines have no GPU and should not pay for asking."""
    if not any(sign.exists() for sign in _GPU_SIGNS):
        return False
    import torch

    return bool(torch.cuda.is_available())
