"""WebDataset shards as pairs: samples, patterns, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import tarfile
import tracemalloc

import pytest
from locked import locked, shared_path  # noqa: F401 - a fixture
from picture_builders import jpeg, photo, png

from mmsearch.data.collection import read_collection
from mmsearch.data.images import open_image
from mmsearch.data.pairs import read_pairs
from mmsearch.data.webdataset import read_webdataset, shards
from mmsearch.errors import InputError
from mmsearch.types import SkipReason


def shard(path, members: list[tuple[str, bytes | str]]):
    """A tar of the members in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes | str]]:
    """Pictures of growing width and their captions."""
    return [
        member
        for i in range(first, first + count)
        for member in ((f"{i:04}.png", png(photo(10 + i, 8))), (f"{i:04}.txt", f"caption {i}"))
    ]


def read(path, **options):
    skipped: list = []
    return list(read_pairs(str(path), on_skip=skipped.append, **options)), skipped


def widths(pairs) -> list[int]:
    return [open_image(pair.image)[0].width for pair in pairs]


def test_a_shard_is_its_samples_in_order(tmp_path):
    """Each picture with its own caption, and a group of its own."""
    pairs, skipped = read(shard(tmp_path / "s.tar", samples(0, 5)))
    assert [pair.captions for pair in pairs] == [(f"caption {i}",) for i in range(5)]
    assert widths(pairs) == [10, 11, 12, 13, 14]
    assert len({pair.group for pair in pairs}) == 5
    assert skipped == []


def test_captions_come_from_texts_and_json(tmp_path):
    """Lines of .txt and .caption; caption, split and group of .json; one that both say counts once."""
    facts = {"caption": "one", "captions": ["four"], "split": "validation", "group": 7, "url": "x"}
    members = [
        ("d/1.jpg", jpeg()), ("d/1.txt", "one\ntwo\n\n"), ("d/1.caption", "three"), ("d/1.json", json.dumps(facts)),
        ("d/2.webp", png()), ("d/2.json", '{"title": "t"}'), ("d/2.cls", "5"), ("d/2.seg.png", png()),
    ]  # fmt: skip
    (first, second), skipped = read(shard(tmp_path / "s.tar", members))
    assert (first.captions, first.split, first.group) == (("one", "two", "three", "four"), "val", "7")
    assert (second.captions, second.split) == (("t",), None)
    assert "2.webp" in second.image
    assert skipped == []
    (again, _), _ = read(shard(tmp_path / "t.tar", members[3:4] + members[:3] + members[4:]))
    assert again.captions == first.captions


def test_members_of_a_key_need_not_be_neighbours(tmp_path):
    """All pictures first, then all texts."""
    members = sorted(samples(0, 4), key=lambda member: member[0][-3:])
    assert members[0][0].endswith("png")
    pairs, skipped = read(shard(tmp_path / "s.tar", members))
    assert [(pair.captions, width) for pair, width in zip(pairs, widths(pairs), strict=True)] == [
        ((f"caption {i}",), 10 + i) for i in range(4)
    ]
    assert skipped == []


@pytest.mark.parametrize("name", ["s.tar", "train-0.tar"])
def test_members_apart_may_name_their_split(tmp_path, name):
    """All pictures first, then all JSON with a split: it counts for the picture too, before that of the file."""
    facts = [(f"{i}.json", json.dumps({"caption": f"c{i}", "split": "test"})) for i in (1, 2)]
    pairs, skipped = read(shard(tmp_path / name, [("1.png", png()), ("2.png", png()), *facts]))
    assert [(pair.captions, pair.split) for pair in pairs] == [(("c1",), "test"), (("c2",), "test")]
    assert skipped == []
    apart, _ = read(shard(tmp_path / name, sorted(samples(0, 2), key=lambda member: member[0][-3:])))
    assert [pair.split for pair in apart] == ["train" if name.startswith("train") else None] * 2


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    """In the order of their names; keys that repeat in another shard are other samples; hidden files are none."""
    shard(tmp_path / "b.tar", samples(0, 2))
    shard(tmp_path / "a.tar", samples(0, 3))
    shard(tmp_path / ".c.tar", samples(0, 3))
    pairs, _ = read(tmp_path)
    assert widths(pairs) == [10, 11, 12, 10, 11]
    assert len({pair.group for pair in pairs}) == 5


