"""The learning rate over a run: warm-up, then down; and parts that start later.

Decisions:
- Plain functions of the step: nothing to save, so a resumed run continues at the exact same rate.
- A part that starts late warms up by itself: its optimiser has seen no gradient before.
- While a part waits, its parameters need no gradient: the backward pass of a backbone is two thirds of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mmsearch.errors import UsageError

KINDS = ("cosine", "linear", "constant")


def rate_at(step: int, *, total: int, warmup: int = 0, kind: str = "cosine", floor: float = 0.0) -> float:
    """Factor on the peak rate at `step` (0 .. total - 1), in [floor, 1] after the warm-up.

    The warm-up rises in equal steps, (step + 1) / warmup, and reaches 1 at step warmup - 1. Then "cosine" falls
    along half a cosine (Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983, without restarts) and "linear" along a line,
    from 1 at step `warmup` to `floor` at step `total`; "constant" stays 1. Steps beyond `total` count as `total`.
    Known values without warm-up and floor: 1 at step 0, 0.5 at half the run.
    """
    if kind not in KINDS:
        raise UsageError("schedule", expected=f"one of {', '.join(KINDS)}", got=repr(kind))
    if total < 1 or warmup < 0 or not 0.0 <= floor <= 1.0 or step < 0:
        raise UsageError(
            "schedule",
            expected="total >= 1, warmup >= 0, step >= 0, floor in [0, 1]",
            got=f"total {total}, warmup {warmup}, step {step}, floor {floor}",
        )
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant" or total <= warmup:
        return 1.0
    done = min(1.0, (step - warmup) / (total - warmup))
    down = 0.5 * (1.0 + math.cos(math.pi * done)) if kind == "cosine" else 1.0 - done
    return floor + (1.0 - floor) * down


@dataclass(frozen=True, slots=True)
class Schedule:
    """`rate_at` for a run of `total` steps, where backbones start `backbone_start` steps later.

    Before that step a backbone's factor is 0 (embedding warm-up: only heads learn; Chen et al. 2021, VSE∞,
    arXiv:2011.04305); from it on, the common curve times a warm-up of its own.
    """

    total: int
    warmup: int = 0
    kind: str = "cosine"
    floor: float = 0.0
    backbone_start: int = 0

    def __post_init__(self) -> None:
        rate_at(0, total=self.total, warmup=self.warmup, kind=self.kind, floor=self.floor)
        if self.backbone_start < 0:
            raise UsageError("backbone_start", expected="a step from 0", got=str(self.backbone_start))

    def factor(self, step: int, *, part: str = "head") -> float:
        """Factor on the peak rate of a group of this `part`, "backbone" or "head"."""
        common = rate_at(step, total=self.total, warmup=self.warmup, kind=self.kind, floor=self.floor)
        if part != "backbone" or not self.backbone_start:
            return common
        late = step - self.backbone_start
        if late < 0:
            return 0.0
        return common * min(1.0, (late + 1) / self.warmup) if self.warmup else common

    def apply(self, groups: Iterable[dict[str, Any]], *, step: int) -> None:
        """Set `lr` of each of `parameter_groups`' groups for `step`, and `requires_grad` of what waits or starts.

        Call it before the step's forward pass. Whoever asks which parameters learn (`Average`) asks before the first.
        """
        for group in groups:
            group["lr"] = group["rate"] * self.factor(step, part=group["part"])
            if self.backbone_start and group["part"] == "backbone":
                for parameter in group["params"]:
                    parameter.requires_grad_(step >= self.backbone_start)
