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


def home() -> Path:
    """The folder that holds indexes."""
    return Path(os.environ.get("MMSEARCH_HOME") or "indexes")


def default_index(paths: Sequence[str]) -> Path:
    """Where an index of `paths` goes when nobody said: `indexes/photos` for `./photos` or `photos.csv`."""
    first = Path(os.path.abspath(paths[0]))  # not resolve(): a link keeps the name the user gave
    name = first.name if first.is_dir() or not first.suffix else first.stem
    return home() / (name or "all")


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
