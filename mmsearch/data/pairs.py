"""Pictures with their captions, for training and evaluation: a table, a captions file, a folder with side-cars, or a
data set of many files.

Decisions:
- A picture whose rows name different splits is one pair in each: its captions of one split never come with another.
- In a folder with side-cars a split is what a side-car says, else what a folder on the way to the picture is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from mmsearch.data import formats
from mmsearch.data.folder import Rules, Walk
from mmsearch.data.records import joined, locate
from mmsearch.data.splits import canonical_split, split_of_folder
from mmsearch.data.texts import OnSkip
from mmsearch.errors import InputError
from mmsearch.types import Pair, Skipped, SkipReason

_OTHER_SPLIT = "Name another split, or none. What a run held out is in its folder: OUT/held_out.jsonl."


def read_pairs(
    path: str, *, split: str | None = None, on_skip: OnSkip, format: str | None = None, tell_bare: bool = True
) -> Iterator[Pair]:
    """Pairs in the order of the file; several rows of one picture are one pair.

    `path` may also be a pattern of WebDataset shards ("shards/{000..127}.tar"). The picture of a pair is a path, or the
    address of one inside a file (`data.packed`).
    `split`: only pairs of this split ("train", "val" or "test"; "dev" and "validation" mean "val").
    A pair's group is its picture's path, or what the column `group` says. Pictures that are not there and
    rows without a caption are reported to `on_skip`, and so are pictures of a folder without one if `tell_bare`.
    Raises `InputError` when there is no such path or no pair of that split.
    """
    absolute = os.path.abspath(path)
    if os.path.isdir(absolute):
        kind = format or formats.sniff_folder(absolute)
        pairs = _from_folder(absolute, on_skip, tell_bare) if kind is None else _from_table(absolute, kind, on_skip)
    elif os.path.lexists(absolute) or formats.is_pattern(absolute):
        table = format or formats.sniff(absolute)
        if table is None:
            expected = f"a folder or a table ({', '.join(formats.names())})"
            raise InputError(
                path, expected=expected, got=os.path.basename(path), do="Give it the ending of its format."
            )
        pairs = _from_table(absolute, table, on_skip)
    else:
        raise InputError(path, expected="a folder or a table", got="no such path", do="Check the path.")
    return pairs if split is None else _of_split(pairs, split, path)


def _from_folder(path: str, on_skip: OnSkip, tell_bare: bool) -> Iterator[Pair]:
    for source in Walk(Rules(), on_skip, [path]).folder(path):
        if source.path is None:
            continue
        if not source.captions:
            if tell_bare:
                on_skip(Skipped(source.path, SkipReason.BAD_ROW, "no caption beside it"))
            continue
        group, split = source.metadata.get("group"), source.metadata.get("split")
        yield Pair(
            source.path,
            source.captions,
            group=group if isinstance(group, str) else source.path,
            split=canonical_split(split) if isinstance(split, str) else split_of_folder(source.name),
        )


def _from_table(path: str, format: str, on_skip: OnSkip) -> Iterator[Pair]:
    records, finder = formats.open_table(path, format=format, on_skip=on_skip)
    for record in joined(records, by_split=True):
        if record.image is None or not record.captions:
            missing = "caption" if record.image else "picture"
            on_skip(Skipped(f"{path}:{record.line}", SkipReason.BAD_ROW, f"no {missing}"))
        elif (found := locate(path, record, finder=finder, on_skip=on_skip)) is not None:
            yield Pair(
                found[0],
                record.captions,
                group=record.group or found[0],
                split=canonical_split(record.split) if record.split else None,
            )


def _of_split(pairs: Iterator[Pair], split: str, path: str) -> Iterator[Pair]:
    wanted, seen, count = canonical_split(split), set(), 0
    for pair in pairs:
        seen.add(pair.split)
        if pair.split == wanted:
            count += 1
            yield pair
    if not count:
        got = ", ".join(sorted(name or "pairs that name none" for name in seen)) or "no pairs at all"
        raise InputError(path, expected=f"pairs of split {split}", got=got, do=_OTHER_SPLIT)
