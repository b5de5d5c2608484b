"""Rivals from earlier batches: a small batch is judged against the rows of the thirty before it.

Decisions:
- The towers move little in thirty steps, so that rows that were made then still stand where they stood; they cost a
  matrix product and no tower. A batch that large would cost all of it (`chunked`).
- The rows lie in buffers of the objective: a state file holds them, and an interrupted run goes on with them.
- Half of the loss is the batch alone, as without a memory: there every row has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmsearch.errors import UsageError
from mmsearch.train.objective import Objective


class Remembering(Objective):
    """`inner` on the batch, and with the last `size` pairs of earlier batches as further rivals (cross-batch memory;
    Wang et al. 2020, arXiv:1912.06798, sec. 3.3).

    The value is the mean of texts asking for the batch's and the remembered images, images asking for the batch's and
    the remembered texts, and both asking the batch alone. What is remembered has no gradient and is never a partner;
    of a query's own group it takes no part. Known value: log(n) / 2 + log(n + k) / 2 for InfoNCE when all rows are
    alike, with n pairs and k remembered, of n + k groups.
    """

    texts: Tensor
    images: Tensor
    groups: Tensor
    count: Tensor

    def __init__(self, inner: Objective, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise UsageError("objective.memory", expected="1 or more pairs", got=str(size))
        self.inner, self.start_logit_scale = inner, inner.start_logit_scale
        self.register_buffer("texts", torch.zeros(size, dim))
        self.register_buffer("images", torch.zeros(size, dim))
        self.register_buffer("groups", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # pairs that were ever remembered

    def forward(
        self, texts: Tensor, images: Tensor, logit_scale: Tensor, *, text_groups: Tensor, image_groups: Tensor
    ) -> Tensor:
        """As `Objective`, for as many images as texts."""
        if len(texts) != len(images):
            raise UsageError(
                "batch", expected="as many images as texts", got=f"{len(texts)} texts and {len(images)} images"
            )
        kept = min(int(self.count), len(self.groups))
        known = self.groups[:kept]
        there = self.inner(
            texts, torch.cat([images, self.images[:kept].to(images.dtype)]), logit_scale,
            text_groups=text_groups, image_groups=torch.cat([image_groups, known]),
        )  # fmt: skip
        back = self.inner(
            images, torch.cat([texts, self.texts[:kept].to(texts.dtype)]), logit_scale,
            text_groups=image_groups, image_groups=torch.cat([text_groups, known]),
        )  # fmt: skip
        return (there + back) / 2

    @torch.no_grad()
    def remember(self, texts: Tensor, images: Tensor, groups: Tensor) -> None:
        """Take up n pairs, (n, d) each with (n,) groups, in the places of the oldest."""
        size = len(self.groups)
        texts, images, groups = texts[-size:], images[-size:], groups[-size:]
        places = (int(self.count) + torch.arange(len(groups), device=self.groups.device)) % size
        self.texts[places] = texts.detach().to(self.texts.dtype)
        self.images[places] = images.detach().to(self.images.dtype)
        self.groups[places] = groups
        self.count += len(groups)
