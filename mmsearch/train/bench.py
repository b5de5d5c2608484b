"""What is at hand while a run is set up, talks and ends; and how it keeps a checkpoint.

Decisions:
- A checkpoint is written under a name of its own and shown by the link `best`, which is swapped in one rename: there
  is no moment at which the best model is not whole.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmsearch.towers.checkpoint import save_checkpoint
from mmsearch.towers.locate import BEST
from mmsearch.train.distributed import Ranks
from mmsearch.train.examples import Examples
from mmsearch.train.lora import has_lora, merge_lora
from mmsearch.train.settings import TrainSettings
from mmsearch.train.setup import Beginning
from mmsearch.train.trainer import Watcher
from mmsearch.types import Skipped

RUN = "run"


class Silent:
    """Follows a run without a word."""

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """Nothing."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(slots=True)
class Bench:
    """What is at hand while a run is set up."""

    settings: TrainSettings
    out: Path
    watcher: Watcher
    ranks: Ranks
    examples: Examples
    start: Beginning
    warnings: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the state of the run is."""
        return self.out / RUN

    def warn(self, text: str) -> None:
        """Tell now, and again in the report."""
        self.warnings.append(text)
        if self.ranks.is_main:
            self.watcher.note(f"warning: {text}")

    def skip(self, skipped: Skipped) -> None:
        """A picture that cannot be used."""
        self.skipped.append(skipped)
        self.watcher.note(f"skipped {skipped.path}: {skipped.reason} {skipped.detail}")


def keep(bench: Bench, name: str, *, graphs: bool, card: str) -> None:
    """Store the model as it is now in OUT/`name` and let OUT/best be that, in one rename; older ones are removed."""
    model = bench.start.model
    plain = _without_adapters(model)
    save_checkpoint(
        plain, bench.out / name, tokenizer_json=bench.start.tokenizer_json, name=bench.out.resolve().name,
        card=card or "A checkpoint of a run that has not ended.\n", graphs=graphs,
    )  # fmt: skip
    draft = bench.out / f".{BEST}.draft"
    draft.unlink(missing_ok=True)
    draft.symlink_to(name, target_is_directory=True)
    draft.replace(bench.out / BEST)
    for old in bench.out.glob("epoch-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def _without_adapters(model: Any) -> Any:  # noqa: ANN401 - a dual encoder, with adapters or without
    if not has_lora(model):
        return model
    copied = copy.deepcopy(model)
    merge_lora(copied)
    return copied
