"""Class folders -> both encoders -> how often a picture is given its folder's name (zero-shot classification).

Decisions:
- Every sub-folder is a class, whatever it is called: a folder of strays (`BACKGROUND_Google`) is one more class, with a
  name that nothing looks like. `exclude` leaves it out.
- A class without a readable picture is no choice either: it is left out and warned of, for numbers over fewer
  classes are easier.
- Folders whose names read alike are one class: no model could tell their names apart.
- Names come from the folders alone; ImageNet's ids are looked up in timm's table.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsearch.data.folder import Rules, Walk
from mmsearch.data.loading import Loader
from mmsearch.data.reading import read_file
from mmsearch.data.texts import OnSkip, clean
from mmsearch.errors import ImageError, InputError, UsageError
from mmsearch.evaluate.classification import Classification, classify_rows, compare_classes
from mmsearch.evaluate.comparison import Comparison
from mmsearch.evaluate.evaluator import Progress, Rounds, Silent, image_rows, text_rows
from mmsearch.evaluate.prompts import TEMPLATES, WORDNET_ID, class_name, ensembled, filled, parse_templates
from mmsearch.types import Embeddings, Skipped

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

_MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ClassFolders:
    """`names` (c) of the classes; `paths` (n) of the pictures with `labels` (n), the class of each; `warnings`."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    warnings: tuple[str, ...]


