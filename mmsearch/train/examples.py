"""What a run trains on and what it is measured on: pairs of all sources, split by group, checked before any work.

Decisions:
- Only whole groups are held out, and always the same ones: a group's place is decided by a hash of its name below its
  source and the seed. Rows that are added or sorted differently move no other group to the other side.
- A group named by a table means something in that table only: "7" in two tables is not one thing.
- Rows of other splits ("test") are left alone, so that a later evaluation on them is honest; a picture or a group of
  theirs among the training rows is an error.
- A table among several that is called as a split is ("val.csv") is that split, unless its rows say something else.
- A picture that several tables list is held out of all of them. Rows that name no split follow those that do: their
  picture is trained on where another table says train, measured on where it says val, and left alone else.
- What would make the numbers lie (a leak, one caption for everything) is an error; what makes them coarse is a warning.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import xxhash

from mmsearch.data.pairs import read_pairs
from mmsearch.data.splits import canonical_split, split_of_file
from mmsearch.errors import InputError, UsageError
from mmsearch.types import Pair, Skipped

MOST_HELD_OUT = 5000
"""Groups that are held out at most: hit@k over so many has an interval of 1.4 points, and more only costs time."""

_FEW_HELD_OUT = 30
_SAME_TEXTS = 0.1


@dataclass(frozen=True, slots=True)
class DataSource:
    """One path to train on, in any format of `data.pairs.read_pairs`.

    `repeat`: how often each of its pictures comes in an epoch. `split`, `val_split`: what to train on and what to
    measure on, where its rows name a split; rows without a name count as training rows.
    """

    path: str
    repeat: int = 1
    split: str = "train"
    val_split: str = "val"


@dataclass(frozen=True, slots=True)
class Examples:
    """`repeats[i]`: how often `train[i]` comes in an epoch. No group and no picture is in both `train` and `val`.

    `origins[i]`: the number of the source that `train[i]` is from.
    """

    train: tuple[Pair, ...]
    repeats: tuple[int, ...]
    val: tuple[Pair, ...]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    origins: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Member:
    """A pair of source `origin` on its way: `key` places its group, in [0, 2**64), one for all pairs of the group."""

    pair: Pair
    repeat: int
    key: int
    origin: int


@dataclass(frozen=True, slots=True)
class _Read:
    """What one source holds: to train on, to measure on, and what is of neither split."""

    train: list[_Member]
    val: list[Pair]
    others: list[Pair]


def read_examples(
    sources: Sequence[DataSource], *, val_share: float = 0.1, seed: int = 0, limit: int | None = None
) -> Examples:
    """Read all sources, hold out what has to be, and check that training on the rest can mean something.

    A source whose rows name `val_split` is split as it says; of any other, `val_share` of the groups are held out
    (at least one, at most `MOST_HELD_OUT`, never so many that fewer than two are left; 0 holds out none), unless there
    is a source with nothing but such rows: then that is what is measured on.
    `limit`: train on so many pairs only, whole groups as long as they fit, chosen by `seed`; a share that is held out
    is then a share of that many.

    Raises `InputError` where there is nothing to train on, nothing to contrast (one group, one caption for all), or
    where a group or a picture would be both trained on and measured on; `UsageError` for numbers that cannot be.
    """
    _check_numbers(sources, val_share=val_share, limit=limit)
    skipped: list[Skipped] = []
    read = [
        _read_source(source, number, seed=seed, skipped=skipped, alone=len(sources) == 1)
        for number, source in enumerate(sources)
    ]
    if not any(one.train for one in read):
        where = ", ".join(source.path for source in sources)
        raise InputError(where, expected="pairs to train on", got="only val", do="Name a table of them as well.")
    share = 0.0 if any(one.val and not one.train for one in read) else val_share
    others = [pair for one in read for pair in one.others]
    train, val, left_alone = _divided(read, others, share=share, limit=limit)
    train = _limited(train, limit)
    pairs = [member.pair for member in train]
    _check_contrast(pairs, where=", ".join(source.path for source in sources))
    _check_leak(pairs, val, what="to measure on")
    _check_leak(pairs, others, what="in another split")
    warnings = (*_about_skipped(skipped), *_about_left_alone(left_alone), *_about_texts(pairs, val), *_about_val(val))
    repeats, origins = (member.repeat for member in train), (member.origin for member in train)
    return Examples(tuple(pairs), tuple(repeats), tuple(val), tuple(skipped), warnings, tuple(origins))


def _check_numbers(sources: Sequence[DataSource], *, val_share: float, limit: int | None) -> None:
    if not sources:
        raise UsageError("sources", expected="at least one", got="none", do="Name a table or a folder.")
    if not 0.0 <= val_share < 1.0:
        raise UsageError("val_share", expected="0 or more and less than 1", got=str(val_share))
    if limit is not None and limit < 1:
        raise UsageError("limit", expected="1 or more", got=str(limit))
    for source in sources:
        if source.repeat < 1:
            raise UsageError(f"repeat of {source.path}", expected="1 or more", got=str(source.repeat))


def _read_source(source: DataSource, number: int, *, seed: int, skipped: list[Skipped], alone: bool) -> _Read:
    """What a source says to train on, and what it says to measure on (nothing where both splits are the same)."""
    wanted, measured = canonical_split(source.split), canonical_split(source.val_split)
    base, seen = os.path.abspath(source.path), set()
    usual = None if alone else split_of_file(base)
    found = _Read([], [], [])
    for pair in read_pairs(source.path, on_skip=skipped.append):
        split = pair.split or usual
        seen.add(split or "none")
        named = pair if pair.group == pair.image else replace(pair, group=f"{base}#{pair.group}")
        if split in (wanted, None):
            key = _key(named.group, base=base, seed=seed)
            found.train.append(_Member(replace(named, split=split), source.repeat, key, number))
        elif split == measured:
            found.val.append(named)
        else:
            found.others.append(named)
    if not found.train and (alone or not found.val):
        first = f", the first skipped: {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        got = f"only {', '.join(sorted(seen))}" if seen else f"no pairs at all{first}"
        if usual is not None and seen == {usual}:
            got += ", as the file is called"
        raise InputError(
            source.path, expected=f"pairs of split {source.split}", got=got, do="Name another split, or another path."
        )
    return found


def _key(group: str, *, base: str, seed: int) -> int:
    below = group.removeprefix(base).removeprefix(os.path.dirname(base))  # a data set that moved is split as before
    return int(xxhash.xxh3_64_intdigest(below.encode("utf-8", "surrogateescape"), seed=seed & (2**64 - 1)))


def _hold_out(
    members: list[_Member], *, share: float, limit: int | None, fixed: Sequence[Pair]
) -> tuple[list[_Member], list[Pair]]:
    """(train, val): the groups with the smallest keys are held out; none that has a picture of `fixed`."""
    images = {pair.image for pair in fixed}
    bound = {member.pair.group for member in members if member.pair.image in images}
    groups = {member.pair.group: member.key for member in members if member.pair.group not in bound}
    of_all = min(len(groups), limit or len(groups))
    count = min(max(1, round(share * of_all)), MOST_HELD_OUT, len(groups) - 2) if share else 0
    if count < 1:
        return members, []
    chosen = set(sorted(groups, key=lambda group: (groups[group], group))[:count])
    return (
        [member for member in members if member.pair.group not in chosen],
        [member.pair for member in members if member.pair.group in chosen],
    )


def _divided(
    read: Sequence[_Read], others: Sequence[Pair], *, share: float, limit: int | None
) -> tuple[list[_Member], list[Pair], list[Pair]]:
    """(train, val, left alone) of all sources, in their order."""
    val = [pair for one in read for pair in one.val]
    members = [member for one in read for member in one.train]
    fixed = [member.pair for one in read if one.val for member in one.train]
    members, said = _follow(members, val, stated=False)
    members, left_alone = _follow(members, others, stated=False)
    train: list[_Member] = []
    drawn: list[Pair] = []
    for number, one in enumerate(read):
        own = [member for member in members if member.origin == number]
        kept, held_out = (own, []) if one.val else _hold_out(own, share=share, limit=limit, fixed=fixed)
        train.extend(kept)
        drawn.extend(held_out)
    train, more = _follow(train, drawn)
    return train, [*val, *said, *drawn, *more], left_alone


def _follow(members: list[_Member], val: Sequence[Pair], *, stated: bool = True) -> tuple[list[_Member], list[Pair]]:
    """(train, val): whoever has a picture or a group of what is held out is held out too, and so on from there.

    `stated` False: only those that name no split. Both keep their order.
    """
    held: list[Pair] = []
    last = val
    while last:
        images, groups = {pair.image for pair in last}, {pair.group for pair in last}
        joins = [
            (stated or member.pair.split is None) and (member.pair.image in images or member.pair.group in groups)
            for member in members
        ]
        last = [member.pair for member, join in zip(members, joins, strict=True) if join]
        held.extend(last)
        members = [member for member, join in zip(members, joins, strict=True) if not join]
    return members, held


def _limited(members: list[_Member], limit: int | None) -> list[_Member]:
    """At most `limit` of them, group after group from the largest key down, in the order they had."""
    if limit is None or len(members) <= limit:
        return members
    order = sorted(range(len(members)), key=lambda i: (-members[i].key, members[i].pair.group, i))
    return [members[i] for i in sorted(order[:limit])]


def _check_contrast(pairs: Sequence[Pair], *, where: str) -> None:
    if len({pair.group for pair in pairs}) < 2:
        got = f"{len(pairs)} of one group" if pairs else "none"
        raise InputError(
            where, expected="pairs of at least two groups to tell apart", got=got, do="Add other pictures."
        )
    captions = {_plain(caption) for pair in pairs for caption in pair.captions}
    if len(captions) < 2:
        raise InputError(
            where,
            expected="captions that differ between pictures",
            got=f'"{next(iter(captions), "")[:60]}" for all {len(pairs)}',
            do="Check the column that captions are read from.",
        )


def _check_leak(train: Iterable[Pair], others: Iterable[Pair], *, what: str) -> None:
    groups, images = set(), set()
    for pair in train:
        groups.add(pair.group)
        images.add(pair.image)
    for pair in others:
        if pair.image in images or pair.group in groups:
            shared = "picture" if pair.image in images else f"group {pair.group}"
            raise InputError(
                pair.image,
                expected="a picture and its group in one split only",
                got=f"the {shared} both to train on and {what}",
                do="Take it out of one of the splits.",
            )


def _about_skipped(skipped: Sequence[Skipped]) -> list[str]:
    if not skipped:
        return []
    counts = Counter(str(one.reason) for one in skipped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = f"{skipped[0].path}: {skipped[0].detail}" if skipped[0].detail else skipped[0].path
    return [f"{len(skipped)} left out of the data ({reasons}), the first: {first}"]


def _about_left_alone(pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    return [f"{len(pairs)} pairs without a split left out: another table has their pictures in a split of its own"]


def _about_texts(train: Sequence[Pair], val: Sequence[Pair]) -> list[str]:
    """Texts that stand for several pictures: as negatives they are false, in validation they are known already."""
    notes = []
    counts = Counter(_plain(caption) for pair in train for caption in set(pair.captions))
    (text, most), total = counts.most_common(1)[0], counts.total()
    if most > 1 and most > _SAME_TEXTS * total:
        notes.append(
            f'{most} of {total} captions are "{text[:60]}": pictures with one caption cannot be told apart '
            "by it; give them one group, or other captions"
        )
    known = [_plain(caption) in counts for pair in val for caption in pair.captions]
    if sum(known) > _SAME_TEXTS * len(known):
        notes.append(
            f"{sum(known)} of {len(known)} validation captions are also captions of training pictures: "
            "validation looks better than new texts will do"
        )
    return notes


def _about_val(val: Sequence[Pair]) -> list[str]:
    count = len({pair.group for pair in val})
    if not count:
        return ["no pairs are held out: nothing says when training turns into learning by heart"]
    if count < _FEW_HELD_OUT:
        return [f"only {count} groups are held out: their hit@k is coarse"]
    return []


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())
