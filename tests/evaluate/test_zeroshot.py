"""Class folders on disk, named by an encoder whose answers are known: colours that are called by their names."""

import os

import pytest
from PIL import Image

from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.comparison import Verdict
from mmsearch.evaluate.prompts import TEMPLATES
from mmsearch.evaluate.zeroshot import class_folders, compare_class_folders, evaluate_classes, read_templates
from mmsearch.testing import COLORS, ColorEncoder


class Blind(ColorEncoder):
    """Sees every picture as red."""

    def encode_pixels(self, pixels, *, batch_size=32):
        rows, ok = super().encode_pixels(pixels, batch_size=batch_size)
        rows[:] = 0.0
        rows[:, 0] = 1.0
        return rows, ok


class Told:
    def __init__(self) -> None:
        self.total, self.done = None, 0

    def start(self, total):
        self.total = total

    def advance(self, n, *, note=""):
        self.done += n


def folders(root, *names: str, each: int = 1):
    """A folder for each name with `each` pictures of the colour that its name ends with."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        colour = next(one for one in COLORS if name.lower().endswith(one))
        for number in range(each):
            Image.new("RGB", (20, 16), COLORS[colour]).save(root / name / f"{number}.png")
    return root


def run(root, **options):
    return evaluate_classes(root, encoder=options.pop("encoder", ColorEncoder()), workers=1, **options)


def found(root, **options):
    return class_folders(root, on_skip=lambda skipped: None, **options)


def test_pictures_are_named_by_their_folders(tmp_path):
    """Underscores and capitals are no obstacle; every picture finds its folder's name among all of them."""
    read = run(folders(tmp_path, "deep_red", "Bright-Green", "skyBlue", "yellow", "cyan", "magenta", each=2))
    assert (read.images, len(read.classes), read.values["top1"], read.values["top5"]) == (12, 6, 1.0, 1.0)
    assert [one.name for one in read.classes] == ["Bright Green", "cyan", "deep red", "magenta", "sky Blue", "yellow"]
    assert read.model == "colors"
    assert (read.skipped, read.warnings) == ((), ())


def test_wrong_names_are_seen(tmp_path):
    """Red pictures in a folder called blue are taken for red: the answers do not come from the folders."""
    folders(tmp_path, "red", "blue", each=2)
    Image.new("RGB", (20, 16), COLORS["red"]).save(tmp_path / "blue" / "0.png")
    read = run(tmp_path)
    assert read.values["top1"] == pytest.approx(3 / 4)
    assert read.classes[0].taken_for == ("red", 1)


def test_templates_are_asked_for_every_class(tmp_path):
    """The encoder reads each name in each sentence; the default is the bundled sentences."""
    asked = []

    class Listens(ColorEncoder):
        def encode_texts(self, texts, *, batch_size=64):
            asked.extend(texts)
            return super().encode_texts(texts)

    folders(tmp_path, "red", "sky_blue")
    assert run(tmp_path, encoder=Listens(), templates=("a {}", "the {}")).templates == 2
    assert asked == ["a red", "the red", "a sky blue", "the sky blue"]
    assert run(tmp_path, encoder=Listens()).templates == len(asked[4:]) // 2 == len(TEMPLATES)


def test_pictures_in_deeper_folders_belong_to_the_first(tmp_path):
    """Sub-folders of a class (train, val, a photographer) are no classes."""
    folders(tmp_path, "red", "green")
    folders(tmp_path / "red", "more_red")
    assert [one.images for one in run(tmp_path).classes] == [1, 2]


def test_empty_and_broken_classes_are_warned_of_and_are_no_choice(tmp_path):
    """Numbers over fewer classes are easier, so it is said; broken pictures are counted."""
    folders(tmp_path, "red", "green")
    (tmp_path / "blue").mkdir()
    (tmp_path / "yellow").mkdir()
    (tmp_path / "yellow" / "broken.png").write_bytes(b"no picture")
    read = run(tmp_path)
    assert [one.name for one in read.classes] == ["green", "red"]
    assert sorted(read.warnings) == [
        "no readable picture of blue: the class is left out",
        "no readable picture of yellow: the class is left out",
    ]
    assert len(read.skipped) == 1


