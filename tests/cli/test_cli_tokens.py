"""Patch tokens from the command line: made, counted, checked, repaired, removed."""

import json
import sqlite3
from pathlib import Path

import pytest
from cli_fakes import FakeLibrary
from PIL import Image

from mmsearch.cli.library import Library
from mmsearch.store.tokens import TOKENS_NAME
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker, color_image


@pytest.fixture
def library() -> Library:
    return Library(ColorEncoder(), ColorReranker())


def photos(folder: Path) -> None:
    folder.mkdir()
    for color in COLORS:
        Image.fromarray(color_image(color)).save(folder / f"{color}.png")


@pytest.mark.parametrize(("flag", "told"), [("--tokens", True), ("--no-tokens", False), (None, None)])
def test_the_flag_reaches_the_builder(mmsearch, flag, told):
    """Said, denied, or left to the index."""
    fake = FakeLibrary()
    assert mmsearch("index", "photos", *([flag] if flag else []), library=fake).code == 0
    assert dict(fake.calls)["build"]["tokens"] is told


def test_tokens_are_made_told_and_removed(mmsearch, tmp_path, library):
    """One line says how many and how large; `--json` and `info` have the numbers."""
    photos(tmp_path / "photos")
    ended = mmsearch("index", "photos", "--tokens", "--workers", "1", "--json", library=library)
    assert ended.code == 0
    assert ended.err_lines[-1] == "patch tokens of 8 pictures (8 new), 0.0 KB each"
    assert json.loads(ended.out)["tokens"] == 8
    facts = json.loads(mmsearch("info", "--json", library=library).out)
    assert facts["patch_tokens"] == {"pictures": 8, "bytes": 8 * 20}
    assert facts["settings"]["tokens"] is True
    lines = mmsearch("info", library=library).out.splitlines()
    assert [line.split() for line in lines if line.startswith("patch_tokens")] == [
        ["patch_tokens.pictures", "8"], ["patch_tokens.bytes", "160"],
    ]  # fmt: skip
    ended = mmsearch("index", "photos", "--no-tokens", "--workers", "1", library=library)
    assert "patch tokens" not in ended.err
    assert json.loads(mmsearch("info", "--json", library=library).out)["patch_tokens"]["pictures"] == 0


def test_damaged_tokens_are_named_and_repaired_as_said(mmsearch, tmp_path, library):
    """`verify` exits with 4 and names the picture and the command; that command brings it right; searches go on."""
    photos(tmp_path / "photos")
    mmsearch("index", "photos", "--tokens", "--workers", "1", library=library)
    with sqlite3.connect(tmp_path / "indexes" / "photos" / TOKENS_NAME) as db:
        db.execute("UPDATE tokens SET tokens = zeroblob(20) WHERE rowid = 3")
    db.close()
    ended = mmsearch("verify", library=library)
    assert ended.code == 4
    (line,) = ended.out.splitlines()
    assert line.startswith(f"{TOKENS_NAME}: ") and ".png" in line and "--tokens" in line
    assert mmsearch("query", "a red car", library=library).code == 0
    assert mmsearch("index", "photos", "--tokens", "--workers", "1", library=library).code == 0
    assert mmsearch("verify", library=library).code == 0