def evaluate_classes(
    folder: str | Path,
    *,
    encoder: Encodes,
    templates: Sequence[str] = TEMPLATES,
    exclude: Sequence[str] = (),
    limit: int | None = None,
    workers: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Classification:
    """Name the pictures in the sub-folders of `folder` by their folders' names.

    `templates`: sentences with `{}` for the name. `exclude`: globs of names that are left out. `limit`: only the
    first so many pictures of each class. Raises `InputError` where fewer than two classes have a readable picture.
    """
    began, told = time.monotonic(), progress or Silent()
    skipped: list[Skipped] = []
    found = class_folders(folder, exclude=exclude, limit=limit, on_skip=skipped.append)
    told.start(len(found.paths) + len(found.names) * len(templates))
    kept: list[int] = []
    rows: list[Embeddings] = []
    with Loader(preprocessing=encoder.preprocessing, workers=workers) as loader:
        for keys, embeddings in image_rows(
            found.paths, encoder=encoder, loader=loader, batch_size=batch_size, skipped=skipped
        ):
            kept.extend(keys)
            rows.append(embeddings)
            told.advance(len(keys))
    seen, labels = np.unique(np.array([found.labels[key] for key in kept], np.int64), return_inverse=True)
    names = [found.names[row] for row in seen]
    if len(names) < 2:
        raise InputError(str(folder), expected="readable pictures of two classes", got=f"{len(skipped)} skipped")
    told.advance(len(found.paths) - len(kept) + (len(found.names) - len(names)) * len(templates))
    sentences = text_rows(filled(names, templates), encoder=encoder, batch_size=batch_size, progress=told)
    named = classify_rows(
        np.concatenate(rows),
        ensembled(sentences, templates=len(templates)),
        labels=labels.astype(np.int64),
        names=names,
        model=encoder.identity.name,
    )
    return replace(
        named,
        templates=len(templates),
        skipped=tuple(skipped),
        warnings=(*found.warnings, *_without_pictures([name for name in found.names if name not in names])),
        seconds=time.monotonic() - began,
    )


def compare_class_folders(
    folder: str | Path,
    *,
    before: Callable[[], Encodes],
    after: Callable[[], Encodes],
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401 - as `evaluate_classes` has them
) -> Comparison[Classification]:
    """Two models on the same class folders. `before` and `after` load them, each when its turn comes."""
    told = Rounds(progress or Silent(), rounds=2)
    first = evaluate_classes(folder, encoder=before(), progress=told, **options)
    return compare_classes(first, evaluate_classes(folder, encoder=after(), progress=told, **options))


def class_folders(
    folder: str | Path, *, exclude: Sequence[str] = (), limit: int | None = None, on_skip: OnSkip
) -> ClassFolders:
    """The classes and pictures of `folder`, sorted by the bytes of their names; folders in folders belong to the first.

    `on_skip` hears of what cannot be listed. Raises `InputError` when there are no two classes with pictures.
    """
    if limit is not None and limit < 1:
        raise UsageError("limit", expected="1 or more", got=str(limit))
    root, rules = os.path.abspath(folder), Rules(tuple(exclude))
    by_folder: dict[str, list[str]] = {name: [] for name in _subfolders(root, rules)}
    loose = 0
    for source in Walk(rules, on_skip, [root]).folder(root):
        first, _, rest = source.name.partition("/")
        if not rest:
            loose += 1
        elif source.path is not None and (limit is None or len(by_folder.get(first, ())) < limit):
            by_folder.setdefault(first, []).append(source.path)  # a folder may have come up meanwhile
    named = _named(by_folder)
    used = {name: paths for name, paths in named.items() if paths}
    if len(used) < 2:
        got = f"{len(by_folder)} folders, {len(used)} classes with pictures"
        raise InputError(str(folder), expected="a folder of pictures for each of two classes or more", got=got)
    warnings = _without_pictures([name for name, paths in named.items() if not paths])
    if loose:
        warnings.append(f"{loose} pictures lie in no class folder: left out")
    if len(named) < len(by_folder):
        warnings.append(f"{len(by_folder)} folders have {len(named)} different names: those alike are one class")
    if all(name.isdigit() or WORDNET_ID.fullmatch(name) for name in used):
        warnings.append("the classes are called by numbers: rename their folders to what they show")
    names = tuple(used)
    return ClassFolders(
        names,
        tuple(path for paths in used.values() for path in paths),
        tuple(row for row, name in enumerate(names) for _ in used[name]),
        tuple(warnings),
    )


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a text file (see `prompts.parse_templates`). Raises `InputError` when it cannot be used."""
    try:
        content, _ = read_file(str(path), max_bytes=_MAX_TEMPLATE_BYTES)
    except ImageError as error:  # what reading any file raises
        raise InputError(str(path), expected="a text file of templates", got=error.reason) from error
    return parse_templates(content.decode("utf-8-sig", "replace"), where=str(path))


def _subfolders(root: str, rules: Rules) -> list[str]:
    try:
        with os.scandir(root) as entries:
            found = [entry.name for entry in entries if entry.is_dir() and rules.allow(entry.name, entry.name)]
    except OSError as error:
        raise InputError(root, expected="a folder with a folder for each class", got=str(error.strerror)) from error
    if not found:
        do = "Put the pictures of each class into a folder with its name."
        raise InputError(root, expected="a folder for each class", got="no sub-folders", do=do)
    return sorted(found, key=os.fsencode)


def _named(by_folder: dict[str, list[str]]) -> dict[str, list[str]]:
    """Class name -> pictures; names that differ only in case are alike."""
    looked_up = _wordnet_names([folder for folder in by_folder if WORDNET_ID.fullmatch(folder)])
    named: dict[str, list[str]] = {}
    spelling: dict[str, str] = {}
    for folder, paths in by_folder.items():
        name = looked_up.get(folder) or class_name(clean(folder))
        named.setdefault(spelling.setdefault(name.casefold(), name), []).extend(paths)
    return named


def _wordnet_names(ids: Sequence[str]) -> dict[str, str]:
    """ImageNet's ids -> their first name; where two ids share it, with the definition ("crane, large ... bird")."""
    if not ids:
        return {}
    from timm.data.imagenet_info import ImageNetInfo  # seconds: only for folders that need it

    table: Any = ImageNetInfo("imagenet-22k")
    known = set(table.label_names())
    names = {one: table.label_name_to_description(one).split(",")[0].strip() for one in ids if one in known}
    counts = Counter(name.casefold() for name in names.values())
    return {
        one: name
        if counts[name.casefold()] == 1
        else f"{name}, {table.label_name_to_description(one, detailed=True).partition(': ')[2]}"
        for one, name in names.items()
    }


def _without_pictures(names: Sequence[str]) -> list[str]:
    return [f"no readable picture of {name}: the class is left out" for name in names]
