"""Folders as the `datasets` library and its hub lay them out, as pairs; pictures inside Parquet and Arrow files."""

from __future__ import annotations

import json
import os
import struct

import pytest
from locked import locked, shared_path  # noqa: F401 - a fixture
from picture_builders import photo, png

from mmsearch.data.collection import read_collection
from mmsearch.data.images import open_image
from mmsearch.data.loading import Loaded, Loader
from mmsearch.data.packed import read_picture
from mmsearch.data.pairs import read_pairs
from mmsearch.errors import ImageError, InputError, MissingExtraError
from mmsearch.types import Preprocessing, SkipReason

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402 - only where pyarrow is

PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def rows(first: int, count: int, **more: object) -> list[dict[str, object]]:
    """Pictures of growing width inside, with their captions; all of one file name, as happens."""
    return [
        {"image": {"bytes": png(photo(10 + i, 8)), "path": "image.png"}, "caption": f"caption {i}", **more}
        for i in range(first, first + count)
    ]


def table(content: list[dict[str, object]], kind=PICTURE):
    schema = pyarrow.schema([(name, kind if name == "image" else _kind(v)) for name, v in content[0].items()])
    return pyarrow.Table.from_pylist(content, schema=schema)


def _kind(value: object):
    if isinstance(value, list):
        return pyarrow.list_(pyarrow.string())
    return pyarrow.int64() if isinstance(value, int) else pyarrow.string()


def as_parquet(path, content, *, kind=PICTURE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(content, kind), path, **options)
    return path


