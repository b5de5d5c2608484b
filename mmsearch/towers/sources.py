"""Weights that others made: where they lie on disk, and their tensors by name.

Decisions:
- "package:NAME/inner/path" is a file of an installed package. The package is found, not imported: nothing of it runs.
- Files of torch (.pth, .pt, .bin) are read with `weights_only=True`, which builds tensors and nothing else; they are
  read here, where the user named that very file, and nowhere else in mmsearch.
- Nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

# The class that torch.load raises for what it will not build. It is the pickle module's, which mmsearch never imports.
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]

from mmsearch.errors import ModelError
from mmsearch.towers.tensors import from_stored, read_tensors

_PACKAGE = "package:"
_TORCH = (".pth", ".pt", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_BROKEN = (UnpicklingError, OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError)


def resolve_place(place: str | os.PathLike[str]) -> Path:
    """A path from "package:NAME/inner/path" (a file or folder of an installed package), or from a plain path.

    `ModelError` when the package is not installed or nothing is there.
    """
    text = os.fspath(place)
    path = _in_package(text) if text.startswith(_PACKAGE) else Path(text).expanduser()
    if not path.exists():
        raise ModelError(text, expected="a file or folder on disk", got="nothing there")
    return path


def read_weights(place: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a place of `resolve_place`.

    A .safetensors file; a folder with model.safetensors or shards of it; or a torch file, where tensors may lie
    under "state_dict" or "model". 8-bit tables of mmsearch's own checkpoints become floats.
    """
    path = resolve_place(place)
    if path.is_dir():
        whole = path / "model.safetensors"
        files = [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError(str(path), expected="a folder with *.safetensors", got="none", do="Name the file itself.")
        return from_stored({name: tensor for file in files for name, tensor in read_tensors(file).items()})
    if path.suffix.lower() in _TORCH:
        return _torch_file(path)
    return from_stored(read_tensors(path))


def keeps_order(place: str | os.PathLike[str]) -> bool:
    """True when `read_weights` gives tensors in the order in which a model registered them: torch files."""
    return resolve_place(place).suffix.lower() in _TORCH


def _in_package(text: str) -> Path:
    name, _, inner = text.removeprefix(_PACKAGE).partition("/")
    parts = PurePosixPath(inner).parts
    if not name.isidentifier() or not parts or ".." in parts or inner.startswith("/"):
        raise ModelError(text, expected="package:NAME/path/inside", got="another form")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            text, expected=f"package {name}", got="not installed", do=f"pip install {name.replace('_', '-')}"
        )
    homes = [Path(home) for home in found.submodule_search_locations]
    return next((home.joinpath(*parts) for home in homes if home.joinpath(*parts).exists()), homes[0].joinpath(*parts))


def _torch_file(path: Path) -> dict[str, Tensor]:
    try:
        values: Any = torch.load(path, weights_only=True, map_location="cpu")
    except _BROKEN as error:
        raise ModelError(
            str(path),
            expected="a torch file of tensors alone",
            got=f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else 'cut short'}",
            do="Convert it to safetensors, or copy it again.",
        ) from error
    for _ in range(2):
        inner = next((values[key] for key in _NESTED if isinstance(values, Mapping) and key in values), None)
        values = inner if isinstance(inner, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ModelError(str(path), expected="tensors by name", got=type(values).__name__)
    return {str(name): value for name, value in values.items()}
