"""A data set as a folder, the ways the `datasets` library and its hub lay it out.

    dataset_dict.json, train/..., test/...            save_to_disk of several splits
    state.json, data-00000-of-00001.arrow             save_to_disk of one split
    data/train-00000-of-00002.parquet, ...            Parquet shards, also in the folder itself or a folder a split
    metadata.csv (or .jsonl, .parquet), pictures      a folder of pictures with a table, also one a split

Decisions:
- The name of a split is that of the saved split, else that of the file or its folder; a row's own comes before it.
- Files are listed by what is in the folder; a name in state.json is used only if it is a plain name in it.
- Parquet files beside pictures are not taken for the data set: the pictures may have side-cars.
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
from mmsearch.data.reading import read_file
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
    """Whether a folder is laid out in one of these ways; looks at names only."""
    return bool(_parts(folder, strict=False))


def read_hf_dataset(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """The rows of all files of the data set, split after split; `InputError` when the folder is laid out otherwise."""
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
    """The files with rows, in the order to read them. `strict`: raise `InputError` for descriptions that are broken."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = _plain_names(folder, "dataset_dict.json", "splits") if strict else ["?"]
        return [part for name in names for part in _saved(os.path.join(folder, name), name, strict=strict)]
    if os.path.isfile(os.path.join(folder, "state.json")):
        return _saved(folder, None, strict=strict)
    found = _matching(folder, [f"{place}{name}" for place in ("", "*/") for name in _METADATA])
    if not found and not any(is_picture_name(name) for name in os.listdir(folder)):
        found = _matching(folder, [f"{place}*.parquet" for place in ("", "data/", "*/")])
    return [_Part(os.path.join(folder, name), split_in(name)) for name in found]


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
    """Paths below `folder`, those of the first pattern first, each once."""
    found = [sorted(glob.glob(pattern, root_dir=folder), key=os.fsencode) for pattern in patterns]
    return list(dict.fromkeys(name for names in found for name in names))


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
