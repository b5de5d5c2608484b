"""A data set as a folder, the ways the `datasets` library and its hub lay it out.

    dataset_dict.json, train/..., test/...            save_to_disk of several splits
    state.json, data-00000-of-00001.arrow             save_to_disk of one split
    data/train-00000-of-00002.parquet, ...            Parquet shards, also in the folder itself or a folder a split
    metadata.csv (or .jsonl, .parquet), pictures      a folder of pictures with a table, also one a split

Decisions:
- The name of a split is that of the saved split, else that of the file or its folder; a row's own comes before it.
- Files are listed by what is in the folder; a name in state.json is used only if it is a plain name in it.
- Parquet files beside pictures are not taken for the data set: the pictures may have side-cars. For the same reason a
  table in a sub-folder counts only where it or its folder is named as a split is, and a state.json without Arrow files
  beside it only where it lists some.
- A file that cannot be read is an error, not a skipped part: what is missing would be noticed by nobody.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from mmsearch.data.folder import is_picture_name
from mmsearch.data.reading import listed, read_file
from mmsearch.data.records import Record
from mmsearch.data.splits import split_in
from mmsearch.data.table import read_csv, read_jsonl
from mmsearch.data.texts import OnSkip, parse_json
from mmsearch.errors import ImageError, InputError, MissingExtraError

_Read: TypeAlias = Callable[..., Iterator[Record]]

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of the data set, and the split it belongs to."""

    path: str
    split: str | None


def is_dataset(folder: str) -> bool:
    """Whether a folder is laid out in one of these ways; `InputError` when it cannot be listed."""
    return bool(_parts(folder, strict=False))


def read_hf_dataset(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """The rows of all files of the data set, split after split.

    Raises `InputError` when the folder is laid out otherwise, or it or a split in it cannot be listed.
    """
    parts = _parts(path, strict=True)
    if not parts:
        expected = "a saved data set (dataset_dict.json or state.json), Parquet shards, or metadata.csv"
        raise InputError(path, expected=expected, got="none of them", do="Name the folder that holds them.")
    for part in parts:
        below = os.path.relpath(os.path.dirname(part.path), path)
        for record in _reader(part.path)(part.path, on_skip=on_skip):
            inside = record.place is not None or record.image is None or os.path.isabs(record.image)
            image = record.image if inside or below == "." else f"{below}/{record.image}"
            yield replace(record, image=image, split=record.split or part.split)


def _parts(folder: str, *, strict: bool) -> list[_Part]:
    """The files with rows, in the order to read them.

    `strict`: raise `InputError` for descriptions that are broken and splits that cannot be listed.
    """
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = _plain_names(folder, "dataset_dict.json", "splits") if strict else ["?"]
        return [part for name in names for part in _saved(os.path.join(folder, name), name, strict=strict)]
    if _is_saved(folder):
        return _saved(folder, None, strict=strict)
    for entry in listed(folder) if strict else ():
        if split_in(entry.name) and os.path.isdir(entry.path):
            next(listed(entry.path), None)  # glob passes over what it cannot list
    found = _matching(folder, [f"{place}{name}" for place in ("", "*/") for name in _METADATA])
    if not found and not any(is_picture_name(entry.name) for entry in listed(folder)):
        found = _matching(folder, [f"{place}*.parquet" for place in ("", "data/", "*/")])
    return [_Part(os.path.join(folder, name), split_in(name)) for name in found]


def _is_saved(folder: str) -> bool:
    """Whether state.json describes a saved split, and is not the side-car of a state.jpg or some program's own."""
    if not os.path.isfile(os.path.join(folder, "state.json")):
        return False
    if glob.glob("*.arrow", root_dir=folder):
        return True
    try:
        return "_data_files" in _json(folder, "state.json")
    except InputError:
        return False


def _saved(folder: str, split: str | None, *, strict: bool) -> list[_Part]:
    """The Arrow files of one saved split."""
    if not strict:
        return [_Part(folder, split)]
    names = _plain_names(folder, "state.json", "_data_files")
    stated = _json(folder, "state.json").get("_split")
    chosen = split or (stated if isinstance(stated, str) else None)
    return [_Part(os.path.join(folder, name), chosen) for name in names]


def _plain_names(folder: str, file: str, key: str) -> list[str]:
    """The list of names under `key`, each as it is or as {"filename"}; `InputError` for what leads elsewhere."""
    listed = _json(folder, file).get(key)
    names = (
        [one.get("filename") if isinstance(one, dict) else one for one in listed] if isinstance(listed, list) else []
    )
    plain = [
        name for name in names if isinstance(name, str) and name == os.path.basename(name) and name not in ("", "..")
    ]
    if not plain or len(plain) < len(names):
        got = str(listed)[:80]
        raise InputError(os.path.join(folder, file), expected=f"plain file names under {key}", got=got)
    return plain


def _json(folder: str, file: str) -> dict[str, object]:
    path = os.path.join(folder, file)
    try:
        document = parse_json(read_file(path, max_bytes=_MAX_JSON_BYTES)[0])
    except (ImageError, ValueError) as error:
        got = f"{error.reason} {error.detail}".strip() if isinstance(error, ImageError) else str(error)
        raise InputError(path, expected="a JSON object", got=got, do="Copy the data set again.") from None
    if not isinstance(document, dict):
        raise InputError(path, expected="a JSON object", got=type(document).__name__)
    return document


def _matching(folder: str, patterns: Sequence[str]) -> list[str]:
    """Paths below `folder`, those of the first pattern first, each once; of any sub-folder, those that name a split."""
    found = [sorted(glob.glob(pattern, root_dir=folder), key=os.fsencode) for pattern in patterns]
    named = ((pattern, name) for pattern, names in zip(patterns, found, strict=True) for name in names)
    return list(dict.fromkeys(name for pattern, name in named if not pattern.startswith("*/") or split_in(name)))


def _reader(path: str) -> _Read:
    ending = os.path.splitext(path)[1].lower()
    if ending == ".csv":
        return read_csv
    if ending == ".jsonl":
        return read_jsonl
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError(path, package="pyarrow", extra="parquet")
    if ending == ".parquet":
        from mmsearch.data.parquet import read_parquet

        return read_parquet
    from mmsearch.data.arrow import read_arrow

    return read_arrow
