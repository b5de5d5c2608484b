"""What a batch of pairs should look like: contrastive objectives over unit rows, all called as `objective` says.

Decisions:
- Both directions are averaged and every value is a mean over pairs, so that a loss does not grow with the batch.
- One pair alone has no rival: InfoNCE and hinges are 0 there, not an error. Whoever plans batches has to notice.
- Weights are part of a loss's name ("info_nce+10*max_hinge"): one option instead of one a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, relu

from mmsearch.errors import UsageError
from mmsearch.train.objective import Objective, both_ways, candidates, check_pairs, cosines, mean_where, zero


class InfoNce(Objective):
    """Symmetric cross-entropy of the own partner among the rivals (van den Oord et al. 2018, arXiv:1807.03748; Radford
    et al. 2021, arXiv:2103.00020, fig. 3).

    `smoothing` s in [0, 1): the target is 1 - s on the own partner plus s shared evenly by all candidates, the own
    one included (Szegedy et al. 2015, arXiv:1512.00567, sec. 7). Known values: log(n) when all n rows are alike and
    of n groups, 0 when the own pair towers over its rivals and s is 0.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= smoothing < 1.0:
            raise UsageError("label smoothing", expected="0 or more and below 1", got=str(smoothing))
        self.smoothing = smoothing

    def value(self, scores: Tensor, rivals: Tensor, logit_scale: Tensor) -> Tensor:
        """Mean over pairs and both directions, in nats."""
        return both_ways(self._one_way, logit_scale * scores, rivals)

    def _one_way(self, logits: Tensor, rivals: Tensor) -> Tensor:
        own = logits.diagonal()  # (n,)
        asked = candidates(rivals)
        total = logits.masked_fill(~asked, -torch.inf).logsumexp(dim=1)
        if not self.smoothing:
            return (total - own).mean()
        even = mean_where(asked, logits)  # (n,)
        return (total - (1.0 - self.smoothing) * own - self.smoothing * even).mean()


class SigmoidLoss(Objective):
    """Every text with every image is a question of yes or no (SigLIP; Zhai et al. 2023, arXiv:2303.15343, sec. 3.2).

    Sum of -log sigmoid(±(logit_scale · cosine + logit_bias)) over own pairs (+) and rivals (-), divided by n.
    `logit_bias` is learned and starts at -10, because almost all questions are to be answered with no; a new model
    starts with a logit_scale of 10. Known value: with cosines of 0 and a bias of 0, m · log(2).
    """

    start_logit_scale = 10.0

    def __init__(self, bias: float = -10.0) -> None:
        super().__init__()
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def value(self, scores: Tensor, rivals: Tensor, logit_scale: Tensor) -> Tensor:
        """Sum over pairs and rivals over n, in nats."""
        logits = logit_scale * scores + self.logit_bias  # (n, m)
        yes = logsigmoid(logits.diagonal()).sum()
        no = torch.where(rivals, logsigmoid(-logits), zero(logits)).sum()
        return -(yes + no) / len(logits)


class Hinge(Objective):
    """max(0, margin - own cosine + rival's cosine), by the hardest rival or as the mean over all.

    `hardest`: VSE++ (Faghri et al. 2018, arXiv:1707.05612, eq. 6), which can collapse when it meets a model that
    knows nothing yet: `soften` takes the mean for the first epoch, as VSE-infinity does (Chen et al. 2021,
    arXiv:2011.04305). False: the mean, VSE0 with the sum divided by the rivals. `logit_scale` does not matter: this
    works on cosines. Known values: `margin` when all rows are alike, 0 when every rival is `margin` below.
    """

    def __init__(self, margin: float = 0.2, *, hardest: bool = True) -> None:
        super().__init__()
        if not 0.0 < margin <= 2.0:
            raise UsageError("hinge margin", expected="above 0 and at most 2, in cosine", got=str(margin))
        self.margin, self.hardest, self.softened = margin, hardest, False

    def value(self, scores: Tensor, rivals: Tensor, logit_scale: Tensor) -> Tensor:
        """Mean over pairs and both directions, in cosine."""
        return both_ways(self._one_way, scores, rivals)

    def _one_way(self, scores: Tensor, rivals: Tensor) -> Tensor:
        violation = relu(self.margin - scores.diagonal().unsqueeze(1) + scores)  # (n, m)
        if self.hardest and not self.softened:
            return torch.where(rivals, violation, zero(violation)).amax(dim=1).mean()
        return mean_where(rivals, violation).mean()


