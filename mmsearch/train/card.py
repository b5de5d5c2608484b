"""The model card of a trained checkpoint: what it came from, what it saw, how well it does."""

from __future__ import annotations

from mmsearch.evaluate.comparison import Comparison
from mmsearch.evaluate.report import Evaluation
from mmsearch.train.examples import Examples
from mmsearch.train.settings import TrainSettings


def card_of(
    settings: TrainSettings, examples: Examples, comparison: Comparison[Evaluation] | None, *, start: str, share: float
) -> str:
    """Markdown for the checkpoint's README.md."""
    run = settings.run
    lines = [
        "# A dual encoder trained with mmsearch",
        "",
        f"Started from: {start}. Objective: {settings.objective.name}. "
        f"Share of the new weights (WiSE-FT): {share:g}. Seed: {run.seed}.",
        f"Data: {len(examples.train)} training pictures with "
        f"{sum(len(pair.captions) for pair in examples.train)} captions, {len(examples.val)} pictures held out.",
        "",
    ]
    if comparison is not None:
        lines += ["On the held-out pairs (they also chose the epoch and the share):", "", "```"]
        lines += [*comparison.lines(), "```", ""]
    lines += [
        "The licences of the data and of the weights it started from apply to this model. "
        "The settings of the run are in `settings.json` of its folder.",
        "",
    ]
    return "\n".join(lines)
