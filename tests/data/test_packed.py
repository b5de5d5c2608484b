"""Pictures inside larger files: addresses, and that they never give another picture."""

from __future__ import annotations

import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_builders import png

from mmsearch.data.images import open_image
from mmsearch.data.loading import Failed, Loader
from mmsearch.data.packed import Packed, packed, read_picture
from mmsearch.errors import ImageError
from mmsearch.types import Preprocessing, SkipReason


def tar(path, members: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> list[str]:
    """Write a tar; the address of each member."""
    with tarfile.open(path, "w", format=format) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as file:
        return [Packed(str(path), m.name, offset=m.offset_data, size=m.size).address for m in file.getmembers()]


def reason(path: str, **options) -> str:
    with pytest.raises(ImageError) as caught:
        read_picture(path, **options)
    return caught.value.reason


@given(
    file=st.sampled_from(["/a/b.tar", "/x::y/c.TAR", "/d.arrow", "r.parquet"]),
    name=st.text(max_size=20),
    offset=st.integers(0, 10**17),
    size=st.integers(0, 10**17),
)
def test_an_address_says_what_it_was_made_of(file, name, offset, size):
    """Whatever a member is called."""
    place = Packed(file, name, offset=offset, size=size)
    assert packed(place.address) == place
    assert packed(Packed(file, name, row=size).address) == Packed(file, name, row=size)


@pytest.mark.parametrize(
    "path", ["/a/b.jpg", "/a/b.tar", "/a.tar::0001.jpg", "/a.tar::-1+5::x", "/a.zip::1+2::x", "a.tar::1+2", ""]
)
def test_paths_are_no_addresses(path):
    """A string is not guessed to be one."""
    assert packed(path) is None


def test_a_file_of_such_a_name_is_that_file(tmp_path):
    """However unlikely."""
    path = tmp_path / "a.tar::1+2::x"
    path.write_bytes(b"content")
    assert packed(str(path)) is None
    assert read_picture(str(path))[0] == b"content"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_member_is_found_again(tmp_path, format):
    """Short, long, nested and foreign names, in all the layouts that tars have."""
    names = ["a.jpg", "deep/er/" + "x" * 60 + "/" + "y" * 70 + ".jpg", "ä €.jpg", "n" * 90 + ".png", "m" * 98 + "x"]
    members = {name: f"content of {name}".encode() for name in names}
    for address, content in zip(tar(tmp_path / "s.tar", members, format=format), members.values(), strict=True):
        data, stamp = read_picture(address)
        assert data == content
        assert stamp.size == os.path.getsize(tmp_path / "s.tar")


@pytest.mark.parametrize(
    "after",
    [{"0.jpg": b"x" * 500, "a.jpg": b"A" * 40}, {"b.jpg": b"B" * 40}, {"a.jpg": b"A" * 41}, {"dir/a.jpg": b"C" * 40}],
)
def test_a_shard_written_anew_is_an_error_not_another_picture(tmp_path, after):
    """Another member at that place, or the same one elsewhere."""
    (address,) = tar(tmp_path / "s.tar", {"a.jpg": b"A" * 40})
    assert read_picture(address)[0] == b"A" * 40
    tar(tmp_path / "s.tar", after)
    assert reason(address) == SkipReason.CHANGING


def test_a_shard_that_is_gone_cut_or_too_large_has_its_reason(tmp_path):
    """As for files."""
    empty, full = tar(tmp_path / "s.tar", {"e.jpg": b"", "a.jpg": b"A" * 4000})
    assert reason(empty) == SkipReason.EMPTY
    assert reason(full, max_bytes=3999) == SkipReason.TOO_LARGE
    os.truncate(tmp_path / "s.tar", 2000)
    assert reason(full) == SkipReason.TRUNCATED
    assert reason(Packed(str(tmp_path / "s.tar"), "x", offset=10**17, size=9).address) == SkipReason.TRUNCATED
    assert reason(Packed(str(tmp_path / "none.tar"), "x", offset=512, size=9).address) == SkipReason.VANISHED
    (tmp_path / "d.tar").mkdir()
    assert reason(Packed(str(tmp_path / "d.tar"), "x", offset=512, size=9).address) == SkipReason.UNREADABLE


def test_whoever_opens_a_picture_can_open_one_inside_a_file(tmp_path):
    """In this process and in a decode worker; a broken one costs itself only."""
    good, bad = tar(tmp_path / "s.tar", {"a.png": png(), "b.png": png()[:200]})
    assert open_image(good)[0].size == (96, 64)
    with Loader(preprocessing=Preprocessing(size=16), workers=1) as loader:
        first, second, third = loader.load([(0, good), (1, bad), (2, good)])
    assert first.pixels.shape == third.pixels.shape == (16, 16, 3)
    assert isinstance(second, Failed)
    assert second.skipped.path == bad
    assert second.skipped.reason is SkipReason.TRUNCATED