class Matryoshka(Objective):
    """The same objective on the first k numbers of every row, made unit again, for each k of `dims`, summed by weight
    (Kusupati et al. 2022, arXiv:2205.13147, eq. 1), so that a shortened embedding still finds.

    `dims` are distinct and hold d itself: whole rows are what an index keeps. `weights`: one a dimension, default 1.
    """

    def __init__(self, inner: Objective, dims: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.inner, self.dims = inner, tuple(dims)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.dims)
        if not self.dims or min(self.dims) < 1 or len(set(self.dims)) != len(self.dims):
            raise UsageError("matryoshka dimensions", expected="distinct numbers from 1 on", got=str(self.dims))
        if len(self.weights) != len(self.dims):
            raise UsageError("matryoshka weights", expected=f"{len(self.dims)} of them", got=str(len(self.weights)))
        self.start_logit_scale = inner.start_logit_scale

    def forward(
        self, texts: Tensor, images: Tensor, logit_scale: Tensor, *, text_groups: Tensor, image_groups: Tensor
    ) -> Tensor:
        """Weighted sum of the inner objective over the shortened rows."""
        if max(self.dims) != texts.shape[-1]:
            raise UsageError(
                "matryoshka dimensions",
                expected=f"{texts.shape[-1]} as the largest, the model's own",
                got=str(max(self.dims)),
                do="Name the dimensions to shorten to, and the whole one.",
            )
        parts = [
            weight * self.inner(
                normalize(texts[:, :dim], dim=-1), normalize(images[:, :dim], dim=-1), logit_scale,
                text_groups=text_groups, image_groups=image_groups,
            )
            for dim, weight in zip(self.dims, self.weights, strict=True)
        ]  # fmt: skip
        return torch.stack(parts).sum()


class Blend(Objective):
    """Weighted sum of objectives: `Blend([(1.0, InfoNce()), (10.0, Hinge())])`.

    A hinge pulls at a cosine with strength 1 and InfoNCE with up to logit_scale: a weight of about 10 makes them even.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        super().__init__()
        if not parts:
            raise UsageError("blend", expected="at least one objective", got="none")
        self.weights = tuple(weight for weight, _ in parts)
        self.objectives = nn.ModuleList([objective for _, objective in parts])
        starts = [part.start_logit_scale for _, part in parts if part.start_logit_scale is not None]
        self.start_logit_scale = starts[0] if starts else None

    def forward(
        self, texts: Tensor, images: Tensor, logit_scale: Tensor, *, text_groups: Tensor, image_groups: Tensor
    ) -> Tensor:
        """Weighted sum of the parts."""
        values = [
            weight * objective(texts, images, logit_scale, text_groups=text_groups, image_groups=image_groups)
            for weight, objective in zip(self.weights, self.objectives, strict=True)
        ]
        return torch.stack(values).sum()


class Distillation(nn.Module):
    """How far the student's ranking of the batch is from a teacher's: weight · KL(teacher || student), both ways.

    The distributions are softmax(scale · cosines) over own pair and rivals, the teacher's with its own `scale`, the
    student's with its learned logit_scale (Vasu et al. 2024, MobileCLIP, arXiv:2311.17049): only rankings are
    compared, so that dimension and spread of the two models may differ. Known value: 0 when both are alike.
    """

    def __init__(self, weight: float, scale: float) -> None:
        super().__init__()
        if not (weight >= 0.0 and scale > 0.0):
            raise UsageError("distillation", expected="weight >= 0 and scale > 0", got=f"{weight} and {scale}")
        self.weight, self.scale = weight, scale

    def forward(
        self, texts: Tensor, images: Tensor, logit_scale: Tensor, *, text_groups: Tensor, image_groups: Tensor,
        teacher_texts: Tensor, teacher_images: Tensor,
    ) -> Tensor:  # fmt: skip
        """As an `Objective`, with the teacher's unit rows (n, e) and (m, e) of the same texts and images; in nats."""
        check_pairs(texts, images, text_groups=text_groups, image_groups=image_groups)
        check_pairs(teacher_texts, teacher_images, text_groups=text_groups, image_groups=image_groups)
        rivals = text_groups.unsqueeze(1) != image_groups.unsqueeze(0)  # (n, m)
        logits = logit_scale * cosines(texts, images)
        taught = (self.scale * cosines(teacher_texts, teacher_images)).detach().to(logits.dtype)
        n = len(logits)
        there = _divergence(taught, logits, rivals)
        back = _divergence(taught[:, :n].T, logits[:, :n].T, rivals[:, :n].T)
        return self.weight * (there + back) / 2


