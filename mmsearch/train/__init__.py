"""Training: pairs and towers in, better towers out.

    from mmsearch.train import DataSource, TrainSettings, train

    report = train(TrainSettings(sources=(DataSource("pairs.csv"),)), "checkpoints/mine")

Names are imported when first used: decode workers import this package and need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmsearch.train.examples import DataSource as DataSource
    from mmsearch.train.run import TrainReport as TrainReport
    from mmsearch.train.run import train as train
    from mmsearch.train.settings import TrainSettings as TrainSettings

_PUBLIC = {
    "DataSource": "mmsearch.train.examples",
    "TrainReport": "mmsearch.train.run",
    "TrainSettings": "mmsearch.train.settings",
    "train": "mmsearch.train.run",
}

__all__ = ["DataSource", "TrainReport", "TrainSettings", "train"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute can be anything
    """Import a public name on first use."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mmsearch.train' has no attribute {name!r}")
