"""Pictures named by URIs: listed in order, stamped, fetched whole or with a reason; through fsspec's `memory://`."""

from __future__ import annotations

import os

import fsspec
import pytest

from mmsearch.data.packed import read_picture
from mmsearch.data.remote import (
    check_scheme,
    is_there,
    is_uri,
    list_pictures,
    local_path,
    may_be_shown,
    read_uri,
)
from mmsearch.errors import ImageError, InputError
from mmsearch.types import SkipReason, Stamp


@pytest.fixture
def bucket():
    """(a function that puts an object in place, the URI of its folder); nothing is left behind."""
    memory = fsspec.filesystem("memory")
    yield lambda name, data=b"bytes": memory.pipe_file(f"/bucket/{name}", data)
    memory.rm("/bucket", recursive=True)


def listed(uri="memory://bucket", **options):
    skipped = []
    return list(list_pictures(uri, on_skip=skipped.append, **options)), skipped


def test_pictures_come_folder_by_folder_in_the_order_of_their_bytes(bucket):
    """Other files, hidden ones and what is excluded are left out; names are whole URIs."""
    for name in ("b.jpg", "a/z.PNG", "a/skip/x.jpg", "B.jpg", ".hidden.jpg", "notes.pdf", "é.jpg"):
        bucket(name)
    found, skipped = listed(exclude=("skip",))
    assert [s.name for s in found] == [f"memory://bucket/{name}" for name in ("B.jpg", "a/z.PNG", "b.jpg", "é.jpg")]
    assert all(s.path == s.name and s.root == "" and s.stamp.size == 5 for s in found) and skipped == []
    assert len(listed(include_hidden=True)[0]) == 6


def test_side_cars_become_captions_and_metadata(bucket):
    """a.txt and a.json beside a.jpg, as in a local folder; a broken one is reported and costs the texts only."""
    bucket("a.jpg")
    bucket("a.txt", b"a cat\na dog")
    bucket("a.json", b'{"caption": "two pets", "place": "home"}')
    bucket("b.jpg")
    bucket("b.json", b"[")
    (first, second), skipped = listed()
    assert (first.captions, dict(first.metadata)) == (("a cat", "a dog", "two pets"), {"place": "home"})
    assert second.captions == () and [s.reason for s in skipped] == [SkipReason.BAD_ROW]


def test_one_picture_can_be_named(bucket):
    """A URI of an object is that object."""
    bucket("a.jpg")
    found, _ = listed("memory://bucket/a.jpg")
    assert [s.name for s in found] == ["memory://bucket/a.jpg"]


def test_nothing_is_listed_where_nothing_is():
    """A prefix without objects is an empty folder, not an error: whoever builds says so."""
    assert listed("memory://no-such-bucket") == ([], [])


def test_the_bytes_come_with_the_stamp_of_the_listing(bucket):
    """What is read has the stamp that was listed, so that the next scan finds it unchanged."""
    bucket("a.jpg", b"content")
    (source,), _ = listed()
    assert read_uri(source.path) == read_uri(source.path, stamp=source.stamp) == (b"content", source.stamp)
    assert read_picture(source.path) == (b"content", source.stamp)


def test_an_object_that_changed_size_since_the_listing_gets_its_new_stamp(bucket):
    """The bytes never go with a stamp of other bytes of another size."""
    bucket("a.jpg", b"longer")
    data, stamp = read_uri("memory://bucket/a.jpg", stamp=Stamp(3, 0, 0))
    assert (data, stamp.size) == (b"longer", 6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gone.jpg", SkipReason.VANISHED), ("empty.jpg", SkipReason.EMPTY), ("big.jpg", SkipReason.TOO_LARGE)],
)
def test_what_cannot_be_read_has_a_reason(bucket, name, reason):
    """The reasons are those of local files."""
    bucket("empty.jpg", b"")
    bucket("big.jpg", b"x" * 100)
    with pytest.raises(ImageError) as raised:
        read_uri(f"memory://bucket/{name}", max_bytes=10)
    assert raised.value.reason == reason


def test_being_unreachable_is_not_being_gone(bucket, tmp_path):
    """A picture that may be there still is not taken for one that has moved."""
    bucket("a.jpg")
    assert is_there("memory://bucket/a.jpg") and not is_there("memory://bucket/b.jpg")
    assert is_there("abfs://container/a.jpg"), "no package and no credentials for it"
    assert is_there(os.fspath(tmp_path)) and not is_there(os.fspath(tmp_path / "gone"))


def test_a_search_shows_remote_pictures_without_asking(tmp_path):
    """Local pictures that are gone are hidden; remote ones would cost a request each."""
    assert may_be_shown("s3://no-such-bucket/a.jpg") and may_be_shown(os.fspath(tmp_path))
    assert not may_be_shown(os.fspath(tmp_path / "gone.jpg"))


def test_a_file_uri_is_a_local_path():
    """So that file:///photos and /photos are the same pictures."""
    assert local_path("file:///photos/a%20b") == "/photos/a b" and not is_uri("file:///photos")
    assert local_path("s3://b/a%20b") == "s3://b/a%20b" and local_path("./x") == "./x"


@pytest.mark.parametrize("uri", ["http://169.254.169.254/latest", "https://host/a.jpg", "ftp://host/a.jpg"])
def test_the_web_is_not_fetched(uri):
    """A list of names from a stranger must not make this program ask a private network."""
    assert not is_uri(uri)
    with pytest.raises(InputError, match="Download it first"):
        check_scheme(uri)