_OBJECTIVES: dict[str, Callable[[float, float], Objective]] = {
    "info_nce": lambda smoothing, margin: InfoNce(smoothing),
    "sigmoid": lambda smoothing, margin: SigmoidLoss(),
    "hinge": lambda smoothing, margin: Hinge(margin, hardest=False),
    "max_hinge": lambda smoothing, margin: Hinge(margin, hardest=True),
}
"""name -> what makes it of smoothing and margin."""


def build_objective(
    name: str, *, smoothing: float = 0.0, margin: float = 0.2, matryoshka_dims: Sequence[int] = ()
) -> Objective:
    """The objective behind a name: one of the table, or several with "+", each with a weight if wanted.

    "info_nce", "sigmoid", "hinge" (mean), "max_hinge", "info_nce+max_hinge", "info_nce+10*max_hinge". With
    `matryoshka_dims` (d the largest) all of it is taken at each of these dimensions. Raises `UsageError` for an
    unknown name, a weight that is not above 0, and for smoothing that no part of the name knows.
    """
    parts = [_weighted(part, smoothing=smoothing, margin=margin) for part in name.split("+")]
    if smoothing and not any(isinstance(objective, InfoNce) for _, objective in parts):
        raise UsageError("label smoothing", expected="0, or a loss with info_nce in it", got=f"{smoothing} with {name}")
    plain = len(parts) == 1 and parts[0][0] == 1.0
    objective = parts[0][1] if plain else Blend(parts)
    return Matryoshka(objective, matryoshka_dims) if matryoshka_dims else objective


def _weighted(part: str, *, smoothing: float, margin: float) -> tuple[float, Objective]:
    """One part of a name: from "10*hinge" to 10.0 and the hinge."""
    factor, star, name = part.rpartition("*")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        weight = math.nan
    if name.strip() not in _OBJECTIVES or not 0.0 < weight < math.inf:
        known = ", ".join(sorted(_OBJECTIVES))
        raise UsageError("loss", expected=f"{known}, or several as info_nce+10*max_hinge", got=part)
    return weight, _OBJECTIVES[name.strip()](smoothing, margin)


def soften(objective: nn.Module, softened: bool) -> None:
    """Let every max-hinge inside `objective` take the mean over rivals while `softened` (for the first epoch)."""
    for module in objective.modules():
        if isinstance(module, Hinge):
            module.softened = softened


def _divergence(taught: Tensor, logits: Tensor, rivals: Tensor) -> Tensor:
    """KL(softmax of `taught` || softmax of `logits`) over own partner and rivals, mean over lines: (n, m) -> ()."""
    asked = candidates(rivals)
    target = taught.masked_fill(~asked, -torch.inf).log_softmax(dim=1)
    guess = logits.masked_fill(~asked, -torch.inf).log_softmax(dim=1)
    gap = torch.where(asked, target - guess, zero(logits))  # -inf minus -inf where nobody looks
    return (target.exp() * gap).sum(dim=1).mean()
