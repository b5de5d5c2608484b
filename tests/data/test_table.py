from __future__ import annotations

import json
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_builders import png

from mmsearch.data.collection import read_collection
from mmsearch.data.table import record
from mmsearch.errors import InputError
from mmsearch.types import SkipReason, Source


def read(path, **options) -> tuple[list[Source], list]:
    skipped: list = []
    return list(read_collection([str(path)], on_skip=skipped.append, **options)), skipped


@pytest.fixture
def folder(tmp_path):
    for name in ("1.jpg", "images/2.jpg", "sub/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    return tmp_path


def write(folder, name: str, text: str | bytes):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


ROWS = [
    {"image": "1.jpg", "caption": "one", "id": "i1", "split": "train", "year": "2001"},
    {"image": "2.jpg", "caption": "two", "id": "i2", "split": "test", "year": "2002"},
    {"image": "sub/3.jpg", "caption": "three", "id": "i3", "split": "val", "year": "2003"},
]


def as_format(folder, kind: str):
    names = list(ROWS[0])
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        lines = [separator.join(names)] + [separator.join(row.values()) for row in ROWS]
        return write(folder, f"t.{kind}", "\n".join(lines))
    if kind in ("jsonl", "ndjson"):
        return write(folder, f"t.{kind}", "\n".join(json.dumps(row) for row in ROWS))
    if kind == "json":
        return write(folder, "t.json", json.dumps(ROWS))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson", "json", "parquet"])
def test_every_format_says_the_same(folder, kind):
    """The contract of a format: the same rows, the same items, in the order of the table."""
    path = as_format(folder, kind)
    found, skipped = read(path)
    assert [(s.root, s.name, s.captions) for s in found] == [
        (str(path), "1.jpg", ("one",)),
        (str(path), "2.jpg", ("two",)),
        (str(path), "sub/3.jpg", ("three",)),
    ]
    assert [s.path for s in found] == [str(folder / n) for n in ("1.jpg", "images/2.jpg", "sub/3.jpg")]
    assert dict(found[0].metadata) == {"id": "i1", "split": "train", "year": "2001"}
    assert found[0].stamp.size == os.path.getsize(folder / "1.jpg")
    assert skipped == []


@pytest.mark.parametrize(
    "column",
    ["image", "image_path", "filepath", "path", "file", "filename", " Image ", "FILE_NAME", "File name", "img-path"],
)
def test_the_picture_is_found_under_many_names(folder, column):
    """And the first of them wins when there are several; the others are metadata."""
    (source,), _ = read(write(folder, "t.csv", f"{column},title\n1.jpg,t\n"))
    assert source.path == str(folder / "1.jpg")
    (source,), _ = read(write(folder, "t.csv", "path,image\nx,1.jpg\n"))
    assert (source.name, dict(source.metadata)) == ("1.jpg", {"path": "x"})


def test_captions_are_gathered_from_all_their_columns(folder):
    """caption, captions, title, text, caption_0 ...; lists and JSON lists in cells; duplicates once."""
    row = {"image": "1.jpg", "captions": ["a", "b"], "Caption 0": "c", "caption": "a", "title": "d", "text": None}
    (source,), _ = read(write(folder, "t.jsonl", json.dumps(row)))
    assert source.captions == ("a", "b", "c", "d")
    (source,), _ = read(write(folder, "t.csv", 'image,captions\n1.jpg,"[""a"", ""b""]"\n'))
    assert source.captions == ("a", "b")
    (source,), _ = read(write(folder, "t.csv", "image,caption\n1.jpg,[not json]\n"))
    assert source.captions == ("[not json]",)


@pytest.mark.parametrize("apart", [False, True])
def test_rows_of_one_picture_are_one_item(folder, apart):
    """Next to each other or far apart: all captions, in order; the order of the table is kept."""
    rows = ["1.jpg,a", "1.jpg,b", "2.jpg,x", "sub/3.jpg,y"]
    if apart:
        rows = ["1.jpg,a", "2.jpg,x", "sub/3.jpg,y", "1.jpg,b"]
    found, _ = read(write(folder, "t.csv", "image,caption\n" + "\n".join(rows)))
    assert [(s.name, s.captions) for s in found] == [("1.jpg", ("a", "b")), ("2.jpg", ("x",)), ("sub/3.jpg", ("y",))]


def test_texts_without_pictures_have_an_identity_that_survives_new_rows(tmp_path):
    """By their id, else by what they say; never by their line."""
    first, _ = read(write(tmp_path, "t.csv", "caption,id\nhello,\nworld,7\n"))
    second, _ = read(write(tmp_path, "t.csv", "caption,id\nnew,\nworld!,7\nhello,\n"))
    assert all(s.path is None and s.stamp is None for s in first)
    assert first[1].name == "id:7"
    assert {s.name for s in first} < {s.name for s in second}


def test_bad_rows_are_reported_with_their_line_and_cost_themselves_only(folder):
    """JSON lines: broken, not an object, empty object, a number for a picture, a URL, a file that is not there."""
    lines = [
        '{"image": "1.jpg"}', "{broken", "[1]", "{}", '{"image": 5}', "", '{"image": "https://x/y.jpg"}',
        '{"image": "none.jpg", "caption": "c"}', '{"image": "a\\u0000b"}', "[" * 100_000, '{"image": "2.jpg"}',
    ]  # fmt: skip
    path = write(folder, "t.jsonl", "\n".join(lines))
    found, skipped = read(path)
    assert [s.name for s in found] == ["1.jpg", "2.jpg"]
    by_line = {s.path: s.reason for s in skipped}
    assert {by_line[f"{path}:{n}"] for n in (2, 3, 4, 5, 10)} == {SkipReason.BAD_ROW}
    assert by_line["https://x/y.jpg"] == SkipReason.UNSUPPORTED
    assert by_line[str(folder / "none.jpg")] == SkipReason.VANISHED
    assert len(skipped) == 8


def test_a_csv_row_with_too_many_cells_is_reported(folder):
    """A comma in a caption without quotes must not shift cells; quoted commas and newlines are fine."""
    text = 'image,caption\n1.jpg,a, b\n2.jpg,"a, ""b""\nc"\n'
    found, (skip,) = read(write(folder, "t.csv", text))
    assert [(s.name, s.captions) for s in found] == [("2.jpg", ('a, "b"\nc',))]
    assert (skip.path, skip.reason) == (f"{folder / 't.csv'}:2", SkipReason.BAD_ROW)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_found(folder, separator):
    """As spreadsheets of all countries write it."""
    text = f"image{separator}caption\n1.jpg{separator}hello\n"
    (source,), _ = read(write(folder, "t.csv", text))
    assert source.captions == ("hello",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_a_column(folder, encoding):
    """As spreadsheets write them."""
    text = "image\tcaption\n1.jpg\tcafé\n".encode(encoding)
    (source,), _ = read(write(folder, "t.tsv", text))
    assert source.captions == ("café",)


def test_a_name_that_is_not_utf8_is_found_through_a_table(folder):
    """Row 24: the bytes of the name stand in the table as they are."""
    name = b"caf\xe9.jpg"
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(png())
    (source,), skipped = read(write(folder, "t.csv", b"image,caption\n" + name + b",hello\n"))
    assert os.fsencode(source.name) == name
    assert skipped == []


@pytest.mark.parametrize("text", ["", "\n", "a,b\n1,2\n", "\0\0\0"])
def test_a_table_without_a_usable_column_is_an_error(tmp_path, text):
    """Which says what is there and what would do."""
    with pytest.raises(InputError, match="caption"):
        read(write(tmp_path, "t.csv", text))


def test_a_parquet_file_that_is_none_is_an_error(tmp_path):
    """One line, not a traceback of pyarrow."""
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="Parquet"):
        read(write(tmp_path, "t.parquet", b"PAR1 no"))


def test_a_table_that_is_a_pipe_or_cannot_be_read_is_an_error(tmp_path):
    """Never a wait."""
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(InputError, match="file"):
        read(tmp_path / "t.csv")


def test_a_line_without_end_takes_no_memory(folder):
    """200 MB without a newline: reported, the rows around it are read."""
    path = folder / "t.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"image": "1.jpg"}\n"')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"image": "2.jpg"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, (skip,) = read(path)
    assert [s.name for s in found] == ["1.jpg", "2.jpg"]
    assert (skip.path, skip.detail) == (f"{path}:2", "line too long")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 130_000


def test_a_long_table_streams(folder):
    """Row 26: 30,000 texts: memory stays flat."""
    path = folder / "t.csv"
    with open(path, "w") as file:
        file.write("image,caption\n")
        for number in range(30_000):
            file.write(f",text number {number}\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in read_collection([str(path)], on_skip=pytest.fail)) == 30_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000


def test_a_huge_cell_is_reported(folder):
    """A quote that is never closed ends at the limit of a cell."""
    text = 'image,caption\n1.jpg,"' + "x" * 200_000 + '"\n2.jpg,b\n'
    found, (skip,) = read(write(folder, "t.csv", text))
    assert ([s.name for s in found], skip.reason) == (["2.jpg"], SkipReason.BAD_ROW)


def test_a_picture_column_of_the_datasets_library_gives_its_path(folder):
    """{"bytes", "path"}."""
    (source,), _ = read(write(folder, "t.jsonl", '{"image": {"bytes": null, "path": "1.jpg"}, "text": "t"}'))
    assert source.name == "1.jpg"


@given(st.dictionaries(st.text(max_size=9), st.none() | st.text() | st.integers() | st.floats() | st.lists(st.text())))
def test_any_row_is_a_record_or_a_value_error(entries):
    """Whatever a row holds; what comes out can be stored as JSON and as text."""
    try:
        found = record(1, list(entries.items()))
    except ValueError:
        return
    json.dumps(found.metadata, allow_nan=False).encode()
    for caption in found.captions:
        assert caption.encode()
