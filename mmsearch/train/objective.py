"""The frame of a contrastive objective: pairs that belong together, their cosines, and who is whose rival.

Every objective (`losses`) is a module that is called the same way:

    objective(texts, images, logit_scale, text_groups=..., image_groups=...) -> ()

with texts (n, d) and images (m, d) float unit rows, m >= n: pair i is (text i, image i) for i < n, and images from n
on are negatives only. logit_scale () is 1 / temperature. text_groups (n,) and image_groups (m,) are int64; a text and
an image of one group that are not the own pair are neither positive nor negative: they take no part, so that the
captions of one image never repel it. The result is a scalar with a gradient.

Decisions:
- A rival is a row of another group. The own pair is of one group by definition, which is checked at each call:
  a batch that slipped by one row would otherwise train happily on wrong pairs.
- Cosines are never computed in half precision, not even under autocast: times a logit_scale of 100 their third digit
  decides. Half-precision rows are widened; float64 stays, for gradcheck.
- Images without a text (from n on) are candidates for texts, never queries.
- Masks select; nothing is multiplied by them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmsearch.errors import UsageError


class Objective(nn.Module):
    """Base of what is called as the module says; a kind defines its value from cosines and rivals.

    `start_logit_scale`: the multiplier from which the paper of this objective starts a model made from scratch;
    None where the model's own start is right. An objective may have parameters of its own (`SigmoidLoss`): they are
    trained without weight decay and saved with the run.
    """

    start_logit_scale: float | None = None

    def forward(
        self, texts: Tensor, images: Tensor, logit_scale: Tensor, *, text_groups: Tensor, image_groups: Tensor
    ) -> Tensor:
        """See the module. Raises `UsageError` for shapes or groups that do not belong together."""
        check_pairs(texts, images, text_groups=text_groups, image_groups=image_groups)
        rivals = text_groups.unsqueeze(1) != image_groups.unsqueeze(0)  # (n, m)
        return self.value(cosines(texts, images), rivals, logit_scale)

    def value(self, scores: Tensor, rivals: Tensor, logit_scale: Tensor) -> Tensor:
        """From cosines (n, m) and rivals (n, m) bool, True where text and image may be pushed apart, to ()."""
        raise NotImplementedError(type(self).__name__)


def cosines(texts: Tensor, images: Tensor) -> Tensor:
    """(n, d), (m, d) unit rows -> (n, m) in float32 (float64 for float64 rows), also under autocast."""
    with torch.autocast(device_type=texts.device.type, enabled=False):
        return _wide(texts) @ _wide(images).T


def check_pairs(texts: Tensor, images: Tensor, *, text_groups: Tensor, image_groups: Tensor) -> None:
    """Raise `UsageError` unless these are n >= 1 texts with m >= n images of the same d, group i beside group i."""
    n, m = len(texts), len(images)
    if texts.ndim != 2 or images.ndim != 2 or texts.shape[-1] != images.shape[-1] or not 1 <= n <= m:
        got = f"{tuple(texts.shape)} and {tuple(images.shape)}"
        raise UsageError("batch", expected="texts (n, d) and images (m, d), m >= n >= 1", got=got)
    if text_groups.shape != (n,) or image_groups.shape != (m,):
        got = f"{tuple(text_groups.shape)} and {tuple(image_groups.shape)}"
        raise UsageError("batch groups", expected=f"({n},) for texts and ({m},) for images", got=got)
    if not torch.equal(text_groups, image_groups[:n]):
        row = int((text_groups != image_groups[:n]).nonzero()[0])
        got = f"groups {int(text_groups[row])} and {int(image_groups[row])}"
        raise UsageError(f"pair {row} of the batch", expected="a text and an image of one group", got=got)


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def zero(like: Tensor) -> Tensor:
    """0 of the same dtype on the same device, for what a mask leaves out."""
    return torch.zeros((), dtype=like.dtype, device=like.device)


def candidates(rivals: Tensor) -> Tensor:
    """(n, m) bool -> (n, m) bool: the rivals and the own partner."""
    return rivals | torch.eye(*rivals.shape, dtype=torch.bool, device=rivals.device)


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of each line over what the mask keeps: (n, m), (n, m) -> (n,); 0 where it keeps nothing."""
    return torch.where(mask, values, zero(values)).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def both_ways(one_way: Callable[[Tensor, Tensor], Tensor], scores: Tensor, rivals: Tensor) -> Tensor:
    """Average of texts asking for all m images and the n images with a text asking for texts."""
    n = len(scores)
    return (one_way(scores, rivals) + one_way(scores[:, :n].T, rivals[:, :n].T)) / 2
