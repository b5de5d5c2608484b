"""What a searcher searches: which directories a path names, an index that is open, and its newest generation.

A folder that `split` made says in `shards.json` which indexes are in it, and its path names them all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmsearch.errors import IndexDamagedError, IndexMismatchError, UsageError
from mmsearch.store.directory import IndexStore
from mmsearch.types import ModelIdentity, Preprocessing
from mmsearch.view import View

SHARDS_NAME = "shards.json"
_SIZE_LIMIT = 1 << 20


class Described(Protocol):
    """An index as far as two of them can be told to belong together."""

    @property
    def path(self) -> str:
        """What messages call it."""
        ...

    @property
    def model(self) -> ModelIdentity:
        """Whose vectors these are."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was made with; `model` is what to load."""
        ...


class Opened(Described, Protocol):
    """An open index, or several as one: `OneIndex`, `shards.Shards`."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How its pictures were prepared."""
        ...

    def view(self, old: View | None = None) -> View:
        """The newest generation; `old` where that is what it shows. Raises `IndexMismatchError` for another model."""
        ...

    def info(self) -> dict[str, Any]:
        """What is in it: JSON values, sizes in bytes."""
        ...

    def close(self) -> None:
        """Let go; views that are still used close with their last search."""
        ...


class OneIndex:
    """One index directory."""

    def __init__(self, store: IndexStore) -> None:
        self._store, self.path, self.model = store, store.path, store.model
        self.preprocessing, self.settings = store.preprocessing, store.settings

    def view(self, old: View | None = None) -> View:
        """See `Opened.view`."""
        fresh = self._store.snapshot()
        try:
            check_same_space(fresh.model, self.model, where=self.path)
        except BaseException:
            fresh.close()
            raise
        if old is not None and fresh.generation == old.snapshot.generation:
            fresh.close()
            return old
        return View(fresh, path=self.path)

    def info(self) -> dict[str, Any]:
        """See `Opened.info`."""
        return self._store.info()

    def close(self) -> None:
        """See `Opened.close`."""
        self._store.close()


ASKED = "Ask with its own model, or give it that one: mmsearch reindex (mmsearch bridge until that is done)."
TOGETHER = "Give all of them one model first: mmsearch reindex."


def check_same_space(of_index: ModelIdentity, got: ModelIdentity, *, where: str, do: str = ASKED) -> None:
    """Raise `IndexMismatchError`, naming both models, unless rows of the two can be compared."""
    if not of_index.same_space(got):
        raise IndexMismatchError(
            where,
            expected=f"model {of_index.name} (weights {of_index.weights[:12]}, d = {of_index.dim})",
            got=f"{got.name} (weights {got.weights[:12]}, d = {got.dim})",
            do=do,
        )


def check_alike(first: Described, other: Described, *, to_be: str, model: str, items: str) -> None:
    """Raise `IndexMismatchError` unless rows of the two can be compared, and stand for the same kind of thing.

    `to_be`: what was to be done with the other and the first ("searched together with"). What to do instead: `model`
    where models differ, `items` where the kinds of item vectors do.
    """
    check_same_space(first.model, other.model, where=f"{other.path}, {to_be} {first.path}", do=model)
    check_same_kind(first.settings, other.settings, where=other.path, whose=f", as {first.path} has them", do=items)


def check_same_kind(
    of_index: Mapping[str, Any], got: Mapping[str, Any], *, where: str, do: str, whose: str = ""
) -> None:
    """Raise `IndexMismatchError` unless rows made with these settings stand for the same: both apart, or both fused.

    `whose`: what the message adds to the kind that is expected.
    """
    kinds = [str(settings.get("item_vectors", "separate")) for settings in (of_index, got)]
    if kinds[0] != kinds[1]:
        raise IndexMismatchError(where, expected=f"{kinds[0]} item vectors{whose}", got=kinds[1], do=do)


def directories(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The index directories that these paths name: themselves, or the shards of a folder that `split` made.

    Of several paths the list of shards itself, as a shell's `parts/*` names it, is passed over. Raises
    `IndexDamagedError` for a folder whose list of shards cannot be read.
    """
    given = [os.fspath(path) for path in paths]
    named = [path for path in given if len(given) == 1 or os.path.basename(path) != SHARDS_NAME]
    return [one for path in named for one in shards_of(path) or [path]]


def refuse_shards(path: str) -> None:
    """Raise `UsageError` for a folder that `split` made, where one index is worked on."""
    if shards := shards_of(path):
        raise UsageError(
            path, expected="one index", got=f"a folder of {len(shards)} shards",
            do=f"Name each shard by itself, such as {shards[0]}; 'mmsearch merge' makes one index of them.",
        )  # fmt: skip


def shards_of(folder: str) -> list[str]:
    """The shards of a folder that `split` made, whether or not they are there; [] for another folder."""
    listing = Path(folder, SHARDS_NAME)
    try:
        with open(listing, "rb") as file:
            names = json.loads(file.read(_SIZE_LIMIT))["shards"]
        if not names or not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
            raise ValueError("no names of folders")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IndexDamagedError(
            str(listing), expected="a list of shards", got=str(error)[:200], do="Name each shard with its own --index."
        ) from error
    return [os.path.join(folder, name) for name in names]
