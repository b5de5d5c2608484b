"""What is at hand while a run is set up, talks and ends; and how it keeps a checkpoint.

Decisions:
- A checkpoint is written under a name of its own and shown by the link `best`, which is swapped in one rename: there
  is no moment at which the best model is not whole. A name that is there already, from before an interruption, is not
  written to again: `best` may point to it.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmsearch.errors import ModelError, ResourceError
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
_OURS = re.compile(r"epoch-\d{4}(-final)?(-again)*")


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
    _told: set[str] = field(default_factory=set)

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
        """A picture that cannot be used: told once, however many of views, banks and batches meet it."""
        if skipped.path in self._told:
            return
        self._told.add(skipped.path)
        self.skipped.append(skipped)
        self.watcher.note(f"skipped {skipped.path}: {skipped.reason} {skipped.detail}")


def keep(bench: Bench, name: str, *, graphs: bool, card: str) -> None:
    """Store the model as it is now in OUT/`name` and let OUT/best be that, in one rename; older ones are removed.

    Raises `ResourceError` when the disk does not take it; what was the best stays.
    """
    while (bench.out / name).exists():
        name += "-again"
    save_checkpoint(
        _without_adapters(bench.start.model), bench.out / name, tokenizer_json=bench.start.tokenizer_json,
        name=bench.out.resolve().name, card=card or "A checkpoint of a run that has not ended.\n", graphs=graphs,
    )  # fmt: skip
    show(bench, name)


def show(bench: Bench, name: str) -> None:
    """Let OUT/best be the checkpoint OUT/`name` in one rename, and remove older ones; `ResourceError` without links."""
    draft = bench.out / f".{BEST}.draft"
    try:
        draft.unlink(missing_ok=True)
        draft.symlink_to(name, target_is_directory=True)
        draft.replace(bench.out / BEST)
    except OSError as error:
        why = error.strerror or str(error)
        do = f"Use a disk that knows links, and remove {BEST} if it is a folder."
        raise ResourceError(str(bench.out / BEST), expected="a link that can be made", got=why, do=do) from error
    for old in bench.out.iterdir():
        if _OURS.fullmatch(old.name) and old.name != name and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)


def keep_final(bench: Bench, name: str, *, store: Callable[..., None] = keep) -> None:
    """`store` with graphs where they are wanted and can be made; without them queries need torch, nothing else."""
    if bench.settings.run.graphs:
        try:
            return store(bench, name, graphs=True, card="")
        except (ModelError, RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
            bench.warn(f"no graphs beside the checkpoint, a query will need torch: {str(error).splitlines()[0][:160]}")
    return store(bench, name, graphs=False, card="")


def _without_adapters(model: Any) -> Any:  # noqa: ANN401 - a dual encoder, with adapters or without
    if not has_lora(model):
        return model
    copied = copy.deepcopy(model)
    merge_lora(copied)
    return copied