@pytest.mark.parametrize("names", [("train-0.tar", "val-0.tar"), ("train/0.tar", "validation/0.tar")])
def test_shards_name_their_split(tmp_path, names):
    """By file or by folder; a sample's own split counts more."""
    shard(tmp_path / names[0], [*samples(0, 2), ("9.png", png()), ("9.json", '{"caption": "x", "split": "test"}')])
    shard(tmp_path / names[1], samples(5, 1))
    pairs, _ = read(tmp_path)
    assert sorted(str(pair.split) for pair in pairs) == ["test", "train", "train", "val"]
    assert len(read(tmp_path, split="train")[0]) == 2


def test_a_split_is_a_word_of_the_name(tmp_path):
    """ "attestation" is no test split, and the folders above the data say nothing."""
    pairs, _ = read(shard(tmp_path / "test" / "attestation-0.tar", samples(0, 1)))
    assert pairs[0].split is None


@pytest.mark.parametrize("pattern", ["s-{000..002}.tar", "s-00{0,1,2}.tar", "s-*.tar", "s-00?.tar", "{s,t}-*.tar"])
def test_a_pattern_names_shards(tmp_path, pattern):
    """Braces with ranges and lists, wildcards, and both."""
    for i in range(3):
        shard(tmp_path / f"s-{i:03}.tar", samples(i, 1))
    pairs, _ = read(tmp_path / pattern)
    assert widths(pairs) == [10, 11, 12]


def test_a_shard_of_a_pattern_that_is_missing_is_reported(tmp_path):
    """And the others are read; when all are missing that is an error."""
    shard(tmp_path / "s-1.tar", samples(0, 1))
    pairs, skipped = read(tmp_path / "s-{0..1}.tar")
    assert len(pairs) == 1
    assert [(one.path, one.reason) for one in skipped] == [(str(tmp_path / "s-0.tar"), SkipReason.VANISHED)]
    for pattern in ("x-{0..3}.tar", "x*.tar"):
        with pytest.raises(InputError, match="at least one"):
            read(tmp_path / pattern)


def test_a_pattern_cannot_ask_for_without_end(tmp_path):
    """A range of a thousand million, or one that runs backwards."""
    for pattern in ("{0..999999999}.tar", "{5..1}.tar"):
        with pytest.raises(InputError, match="a range of 1 to"):
            shards(str(tmp_path / pattern), on_skip=print)


def test_ranges_are_counted_together(tmp_path):
    """Two ranges of 100,000 name 10^10 shards; none of them is looked for."""

    def looked(skipped):
        raise AssertionError(skipped)

    with pytest.raises(InputError, match="at most 100000 shards"):
        shards(str(tmp_path / "{0..99999}{0..99999}.tar"), on_skip=looked)


def test_an_existing_file_with_braces_is_no_pattern(tmp_path):
    """What is there is what is meant."""
    assert len(read(shard(tmp_path / "s-{0..1}.tar", samples(0, 2)))[0]) == 2


def test_a_broken_member_costs_its_sample_only(tmp_path):
    """No caption, no picture, JSON that is none, a text without end; the others keep their own."""
    members = [
        *samples(0, 1), ("1000.png", png()), ("1001.txt", "alone"), ("1002.png", png()), ("1002.json", "{"),
        ("1003.png", png()), ("1003.txt", "x" * (2 << 20)), *samples(4, 1), ("1005.png", png()), ("1005.txt", " \n"),
    ]  # fmt: skip
    pairs, skipped = read(shard(tmp_path / "s.tar", members))
    assert [pair.captions for pair in pairs] == [("caption 0",), ("caption 4",)]
    assert widths(pairs) == [10, 14]
    said = [f"{one.path} {one.detail}" for one in skipped]
    assert {one.reason for one in skipped} == {SkipReason.BAD_ROW}
    for words in ("1001", "1002.json", "2097152 bytes of text", "no caption", "no picture"):
        assert any(words in line for line in said)


