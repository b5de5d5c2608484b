"""Keeping the photo classifier's verdicts while the backbone under it learns.

The class-name anchors read a classifier that does not learn from features that do. Captions name few of its classes,
so nothing in the contrastive loss holds the others in place. Here the verdict on a few pictures of each batch is
pulled to what it was before the run (learning without forgetting: Li & Hoiem 2016, arXiv:1606.09282, without a
temperature).

Decisions:
- A part of the batch, an eighth by default: the pull is the same on average, and the step stays nearly as fast.
- The reference is a copy of the stages that learn, run without a graph; frozen stages are shared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.train.encoding import TowerPass
from mmsearch.train.prefix import FrozenPrefix

_PART, _FEWEST = 8, 4


class KeptClasses:
    """weight · KL(verdict before || verdict now), over classes, mean over an eighth of the batch; in nats.

    Known value: 0 while the backbone is what it was. Make it before the first step, and from the start's weights.
    `chunk`: pictures at a time, 0 for all of the part. On several ranks each takes a part of its own share.
    """

    def __init__(self, passes: TowerPass, *, weight: float, chunk: int = 0) -> None:
        self._passes, self._weight, self._chunk = passes, weight, chunk
        tower = passes.model.image
        assert tower.anchors is not None  # for the type checker
        self._classifier = tower.anchors.classifier
        held = {id(p): p for stage in (passes.prefix.stages if passes.prefix else ()) for p in stage.parameters()}
        backbone = copy.deepcopy(tower.backbone, dict(held))  # what is frozen is not copied
        self._before = nn.ModuleList([backbone, copy.deepcopy(tower.pooling)]).eval()
        self._prefix = None if passes.prefix is None else FrozenPrefix(backbone, len(passes.prefix.stages))

    def backward(self, images: Tensor, *, scale: Callable[[Tensor], Tensor] | None = None) -> float:
        """(b, ...) pictures as the step has them: adds the gradient, and tells the value."""
        part = images[: max(_FEWEST, len(images) // _PART)]
        values = [
            self._backward(piece, share=self._weight * len(piece) / len(part), scale=scale)
            for piece in torch.split(part, self._chunk or len(part))
        ]
        return math.fsum(values)

    def _backward(self, images: Tensor, *, share: float, scale: Callable[[Tensor], Tensor] | None) -> float:
        before = self._verdict_before(images)
        now = self._classifier(self._passes.pooled_images(images)).log_softmax(dim=-1)
        value = share * functional.kl_div(now, before, reduction="batchmean", log_target=True)
        if value.requires_grad:  # not while the backbone waits (`Schedule.backbone_start`)
            torch.autograd.backward(scale(value) if scale else value)
        return float(value.detach())

    @torch.no_grad()
    def _verdict_before(self, images: Tensor) -> Tensor:
        backbone, pooling = self._before
        passes = self._passes
        with passes.autocast():
            if self._prefix is None:
                features = backbone(passes.normalised(images))
            else:
                features = self._prefix.rest(passes.placed(images))
            pooled = pooling(features)
        verdict: Tensor = self._classifier(pooled.float()).log_softmax(dim=-1)
        return verdict
