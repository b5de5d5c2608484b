"""Keeping what the photo classifier knows: its verdicts, and that a picture's row finds them by name.

The class-name anchors read a classifier that does not learn from features that do. Captions name few of its classes,
so nothing in the contrastive loss holds the others in place. Here the verdict on a few pictures of each batch is
pulled to what it was before the run (learning without forgetting: Li & Hoiem 2016, arXiv:1606.09282, without a
temperature).

Decisions:
- A part of the batch, an eighth, where the backbone learns: the pull is the same on average, and the step stays nearly
  as fast. Names are taught of all pictures where only heads learn.
- The reference is a copy of the stages that learn, run without a graph; frozen stages are shared.
- Classes are taught by their usual name alone and in several sentences, one drawn for each batch: a search says one
  name, in any words.
- A name is taught until it is a little ahead of the others (a hinge), not as a distribution: what is found already is
  left to the captions. At the same cost in hit@k more names are found (recipes/README.md).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.evaluate.prompts import TEMPLATES, filled
from mmsearch.train.encoding import Texts, TowerPass
from mmsearch.train.prefix import FrozenPrefix

_PART, _FEWEST = 8, 4
NAMES_MARGIN = 0.02
"""By how much, in cosine, the name of what is seen has to be ahead."""
NAMES_SAID = ("{}", *TEMPLATES[:6])
"""What a name is said in: alone, and in the first sentences that class folders are evaluated with."""


def _part(images: Tensor) -> Tensor:
    return images[: max(_FEWEST, len(images) // _PART)]


def _backward(
    value: Callable[[Tensor], Tensor], images: Tensor, *, weight: float, chunk: int,
    scale: Callable[[Tensor], Tensor] | None,
) -> float:  # fmt: skip
    """weight · the mean of `value` over `images`: its gradient is added, `chunk` pictures at a time (0: all)."""
    told = []
    for piece in torch.split(images, chunk or len(images)):
        share = weight * len(piece) / len(images) * value(piece)
        if share.requires_grad:  # not while the backbone waits (`Schedule.backbone_start`)
            torch.autograd.backward(scale(share) if scale else share)
        told.append(float(share.detach()))
    return math.fsum(told)


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
        return _backward(self._value, _part(images), weight=self._weight, chunk=self._chunk, scale=scale)

    def _value(self, images: Tensor) -> Tensor:
        before = self._verdict_before(images)
        now = self._classifier(self._passes.pooled_images(images)).log_softmax(dim=-1)
        return functional.kl_div(now, before, reduction="batchmean", log_target=True)

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


class KeptNames:
    """weight · mean over pictures of top · max(0, `NAMES_MARGIN` - row · own name + row · nearest other); in cosine.

    The own name is that of the class which the classifier sees in the same view, as it is now; top is the class's
    share: a picture of which the classifier is not sure teaches little. A class of the same name ("crane") is no other.
    Known value: 0 when all are found by more than the margin. Rows are those of the step, with its dropout. Names are
    said by the text tower where only its head learns (`heads_only`), and follow the gradient; else they are the
    anchors' rows, as last said. `names`: the usual name of each class, in the order of the classifier. `whole`: all
    pictures of a batch, for a frozen image backbone. `chunk`: pictures at a time, 0 for all. Draws from torch's global
    random numbers.
    """

    def __init__(
        self, passes: TowerPass, *, names: Sequence[str], tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        weight: float, heads_only: bool, whole: bool, chunk: int = 0,
    ) -> None:  # fmt: skip
        self._passes, self._weight, self._whole, self._chunk = passes, weight, whole, chunk
        numbers = {name: place for place, name in enumerate(name.casefold() for name in names)}
        told = torch.tensor([numbers[name.casefold()] for name in names], device=passes.device)
        self._same = told.unsqueeze(0) == told.unsqueeze(1)  # (classes, classes)
        said = NAMES_SAID if heads_only else ()
        self._said = [Texts(filled(names, (sentence,)), passes, tokens, keep=True) for sentence in said]

    def backward(self, images: Tensor, *, scale: Callable[[Tensor], Tensor] | None = None) -> float:
        """As `KeptClasses.backward`."""
        part = images if self._whole else _part(images)
        drawn = int(torch.randint(len(self._said), ())) if self._said else None
        value = functools.partial(self._value, drawn=drawn)
        return _backward(value, part, weight=self._weight, chunk=self._chunk, scale=scale)

    def _value(self, images: Tensor, *, drawn: int | None) -> Tensor:
        anchors = self._passes.model.image.anchors
        assert anchors is not None  # for the type checker
        pooled = self._passes.pooled_images(images)
        with torch.no_grad():
            top, seen = anchors.classifier(pooled).softmax(dim=-1).max(dim=-1, keepdim=True)  # (b, 1)
        names = anchors.names if drawn is None else self._names(drawn)
        found = self._passes.embedded(pooled) @ names.T  # (b, classes)
        rival = found.masked_fill(self._same[seen.squeeze(1)], -torch.inf).amax(dim=-1, keepdim=True)
        value: Tensor = (top * functional.relu(NAMES_MARGIN - found.gather(1, seen) + rival)).mean()
        return value

    def _names(self, drawn: int) -> Tensor:
        """(classes, d) unit rows in one of the sentences."""
        pooled = self._said[drawn].pooled()
        return self._passes.texts(pooled, pooled)