def test_a_member_that_is_a_picture_no_more_is_found_at_decoding(tmp_path):
    """The pair is there; whoever decodes it gets an error with a reason and the name of the member."""
    (pair,), _ = read(shard(tmp_path / "s.tar", [("1.jpg", b"not a picture"), ("1.txt", "t")]))
    with pytest.raises(Exception, match=r"1\.jpg: .*not an image"):
        open_image(pair.image)


def test_names_in_a_tar_are_never_places(tmp_path):
    """Absolute and climbing names, links to files outside: no file beside the shard is ever read or written."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(photo(50, 50)))
    path = tmp_path / "data" / "s.tar"
    shard(path, [("../secret.png", png()), ("../secret.txt", "climbs"), (f"{tmp_path}/abs.txt", "absolute")])
    with tarfile.open(path, "a") as file:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.png"
            file.addfile(info)
            text = tarfile.TarInfo(name.replace("png", "txt"))
            text.size = 1
            file.addfile(text, io.BytesIO(b"t"))
    pairs, skipped = read(path)
    assert [pair.captions for pair in pairs] == [("climbs",)]
    assert widths(pairs) == [96]
    assert len([one for one in skipped if "a link" in one.detail]) == 3
    assert sorted(os.listdir(tmp_path)) == ["data", "secret.png"]


def test_a_shard_that_breaks_off_keeps_what_came_before(tmp_path):
    """Cut in the middle, or with rubbish where a header should be; both are reported."""
    path = shard(tmp_path / "s.tar", samples(0, 6))
    whole = path.read_bytes()
    for length in (3000, 3900, 4608, 10240):  # in a picture, in a text, after a header, between two members
        path.write_bytes(whole[:length])
        cut, skipped = read(path)
        assert [pair.captions for pair in cut] == [(f"caption {i}",) for i in range(len(cut))]
        assert 1 <= len(cut) < 6
        assert SkipReason.TRUNCATED in [one.reason for one in skipped if one.path == str(path)]
    with tarfile.open(shard(path, samples(0, 6))) as file:
        at = file.getmembers()[6].offset
    path.write_bytes(whole[:at] + b"\xff" * 512 + whole[at + 512 :])
    broken, skipped = read(path)
    assert [pair.captions for pair in broken] == [(f"caption {i}",) for i in range(3)]
    assert [one.reason for one in skipped] == [SkipReason.DAMAGED]


def of_size(name: str, size: int) -> bytes:
    """A header that says `size` bytes, in base 256."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**96 | (0 if size < 0 else 1 << 95)).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [-512, -2048, -1, 2**62, 2**80])
@pytest.mark.parametrize("before", [0, 2])
def test_a_member_of_an_impossible_size_ends_its_shard(tmp_path, size, before):
    """Below zero: to follow it leads back, for ever. Or beyond any file."""
    path = shard(tmp_path / "s.tar", samples(0, 2))
    with tarfile.open(path) as file:
        end = file.getmembers()[-1].offset + 1024
    whole = path.read_bytes()
    path.write_bytes(whole[: end * before // 2] + of_size("9.png", size) + whole)
    reported: list = []
    found = list(itertools.islice(read_webdataset(str(path), on_skip=reported.append), 50))
    assert [record.captions for record in found if record.captions] == [("caption 0",), ("caption 1",)][:before]
    assert [one.reason for one in reported] == [SkipReason.DAMAGED if size < 0 else SkipReason.TRUNCATED]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_a_packed_shard_is_refused_with_what_to_do(tmp_path, name):
    """Nothing can be read at any place in it."""
    data = shard(tmp_path / "x", samples(0, 1)).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data))
    with pytest.raises(InputError, match=r"packed with gzip.*Unpack it"):
        read(tmp_path / name)


