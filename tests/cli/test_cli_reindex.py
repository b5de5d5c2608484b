"""`mmsearch reindex`, `mmsearch bridge` and `mmsearch query --model`, over a model whose answers are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_fakes import FakeLibrary
from reindex_kit import TurnedEncoder, captioned, make_index, shades

from mmsearch.cli.library import Library
from mmsearch.errors import IndexLockedError
from mmsearch.store import IndexStore
from mmsearch.store.bridge_file import NAME
from mmsearch.testing import ColorEncoder
from mmsearch.types import Source


class TwoModels(Library):
    """`--model turned` is `TurnedEncoder`, everything else `ColorEncoder`."""

    def __init__(self, encoder=None):
        super().__init__(encoder or ColorEncoder())

    def _load(self, model, *, device):
        return TurnedEncoder()


NEW = Library(TurnedEncoder())
OLD = TwoModels()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Thirty pictures, each with a caption of its own. Read only: copy it."""
    folder = tmp_path_factory.mktemp("made")
    files = shades(folder / "photos", 30)
    rows = [Source("/t.csv", file.stem, str(file), None, (f"number {i} red",), {}) for i, file in enumerate(files)]
    return make_index(folder / "index", rows)


@pytest.fixture
def index(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "index"))


def model_of(path: Path) -> str:
    with IndexStore.open(str(path)) as store:
        return store.model.name


def test_an_index_gets_another_model(mmsearch, index):
    """One line of summary, the JSON object on stdout, exit code 0."""
    ended = mmsearch("reindex", index, "--model", "turned", "--json", "--workers", 1, library=NEW)
    assert ended.code == 0
    said = json.loads(ended.out)
    assert (said["before"], said["after"], said["switched"], said["items"]) == ("colors", "turned", True, 30)
    assert "colors -> turned, 30 pictures and 30 texts encoded" in ended.err
    assert model_of(index) == "turned"


def test_items_that_are_lost_are_listed_and_keep_the_old_model(mmsearch, tmp_path):
    """Exit 1 with the count and what to do; the report has all of them; --drop-missing goes on."""
    index = make_index(tmp_path / "index", captioned(tmp_path / "photos"))
    (tmp_path / "photos" / "red.png").unlink()
    ended = mmsearch("reindex", index, "--model", "turned", "--report", tmp_path / "r.json", library=NEW)
    assert ended.code == 1
    assert "1 item that cannot be; the index has its old model" in ended.err_lines[-1]
    assert "--drop-missing" in ended.err_lines[-1]
    assert any("red.png" in line for line in ended.err_lines)
    missing = json.loads((tmp_path / "r.json").read_text())["missing"]
    assert [Path(one["path"]).name for one in missing] == ["red.png"]
    assert model_of(index) == "colors"
    ended = mmsearch("reindex", index, "--model", "turned", "--drop-missing", library=NEW)
    assert ended.code == 0
    assert "1 item was dropped" in ended.err
    assert "8 items kept of an earlier run" in ended.err
    assert model_of(index) == "turned"


def test_ctrl_c_says_how_to_go_on(mmsearch, index):
    """Exit 130, the index as it was, and the same command finishes."""
    stopping = Library(TurnedEncoder(stop_after=8))
    ended = mmsearch("reindex", index, "--model", "turned", "--batch-size", 4, library=stopping)
    assert ended.code == 130
    assert "Run the same command again" in ended.err
    assert model_of(index) == "colors"
    ended = mmsearch("reindex", index, "--model", "turned", library=NEW)
    assert ended.code == 0
    assert "8 items kept" in ended.err


def test_abort_gives_it_up(mmsearch, index):
    """Also where nothing has begun; not together with a model."""
    mmsearch("reindex", index, "--model", "turned", "--batch-size", 4, library=Library(TurnedEncoder(stop_after=8)))
    assert (index / "reindex").exists()
    assert mmsearch("reindex", index, "--abort", "--model", "x", library=NEW).code == 2
    assert "given up" in mmsearch("reindex", index, "--abort", library=NEW).err
    assert not (index / "reindex").exists()
    ended = mmsearch("reindex", index, "--abort", library=NEW)
    assert (ended.code, "no reindexing has begun" in ended.err) == (0, True)


@pytest.mark.parametrize("verb", ["reindex", "bridge"])
def test_a_model_must_be_named(mmsearch, index, verb):
    """The bundled one is never chosen by leaving something out."""
    ended = mmsearch(verb, index, library=NEW)
    assert ended.code == 2
    assert "--model" in ended.err


@pytest.mark.parametrize("verb", ["reindex", "bridge"])
def test_where_no_index_is_that_is_said(mmsearch, tmp_path, verb):
    """And no model is loaded for it."""
    ended = mmsearch(verb, tmp_path / "nothing", "--model", "nonsense", library=Library())
    assert ended.code == 1
    assert "expected an index" in ended.err


def test_a_writer_in_the_way_is_exit_code_6(mmsearch, index):
    """As for every verb that writes."""
    with IndexStore.open(str(index), write=True):
        ended = mmsearch("reindex", index, "--model", "turned", library=NEW)
    assert ended.code == IndexLockedError.exit_code


def test_a_bridge_is_made_measured_and_asked(mmsearch, index, tmp_path):
    """The table on stderr, the figures as JSON on stdout, and hits of the new model with a note."""
    (tmp_path / "queries.txt").write_text("red\n\nblue and green\n")
    ended = mmsearch("bridge", index, "--model", "turned", "--queries", tmp_path / "queries.txt", library=NEW)
    assert ended.code == 0
    assert (ended.out, "bridged - new" in ended.err, "new model's first hit" in ended.err) == ("", True, True)
    said = json.loads(mmsearch("bridge", index, "--model", "turned", "--sample", 20, "--json", library=NEW).out)
    assert said["sample"] == {"pictures": 20, "texts": 20, "skipped": 0}
    assert said["new"]["name"] == "turned"
    ended = mmsearch("query", "red", "--index", index, "--model", "turned", "-k", 1, "-f", library=OLD)
    assert ended.code == 0
    assert "scores are bridged: queries of turned over rows of colors" in ended.err
    assert ended.out == mmsearch("query", "red", "--index", index, "-k", 1, "-f", library=OLD).out


def test_another_model_without_a_bridge_is_refused(mmsearch, index):
    """The line says what gives the index that model."""
    ended = mmsearch("query", "red", "--index", index, "--model", "turned", library=OLD)
    assert ended.code == 1
    assert "mmsearch reindex" in ended.err


def test_reindexing_can_make_the_bridge_first(mmsearch, index):
    """While it runs the new model can be asked; afterwards the bridge is gone."""
    stopping = Library(TurnedEncoder(stop_after=40))
    command = ("reindex", index, "--model", "turned", "--bridge", "--batch-size", 4)
    assert mmsearch(*command, library=stopping).code == 130
    assert (index / NAME).exists()
    assert mmsearch("query", "red", "--index", index, "--model", "turned", library=OLD).code == 0
    new = TurnedEncoder()
    ended = mmsearch(*command, library=Library(new))
    assert (ended.code, (index / NAME).exists()) == (0, False)
    assert new.images == 30 - 12, "neither the bridge nor what was encoded is made twice"
    assert mmsearch(*command, library=NEW).code == 0


def test_queries_that_cannot_be_read_are_refused_before_a_model_is_loaded(mmsearch, index, tmp_path):
    """A missing file, an empty one."""
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("missing.txt", "empty.txt"):
        ended = mmsearch("bridge", index, "--model", "x", "--queries", tmp_path / name, library=FakeLibrary())
        assert ended.code == 1
        assert "one query a line" in ended.err
