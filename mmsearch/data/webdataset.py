"""WebDataset: tar files whose members with one key are one sample (0001.jpg, 0001.txt, 0001.json).

A key is a member's path up to the first dot of its last part, as in the `webdataset` library. Captions are the lines of
.txt, .caption and .captions and the usual keys of .json, which also names `split` and `group`.

Decisions:
- Nothing is unpacked: a picture is addressed by where it lies in its shard (`data.packed`), and its name is no path.
- Only uncompressed shards can be read at any place, so others are refused with what to do.
- Members of a key need not be neighbours, since people also pack all pictures first and then all texts.
- The first picture of a key is its picture; further ones are usually masks or thumbnails.
- Shards tell their split by their name or their folder's (train-000.tar, val/000.tar), unless a sample says its own.
- A shard that breaks off is reported and keeps what came before the break; so is one that cannot be read.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from mmsearch.data.packed import Packed
from mmsearch.data.reading import listed, skip_reason
from mmsearch.data.records import Record
from mmsearch.data.sniffing import PICTURE_EXTENSIONS
from mmsearch.data.splits import split_in
from mmsearch.data.texts import OnSkip, captions_in, decoded, parse_json, split_texts
from mmsearch.errors import InputError
from mmsearch.types import Skipped, SkipReason

MAX_SHARDS = 100_000
"""How many shards a pattern may name."""

_TEXTS = frozenset({".txt", ".caption", ".captions"})
_MAX_TEXT_BYTES = 1 << 20
_KEY = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<rest>[^/]+)", re.DOTALL)
_BRACES = re.compile(r"\{(?P<low>\d+)\.\.(?P<high>\d+)\}|\{(?P<list>[^{}]*,[^{}]*)\}")
_PACKERS = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


@dataclass(slots=True)
class _Sample:
    """The members of one key so far; `line`: which member of its shard came first, counted from 1.

    `captions`: from texts; `stated`: from JSON, which often says the same again.
    """

    name: str
    line: int
    place: str | None = None
    captions: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    split: str | None = None
    group: str | None = None
    metadata: dict[str, object] = field(default_factory=dict)

    def record(self, split_of_file: str | None) -> Record:
        """The sample as one row."""
        return Record(
            self.line,
            self.name,
            self.captions + tuple(caption for caption in self.stated if caption not in self.captions),
            split=self.split,
            group=self.group,
            metadata=self.metadata,
            place=self.place,
            split_of_file=split_of_file,
        )


def shards(path: str, *, on_skip: OnSkip) -> list[str]:
    """The tar files that `path` names: itself, those in the folder, or all of a pattern ({000..127}, {a,b}, *).

    In a folder also those in its sub-folders, one level down (a folder a split, say). Ones that a pattern names and
    that are not there are reported. Raises `InputError` when there is none at all.
    """
    if os.path.isdir(path):
        chosen = sorted(_in_folder(path, on_skip), key=os.fsencode)
    elif os.path.lexists(path):
        chosen = [path]
    else:
        chosen = []
        for name in _names(path):
            matches = sorted(glob.glob(name), key=os.fsencode)
            chosen.extend(matches)
            if not matches:
                on_skip(Skipped(name, SkipReason.VANISHED, "named by the pattern"))
    if not chosen:
        raise InputError(path, expected="at least one .tar file", got="none", do="Check the path or the pattern.")
    return chosen


def _in_folder(path: str, on_skip: OnSkip) -> Iterator[str]:
    for entry in listed(path):
        if _is_tar(entry):
            yield entry.path
        elif not entry.name.startswith(".") and os.path.isdir(entry.path):
            try:
                yield from (below.path for below in listed(entry.path) if _is_tar(below))
            except InputError as error:
                on_skip(Skipped(entry.path, SkipReason.UNREADABLE, error.got))


def read_webdataset(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """The samples of all shards that `path` names. Broken members and shards are reported, and cost themselves only.

    Raises `InputError` where there is no shard, or a single one that cannot be read or is no tar file.
    """
    found = shards(path, on_skip=on_skip)
    above = os.path.commonpath([os.path.dirname(shard) for shard in found])
    for shard in found:
        below = os.path.relpath(shard, above)
        stated = split_in(os.path.relpath(shard, path) if os.path.isdir(path) else os.path.basename(shard))
        with closing(_samples(shard, "" if len(found) == 1 else f"{below}/", on_skip)) as samples:
            try:
                for sample in samples:
                    yield sample.record(stated)
            except InputError as error:
                if len(found) == 1:
                    raise
                on_skip(Skipped(shard, SkipReason.UNSUPPORTED, f"{error.got}, not {error.expected}"))
            except OSError as error:
                got = error.strerror or str(error)
                if len(found) == 1:
                    do = "Check what it is, and its permissions."
                    raise InputError(shard, expected="a readable tar file", got=got, do=do) from error
                on_skip(Skipped(shard, skip_reason(error), got))


def _samples(shard: str, prefix: str, on_skip: OnSkip) -> Generator[_Sample, None, None]:
    """Neighbours of one key together; what is not beside them comes as a sample of its own, of the same name."""
    current: _Sample | None = None
    with _opened(shard) as tar:
        for number, member in _members(tar, shard, on_skip):
            found = _KEY.fullmatch(member.name)
            if found is None:
                continue
            if current is None or current.name != prefix + found["key"]:
                if current is not None:
                    yield current
                current = _Sample(prefix + found["key"], number)
            extension = os.path.splitext(f"x.{found['rest']}")[1].lower()
            try:
                _add(current, member, extension=extension, tar=tar)
            except (ValueError, OSError, tarfile.TarError) as error:
                on_skip(Skipped(f"{shard}: {member.name}", SkipReason.BAD_ROW, str(error)))
    if current is not None:
        yield current


def _add(sample: _Sample, member: tarfile.TarInfo, *, extension: str, tar: tarfile.TarFile) -> None:
    """Put one member into its sample; `ValueError` with the reason where it cannot be used."""
    if extension not in _TEXTS | PICTURE_EXTENSIONS | {".json"}:
        return
    if not member.isreg() or member.issparse():
        raise ValueError("a link or a sparse file")
    if extension in PICTURE_EXTENSIONS:
        if sample.place is None:
            place = Packed(str(tar.name), member.name, offset=member.offset_data, size=member.size)
            sample.place = place.address
        return
    text = _text(member, tar)
    if extension in _TEXTS:
        sample.captions += captions_in(text.splitlines())
        return
    entries = parse_json(text)
    if not isinstance(entries, dict):
        raise ValueError("not a JSON object")
    sample.stated, sample.metadata = split_texts(entries)
    split, group = sample.metadata.pop("split", None), sample.metadata.pop("group", None)
    sample.split = str(split) if split else sample.split
    sample.group = str(group) if group is not None else sample.group


def _text(member: tarfile.TarInfo, tar: tarfile.TarFile) -> str:
    if member.size > _MAX_TEXT_BYTES:
        raise ValueError(f"{member.size} bytes of text, limit {_MAX_TEXT_BYTES}")
    file = tar.extractfile(member)
    return decoded(file.read()) if file is not None else ""


def _opened(shard: str) -> tarfile.TarFile:
    """The shard, to be read member by member; `InputError` when it is no uncompressed tar, `OSError` as `open`."""
    try:
        return tarfile.open(shard, "r:", errors="surrogateescape")
    except tarfile.TarError as error:
        with open(shard, "rb") as file:
            head = file.read(8)
        packer = next((name for magic, name in _PACKERS if head.startswith(magic)), None)
        got = f"one packed with {packer}" if packer else str(error)
        do = f"Unpack it with {packer}: only then can pictures be read at any place." if packer else "Copy it again."
        raise InputError(shard, expected="an uncompressed tar file", got=got, do=do) from None


def _members(tar: tarfile.TarFile, shard: str, on_skip: OnSkip) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """(number from 1, member); a break is reported, and ends the shard."""
    number = end = 0
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all otherwise
            if member.size < 0 or tar.offset <= end:  # tarfile would come back to it for ever
                on_skip(Skipped(shard, SkipReason.DAMAGED, f"a member of {member.size} bytes after {number} members"))
                return
            number, end = number + 1, tar.offset
            yield number, member
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: an offset beyond what a file can have
        on_skip(Skipped(shard, SkipReason.TRUNCATED, f"after {number} members: {error}"))
        return
    with open(shard, "rb") as file:  # tarfile takes whatever is no header for the end
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        on_skip(Skipped(shard, SkipReason.TRUNCATED, f"it ends without an end mark, after {number} members"))
    elif block.strip(b"\0"):
        on_skip(Skipped(shard, SkipReason.DAMAGED, f"no header after {number} members"))


def _is_tar(entry: os.DirEntry[str]) -> bool:
    """By its name, when it is a file, or a link that leads nowhere: that one is reported as it is opened."""
    named = entry.name.lower().endswith(".tar") and not entry.name.startswith(".")
    return named and (os.path.isfile(entry.path) or not os.path.exists(entry.path))


def _names(pattern: str) -> list[str]:
    """The names that `pattern` stands for. `InputError` for more than `MAX_SHARDS`, whichever braces they come from."""
    names = list(itertools.islice(_expanded(pattern), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise InputError(pattern, expected=f"a pattern of at most {MAX_SHARDS} shards", got="one of more")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    """`pattern` with its braces written out, the last one changing fastest. `InputError` for a range without end."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    if found["list"] is not None:
        choices: Sequence[str] = found["list"].split(",")
    else:
        low, high = int(found["low"]), int(found["high"])
        if not 0 <= high - low < MAX_SHARDS:
            raise InputError(pattern, expected=f"a range of 1 to {MAX_SHARDS} shards", got=f"{low}..{high}")
        choices = [str(number).zfill(len(found["low"])) for number in range(low, high + 1)]
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])