def test_one_bad_shard_of_many_is_reported(tmp_path):
    """The others are read."""
    shard(tmp_path / "a.tar", samples(0, 1))
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    pairs, skipped = read(tmp_path)
    assert len(pairs) == 1
    assert {os.path.basename(one.path) for one in skipped} == {"b.tar", "c.tar"}


def test_what_cannot_be_opened_is_reported(tmp_path):
    """A link to nothing; a folder called x.tar is none of the shards. Alone, each is an error."""
    shard(tmp_path / "a.tar", samples(0, 1))
    (tmp_path / "b.tar").symlink_to("nowhere")
    (tmp_path / "c.tar").mkdir()
    pairs, skipped = read(tmp_path)
    assert len(pairs) == 1
    assert [(one.path, one.reason) for one in skipped] == [(str(tmp_path / "b.tar"), SkipReason.VANISHED)]
    pairs, skipped = read(tmp_path / "{a,c}.tar")
    assert (len(pairs), [one.reason for one in skipped]) == (1, [SkipReason.UNREADABLE])
    for name in ("b.tar", "c*.tar"):
        with pytest.raises(InputError, match="expected"):
            read(tmp_path / name)


def test_a_folder_called_tar_is_a_folder(tmp_path):
    """With pictures and side-cars as any other."""
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.png").write_bytes(png())
    (tmp_path / "x.tar" / "a.txt").write_text("mine")
    assert [pair.captions for pair in read(tmp_path)[0]] == [("mine",)]


def test_what_may_not_be_read_is_reported(shared_path):  # noqa: F811 - the fixture
    """A shard or a split among others; the only shard is an error."""
    for name in ("train/0.tar", "train/1.tar", "test/0.tar"):
        shard(shared_path / name, samples(0, 2))
    read(shared_path)  # loads what is loaded late
    with locked(shared_path / "train" / "1.tar", shared_path / "test"):
        pairs, skipped = read(shared_path)
        with pytest.raises(InputError, match="readable"):
            read(shared_path / "train" / "1.tar")
        with pytest.raises(InputError, match="readable"):
            read(shared_path / "train" / "1*.tar")
    assert len(pairs) == 2
    assert sorted(os.path.relpath(one.path, shared_path) for one in skipped) == ["test", "train/1.tar"]
    assert {one.reason for one in skipped} == {SkipReason.UNREADABLE}


@pytest.mark.parametrize("name", ["backup.tar", "train/backup.tar", "2019/backup.tar"])
def test_a_folder_of_photos_with_an_archive_stays_one(tmp_path, name):
    """Wherever the archive lies."""
    shard(tmp_path / name, samples(0, 3))
    (tmp_path / "2019").mkdir(exist_ok=True)
    (tmp_path / "2019" / "a.png").write_bytes(png())
    (tmp_path / "2019" / "a.txt").write_text("mine")
    if not name.startswith("2019"):
        (tmp_path / name).with_name("b.png").write_bytes(png())
    assert [pair.captions for pair in read(tmp_path)[0]] == [("mine",)]


def test_an_index_refuses_a_shard_with_a_reason(tmp_path):
    """It would show pictures that no program can open."""
    path = shard(tmp_path / "s.tar", samples(0, 3))
    with pytest.raises(InputError, match="pictures inside a table or an archive"):
        list(read_collection([str(path)], on_skip=print))


def test_a_large_shard_needs_little_memory(tmp_path):
    """Pictures are passed over, not read, and members are forgotten once they are dealt with."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as file:
        for i in range(3000):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = 10_000
            file.addfile(info, io.BytesIO(bytes(info.size)))
    tracemalloc.start()
    count = sum(1 for _ in read_webdataset(str(path), on_skip=print))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 1 << 20
