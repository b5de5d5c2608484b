"""Towers: raw batches to unit rows of one shared space.

Nothing heavy happens at import: `config` and `checkpoint` read a directory without torch, everything
that computes is fetched on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmsearch.towers.checkpoint import Checkpoint, load_dual_encoder, save_checkpoint
    from mmsearch.towers.config import DualEncoderConfig
    from mmsearch.towers.dual_encoder import DualEncoder, build_dual_encoder

_HOMES = {
    "Checkpoint": "mmsearch.towers.checkpoint",
    "DualEncoder": "mmsearch.towers.dual_encoder",
    "DualEncoderConfig": "mmsearch.towers.config",
    "build_dual_encoder": "mmsearch.towers.dual_encoder",
    "load_dual_encoder": "mmsearch.towers.checkpoint",
    "save_checkpoint": "mmsearch.towers.checkpoint",
}

__all__ = [
    "Checkpoint",
    "DualEncoder",
    "DualEncoderConfig",
    "build_dual_encoder",
    "load_dual_encoder",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute of any type
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
