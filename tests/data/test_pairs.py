from __future__ import annotations

import io
import json
import os
import tarfile

import pytest
from picture_builders import png

from mmsearch.data.pairs import read_pairs
from mmsearch.errors import InputError, MissingExtraError
from mmsearch.types import Pair, SkipReason


def read(path, **options) -> tuple[list[Pair], list]:
    skipped: list = []
    return list(read_pairs(str(path), on_skip=skipped.append, **options)), skipped


def pictures(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())


def short(pairs: list[Pair], folder) -> list[tuple]:
    return [(p.image.removeprefix(f"{folder}/"), p.captions, p.split) for p in pairs]


def test_json_lines_with_several_captions(tmp_path):
    """The layout of the bundled recipe: image, split, captions."""
    pictures(tmp_path, "images/1.avif", "images/2.avif")
    rows = [
        {"image": "images/1.avif", "split": "train", "captions": ["a", "b"]},
        {"image": "images/2.avif", "split": "test", "captions": ["c"]},
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    pairs, skipped = read(path)
    assert short(pairs, tmp_path) == [("images/1.avif", ("a", "b"), "train"), ("images/2.avif", ("c",), "test")]
    assert [p.group for p in pairs] == [p.image for p in pairs]
    assert skipped == []
    assert short(read(path, split="test")[0], tmp_path) == [("images/2.avif", ("c",), "test")]


def test_one_row_a_caption_is_one_pair_a_picture(tmp_path):
    """Several captions of one picture are never several pictures."""
    pictures(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "t.csv").write_text("image,caption\n1.jpg,a\n2.jpg,x\n1.jpg,b\n")
    assert short(read(tmp_path / "t.csv")[0], tmp_path) == [("1.jpg", ("a", "b"), None), ("2.jpg", ("x",), None)]


def test_a_column_group_joins_what_belongs_together(tmp_path):
    """Two photos of one product."""
    pictures(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "t.csv").write_text("image,caption,group\n1.jpg,a,shoe\n2.jpg,b,shoe\n")
    assert [p.group for p in read(tmp_path / "t.csv")[0]] == ["shoe", "shoe"]


def test_a_folder_with_side_cars(tmp_path):
    """Pictures with texts are pairs; pictures without are not, and are reported unless nobody wants to know."""
    pictures(tmp_path, "a.jpg", "s/b.jpg", "c.jpg")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "s" / "b.json").write_text('{"caption": "three", "split": "validation", "group": "g"}')
    pairs, skipped = read(tmp_path)
    assert short(pairs, tmp_path) == [("a.jpg", ("one", "two"), None), ("s/b.jpg", ("three",), "val")]
    assert pairs[1].group == "g"
    assert [(s.path, s.reason, s.detail) for s in skipped] == [
        (str(tmp_path / "c.jpg"), SkipReason.BAD_ROW, "no caption beside it")
    ]
    assert read(tmp_path, tell_bare=False) == (pairs, [])


