"""Names of splits: which ones mean the same, and which one a path names."""

from __future__ import annotations

import os
import re

_ALIASES = {
    "dev": "val",
    "valid": "val",
    "validation": "val",
    "training": "train",
    "restval": "train",
    "testing": "test",
}
_NAMED = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|dev|test)(?=$|[^a-z])")


_FOLDER = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([-_ ]?\d+)?")
_SPLITS = ("train", "val", "test")


def canonical_split(split: str) -> str:
    """The one name of a split: "val" for "dev" and "validation", "train" for "training" and "restval"."""
    lower = split.strip().lower()
    return _ALIASES.get(lower, lower)


def split_of_folder(path: str) -> str | None:
    """The split that one of a path's folders is called, from the last one up; a year or a number may follow.

    Known values: "val/1.jpg" and "val2017/dogs/1.jpg" -> "val", "test shots/1.jpg" and "dogs/test.jpg" -> None.
    """
    for part in reversed(path.lower().split("/")[:-1]):
        if found := _FOLDER.fullmatch(part):
            return canonical_split(found[1])
    return None


def split_of_file(path: str) -> str | None:
    """The split that a file or folder is called, and nothing else: "val.csv" -> "val", "test1.csv" -> None."""
    found = canonical_split(os.path.splitext(os.path.basename(path))[0])
    return found if found in _SPLITS else None


def split_in(path: str) -> str | None:
    """The split that a file's name is or begins a word with, else one of its folders, from the last one up.

    Known values: "data/train-00000.parquet" -> "train", "test/000.tar" -> "test", "attestation.tar" -> None.
    """
    for part in reversed(path.lower().split("/")):
        if found := _NAMED.search(part):
            return canonical_split(found[1])
    return None