def as_saved(
    folder, content, *, split: str | None = None, files: int = 1, kind=PICTURE, stream=True, codec=None, chunk=2
):
    """A folder as `save_to_disk` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, names = table(content, kind), [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    for i, name in enumerate(names):
        part = whole.slice(i * len(whole) // files, (i + 1) * len(whole) // files - i * len(whole) // files)
        make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
        with make(str(folder / name), whole.schema, options=options) as writer:
            writer.write_table(part, max_chunksize=chunk)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(path, **options):
    skipped: list = []
    return list(read_pairs(str(path), on_skip=skipped.append, **options)), skipped


def widths(pairs) -> list[int]:
    return [open_image(pair.image)[0].width for pair in pairs]


def check_five(pairs) -> None:
    """Every picture beside its own caption, each in a group of its own."""
    assert [pair.captions for pair in pairs] == [(f"caption {i}",) for i in range(5)]
    assert widths(pairs) == [10, 11, 12, 13, 14]
    assert len({pair.group for pair in pairs}) == 5


KINDS = [
    PICTURE,
    pyarrow.struct([("path", pyarrow.string()), ("bytes", pyarrow.large_binary())]),
    pyarrow.struct([("bytes", pyarrow.binary())]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 100])
def test_pictures_inside_a_parquet_file(tmp_path, kind, group):
    """In any order of its parts and any size of its row groups."""
    pairs, skipped = read(as_parquet(tmp_path / "t.parquet", rows(0, 5), kind=kind, row_group_size=group))
    check_five(pairs)
    assert widths(pairs[::-1]) == [14, 13, 12, 11, 10]
    assert skipped == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("files", "stream"), [(1, True), (2, True), (1, False)])
def test_pictures_inside_saved_arrow_files(tmp_path, kind, files, stream):
    """One file or several, stream or file layout; nothing is copied out."""
    pairs, skipped = read(as_saved(tmp_path / "d", rows(0, 5), kind=kind, files=files, stream=stream))
    check_five(pairs)
    assert skipped == []
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_a_long_batch_is_read_in_parts(tmp_path):
    """More rows in one piece than are held at once: each still has its own bytes."""
    content = [{"image": {"bytes": b"%d" % i, "path": None}, "caption": f"{i}"} for i in range(2500)]
    pairs, _ = read(as_saved(tmp_path, content, chunk=2500))
    assert [read_picture(pair.image)[0] for pair in pairs] == [b"%d" % i for i in range(2500)]
    assert [pair.captions for pair in pairs] == [(f"{i}",) for i in range(2500)]


@pytest.mark.parametrize("name", ["image", "jpg", "Picture", "bytes"])
def test_a_column_of_plain_bytes_is_a_column_of_pictures(tmp_path, name):
    """Under the names that it goes by; a name beside it is metadata."""
    content = [{name: png(photo(10 + i, 8)), "caption": f"caption {i}", "filename": "x.png"} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "t.parquet")
    check_five(read(tmp_path / "t.parquet")[0])


def test_parquet_shards_of_a_hub_snapshot(tmp_path):
    """data/train-00000-of-00002.parquet and so on; README and JSON beside them say nothing."""
    as_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows(0, 2))
    as_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows(2, 1))
    as_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows(3, 2))
    (tmp_path / "README.md").write_text("# data")
    pairs, _ = read(tmp_path)
    check_five(pairs)
    assert [pair.split for pair in pairs] == ["train", "train", "train", "val", "val"]
    assert len(read(tmp_path, split="val")[0]) == 2


@pytest.mark.parametrize("layout", ["{}.parquet", "{}/0000.parquet"])
def test_other_places_for_parquet_shards(tmp_path, layout):
    """In the folder itself, or a folder a split."""
    as_parquet(tmp_path / layout.format("test"), rows(0, 2))
    as_parquet(tmp_path / layout.format("train"), rows(2, 3))
    assert sorted(str(pair.split) for pair in read(tmp_path)[0]) == ["test", "test", "train", "train", "train"]


def test_several_saved_splits(tmp_path):
    """dataset_dict.json names them, in its order."""
    as_saved(tmp_path / "train", rows(0, 3), split="train")
    as_saved(tmp_path / "test", rows(3, 2), split="test")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    pairs, _ = read(tmp_path)
    check_five(pairs)
    assert [pair.split for pair in pairs] == ["train"] * 3 + ["test"] * 2


def test_a_saved_split_says_its_name(tmp_path):
    """Unless a row says its own."""
    pairs, _ = read(as_saved(tmp_path, rows(0, 2, split="test") + rows(2, 1, split=None), split="validation"))
    assert [pair.split for pair in pairs] == ["test", "test", "val"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_folder_of_pictures_with_a_table(tmp_path, ending):
    """metadata.csv names the pictures that lie beside it, here a folder a split."""
    for split, numbers in (("train", (0, 1, 2)), ("validation", (3, 4))):
        folder = tmp_path / split
        folder.mkdir()
        content = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in numbers]
        for i in numbers:
            (folder / f"{i}.png").write_bytes(png(photo(10 + i, 8)))
        if ending == "csv":
            lines = ["file_name,text", *(",".join(row.values()) for row in content)]
            (folder / "metadata.csv").write_text("\n".join(lines))
        elif ending == "jsonl":
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, content)))
        else:
            parquet.write_table(pyarrow.Table.from_pylist(content), folder / "metadata.parquet")
    pairs, skipped = read(tmp_path)
    check_five(pairs)
    assert [pair.split for pair in pairs] == ["train"] * 3 + ["val"] * 2
    assert pairs[0].image == str(tmp_path / "train" / "0.png")
    assert skipped == []


def test_pictures_named_only_are_found_beside_the_data_set(tmp_path):
    """{"bytes": null, "path": ...}: relative to the folder."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(photo(33, 8)))
    content = [{"image": {"bytes": None, "path": f"images/{i}.png"}, "caption": f"c{i}"} for i in (1, 2)]
    pairs, skipped = read(as_saved(tmp_path, content))
    assert widths(pairs) == [33]
    assert [one.reason for one in skipped] == [SkipReason.VANISHED]


def test_rows_with_the_same_picture_are_one_pair(tmp_path):
    """One row a caption: by what is in the picture, not by what it is called."""
    first, second = png(photo(20, 8)), png(photo(21, 8))
    content = [
        {"image": {"bytes": data, "path": "same.png"}, "caption": text}
        for data, text in ((first, "a"), (second, "x"), (first, "b"))
    ]
    pairs, _ = read(as_parquet(tmp_path / "t.parquet", content))
    assert [(pair.captions, width) for pair, width in zip(pairs, widths(pairs), strict=True)] == [
        (("a", "b"), 20),
        (("x",), 21),
    ]


def test_a_picture_in_two_splits_is_one_group(tmp_path):
    """So that whoever trains notices the leak."""
    as_parquet(tmp_path / "train.parquet", rows(0, 3))
    as_parquet(tmp_path / "test.parquet", rows(2, 2))
    pairs, _ = read(tmp_path)
    assert len(pairs) == 5
    assert len({pair.group for pair in pairs}) == 4
    assert {pair.split for pair in pairs if pair.captions == ("caption 2",)} == {"train", "test"}


