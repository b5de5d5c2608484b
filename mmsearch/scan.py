"""What a build was asked to look at: all pictures and rows of it, and what can be told to be gone.

Decisions:
- Everything that is a file of its own, local or remote, is known by its path alone (root ""), whatever folder named it.
- A folder, table or bucket that shows nothing looks like an unmounted disk: what is indexed of it is not gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mmsearch.data.collection import is_table, read_collection
from mmsearch.data.formats import sniff
from mmsearch.data.reading import stamp_of
from mmsearch.data.remote import check_scheme, is_uri, list_pictures, local_path
from mmsearch.errors import InputError
from mmsearch.types import Skipped, SkipReason, Source

FILES = ""
"""The store's root of everything that is a file of its own (a picture), whatever folder it lies in."""


class Scan:
    """What the user named, made absolute, and what of it can be told to be gone."""

    def __init__(
        self, given: Sequence[str | os.PathLike[str] | Source], *, exclude: Sequence[str], include_hidden: bool
    ) -> None:
        self._ready = [entry for entry in given if isinstance(entry, Source)]
        named = [local_path(os.fspath(p)) for p in given if not isinstance(p, Source)]
        self.uris = [_checked_uri(name) for name in named if is_uri(name)]
        paths = [os.path.abspath(_checked_scheme(name)) for name in named if not is_uri(name)]
        self._exclude, self._include_hidden = tuple(exclude), include_hidden
        self.absent = {p for p in paths if not os.path.lexists(p)}
        self._present = [p for p in paths if p not in self.absent]
        self._named = [*paths, *self.uris]
        self._is_folder = frozenset(p for p in self._present if os.path.isdir(p))
        self.folders = [*(p for p in self._present if p in self._is_folder), *self.uris]
        self.skipped = [Skipped(p, SkipReason.VANISHED, "no such path") for p in sorted(self.absent)]
        self.tables: set[str] = set()
        self._full: set[str] = set()

    def check(self, *, prune: bool) -> None:
        """Raise `InputError` when there is nothing to look at; some absent paths among others are only skipped."""
        if not self._ready and not self._named:
            raise InputError("index", expected="a folder, a picture, or a table", got="nothing")
        if self._named and not (self._present or self.uris or self._ready or prune):
            raise InputError(
                self.names(), expected="a folder, a picture, or a table", got="no such path",
                do="What is indexed of it stays; --prune drops it.",
            )  # fmt: skip

    def names(self) -> str:
        """What the user named, for messages; the first few of many."""
        shown = ", ".join(self._named[:3])
        return (shown + f" and {len(self._named) - 3} more" * (len(self._named) > 3)) or "the sources"

    def sources(self) -> Iterator[Source]:
        """Everything found, pictures under their absolute path; streams.

        Tables come first: a picture that a table names is that row's item, not another one of its folder.
        """
        for source in self._ready:
            self.tables.add(source.root)
            yield _stamped(source)
        tables = [p for p in self._present if p not in self._is_folder and is_table(p)]
        tabled: set[int] = set()
        looked_at: set[str] = set()
        for source in self._read_tables(tables):
            self.tables.add(source.root)
            if source.path is not None and self.folders:
                tabled.add(hash(source.path))
            yield source
        read = set(tables)
        for source in self._read([p for p in self._present if p not in read]):
            path = str(source.path)
            if (parent := os.path.dirname(path)) not in looked_at:
                looked_at.add(parent)
                self._full.update(folder for folder in self.folders if is_below(parent, folder))
            if hash(path) not in tabled:
                yield replace(source, root=FILES, name=path)
        for uri in self.uris:
            for source in self._read_uri(uri):
                self._full.add(uri)
                if hash(source.path) not in tabled:
                    yield source

    def _read_tables(self, tables: list[str]) -> Iterator[Source]:
        """Rows of all tables; among other paths, a file that turns out to be no table costs itself only."""
        for table in tables:
            try:
                yield from self._read([table])
            except InputError as error:
                if len(self._named) == 1:
                    raise
                self.skipped.append(Skipped(table, SkipReason.BAD_ROW, f"no table: {error.got}"))

    def _read(self, paths: list[str]) -> Iterator[Source]:
        if not paths:
            return iter(())
        return read_collection(
            paths, exclude=self._exclude, include_hidden=self._include_hidden, on_skip=self.skipped.append
        )

    def _read_uri(self, uri: str) -> Iterator[Source]:
        return list_pictures(
            uri, exclude=self._exclude, include_hidden=self._include_hidden, on_skip=self.skipped.append
        )

    def emptied(self) -> list[str]:
        """Folders and tables that were named and hold nothing any more (call after the scan)."""
        known = self._is_folder | self.tables | {s.path for s in self.skipped}
        tables = (p for p in self._present if p not in known and is_table(p))
        return [*(f for f in self.folders if f not in self._full), *tables, *sorted(self.absent)]

    def gone(self, *, prune: bool) -> Callable[[str | None, str], bool]:
        """Whether an item of (path, root) that the scan did not find is to be dropped (call after the scan).

        Kept, unless `prune`: what lies in a folder or table that is empty or absent, and rows whose picture
        could not be found. Kept in any case: what lies below something that could not be read.
        """
        emptied = self.emptied()
        unreadable = [s.path for s in self.skipped if s.reason is SkipReason.UNREADABLE]
        lost = {s.path for s in self.skipped if s.reason is SkipReason.VANISHED}
        roots = self.tables | (set(emptied) if prune else set())
        folders = [*self.folders, *(self.absent if prune else ())]

        def is_gone(path: str | None, root: str) -> bool:
            if path is not None and any(is_below(path, u) for u in unreadable):
                return False
            if not prune and path is not None and (path in lost or any(is_below(path, e) for e in emptied)):
                return False
            if root != FILES:
                return root in roots
            return path is not None and any(is_below(path, folder) for folder in folders)

        return is_gone


def _checked_scheme(path: str) -> str:
    check_scheme(path)
    return path


def _checked_uri(uri: str) -> str:
    """Without a slash at its end; `InputError` for one that names a table."""
    if sniff(uri) is not None:
        raise InputError(uri, expected="a folder or a picture", got="a table", do="Name a local copy of it.")
    return uri.rstrip("/")


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it (by name; both absolute)."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _stamped(source: Source) -> Source:
    """With the stamp of its file, if nobody gave one: without it the picture would be read at each build."""
    if source.path is None or source.stamp is not None:
        return source
    try:
        return replace(source, stamp=stamp_of(os.stat(source.path)))
    except OSError:
        return source  # reading it will say why
