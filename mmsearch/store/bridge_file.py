"""bridge.safetensors: matrices from an index's rows into the space of another model, and what is known of them.

One file, so that matrices and facts are never of different makings: the facts are JSON in its header, with a checksum
over both. It is replaced in one rename. A bridge that leads from another model than the index's is of no use any more;
the next writer removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.store.disk import Disk
from mmsearch.types import ModelIdentity

NAME = "bridge.safetensors"
REFIT = "The index itself is whole. Run 'mmsearch bridge' on it again, or remove this file."
_MOST_BYTES = 1 << 30
_FACTS, _CHECK = "facts", "check"


def write(index: str, matrices: Mapping[str, NDArray[np.float32]], facts: Mapping[str, Any], disk: Disk) -> None:
    """Put a bridge in place durably. `facts`: JSON values; `old` and `new` in it are fields of `ModelIdentity`."""
    from safetensors.numpy import save

    text = json.dumps(facts, sort_keys=True)
    tensors = {name: np.ascontiguousarray(matrix, np.float32) for name, matrix in matrices.items()}
    header = {_FACTS: text, _CHECK: _digest(tensors, text)}
    disk.put(os.path.join(index, NAME), [save(tensors, metadata=header)])


def read(index: str) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]] | None:
    """(matrices, facts) of the bridge in an index directory, None without one; `IndexDamagedError` for wrong bytes."""
    path = os.path.join(index, NAME)
    try:
        if os.path.getsize(path) > _MOST_BYTES:
            raise _damaged(path, f"more than {_MOST_BYTES:,} bytes")
    except FileNotFoundError:
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        text = header[_FACTS]
        if header[_CHECK] != _digest(tensors, text):
            raise _damaged(path, "a wrong checksum")
        facts: dict[str, Any] = json.loads(text)
        for side in ("old", "new"):
            ModelIdentity(**facts[side])
    except FileNotFoundError:
        return None  # removed in between
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, f"no bridge ({str(error)[:160]})") from error
    return tensors, facts


def ends_of(index: str) -> tuple[ModelIdentity, ModelIdentity] | None:
    """From which model to which the bridge in an index directory leads; None without an intact one."""
    try:
        found = read(index)
    except IndexDamagedError:
        return None
    return None if found is None else (ModelIdentity(**found[1]["old"]), ModelIdentity(**found[1]["new"]))


def tidy(index: str, model: str, disk: Disk) -> None:
    """Remove a bridge that leads from another model than the index's; `model` as `meta` has it (JSON)."""
    ends = ends_of(index)
    if ends is not None and not ends[0].same_space(ModelIdentity(**json.loads(model))):
        disk.remove(os.path.join(index, NAME))


def _digest(tensors: Mapping[str, NDArray[np.float32]], text: str) -> str:
    """Hex xxh3_64 of names, shapes and bytes of all matrices, and of the facts."""
    state = xxhash.xxh3_64()
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        state.update(np.ascontiguousarray(tensors[name]).tobytes())
    state.update(text.encode())
    return str(state.hexdigest())


def _damaged(path: str, got: str) -> IndexDamagedError:
    return IndexDamagedError(path, expected="an intact bridge", got=got, do=REFIT)
