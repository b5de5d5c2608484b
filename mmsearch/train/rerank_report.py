"""What a second-stage run ends with: its report, its card, and the scoring that is stored with the re-ranker.

Decisions:
- The cut-off ("nothing found") is fitted on held-out captions: asked with their picture in the gallery, and without it.
- A checkpoint of a run that has not ended has a scoring with even weights, so that it can be opened and tried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmsearch.evaluate.comparison import Comparison
from mmsearch.evaluate.matching import Matching
from mmsearch.evaluate.report import Evaluation
from mmsearch.rerank.calibration import Platt
from mmsearch.rerank.cutoff import fit_cutoff
from mmsearch.rerank.model import RerankModel
from mmsearch.rerank.scores import CASES, Case, Evidence, Scoring
from mmsearch.train.bench import Bench
from mmsearch.train.rerank_validation import Found, HeldOut
from mmsearch.types import Skipped

_BEST_SHOWN = 64


@dataclass(frozen=True, slots=True)
class RerankReport:
    """How a second-stage run ended. `comparison`: the first stage and both, on the held-out pairs, None without any.

    `matching`: yes/no on balanced true and hard false held-out pairs. `scoring`: how parts became a probability.
    """

    checkpoint: Path
    fusion: str
    parameters: int
    pairs: int
    held_out: int
    steps: int
    best_epoch: int
    comparison: Comparison[Evaluation] | None
    matching: Matching | None
    scoring: Scoring
    warnings: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "checkpoint": str(self.checkpoint), "fusion": self.fusion, "parameters": self.parameters,
            "pairs": self.pairs, "held_out": self.held_out, "steps": self.steps, "best_epoch": self.best_epoch,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "matching": None if self.matching is None else self.matching.to_json(),
            "scoring": self.scoring.to_json(), "warnings": list(self.warnings), "skipped": len(self.skipped),
            "seconds": round(self.seconds, 1),
        }  # fmt: skip


def with_cutoff(found: Found, held: HeldOut) -> Scoring:
    """The scoring with a cut-off: each caption asked of all pictures, and of all but those of its own group."""
    groups = held.groups[held.owners]
    present, absent, relevant = [], [], []
    for query, (rows, final) in enumerate(zip(found.to_image.rows, found.to_image.final, strict=True)):  # type: ignore[arg-type]
        own = held.groups[rows] == groups[query]
        order = np.argsort(-final, kind="stable")
        if own.any():
            present.append(final[order])
            relevant.append(own[order])
        if not own.all():
            absent.append(np.sort(final[~own])[::-1])
    if not present or not absent:
        return found.scoring
    return replace(found.scoring, cutoff=fit_cutoff(present, absent, relevant=relevant, depth=_BEST_SHOWN))


def card_of(bench: Bench, model: RerankModel, comparison: Comparison[Evaluation], matching: Matching) -> str:
    """RERANK.md: what it is, what it was trained on, its figures on held-out pairs."""
    lines = [f"# Re-ranker: {model.config.fusion} over {bench.start.name}", ""]
    paths = ", ".join(source.path for source in bench.settings.sources)
    lines += [f"- trained on {len(bench.examples.train)} pictures of {paths}"]
    lines += ["", "On held-out pairs, in per cent:", "", "```", *comparison.lines(), "", *matching.lines(), "```", ""]
    return "\n".join(lines)


def of_picture(found: Found) -> Evidence:
    """The balanced pairs as a picture without texts has them."""
    parts = {part: getattr(found.pairs.evidence, part) for part in ("cosine", "logit", "rarity")}
    return Evidence.of(**parts)


def plain_scoring() -> Scoring:
    """Even weights, for a checkpoint of a run that has not ended."""

    def case(parts: tuple[str, ...]) -> Case:
        ones = tuple(1.0 for _ in parts)
        return Case(tuple(0.0 for _ in parts), ones, ones, 0.0, Platt(1.0, 0.0), None)

    return Scoring({name: case(parts) for name, parts in CASES.items()})
