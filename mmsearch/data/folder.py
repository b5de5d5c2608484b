"""Pictures below a folder: recursive, sorted, each file once, whatever links and names are found.

Decisions:
- Order is by the bytes of the names, folder by folder, so that it is the same under every locale.
- A linked file or folder that the walk reaches anyway under its own name is listed there only; a second
  hard link, and a link that leads to a place already visited, are left out. Loops end for the same reason.
- Memory is bound by the names of one folder at a time, plus one small entry for every folder, and for
  every file that has several links or lies behind one.
- What cannot be listed or looked at is reported; it is for the builder not to take it for deleted.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmsearch.data.reading import skip_reason, stamp_of
from mmsearch.data.sniffing import PICTURE_EXTENSIONS
from mmsearch.data.texts import SIDECAR_EXTENSIONS, OnSkip, read_sidecars
from mmsearch.types import Skipped, SkipReason, Source

ALWAYS_LEFT_OUT = frozenset({"@eaDir", "node_modules", ".git", "System Volume Information", "$RECYCLE.BIN"})


@dataclass(frozen=True, slots=True)
class Rules:
    """Which names are walked: `exclude` globs match a name or a path below the folder ("*" also crosses "/")."""

    exclude: Sequence[str] = ()
    include_hidden: bool = False
    follow_symlinks: bool = True
    _pattern: re.Pattern[str] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.exclude:
            globs = (fnmatch.translate(glob.rstrip("/")) for glob in self.exclude)
            object.__setattr__(self, "_pattern", re.compile("|".join(globs)))

    def allow(self, name: str, relative: str) -> bool:
        """Whether a file or folder is walked; `relative` is its path below the root, with "/"."""
        if name in ALWAYS_LEFT_OUT or (name.startswith(".") and not self.include_hidden):
            return False
        return self._pattern is None or not (self._pattern.match(name) or self._pattern.match(relative))

    def allow_below(self, relative: str) -> bool:
        """Whether the walk comes to `relative`: every part of it is allowed."""
        parts = relative.split("/")
        return all(self.allow(part, "/".join(parts[: i + 1])) for i, part in enumerate(parts))


def is_picture_name(name: str) -> bool:
    """Whether the ending is one of a picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_EXTENSIONS


@dataclass(slots=True)
class Walk:
    """One pass over any number of folders; files and folders count as visited across all of them.

    `roots`: all folders of the pass, absolute; a link into one of them is listed where it leads.
    """

    rules: Rules
    on_skip: OnSkip
    roots: Sequence[str] = ()
    _visited: set[tuple[int, int]] = field(default_factory=set)
    _real_roots: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._real_roots = [os.path.realpath(root) for root in self.roots]

    def folder(self, root: str) -> Iterator[Source]:
        """The pictures below `root` (absolute), sorted."""
        if not self._enter(root):
            return
        stack = [self._entries(root, "", linked=False)]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
            elif isinstance(found, _Folder):
                stack.append(self._entries(root, found.relative, linked=found.linked))
            else:
                yield found

    def reaches(self, path: str) -> bool:
        """Whether walking the roots lists this file or folder (absolute, links resolved) under its own name."""
        for root in self._real_roots:
            if path != root and path.startswith(root.rstrip("/") + "/"):
                relative = path[len(root.rstrip("/")) + 1 :]
                if self.rules.allow_below(relative):
                    return True
        return path in self._real_roots

    def source(self, root: str, name: str, extensions: set[str], *, linked: bool = False) -> Source | None:
        """The file `name` below `root` as an item, None when it is none or was listed before.

        `extensions`: the endings of its side-cars. `linked`: it may have other names (its folder is a link).
        """
        path = os.path.join(root, name)
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not self.rules.follow_symlinks:
                    return None
                status = os.stat(path)
                if is_picture_name(real := os.path.realpath(path)) and self.reaches(real):
                    return None
                linked = True
            else:
                linked = linked or status.st_nlink > 1
        except OSError as error:
            self._failed(path, error)
            return None
        if not stat.S_ISREG(status.st_mode):
            self.on_skip(Skipped(path, SkipReason.NOT_A_FILE))
            return None
        if linked and not self._first_time(status):
            return None
        captions, metadata = read_sidecars(os.path.splitext(path)[0], extensions, self.on_skip)
        return Source(root, name, path, stamp_of(status), captions, metadata)

    def _entries(self, root: str, relative: str, *, linked: bool) -> Iterator[Source | _Folder]:
        """Pictures and folders directly in one folder, sorted by name."""
        names, folders, sidecars = self._list(root, relative)
        for name in sorted(names, key=os.fsencode):
            below = f"{relative}/{name}" if relative else name
            if name in folders:
                path = os.path.join(root, below)
                if self._enter(path):
                    yield _Folder(below, linked or os.path.islink(path))
                continue
            extensions = sidecars.get(os.path.splitext(name)[0], set())
            source = self.source(root, below, extensions, linked=linked)
            if source is not None:
                yield source

    def _list(self, root: str, relative: str) -> tuple[list[str], set[str], dict[str, set[str]]]:
        names: list[str] = []
        folders: set[str] = set()
        sidecars: dict[str, set[str]] = {}
        path = os.path.join(root, relative) if relative else root
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    below = f"{relative}/{name}" if relative else name
                    stem, extension = os.path.splitext(name)
                    if extension.lower() in SIDECAR_EXTENSIONS:
                        sidecars.setdefault(stem, set()).add(extension)
                    if not self.rules.allow(name, below):
                        continue
                    if self._is_folder(entry):
                        folders.add(name)
                        names.append(name)
                    elif extension.lower() in PICTURE_EXTENSIONS:
                        names.append(name)
        except OSError as error:
            self._failed(path, error)
        return names, folders, sidecars

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir(follow_symlinks=self.rules.follow_symlinks)
        except OSError:
            return False  # a loop of links; as a file it is reported if it has a picture's name

    def _enter(self, path: str) -> bool:
        """Whether a folder is to be walked now: not visited, and not reached later under its own name."""
        try:
            if os.path.islink(path) and path not in self.roots and self.reaches(os.path.realpath(path)):
                return False
            return self._first_time(os.stat(path))
        except OSError as error:
            self._failed(path, error)
            return False

    def _first_time(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        if identity in self._visited:
            return False
        self._visited.add(identity)
        return True

    def _failed(self, path: str, error: OSError) -> None:
        detail = error.strerror or str(error)
        if error.errno == errno.ENOENT and os.path.islink(path):
            detail = "a link that leads nowhere"
        self.on_skip(Skipped(path, skip_reason(error), detail))


@dataclass(frozen=True, slots=True)
class _Folder:
    relative: str
    linked: bool
