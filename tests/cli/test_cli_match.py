"""`mmsearch match`: one pair, many pairs, and how good the answers are."""

import json
from pathlib import Path

import fsspec
import pytest
from cli_fakes import FakeLibrary
from PIL import Image

from mmsearch.cli.library import Library
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker


@pytest.fixture
def library(tmp_path) -> Library:
    """Knows colours; two pictures and a broken one are in the current folder."""
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), COLORS[name]).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    return Library(ColorEncoder(), ColorReranker())


def test_one_pair_is_a_probability_and_yes_or_no(mmsearch, library):
    """Both answers end with 0; the threshold is the user's."""
    ended = mmsearch("match", "red.png", "a red one", library=library)
    probability, word = ended.out.rstrip("\n").split("\t")
    assert (ended.code, word, ended.err) == (0, "yes", "") and float(probability) > 0.99
    ended = mmsearch("match", "red.png", "a blue one", library=library)
    assert (ended.code, ended.out.rstrip("\n").split("\t")[1]) == (0, "no")
    assert mmsearch("match", "red.png", "red", "--threshold", "1", library=library).out.endswith("no\n")
    read = json.loads(mmsearch("match", "red.png", "red", "--json", library=library).out)
    assert (read["image"], read["text"], read["match"]) == ("red.png", "red", True)
    assert {"cosine", "logit", "log_odds"} <= set(read["parts"])


def test_a_picture_may_be_named_by_an_address(mmsearch, library):
    """It is fetched; both slashes arrive."""
    fsspec.filesystem("memory").pipe("/asked/red.png", Path("red.png").read_bytes())
    ended = mmsearch("match", "memory://asked/red.png", "red", "--json", library=library)
    assert (ended.code, json.loads(ended.out)["image"]) == (0, "memory://asked/red.png")


def test_many_pairs_are_a_line_each_in_their_order(mmsearch, library):
    """JSON lines, or probability, answer, picture and text; broken pictures are named and left out."""
    Path("pairs.csv").write_text("image,text\nred.png,red\nbad.png,red\nblue.png,red\ngone.png,x\n")
    ended = mmsearch("match", "pairs.csv", "--json", "--workers", "1", library=library)
    read = [json.loads(line) for line in ended.out.splitlines()]
    assert ended.code == 0
    assert [(Path(one["image"]).name, one["match"]) for one in read] == [("red.png", True), ("blue.png", False)]
    assert "label" not in read[0]
    assert any("bad.png: not an image" in line for line in ended.err_lines)
    assert any("gone.png: vanished" in line for line in ended.err_lines)
    assert ended.err_lines[-1] == "2 pairs answered, 2 skipped"
    ended = mmsearch("match", "pairs.csv", "--workers", "1", library=library)
    cells = [line.split("\t") for line in ended.out.splitlines()]
    assert [(one[1], Path(one[2]).name, one[3]) for one in cells] == [
        ("yes", "red.png", "red"),
        ("no", "blue.png", "red"),
    ]


def test_labels_are_summed_up_on_stderr(mmsearch, library):
    """Accuracy, ROC AUC and calibration error; the labels stand in the JSON lines."""
    Path("pairs.csv").write_text(
        "image,text,label\nred.png,red,1\nblue.png,red,0\nblue.png,blue,yes\nred.png,blue,no\n"
    )
    ended = mmsearch("match", "pairs.csv", "--json", "--workers", "1", library=library)
    assert [json.loads(line)["label"] for line in ended.out.splitlines()] == [True, False, True, False]
    assert ended.err_lines[0] == "4 labelled pairs: 100.0 % answered rightly at 0.5"
    assert any(line.startswith("ROC AUC") for line in ended.err_lines)
    assert any(line.startswith("ECE") for line in ended.err_lines)


@pytest.mark.parametrize(
    "args", [("red.png", " "), ("",), ("red.png", "red", "--threshold", "2"), ("p.csv", "--threshold", "nan"), ()]
)
def test_what_cannot_be_asked_is_a_usage_error(mmsearch, args):
    """Exit 2 before a model is loaded."""
    library = FakeLibrary()
    assert mmsearch("match", *args, library=library).code == 2
    assert library.calls == []


def test_a_picture_that_is_broken_or_stands_alone_is_one_clear_line(mmsearch, library):
    """Exit 1: it cannot be read; a picture is no table."""
    Path("empty.csv").write_text("image,text\n")
    wrong = ((("bad.png", "red"), 1), (("red.png",), 2), (("gone.csv",), 1), (("empty.csv",), 1), ((".",), 1))
    for args, code in wrong:
        ended = mmsearch("match", *args, library=library)
        assert (ended.code, len(ended.err_lines), ended.out) == (code, 1, "")
    assert mmsearch("match", "my red.png", library=library).err.endswith(
        "Add a text: mmsearch match 'my red.png' \"...\"\n"
    )


def test_notes_are_said_once(mmsearch, library):
    """Labels that are none, texts longer than the model reads; the answers are there all the same."""
    long = "red " * (ColorEncoder().max_tokens + 1)
    Path("pairs.csv").write_text(f"image,text,label\nred.png,{long},dog\nred.png,{long},cat\n")
    ended = mmsearch("match", "pairs.csv", "--workers", "1", library=library)
    assert (ended.code, len(ended.out.splitlines()), len(ended.err_lines)) == (0, 2, 2)
    assert "'dog' is no label" in ended.err_lines[0]
    assert ended.err_lines[1].startswith("2 pairs with a text longer than")
    ended = mmsearch("match", "red.png", long, library=library)
    assert (ended.code, len(ended.err_lines)) == (0, 1) and "only its beginning" in ended.err
    for text, cut in ((long, True), ("red", None)):
        assert json.loads(mmsearch("match", "red.png", text, "--json", library=library).out).get("cut") is cut
