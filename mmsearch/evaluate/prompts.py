"""What a class is called, and the sentences it is put into.

Decisions:
- A class is described by several sentences whose embeddings are averaged (prompt ensembling; Radford et al. 2021,
  arXiv:2103.00020, section 3.1.4): captions of one thing differ in wording, and the average is nearer to all of them.
- The sentences speak of photos in general, not of one kind of thing, and only some of them of art.
- A folder's name becomes words by its separators; only what is certainly numbering is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmsearch.errors import InputError
from mmsearch.similarity import normalise
from mmsearch.types import Embeddings

TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a photograph showing a {}",
    "a picture with a {} in it",
    "one {} in the middle of a photo",
    "several {} together",
    "a close view of a {}",
    "a {} seen from far away",
    "a {} against a plain background",
    "a {} in its usual surroundings",
    "a {} outdoors in daylight",
    "a {} inside a room",
    "part of a {}, close up",
    "a small {}",
    "a big {}",
    "a clear photo of one {}",
    "a blurred photo of a {}",
    "a dark photo of a {}",
    "a black and white photo of a {}",
    "a snapshot of my {}",
    "somebody took a picture of this {}",
    "an old photo of a {}",
    "a drawing of a {}",
    "a painting of a {}",
    "a toy {}",
)
"""Sentences with one place for the name, `{}`."""

WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
"""What the folders of ImageNet are called."""

_WORDNET_PREFIX = re.compile(r"^n\d{8}[-_. ]+", re.ASCII)
_NUMBERING = re.compile(r"^\d+\.\s*(?=\D)", re.ASCII)
_SEPARATORS = re.compile(r"[_\-+\s]+")
_HUMPS = re.compile(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})")


def class_name(folder: str) -> str:
    """The words of a folder's name; the name itself where there are none.

    Underscores, dashes and plus signs become spaces, words joined by capitals are parted (`GoldenRetriever`,
    but not `TVs` or `iPhone`), numbering in front goes (`001.heron`, `n02084071-dog`). Case stays.
    Known values: "sea_horse" -> "sea horse", "DVDPlayer" -> "DVD Player".
    """
    name = _NUMBERING.sub("", _WORDNET_PREFIX.sub("", folder))
    return _SEPARATORS.sub(" ", _HUMPS.sub(" ", name)).strip() or folder


def parse_templates(text: str, *, where: str) -> tuple[str, ...]:
    """Templates, one a line; empty lines and lines that begin with # are left out.

    Raises `InputError`, naming `where` and the line, when one does not hold `{}` exactly once, or there is none.
    """
    templates = []
    for number, line in enumerate(text.splitlines(), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if template.count("{}") != 1:
            do = "Write one sentence a line: a photo of a {}"
            raise InputError(f"{where}:{number}", expected="{} once, for the name", got=repr(template[:80]), do=do)
        templates.append(template)
    if not templates:
        raise InputError(where, expected="at least one template", got="none", do="Write: a photo of a {}")
    return tuple(templates)


def filled(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template: (c · t) texts, those of one name side by side. Braces in names stay as they are."""
    return [template.replace("{}", name) for name in names for template in templates]


def ensembled(rows: Embeddings, *, templates: int) -> Embeddings:
    """(c · t, d) rows of `filled` -> (c, d) unit rows: the mean of each name's t = `templates` rows, normalised."""
    return normalise(rows.reshape(-1, templates, rows.shape[1]).mean(axis=1, dtype=np.float64))