def test_loose_pictures_and_folders_of_one_name_are_warned_of(tmp_path):
    """What is left out or joined is said, with how much."""
    folders(tmp_path, "dark_red", "dark-Red", "green")
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    read = found(tmp_path)
    assert read.names == ("dark Red", "green")
    assert read.labels == (0, 0, 1)
    assert [warning.split(":")[0] for warning in read.warnings] == [
        "1 pictures lie in no class folder", "3 folders have 2 different names",
    ]  # fmt: skip


def test_numbers_are_poor_names(tmp_path):
    """Folders 0 and 1 say nothing of what they show."""
    folders(tmp_path, "red", "green")
    (tmp_path / "red").rename(tmp_path / "0")
    (tmp_path / "green").rename(tmp_path / "1")
    assert "numbers" in found(tmp_path).warnings[0]


@pytest.mark.slow
def test_ids_of_imagenet_are_looked_up(tmp_path):
    """n01440764 is a tench; two cranes are told apart; an id that is in no table stays."""
    pytest.importorskip("timm")
    for name in ("n01440764", "n02012849", "n03126707", "n99999999"):
        folders(tmp_path, "red")
        (tmp_path / "red").rename(tmp_path / name)
    names = found(tmp_path).names
    assert names[0] == "tench"
    assert all(name.startswith("crane, ") for name in names[1:3])
    assert "bird" in names[1]
    assert names[3] == "n99999999"


def test_excluded_classes_and_the_limit(tmp_path):
    """A folder of strays is a class unless it is left out; the limit counts pictures of each class."""
    folders(tmp_path, "red", "green", "BACKGROUND_blue", each=3)
    assert "BACKGROUND blue" in found(tmp_path).names
    assert found(tmp_path, exclude=["BACKGROUND*"], limit=2).labels == (0, 0, 1, 1)
    with pytest.raises(UsageError):
        found(tmp_path, limit=0)


def test_names_that_are_no_text_still_work(tmp_path):
    """Folder names are bytes."""
    folders(tmp_path, "red", "green")
    os.rename(tmp_path / "red", os.fsencode(tmp_path) + b"/red_caf\xe9")
    assert run(tmp_path).values["top1"] == 1.0


@pytest.mark.parametrize("names", [(), ("red",)])
def test_no_folders_or_one_class_is_an_error(tmp_path, names):
    """There is nothing to choose from."""
    Image.new("RGB", (8, 8)).save(folders(tmp_path, *names) / "loose.png")
    with pytest.raises(InputError, match="class"):
        run(tmp_path)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    """Also a file in its place."""
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        with pytest.raises(InputError, match=name):
            run(tmp_path / name)


def test_a_folder_without_one_readable_picture_is_an_error(tmp_path):
    """Not an empty table."""
    for name in ("red", "green"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="2 skipped"):
        run(tmp_path)


def test_two_models_on_the_same_folders(tmp_path):
    """The one that sees only red falls; progress of both is one bar that ends at its total."""
    told = Told()
    folders(tmp_path, *COLORS, each=2)
    read = compare_class_folders(
        tmp_path, before=ColorEncoder, after=Blind, workers=1, templates=("{}", "a {}"), progress=told
    )
    assert read.differences["classes"]["top1"].verdict is Verdict.FALLS
    assert (read.before.values["top1"], read.after.values["top1"]) == (1.0, 1 / 8)
    assert told.done == told.total == 2 * (16 + 8 * 2)


def test_templates_come_from_a_text_file(tmp_path):
    """UTF-8 with or without a mark; a file that is not there is one line."""
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfune photo: {}\n")
    assert read_templates(tmp_path / "t.txt") == ("une photo: {}",)
    with pytest.raises(InputError, match="none"):
        read_templates(tmp_path / "none.txt")