def test_folders_of_a_folder_with_side_cars_name_splits(tmp_path):
    """What a side-car says counts first; a folder that only begins like a split is none, nor is a file's name."""
    for name in ("train/a", "val2017/dogs/b", "Test/c", "test shots/d", "dogs/train", "train/e"):
        pictures(tmp_path, f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text("x")
    (tmp_path / "train" / "e.txt").unlink()
    (tmp_path / "train" / "e.json").write_text('{"caption": "x", "split": "dev"}')
    found = {image: split for image, _, split in short(read(tmp_path)[0], tmp_path)}
    assert found == {
        "train/a.jpg": "train", "val2017/dogs/b.jpg": "val", "Test/c.jpg": "test", "test shots/d.jpg": None,
        "dogs/train.jpg": None, "train/e.jpg": "val",
    }  # fmt: skip


@pytest.mark.parametrize("columns", ["img,sentence", "picture,description", "image_name,comment", "IMG_PATH,Alt"])
def test_other_names_of_columns(tmp_path, columns):
    """As published data sets have them."""
    pictures(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text(f"{columns}\n1.jpg,a dog\n")
    assert short(read(tmp_path / "t.csv")[0], tmp_path) == [("1.jpg", ("a dog",), None)]


def test_what_else_captions_are_called_counts_only_without_captions(tmp_path):
    """A comment beside a caption is a comment, and so is one beside a description."""
    pictures(tmp_path, "1.jpg")
    for column in ("caption", "description"):
        (tmp_path / "t.csv").write_text(f"image,{column},comment\n1.jpg,a dog,blurred\n")
        assert short(read(tmp_path / "t.csv")[0], tmp_path) == [("1.jpg", ("a dog",), None)]


def test_a_text_file_with_a_header_is_a_table(tmp_path):
    """captions.txt beside the folder Images, as Flickr8k is often handed round; other texts are none."""
    pictures(tmp_path, "Images/1.jpg")
    (tmp_path / "captions.txt").write_text('image,caption\n1.jpg,a dog\n1.jpg,"a dog, running"\n')
    assert short(read(tmp_path / "captions.txt")[0], tmp_path) == [("Images/1.jpg", ("a dog", "a dog, running"), None)]
    (tmp_path / "notes.txt").write_text("a text, with an image in it\n")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("notes.txt", "pipe.txt"):
        with pytest.raises(InputError, match="the ending of its format"):
            read(tmp_path / name)


def test_a_table_may_name_pictures_inside_files(tmp_path):
    """By their address, as the held-out pairs of a run over shards do."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("1.jpg", png()), ("1.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = read(tmp_path / "s.tar")[0]
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"image": pairs[0].image, "captions": ["a dog"]}))
    assert [(p.image, p.captions) for p in read(path)[0]] == [(pairs[0].image, ("a dog",))]


def test_karpathy_splits(tmp_path):
    """filepath and filename, sentences raw, restval counts as train."""
    pictures(tmp_path, "val2014/1.jpg", "2.jpg", "3.jpg")
    images = [
        {"filepath": "val2014", "filename": "1.jpg", "split": "restval", "sentences": [{"raw": "a"}, {"raw": "b"}]},
        {"filename": "2.jpg", "split": "test", "sentences": [{"raw": "c"}], "imgid": 7},
        {"filename": "3.jpg", "split": "test", "sentences": [{"tokens": ["d"]}]},
        {"split": "test"},
    ]
    path = tmp_path / "dataset_x.json"
    path.write_text(json.dumps({"images": images, "dataset": "x"}))
    pairs, skipped = read(path)
    assert short(pairs, tmp_path) == [("val2014/1.jpg", ("a", "b"), "train"), ("2.jpg", ("c",), "test")]
    assert [s.reason for s in skipped] == [SkipReason.BAD_ROW, SkipReason.BAD_ROW]


@pytest.mark.parametrize("place", ["annotations", "."])
def test_coco_captions(tmp_path, place):
    """Pictures in a folder beside the annotations' folder or beside the file; split by the file's name."""
    pictures(tmp_path, "val2017/000001.jpg", "val2017/000002.jpg")
    path = tmp_path / place / "captions_val2017.json"
    path.parent.mkdir(exist_ok=True)
    images = [{"id": 2, "file_name": "000002.jpg"}, {"id": 1, "file_name": "000001.jpg"}, {"id": 3}]
    notes = [
        {"image_id": 1, "id": 12, "caption": "second"},
        {"image_id": 1, "id": 11, "caption": "first\n"},
        {"image_id": 2, "id": 13, "caption": "other"},
        {"image_id": 2, "id": 14},
    ]
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    pairs, skipped = read(path)
    assert short(pairs, tmp_path) == [
        ("val2017/000002.jpg", ("other",), "val"),
        ("val2017/000001.jpg", ("first", "second"), "val"),
    ]
    assert len(skipped) == 2
    assert read(path, split="val", format="coco")[0] == pairs


def test_missing_pictures_and_captions_are_reported(tmp_path):
    """And cost themselves only."""
    pictures(tmp_path, "1.jpg", "3.jpg")
    (tmp_path / "t.csv").write_text("image,caption\n1.jpg,a\n2.jpg,b\n3.jpg,\n,only text\n")
    pairs, skipped = read(tmp_path / "t.csv")
    assert short(pairs, tmp_path) == [("1.jpg", ("a",), None)]
    assert [s.reason for s in skipped] == [SkipReason.VANISHED, SkipReason.BAD_ROW, SkipReason.BAD_ROW]
    assert "line 3 of t.csv" in skipped[0].detail


@pytest.mark.parametrize("name", ["dev", "valid", "validation", "VAL", " val "])
def test_names_of_splits_mean_the_same(tmp_path, name):
    """The split called "dev" in the file, "val" asked for, and the other way round."""
    pictures(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text(f"image,caption,split\n1.jpg,a,{name}\n")
    assert read(tmp_path / "t.csv", split="val")[0] == read(tmp_path / "t.csv", split=name)[0]
    assert read(tmp_path / "t.csv", split="val")[0][0].split == "val"


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    """Rather than an evaluation of nothing."""
    pictures(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text("image,caption,split\n1.jpg,a,train\n")
    with pytest.raises(InputError, match="got train"):
        read(tmp_path / "t.csv", split="test")


def test_pairs_without_a_split_are_said_to_be_such(tmp_path):
    """When a split is asked for: "none" would read as no pairs."""
    pictures(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "t.csv").write_text("image,caption,split\n1.jpg,a,train\n2.jpg,b,\n")
    with pytest.raises(InputError, match="got pairs that name none, train"):
        read(tmp_path / "t.csv", split="test")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_row_without_a_split_goes_with_those_of_its_picture(tmp_path, order):
    """With the first split that a row of the picture names; captions of two splits stay apart."""
    pictures(tmp_path, "1.jpg")
    lines = ["1.jpg,a,", "1.jpg,b,train", "1.jpg,c,train"]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,split", *(lines[i] for i in order), "1.jpg,d,test"]))
    pairs = read(tmp_path / "t.csv")[0]
    assert [(set(pair.captions), pair.split) for pair in pairs] == [({"a", "b", "c"}, "train"), ({"d"}, "test")]


def test_paths_that_are_no_pairs_are_errors(tmp_path):
    """No such path; a picture; a document of another kind; broken JSON."""
    pictures(tmp_path, "1.jpg")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"images": []}')
    for path in (tmp_path / "none", tmp_path / "1.jpg", tmp_path / "a.json", tmp_path / "b.json"):
        with pytest.raises(InputError):
            read(path)
    for format in ("coco", "karpathy"):
        with pytest.raises(InputError, match="something else"):
            read(tmp_path / "b.json", format=format)


def test_a_format_whose_package_is_missing_names_the_extra(tmp_path, monkeypatch):
    """pip install 'mmsearch[parquet]'."""
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mmsearch\[parquet\]"):
        read(tmp_path / "t.parquet")


def test_a_list_of_objects_is_a_table(tmp_path):
    """As several projects write their annotations."""
    pictures(tmp_path, "1.jpg")
    (tmp_path / "t.json").write_text(json.dumps([{"image": "1.jpg", "caption": ["a", "b"]}, 5]))
    pairs, skipped = read(tmp_path / "t.json")
    assert short(pairs, tmp_path) == [("1.jpg", ("a", "b"), None)]
    assert [s.reason for s in skipped] == [SkipReason.BAD_ROW]
