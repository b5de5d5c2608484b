"""What the anchors' classes are called: sentences for the text tower, and rows of names made from them.

Decisions:
- Several synonyms a class, each in a sentence, averaged: one name alone says too little ("crane") or is Latin.
- Names come from timm's table of ImageNet, or from a file: one class a line, in the order of the classifier.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmsearch.errors import InputError, UsageError

TEMPLATE = "a photo of a {}"
FIRST_NAME = 3.0
"""Weight of a class's usual name against that of its synonym in the anchors: chosen on validation captions and on how
often a photo's nearest name is the classifier's own verdict (recipes/README.md)."""
_MAX_FILE = 16 << 20


def imagenet_prompts(synonyms: int = 2, *, template: str = TEMPLATE) -> tuple[list[str], list[int]]:
    """Sentences for the first `synonyms` names of each of ImageNet's 1,000 classes, and which class each is of.

    Known values: "a photo of a tench" and "a photo of a Tinca tinca", both of class 0.
    """
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()
    lines = [str(info.index_to_description(index)) for index in range(info.num_classes())]
    return prompts([line.split(",") for line in lines], synonyms=synonyms, template=template)


def read_prompts(
    path: str | os.PathLike[str], *, synonyms: int = 2, template: str = TEMPLATE
) -> tuple[list[str], list[int]]:
    """As `imagenet_prompts`, with the names of a UTF-8 text file: one class a line, synonyms joined by commas.

    `InputError` when a line is empty: class numbers are line numbers, so none may be left out.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_FILE:
            raise InputError(str(file), expected=f"at most {_MAX_FILE} bytes", got=str(file.stat().st_size))
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(file), expected="a text file of class names", got=str(error)[:120]) from error
    lines = text.rstrip("\r\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.replace(",", " ").strip():
            raise InputError(f"{file}, line {number}", expected="a class name", got="an empty line")
    return prompts([line.split(",") for line in lines], synonyms=synonyms, template=template)


def prompts(
    names: Sequence[Sequence[str]], *, synonyms: int = 2, template: str = TEMPLATE
) -> tuple[list[str], list[int]]:
    """A sentence for each of the first `synonyms` names of every class, and the class of each sentence.

    Names are stripped, empty and repeated ones dropped. `template` has one {} for the name.
    """
    if synonyms < 1:
        raise UsageError("synonyms", expected="at least 1", got=str(synonyms))
    if template.count("{}") != 1:
        raise UsageError("template", expected="one {} for the name", got=repr(template)[:60])
    sentences: list[str] = []
    owners: list[int] = []
    for owner, own in enumerate(names):
        kept = list(dict.fromkeys(name.strip() for name in own if name.strip()))[:synonyms]
        sentences += [template.replace("{}", name) for name in kept]
        owners += [owner] * len(kept)
    return sentences, owners


def class_rows(rows: Tensor, owners: Sequence[int], *, classes: int, first: float = 1.0) -> Tensor:
    """(p, d) unit rows of sentences -> (classes, d) unit rows: the mean of each class's own, at length 1 again.

    `first`: weight of each class's first sentence, its usual name, against 1 for the others. Carries gradients.
    Equals the row itself where a class has one sentence. `UsageError` when a class has none.
    """
    where = torch.as_tensor(owners, device=rows.device)
    if len(where) != len(rows) or set(range(classes)) != set(owners):
        raise UsageError(
            "anchor names",
            expected=f"sentences for each of {classes} classes",
            got=f"{len(rows)} for {len(set(owners))} classes",
        )
    weights = rows.new_ones(len(rows), 1)
    weights[list({owner: place for place, owner in reversed(list(enumerate(owners)))}.values())] = first
    weighted = rows * weights
    total = rows.new_zeros(classes, rows.shape[1]).index_add(0, where, weighted)
    return functional.normalize(total, dim=-1)
