"""Tensors on disk: half precision, an 8-bit token table, and where each lies in `model.safetensors`.

Decisions:
- Matrices are stored in half precision; vectors (biases, norms, batch statistics) and whatever half precision
  cannot hold stay in single: they are 1 % of the bytes and most of the trouble.
- An 8-bit table is stored as NAME.q8 (rows of int8) and NAME.scale (one fp16 a row): row = q8 * scale, with q8
  rounded against the *rounded* scale, so that the error is at most half a step of what is stored.
- The header is read here a second time, after the library has checked it: the graphs need byte offsets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

QUANTISED, SCALE = ".q8", ".scale"
_HALF_MAX = 65_504.0
_MAX_HEADER = 32 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor's place: safetensors' dtype name ("F16"), shape, first byte in the file, number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def to_stored(state: dict[str, Tensor], *, quantise: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors as they are written: halves where they fit, the tables named in `quantise` in 8 bits."""
    import torch

    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.detach().cpu()
        if name in quantise:
            stored[name + QUANTISED], stored[name + SCALE] = quantise_rows(tensor)
        elif tensor.is_floating_point() and tensor.ndim >= 2 and bool(tensor.abs().max() <= _HALF_MAX):
            stored[name] = tensor.to(torch.float16).contiguous()
        elif tensor.is_floating_point():
            stored[name] = tensor.to(torch.float32).contiguous()
        else:
            stored[name] = tensor.contiguous()
    return stored


def from_stored(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that `to_stored` was given, floats as float32."""
    state: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(QUANTISED) and name.removesuffix(QUANTISED) + SCALE in stored:
            table = name.removesuffix(QUANTISED)
            state[table] = value.float() * stored[table + SCALE].float()
        elif name.endswith(SCALE) and name.removesuffix(SCALE) + QUANTISED in stored:
            continue
        else:
            state[name] = value.float() if value.is_floating_point() else value
    return state


def quantise_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """(v, w) float -> ((v, w) int8 in -127..127, (v, 1) float16): table is about q8 * scale, row by row."""
    import torch

    wide = table.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / 127.0).to(torch.float16)  # (v, 1)
    safe = torch.where(scale > 0, scale.float(), torch.ones(()))
    return (wide / safe).round().clamp(-127, 127).to(torch.int8).contiguous(), scale.contiguous()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; `ModelError` when it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except FileNotFoundError as error:
        raise ModelError(str(path), expected="the model's weights", got="no such file") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, detail=str(error)) from error


def read_layout(path: Path) -> dict[str, Stored]:
    """Where each tensor lies in a safetensors file. Reads only the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
            raise damaged(path, detail=f"header of {length} bytes")
        try:
            header = json.loads(file.read(length))
            start = 8 + length
            return {
                name: Stored(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    start + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise damaged(path, detail=str(error)[:120]) from error


def damaged(path: Path, *, detail: str) -> ModelError:
    """The error for a weights file whose bytes make no sense."""
    return ModelError(str(path), expected="a safetensors file", got=detail[:160], do="Copy the model again.")
