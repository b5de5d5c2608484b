"""The commands together, on real files, with an encoder whose answers are known."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from mmsearch.cli.library import Library
from mmsearch.data.images import open_image, prepare
from mmsearch.store import IndexStore
from mmsearch.testing import COLORS, ColorEncoder


class FromFiles(ColorEncoder):
    """Opens pictures as `Encoder` does."""

    def encode_images(self, images, *, batch_size=32):
        pixels = [
            image if isinstance(image, np.ndarray) else prepare(open_image(image)[0], self.preprocessing)
            for image in images
        ]
        return self.encode_pixels(np.stack(pixels))[0]


@pytest.fixture
def colours(mmsearch, tmp_path):
    """Run commands with `ColorEncoder` in a folder with eight pictures, a broken one, and one odd name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in COLORS.items():
        Image.new("RGB", (64, 48), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} thing\n")
    (folder / "broken.jpg").write_bytes(b"this is no picture")
    os.rename(folder / "cyan.png", os.fsencode(folder) + b"/cyan\xe9.png")

    def run(*args):
        return mmsearch(*args, library=Library(FromFiles()))

    return run


def test_index_then_query(colours, tmp_path):
    """The two commands that everybody tries first: the right picture is the first line of stdout."""
    built = colours("index", "photos", "--workers", "1", "--json")
    assert built.code == 0
    report = json.loads(built.out)
    assert (report["added"], len(report["skipped"]), report["index"]) == (8, 1, "indexes/photos")
    asked = colours("query", "something yellow", "-f")
    assert asked.code == 0
    assert asked.out.splitlines()[0] == str(tmp_path / "photos" / "yellow.png")
    assert "index: indexes/photos" in asked.err


def test_every_form_of_a_hit_names_the_same_file(colours, tmp_path):
    """Lines, JSON and NUL-separated paths, also for a name that is not UTF-8."""
    colours("index", "photos", "--workers", "1")
    wanted = os.fsencode(tmp_path) + b"/photos/cyan\xe9.png"
    assert os.fsencode(colours("query", "cyan", "-k", "1").out.rstrip("\n").split("\t")[1]) == wanted
    assert os.fsencode(json.loads(colours("query", "cyan", "-k", "1", "--json").out)["path"]) == wanted
    assert os.fsencode(colours("query", "cyan", "-k", "1", "-0").out) == wanted + b"\0"


def test_a_picture_finds_captions(colours):
    """--image with --to text searches what people wrote."""
    colours("index", "photos", "--workers", "1")
    hit = json.loads(colours("query", "--image", "photos/red.png", "--to", "text", "-k", "1", "--json").out)
    assert (hit["caption"], hit["modality"], hit["rank"]) == ("a red thing", "text", 1)


def test_a_second_run_encodes_nothing(colours):
    """And strict still counts what was skipped before."""
    colours("index", "photos", "--workers", "1")
    again = colours("index", "photos", "--workers", "1", "--json", "--strict")
    report = json.loads(again.out)
    assert again.code == 3
    assert (report["added"], report["encoded_images"], len(report["skipped"])) == (0, 0, 1)


def test_info_and_verify_need_no_model(colours, mmsearch):
    """They work where the model is not to be had."""
    colours("index", "photos", "--workers", "1")
    library = Library()
    facts = json.loads(mmsearch("info", "--json", library=library).out)
    assert facts["items"] == 8
    assert facts["model"]["name"] == "colors"
    assert mmsearch("verify", library=library).code == 0


@pytest.mark.parametrize("file", ["vectors.f16", "manifest.json", "items.sqlite"])
def test_damage_is_found_and_has_an_exit_code(colours, tmp_path, file):
    """One changed byte in the middle: exit 4, the file and its repair named."""
    colours("index", "photos", "--workers", "1")
    path = tmp_path / "indexes" / "photos" / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x55
    path.write_bytes(raw)
    ended = colours("verify", "--json")
    problems = json.loads(ended.out)["problems"]
    assert ended.code == 4
    assert any(file in problem["file"] and problem["repair"] for problem in problems)


def test_an_index_of_another_model_is_refused(colours, mmsearch):
    """Its vectors mean something else; --force encodes everything anew."""
    colours("index", "photos", "--workers", "1")
    other = Library(ColorEncoder(name="other"))
    assert mmsearch("query", "red", library=other).code == 1
    assert mmsearch("index", "photos", "--workers", "1", library=other).code == 1
    forced = mmsearch("index", "photos", "--workers", "1", "--force", "--json", library=other)
    assert (forced.code, json.loads(forced.out)["encoded_images"]) == (0, 8)
    assert mmsearch("query", "red", "-f", "-k", "1", library=other).out.endswith("red.png\n")


def test_a_second_writer_is_told_to_wait(colours):
    """Exit 6 while another process has the index open for writing; readers go on."""
    colours("index", "photos", "--workers", "1")
    with IndexStore.open("indexes/photos", write=True):
        assert colours("index", "photos", "--workers", "1").code == 6
        assert colours("query", "red").code == 0
    assert colours("index", "photos", "--workers", "1").code == 0


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("index", "no-such-folder"), 1),
        (("index", "empty"), 1),
        (("query", "red", "--index", "no-such-index"), 1),
        (("query", "--image", "no-such-picture.jpg"), 1),
        (("query", "--image", "photos/broken.jpg"), 1),
        (("info", "--index", "photos"), 1),
        (("verify", "--index", "no-such-index"), 1),
        (("eval", "no-such-pairs.jsonl"), 1),
        (("query", "red", "-k", "1000000000"), 2),
    ],
)
def test_what_cannot_be_done_is_one_line(colours, tmp_path, args, code):
    """Where, what was expected, what is there, what to do: no traceback."""
    (tmp_path / "empty").mkdir()
    colours("index", "photos", "--workers", "1")
    ended = colours(*args)
    assert ended.code == code
    assert [line for line in ended.err_lines if line.startswith("mmsearch: error: ")] == ended.err_lines[-1:]
    assert ended.out == ""


def test_eval_of_side_car_captions(colours):
    """A folder that was indexed can be evaluated as it is."""
    ended = colours("eval", "photos", "--workers", "1", "--json")
    read = json.loads(ended.out)
    assert (read["images"], read["texts"]) == (7, 7)  # cyan.txt lost its picture when that was renamed
    assert read["text_to_image"]["hit@1"] == read["image_to_text"]["hit@1"] == 1.0


def test_eval_of_class_folders_and_of_two_models(colours, tmp_path):
    """Real files through the real library: names from folders, and a model that does not differ from itself."""
    for name in ("red", "green", "blue"):
        (tmp_path / "classes" / f"so_{name}").mkdir(parents=True)
        os.link(tmp_path / "photos" / f"{name}.png", tmp_path / "classes" / f"so_{name}" / "1.png")
    (tmp_path / "templates.txt").write_text("{}\nall {}\n")
    named = colours("eval", "--classes", "classes", "--templates", "templates.txt", "--workers", "1", "--json")
    read = json.loads(named.out)
    assert (read["images"], read["templates"], read["top1"]) == (3, 2, 1.0)
    for what in (("photos",), ("--classes", "classes")):
        both = colours("eval", *what, "--compare", "bundled", "--workers", "1")
        assert both.code == 0
        assert "rises" not in both.out
        assert "no clear change" in both.out
