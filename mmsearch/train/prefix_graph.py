"""The frozen first stages as an ONNX graph: on a CPU twice to three times as fast as the same stages in torch.

Decisions:
- Exported from the stages as they are, with batch norms folded by the runtime, in float32: the outputs are kept and
  trained on for many epochs, so they are made once and made exactly.
- A backbone that cannot be exported is run by torch instead; nothing but time is lost.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmsearch.train.prefix import FrozenPrefix

_AGREE = 1e-2


class _Stages(nn.Module):
    """(b, s, s, 3) uint8 -> (b, ...): scaling and the frozen stages."""

    def __init__(self, prefix: FrozenPrefix, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self._prefix, self._normalise = prefix.backbone, prefix, normalise

    def forward(self, pixels: Tensor) -> Tensor:
        return self._prefix.outputs(self._normalise(pixels))


def compiled_prefix(
    prefix: FrozenPrefix, *, normalise: Callable[[Tensor], Tensor], size: int, threads: int
) -> Callable[[Tensor], Tensor] | None:
    """(b, size, size, 3) uint8 -> (b, ...) float32 on the CPU, or None where the stages cannot be exported.

    Checked against torch on a random picture before it is handed out.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    # onnxruntime's errors have no base of their own
    refusals = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented, ort.RuntimeException)
    example = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's talk about its own future
        path = Path(folder) / "prefix.onnx"
        try:
            torch.onnx.export(
                _Stages(prefix, normalise).eval(), (example,), str(path), dynamo=True, verbose=False,
                input_names=["pixels"], dynamic_shapes={"pixels": {0: torch.export.Dim("b", min=1, max=4096)}},
            )  # fmt: skip
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            session.run(None, {"pixels": example.numpy()})
        except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError, *refusals):
            return None

    def run(pixels: Tensor) -> Tensor:
        found = session.run(None, {"pixels": pixels.numpy()})[0]
        return torch.from_numpy(found)

    with torch.no_grad():
        expected = prefix.outputs(normalise(example))
    close = torch.linalg.vector_norm(run(example) - expected) <= _AGREE * torch.linalg.vector_norm(expected)
    return run if bool(close) else None
