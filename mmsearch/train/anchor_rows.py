"""The class names of a model's anchors, kept in step with a text tower that learns.

Decisions:
- Rows are made anew every so many steps and before anything is measured or saved, without a gradient: a thousand names
  at every step would cost more than the captions, and the names should follow the text tower, not pull at it. They
  must not fall far behind: captions then learn to meet names that are no longer said so, and the loss falls while the
  model gets worse (with names 120 steps old, from 47.8 to 45.6 mean hit@1/5/10 on held-out pairs).
- Which names a checkpoint's anchors stand for is not stored in it. A model with 1,000 classes is taken to speak of
  ImageNet's unless the settings name a file; with another number and no file the rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmsearch.errors import UsageError
from mmsearch.towers.anchor_names import FIRST_NAME, TEMPLATE, class_rows, imagenet_prompts, read_prompts
from mmsearch.train.encoding import Texts, TowerPass

IMAGENET, IMAGENET_CLASSES = "imagenet", 1000


def spoken(
    prompts: str, *, classes: int, synonyms: int = 2, template: str = TEMPLATE
) -> tuple[list[str], list[int]]:  # fmt: skip
    """Sentences for the names of `prompts` ("imagenet", a file, or "" for what is usual), and which class each is of.

    Nothing where the names of so many classes are not known.
    """
    if prompts == IMAGENET or (not prompts and classes == IMAGENET_CLASSES):
        return imagenet_prompts(synonyms, template=template)
    return read_prompts(Path(prompts), synonyms=synonyms, template=template) if prompts else ([], [])


class AnchorRows:
    """Makes the anchors' rows of a model; nothing to do for one without anchors, or whose names are not known."""

    def __init__(
        self, passes: TowerPass, *, prompts: str, tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        keep_texts: bool = False,
    ) -> None:  # fmt: skip
        self._passes = passes
        self._texts = Texts([], passes, tokens)
        anchors = passes.model.image.anchors
        self._sentences: list[str] = []
        self._owners: list[int] = []
        if anchors is None:
            if prompts:
                raise UsageError("start.anchor_prompts", expected="a model with anchors", got="one without")
            return
        self._classes = len(anchors.names)
        self._sentences, self._owners = spoken(prompts, classes=self._classes)
        self._texts = Texts(self._sentences, passes, tokens, keep=keep_texts)
        named = len(set(self._owners))
        if self._sentences and named != self._classes:
            raise UsageError("start.anchor_prompts", expected=f"{self._classes} classes", got=str(named))

    @property
    def known(self) -> bool:
        """Whether there are names to speak."""
        return bool(self._sentences)

    @torch.no_grad()
    def refresh(self) -> None:
        """Say all names with the text tower as it is now, in evaluation mode."""
        if not self._sentences:
            return
        model = self._passes.model
        assert model.image.anchors is not None  # for the type checker
        was_training = {module: module.training for module in model.text.modules()}
        model.text.eval()
        rows = torch.from_numpy(self._texts.rows())
        for module, training in was_training.items():
            module.training = training
        model.image.anchors.set_names(class_rows(rows, self._owners, classes=self._classes, first=FIRST_NAME))