def test_columns_mean_what_they_mean_in_any_table(tmp_path):
    """Lists of captions, group, split; numbers stay where they are."""
    content = rows(0, 2, captions=["one", "two"], group="g", label=3)
    pairs, _ = read(as_saved(tmp_path, content))
    assert [pair.captions for pair in pairs] == [("caption 0", "one", "two"), ("caption 1", "one", "two")]
    assert {pair.group for pair in pairs} == {"g"}


@pytest.mark.parametrize("make", ["parquet", "arrow"])
def test_a_broken_row_costs_itself_only(tmp_path, make):
    """No picture, no caption, neither, a picture of no bytes; the others keep their own."""
    content = rows(0, 5)
    content[1]["image"] = {"bytes": None, "path": None}
    content[2]["caption"] = None
    content[3] = {"image": None, "caption": None}
    content[4]["image"] = {"bytes": b"", "path": "x.png"}
    content += rows(7, 1)
    path = as_parquet(tmp_path / "t.parquet", content) if make == "parquet" else as_saved(tmp_path / "d", content)
    pairs, skipped = read(path)
    assert [pair.captions for pair in pairs] == [("caption 0",), ("caption 4",), ("caption 7",)]
    assert widths([pairs[0], pairs[2]]) == [10, 17]
    with pytest.raises(ImageError, match="empty file"):
        open_image(pairs[1].image)
    assert [one.reason for one in skipped].count(SkipReason.BAD_ROW) == len(skipped) == 3
    assert sorted(int(one.path.rsplit(":", 1)[1]) for one in skipped) == [2, 3, 4]


@pytest.mark.parametrize("make", ["parquet", "arrow"])
def test_workers_decode_what_is_inside(tmp_path, make):
    """As they decode files, also when memory is bounded."""
    content = rows(0, 5)
    path = as_parquet(tmp_path / "t.parquet", content) if make == "parquet" else as_saved(tmp_path / "d", content)
    pairs, _ = read(path)
    with Loader(preprocessing=Preprocessing(size=16), workers=1) as loader:
        found = list(loader.load((i, pair.image) for i, pair in enumerate(pairs)))
    assert all(isinstance(one, Loaded) for one in found)
    assert [one.info.width for one in found] == [10, 11, 12, 13, 14]


def test_a_parquet_file_written_anew_has_no_such_row(tmp_path):
    """Or another picture in it; never a crash."""
    path = as_parquet(tmp_path / "t.parquet", rows(0, 5))
    pairs, _ = read(path)
    assert widths(pairs[4:]) == [14]
    as_parquet(path, rows(0, 2))
    with pytest.raises(ImageError, match="no row 4"):
        read_picture(pairs[4].image)
    path.write_bytes(b"PAR1")
    with pytest.raises(ImageError):
        read_picture(pairs[0].image)
    path.unlink()
    with pytest.raises(ImageError, match="vanished"):
        read_picture(pairs[0].image)


def test_compressed_arrow_is_refused(tmp_path):
    """Nothing lies in it as is."""
    with pytest.raises(InputError, match="compressed"):
        read(as_saved(tmp_path, rows(0, 4), codec="lz4"))


def test_arrow_files_that_are_none_are_errors(tmp_path):
    """Empty, rubbish, cut."""
    folder = as_saved(tmp_path, rows(0, 5))
    path = folder / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for content in (b"", b"rubbish" * 99, whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="Arrow"):
            read(folder)


@pytest.mark.parametrize(
    "state",
    [
        "{", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../d/x.arrow"}]}',
        '{"_data_files": [{"filename": "/etc/passwd"}]}', '{"_data_files": [{"filename": ".."}]}',
        '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}, 5]}',
    ],
)  # fmt: skip
def test_a_description_that_leads_elsewhere_is_refused(tmp_path, state):
    """Names in state.json are plain names in that folder."""
    folder = as_saved(tmp_path / "d", rows(0, 2))
    (folder / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"state\.json"):
        read(folder)


def test_splits_that_lead_elsewhere_are_refused(tmp_path):
    """Names in dataset_dict.json are plain names too."""
    as_saved(tmp_path / "other", rows(0, 2))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(InputError, match="plain file names"):
        read(tmp_path / "d")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    """pip install 'mmsearch[parquet]'; a metadata.csv needs none."""
    as_saved(tmp_path / "d", rows(0, 2))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "metadata.csv").write_text("file_name,text\n1.png,t\n")
    (tmp_path / "p" / "1.png").write_bytes(png())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mmsearch\[parquet\]"):
        read(tmp_path / "d")
    assert len(read(tmp_path / "p")[0]) == 1


