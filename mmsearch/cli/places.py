"""Where indexes are: the only reader of the environment.

`MMSEARCH_HOME` is the folder that holds indexes (default `indexes`, below the current folder);
`MMSEARCH_INDEX` is the index to use when none is named, or several of them, separated as in PATH. A value with `://`
is one address, whatever else is in it. Empty values count as unset.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmsearch.cli.library import Library
from mmsearch.cli.terminal import say
from mmsearch.errors import UsageError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")


def home() -> Path:
    """The folder that holds indexes."""
    return Path(os.environ.get("MMSEARCH_HOME") or "indexes")


def default_index(paths: Sequence[str]) -> Path:
    """Where an index of `paths` goes when nobody said: `indexes/photos` for `./photos` or `photos.csv`.

    Pictures that are named one by one go by the folder that holds them all, whichever comes first.
    """
    first = Path(os.path.abspath(paths[0]))  # not resolve(): a link keeps the name the user gave
    if first.is_dir() or not first.suffix:
        return home() / (first.name or "all")
    if first.suffix.lower() in TABLES:
        return home() / first.stem
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return home() / (os.path.basename(folder) or "all")


def chosen_index(named: str | None, library: Library) -> Path:
    """The one index directory to read; see `chosen_indexes`."""
    chosen = chosen_indexes([named] if named else [], library)
    if isinstance(chosen, Path):
        return chosen
    got = _shown(chosen) if isinstance(chosen, str) else f"{len(chosen)} of them"
    raise UsageError("index", expected="one index directory", got=got, do="Name one with --index.")


def chosen_indexes(named: Sequence[str] | None, library: Library) -> Path | str | list[Path]:
    """What to search: one directory, the address of an engine (a `str`, with `://`), or several directories as one.

    The named ones, else those of `$MMSEARCH_INDEX`, else the last one updated, saying which.
    """
    if named:
        return _together(named)
    if from_environment := os.environ.get("MMSEARCH_INDEX"):
        say(f"index: {_shown(from_environment)} (from MMSEARCH_INDEX)")
        parts = [from_environment] if "://" in from_environment else from_environment.split(os.pathsep)
        return _together([part for part in parts if part] or [from_environment])
    found = library.find_index(home())
    say(f"index: {found} (the last one updated under {home()}; --index names another)")
    return found


def _shown(name: str) -> str:
    """A place as messages have it: an address without its password."""
    if "://" not in name:
        return name
    from mmsearch.scale.address import Address

    return Address.parse(name).shown


def _together(names: Sequence[str]) -> Path | str | list[Path]:
    addresses = [name for name in names if "://" in name]
    if addresses and len(names) > 1:
        got = ", ".join(map(_shown, names))
        raise UsageError("index", expected="one address, or directories", got=got, do="Search an engine by itself.")
    if addresses:
        return addresses[0]
    return Path(names[0]) if len(names) == 1 else [Path(name) for name in names]
