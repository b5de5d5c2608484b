"""Where indexes are: the only reader of the environment.

`MMSEARCH_HOME` is the folder that holds indexes (default `indexes`, below the current folder);
`MMSEARCH_INDEX` is the index to use when none is named. Empty values count as unset.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmsearch.cli.library import Library
from mmsearch.cli.terminal import say

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
    """The index to read: the named one, else `$MMSEARCH_INDEX`, else the last one updated, saying which."""
    if named:
        return Path(named)
    if from_environment := os.environ.get("MMSEARCH_INDEX"):
        say(f"index: {from_environment} (from MMSEARCH_INDEX)")
        return Path(from_environment)
    found = library.find_index(home())
    say(f"index: {found} (the last one updated under {home()}; --index names another)")
    return found