def test_a_folder_that_is_no_data_set_is_an_error_when_it_is_called_one(tmp_path):
    """And one of pictures with side-cars else."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("mine")
    as_parquet(tmp_path / "stray.parquet", rows(0, 2))
    assert [pair.captions for pair in read(tmp_path)[0]] == [("mine",)]
    with pytest.raises(InputError, match="none of them"):
        read(tmp_path, format="huggingface")


@pytest.mark.parametrize("name", ["metadata.csv", "more.parquet"])
def test_a_table_in_any_sub_folder_is_no_data_set(tmp_path, name):
    """Pictures with side-cars stay what they are; only a split's folder counts, or a file named as one."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png())
        (tmp_path / folder / "1.txt").write_text(folder)
    if name.endswith("csv"):
        (tmp_path / "b" / name).write_text("file_name,size\n1.png,5\n")
    else:
        as_parquet(tmp_path / "b" / name, rows(0, 2))
    assert [pair.captions for pair in read(tmp_path)[0]] == [("a",), ("b",)]


def test_a_picture_called_state_has_its_side_car(tmp_path):
    """And the folder is one of pictures; without its Arrow files a saved split is still an error."""
    (tmp_path / "state.png").write_bytes(png())
    (tmp_path / "state.json").write_text('{"caption": "Ohio"}')
    assert [pair.captions for pair in read(tmp_path)[0]] == [("Ohio",)]
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    with pytest.raises(InputError, match="data-0"):
        read(tmp_path)


def test_a_folder_that_may_not_be_read_is_an_error(shared_path):  # noqa: F811 - the fixture
    """Of a data set also one of its splits, since nobody would miss it; of a folder of pictures it is reported."""
    as_parquet(shared_path / "d" / "train" / "0.parquet", rows(0, 2))
    as_parquet(shared_path / "d" / "test" / "0.parquet", rows(0, 2))
    for name in ("p/a", "p/test/b"):
        (shared_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shared_path / f"{name}.png").write_bytes(png())
        (shared_path / f"{name}.txt").write_text(name)
    assert (len(read(shared_path / "d")[0]), len(read(shared_path / "p")[0])) == (4, 2)
    with locked(shared_path / "d" / "test", shared_path / "p" / "test"):
        with pytest.raises(InputError, match=r"d/test: expected a readable folder"):
            read(shared_path / "d")
        pairs, skipped = read(shared_path / "p")
        with pytest.raises(InputError, match="readable folder"):
            read(shared_path / "p" / "test")
        with pytest.raises(InputError, match="readable folder"):
            read(shared_path / "p" / "test", format="huggingface")
        with pytest.raises(InputError, match="readable folder"):
            read(shared_path / "p" / "test", format="webdataset")
    assert [pair.captions for pair in pairs] == [("p/a",)]
    assert [one.reason for one in skipped] == [SkipReason.UNREADABLE]


@pytest.mark.parametrize("size", [0, 4, 16, 23])
def test_an_arrow_file_with_too_few_offsets_is_an_error(tmp_path, size):
    """The length of that buffer says so; none of them is read past its end."""
    folder = as_saved(tmp_path, rows(0, 5), chunk=5)
    path = folder / "data-00000-of-00001.arrow"
    whole, six_offsets = path.read_bytes(), struct.pack("<q", 24)
    assert whole.count(six_offsets) >= 2
    path.write_bytes(whole.replace(six_offsets, struct.pack("<q", size), 1))
    with pytest.raises(InputError, match="too few offsets"):
        read(folder)


def test_arrow_offsets_that_leave_and_come_back_are_an_error(tmp_path):
    """The last is the first, and one between them lies far outside."""
    folder = as_saved(tmp_path, rows(0, 2), chunk=2)
    path = folder / "data-00000-of-00001.arrow"
    sizes = [len(row["image"]["bytes"]) for row in rows(0, 2)]
    sound, wild = struct.pack("<iii", 0, sizes[0], sum(sizes)), struct.pack("<iii", 0, 1 << 30, 0)
    whole = path.read_bytes()
    assert whole.count(sound) == 1
    path.write_bytes(whole.replace(sound, wild))
    with pytest.raises(InputError, match="outside the file"):
        read(folder)


def test_an_index_refuses_pictures_inside_a_table(tmp_path):
    """With a reason; texts and named pictures are indexed as before."""
    path = as_parquet(tmp_path / "t.parquet", rows(0, 2))
    with pytest.raises(InputError, match="pictures inside a table or an archive"):
        list(read_collection([str(path)], on_skip=print))
