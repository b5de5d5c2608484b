"""Which values of the settings can mean anything: ranges, and what the parts of a loss would refuse later."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mmsearch.errors import UsageError
from mmsearch.rerank.config import FUSIONS
from mmsearch.train.losses import Distillation, InfoNce, Matryoshka, build_objective
from mmsearch.train.schedule import rate_at

if TYPE_CHECKING:
    from mmsearch.train.settings import Objective, Rerank, Run, TrainSettings


def check_settings(settings: TrainSettings) -> None:
    """`UsageError` for the first that cannot mean anything, before data or weights are touched."""
    _check_range("data", settings.data, ("workers", 0, math.inf), ("captions", 1, math.inf))
    _check_range("start", settings.start, ("anchor_peak", 0.0, 1.0), ("anchor_boost", 0.0, 100.0))
    _check_run(settings.run)
    _check_objective(settings.objective)
    _check_rerank(settings.rerank)


def _check_range(section: str, settings: object, *limits: tuple[str, float, float]) -> None:
    """`UsageError` for the first setting (name, least, most) that is out of its range; None is in every one."""
    for name, low, high in limits:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            hint = "A batch of one has nothing to contrast." if name == "batch_size" and value < low else ""
            expected = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise UsageError(f"{section}.{name}", expected=expected, got=str(value), do=hint)


def _check_run(run: Run) -> None:
    _check_range(
        "run", run, ("epochs", 0, 100_000), ("batch_size", 2, 1 << 20), ("lr", 0.0, 10.0), ("weight_decay", 0.0, 10.0),
        ("warmup", 0.0, 1.0), ("floor", 0.0, 1.0), ("backbone_start", 0.0, 1.0), ("clip", 0.0, 1e6),
        ("chunk", 0, 1 << 20), ("accumulate", 1, 1 << 16), ("feature_dropout", 0.0, 0.95),
        ("anchor_refresh", 1, 1 << 30), ("patience", 0, 100_000), ("ema", 0.0, 0.99999),
        ("views", -1, 1000), ("max_steps", 0, 1 << 40), ("save_seconds", 0.0, 1e9), ("threads", 0, 4096),
    )  # fmt: skip
    if not run.lr:
        raise UsageError("run.lr", expected="more than 0", got="0")
    if run.precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UsageError("run.precision", expected="auto, fp32, bf16 or fp16", got=repr(run.precision))
    if not all(0.0 <= beta < 1.0 for beta in run.betas):
        raise UsageError("run.betas", expected="two numbers from 0 to below 1", got=str(run.betas))
    if not -(2**63) <= run.seed < 2**63:
        raise UsageError("run.seed", expected="a number of at most 64 bits", got=str(run.seed))
    rate_at(0, total=1, kind=run.schedule)


def _check_objective(objective: Objective) -> None:
    _check_range(
        "objective", objective, ("smoothing", 0, 1), ("hard_share", 0, 1), ("modality_dropout", 0, 1),
        ("keep_classes", 0, 1000), ("keep_names", 0, 1000), ("hard_negatives", 0, math.inf),
        ("soften_epochs", 0, math.inf), ("mine_from", 0, math.inf),
    )  # fmt: skip
    # What the parts of the loss refuse, they refuse now, not when pictures have been decoded for an hour.
    build_objective(objective.name, smoothing=objective.smoothing, margin=objective.margin)
    Distillation(objective.teacher_weight, objective.teacher_scale)
    if objective.matryoshka:
        Matryoshka(InfoNce(), objective.matryoshka)


def _check_rerank(rerank: Rerank) -> None:
    if rerank.fusion not in FUSIONS:
        raise UsageError("rerank.fusion", expected=f"one of {', '.join(FUSIONS)}", got=repr(rerank.fusion)[:60])
    _check_range(
        "rerank", rerank, ("patch_dim", 1, 4096), ("grid", 1, 64), ("text_layer", -1, 96), ("layers", -1, 48),
        ("width", 0, 4096), ("hidden", 1, 65_536), ("dropout", 0.0, 0.95), ("contrast", 0.0, 1000.0),
        ("match", 0.0, 1000.0), ("negatives", -1, 4096), ("hardness", 0.0, 1000.0), ("mined", 0, 1000),
        ("mined_share", 0.0, 1.0), ("teacher_weight", 0.0, 1000.0), ("layers_rate", 0.0, 100.0), ("bank", 0, 1 << 20),
        ("image_train", 0, 1000), ("image_rate", 0.0, 100.0), ("depth", 2, 1000), ("val_pictures", 8, 1 << 20),
        ("val_texts", 8, 1 << 20),
    )  # fmt: skip
    if not rerank.contrast and not rerank.match:
        raise UsageError("rerank.contrast, rerank.match", expected="one above 0", got="0 and 0")
