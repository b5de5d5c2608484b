from __future__ import annotations

import json

import pytest
from picture_builders import png

from mmsearch.data.collection import read_collection
from mmsearch.errors import InputError, UsageError
from mmsearch.types import SkipReason, Source


def read(*paths, **options) -> tuple[list[Source], list]:
    skipped: list = []
    return list(read_collection([str(p) for p in paths], on_skip=skipped.append, **options)), skipped


def put(path, content=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if content is None else content if isinstance(content, bytes) else content.encode())


def test_side_cars_are_joined_by_stem(tmp_path):
    """a.txt: a caption a line; a.json: captions and metadata; both together, each caption once."""
    put(tmp_path / "a.jpg")
    put(tmp_path / "a.txt", "\ufeffA dog.\n\n  On a beach. \r\n")
    meta = {"caption": "A dog.", "title": "Rex", "captions": ["x", "y"], "year": 2020, "tags": ["q"]}
    put(tmp_path / "a.json", json.dumps(meta))
    put(tmp_path / "b.jpg")
    put(tmp_path / "b.TXT", "upper case")
    put(tmp_path / "c.jpg")
    (a, b, c), skipped = read(tmp_path)
    assert a.captions == ("A dog.", "On a beach.", "Rex", "x", "y")
    assert a.metadata == {"year": 2020, "tags": ["q"]}
    assert (b.captions, c.captions, dict(c.metadata), skipped) == (("upper case",), (), {}, [])


def test_two_pictures_of_one_stem_share_the_side_car(tmp_path):
    """a.jpg and a.png both get a.txt, and neither gets ab.txt."""
    for name in ("a.jpg", "a.png"):
        put(tmp_path / name)
    put(tmp_path / "a.txt", "shared")
    put(tmp_path / "ab.txt", "other")
    assert [s.captions for s in read(tmp_path)[0]] == [("shared",), ("shared",)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"{broken", SkipReason.BAD_ROW),
        ("a.json", b"[1, 2]", SkipReason.BAD_ROW),
        ("a.json", b"[" * 100_000, SkipReason.BAD_ROW),
        ("a.txt", b"x" * (2 << 20), SkipReason.TOO_LARGE),
    ],
)
def test_a_bad_side_car_is_reported_and_costs_the_texts_only(tmp_path, name, content, reason):
    """The picture stays."""
    put(tmp_path / "a.jpg")
    put(tmp_path / name, content)
    (source,), (skip,) = read(tmp_path)
    assert (source.captions, skip.reason, skip.path) == ((), reason, str(tmp_path / name))


def test_texts_from_outside_are_made_fit_to_store(tmp_path):
    """Half surrogates, NUL, NaN, wrong types, bytes that are not UTF-8: valid text and JSON come out."""
    put(tmp_path / "a.jpg")
    put(tmp_path / "a.json", b'{"caption": ["ok \\ud800", "n\\u0000l", 5, null, ""], "v": NaN, "w": [1e999]}')
    put(tmp_path / "a.txt", b"caf\xe9\n")
    (source,), _ = read(tmp_path)
    assert source.captions == ("caf\ufffd", "ok ?", "n l")
    json.dumps(dict(source.metadata), allow_nan=False)
    for caption in source.captions:
        caption.encode()


def test_a_named_picture_is_an_item_of_its_folder(tmp_path):
    """Root is the folder; its side-car counts; any name will do if the content is a picture."""
    put(tmp_path / "a.jpg")
    put(tmp_path / "a.txt", "hello")
    put(tmp_path / "b")
    (a, b), skipped = read(tmp_path / "a.jpg", tmp_path / "b")
    assert (a.root, a.name, a.path, a.captions) == (str(tmp_path), "a.jpg", str(tmp_path / "a.jpg"), ("hello",))
    assert (b.name, skipped) == ("b", [])


def test_a_shell_glob_over_a_folder_does_the_right_thing(tmp_path):
    """`index folder/*`: pictures once, side-cars to their pictures, folders walked, the rest reported."""
    for name in ("a.jpg", "s/b.jpg"):
        put(tmp_path / name)
    put(tmp_path / "a.txt", "caption")
    put(tmp_path / "a.json", '{"x": 1}')
    put(tmp_path / "notes.doc", "nothing")
    found, skipped = read(*sorted(tmp_path.iterdir()))
    assert [(s.name, s.captions) for s in found] == [("a.jpg", ("caption",)), ("b.jpg", ())]
    assert [(s.path, s.reason) for s in skipped] == [(str(tmp_path / "notes.doc"), SkipReason.UNSUPPORTED)]


def test_hidden_and_odd_names_count_when_named(tmp_path):
    """Rules about names are for folders; what the user names is meant."""
    put(tmp_path / ".hidden.jpg")
    assert [s.name for s in read(tmp_path / ".hidden.jpg")[0]] == [".hidden.jpg"]


def test_tables_folders_and_pictures_come_in_the_order_given(tmp_path):
    """One stream."""
    put(tmp_path / "x" / "1.jpg")
    put(tmp_path / "2.jpg")
    put(tmp_path / "t.csv", "image,caption\n2.jpg,two\n")
    found, _ = read(tmp_path / "t.csv", tmp_path / "x", tmp_path / "2.jpg")
    assert [(s.root, s.name) for s in found] == [
        (str(tmp_path / "t.csv"), "2.jpg"),
        (str(tmp_path / "x"), "1.jpg"),
        (str(tmp_path), "2.jpg"),
    ]


def test_a_format_may_be_named_where_the_ending_does_not_tell(tmp_path):
    """A caption list called .txt is a CSV if the user says so; unknown names are refused with the known ones."""
    put(tmp_path / "1.jpg")
    put(tmp_path / "captions.txt", "image,caption\n1.jpg,one\n1.jpg,uno\n")
    (source,), _ = read(tmp_path / "captions.txt", format="csv")
    assert source.captions == ("one", "uno")
    with pytest.raises(UsageError, match="jsonl"):
        read(tmp_path / "captions.txt", format="xlsx")


def test_a_json_document_that_is_no_collection_is_an_error(tmp_path):
    """Unless it is a side-car."""
    put(tmp_path / "config.json", '{"a": 1}')
    with pytest.raises(InputError, match="COCO"):
        read(tmp_path / "config.json")
