"""manifest.json: what an index directory holds, readable without SQLite. Written last, never trusted blindly.

Decisions:
- It mirrors items.sqlite, which is the truth. A manifest that lags (killed before it was written) is
  normal; one that is ahead means that files of different generations were mixed, and is refused.
- It carries a checksum of itself: of its JSON without the field `check`, keys sorted, no spaces.
- The format version is looked at before the checksum, so that a newer program's file is named as such.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from mmsearch import __version__
from mmsearch.errors import IndexDamagedError, IndexMismatchError
from mmsearch.store.base import Derived
from mmsearch.store.disk import REBUILD, Disk
from mmsearch.types import Modality, ModelIdentity, Preprocessing

FORMAT = 1
MANIFEST_NAME = "manifest.json"
DERIVED_FOLDER = "faiss"
_SIZE_LIMIT = 1 << 20
REWRITE = "Run 'mmsearch index' on this index again: it writes the manifest anew from items.sqlite."


def made_by() -> str:
    """This program and its version, as indexes record it."""
    return f"mmsearch {__version__}"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size in bytes and the hex xxh3_64 of its content; "" when it could not be taken."""

    file: str
    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """See indexes/README.md for every field."""

    generation: int
    model: ModelIdentity
    preprocessing: Preprocessing
    settings: Mapping[str, Any]
    created_at: str
    updated_at: str
    vectors: FileRecord
    rows: int
    items: FileRecord
    counts: Mapping[str, int]
    derived: Mapping[str, Derived] = field(default_factory=dict)
    made_by: str = ""
    format: int = FORMAT


def checksum(fields: Mapping[str, Any]) -> str:
    """Hex xxh3_64 of the JSON of `fields` without `check`."""
    rest = {key: value for key, value in fields.items() if key != "check"}
    return str(xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()))


def refuse_newer(found: int, made: str, where: str) -> None:
    """Raise `IndexMismatchError` when format `found` is newer than this program knows."""
    if found > FORMAT:
        raise IndexMismatchError(
            where,
            expected=f"format {FORMAT} or older",
            got=f"format {found}, made by {made or 'a newer mmsearch'}; you have {made_by()}",
            do="Update mmsearch, or build the index anew with this version.",
        )


def refuse_mixed(manifest: Manifest | None, generation: int, items_path: str) -> None:
    """Raise `IndexDamagedError` when the manifest is ahead of the database: it was restored from a copy."""
    if manifest is not None and manifest.generation > generation:
        raise IndexDamagedError(
            items_path,
            expected=f"generation {manifest.generation} or later ({MANIFEST_NAME})",
            got=f"generation {generation}: files of different times were mixed",
            do=REBUILD,
        )


def write_manifest(folder: str, manifest: Manifest, disk: Disk) -> None:
    """Put the manifest in place durably."""
    fields = asdict(manifest)
    fields["made_by"] = made_by()
    fields["check"] = checksum(fields)
    text = json.dumps(fields, indent=1, sort_keys=True) + "\n"
    disk.put(os.path.join(folder, MANIFEST_NAME), [text.encode()])


def read_manifest(folder: str) -> Manifest | None:
    """The manifest, or None where there is none. Raises `IndexDamagedError` or `IndexMismatchError`."""
    path = os.path.join(folder, MANIFEST_NAME)
    try:
        with open(path, "rb") as file:
            text = file.read(_SIZE_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, f"unreadable ({error.strerror})") from error
    if len(text) > _SIZE_LIMIT:
        raise _damaged(path, f"more than {_SIZE_LIMIT:,} bytes")
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError("not an object")
        refuse_newer(int(fields["format"]), str(fields.get("made_by", "")), path)
        if fields.pop("check", None) != checksum(fields):
            raise _damaged(path, "a wrong checksum")
        return _from_json(fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"not a manifest ({error})") from error


def _from_json(fields: dict[str, Any]) -> Manifest:
    derived = {
        name: Derived(**{**entry, "modality": Modality(entry["modality"])}) for name, entry in fields["derived"].items()
    }
    for entry in derived.values():  # a path is followed only into the one folder that holds such files
        if os.path.dirname(entry.file) != DERIVED_FOLDER or os.path.basename(entry.file) in ("", ".", ".."):
            raise ValueError(f"a derived file at {entry.file!r}")
        if not isinstance(entry.facts, dict):
            raise ValueError(f"facts of a derived file that are {entry.facts!r}")
    shaped = {
        **fields,
        "model": ModelIdentity(**fields["model"]),
        "preprocessing": preprocessing_from(fields["preprocessing"]),
        "vectors": FileRecord(**fields["vectors"]),
        "items": FileRecord(**fields["items"]),
        "derived": derived,
    }
    return Manifest(**shaped)


def preprocessing_from(fields: Mapping[str, Any]) -> Preprocessing:
    """`Preprocessing` of its JSON (lists become tuples)."""
    shaped: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    return Preprocessing(**shaped)


def _damaged(path: str, got: str) -> IndexDamagedError:
    return IndexDamagedError(path, expected="an intact manifest", got=got, do=REWRITE)
