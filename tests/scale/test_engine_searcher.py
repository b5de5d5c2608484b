"""Searching an engine by words and pictures, as an index directory is searched; pushing by the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_kit import entries, make_index
from PIL import Image

from mmsearch.builder import build
from mmsearch.cli.app import main
from mmsearch.cli.library import Library
from mmsearch.errors import IndexMismatchError, ModelError, UsageError
from mmsearch.scale.engine import open_engine
from mmsearch.scale.engine_searcher import EngineSearcher
from mmsearch.scale.push import push
from mmsearch.searcher import Searcher
from mmsearch.testing import COLORS, ColorEncoder, color_image
from mmsearch.types import Modality
from mmsearch.where import parse_condition


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An index of one picture a colour, with a caption each and a year that a table gave."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["image,caption,year,kind"]
    for number, color in enumerate(COLORS):
        Image.fromarray(color_image(color)).save(folder / f"{color}.png")
        lines.append(f"{color}.png,a {color} thing,{2000 + number},{'even' if number % 2 == 0 else 'odd'}")
    (folder / "table.csv").write_text("\n".join(lines))
    build([str(folder / "table.csv")], folder / "index", encoder=ColorEncoder())
    return folder


@pytest.fixture(scope="module", params=["file", "postgresql"])
def uri(request, photos, database):
    """The same collection as an index directory, and in PostgreSQL."""
    if request.param == "file":
        return f"file://{photos}/index"
    address = f"{database('pgserver')}&collection=photos"
    push(photos / "index", address)
    return address


def seen(hits) -> list[tuple]:
    """What is shown of each hit, in an order that does not depend on which of equal scores came first."""
    return sorted((-round(hit.score, 3), hit.item.path, str(hit.modality), hit.caption or "") for hit in hits)


@pytest.mark.engines
@pytest.mark.parametrize("to", ["image", "text"])
def test_words_and_pictures_find_what_they_find_in_the_index(photos, uri, to):
    """Same hits, scores, captions and items as the index that was pushed."""
    picture = Image.fromarray(color_image("blue"))
    with (
        Searcher.open(photos / "index", encoder=ColorEncoder()) as index,
        EngineSearcher.open(uri, encoder=ColorEncoder()) as engine,
    ):
        for k in (1, 50):
            found, wanted = engine.search_text("red", k=k, to=to), index.search_text("red", k=k, to=to)
            assert seen(found) == seen(wanted)
            assert [hit.rank for hit in found] == list(range(1, len(wanted) + 1))
            assert seen(engine.search_image(picture, k=k, to=to)) == seen(index.search_image(picture, k=k, to=to))
        above = engine.search_text("red", k=50, to=to, threshold=0.5)
        assert seen(above) == seen(index.search_text("red", k=50, to=to, threshold=0.5))
        assert above[0].item == index.search_text("red", k=1, to=to)[0].item
        assert (engine.model, engine.preprocessing) == (index.model, index.preprocessing)
        assert engine.info()["image_rows"] == len(COLORS)


@pytest.mark.engines
def test_pictures_and_captions_are_merged_by_rank(uri):
    """`to="any"` shows each item once, as its best-placed hit."""
    with EngineSearcher.open(uri, encoder=ColorEncoder()) as engine:
        hits = engine.search_text("red", k=50, to="any")
    names = [Path(hit.item.path).stem for hit in hits]
    assert names[0] == "red"
    assert sorted(names) == sorted(COLORS)
    assert [hit.rank for hit in hits] == list(range(1, len(COLORS) + 1))


@pytest.mark.engines
def test_conditions_narrow_what_is_found(uri):
    """A filter reaches words, pictures and vectors alike."""
    where = (parse_condition("year>=2002"), parse_condition("kind=even"))
    with EngineSearcher.open(uri, encoder=ColorEncoder()) as engine:
        for hits in (
            engine.search_text("red", k=50, to="any", where=where),
            engine.search_vector(np.eye(8, dtype=np.float32)[0], k=50, where=where),
            engine.search_image(color_image("red"), k=50, where=where),
        ):
            assert {hit.item.metadata["year"] for hit in hits} == {"2002", "2004", "2006"}


@pytest.mark.engines
def test_what_an_engine_cannot_do_is_said(uri):
    """Other models, re-ranking and empty questions are refused in one line; `auto` goes without a second stage."""
    with pytest.raises(IndexMismatchError, match="weights"):
        EngineSearcher.open(uri, encoder=ColorEncoder(name="another"))
    with EngineSearcher.open(uri, encoder=ColorEncoder()) as engine:
        assert engine.search_text("red", rerank="auto")
        for bad in ({"rerank": 64}, {"k": 0}, {"k": 10_001}, {"to": "sound"}, {"threshold": 2.0}):
            with pytest.raises(UsageError):
                engine.search_text("red", **bad)
        with pytest.raises(UsageError):
            engine.search_text("  ")
        with pytest.raises(UsageError, match="rerank"):
            _ = engine.reranker
        assert engine.search_text("red " * 40).notes
    with EngineSearcher.open(uri) as engine, pytest.raises(ModelError):
        engine.search_text("red")  # the collection names the encoder that made it, which lies nowhere


def test_files_that_are_gone_are_left_out_of_an_index(photos, tmp_path):
    """As a plain search of a directory does: the next best take their places, and a note says so."""
    (tmp_path / "p").mkdir()
    for color in COLORS:
        Image.fromarray(color_image(color)).save(tmp_path / "p" / f"{color}.png")
    build([str(tmp_path / "p")], tmp_path / "i", encoder=ColorEncoder())
    (tmp_path / "p" / "red.png").unlink()
    with EngineSearcher.open(f"file://{tmp_path}/i", encoder=ColorEncoder()) as engine:
        hits = engine.search_text("red", k=2)
        assert len(hits) == 2
        assert "red" not in [Path(hit.item.path).stem for hit in hits]
        assert any("not shown" in note for note in hits.notes)


def run(*words: object, encoder=None) -> int:
    return main([str(word) for word in words], library=Library(encoder or ColorEncoder()))


@pytest.mark.engines
def test_the_command_line_pushes_filters_and_reports(photos, uri, capsys, tmp_path, monkeypatch):
    """`push`, `query --index ADDRESS --where`, and `info` of an address."""
    monkeypatch.chdir(tmp_path)
    if uri.startswith("postgresql"):
        assert run("push", photos / "index", f"{uri}_2", "--json") == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["added"] == len(COLORS)
        assert f"{len(COLORS)} added" in captured.err
        assert run("push", photos / "index", f"{uri}_2") == 0
        assert f"{len(COLORS)} unchanged" in capsys.readouterr().err
    assert run("query", "red", "--index", uri, "--where", "year<=2001", "--where", "kind=odd", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["metadata"]["year"] == "2001"
    assert run("info", "--index", uri, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text_rows"] == len(COLORS)
    assert run("query", "red", "--index", uri, "--where", "year>2001") == 2
    assert "FIELD>=VALUE" in capsys.readouterr().err


def test_a_directory_is_filtered_by_its_plain_name(photos, capsys):
    """--where needs no address, and several directories are filtered as one."""
    assert run("query", "red", "--index", photos / "index", "--where", 'kind in ["odd"]', "-k", "50", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    both = ("--index", photos / "index", "--index", photos / "index")
    assert run("query", "red", *both, "--where", "kind=odd", "-k", "50") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("option", ["--partial", "--reranker=m"])
def test_options_that_an_engine_would_not_heed_are_refused(photos, option, capsys):
    """In one line; nothing is dropped in silence."""
    assert run("query", "red", "--index", f"file://{photos}/index", option) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_another_model_under_a_filter_needs_a_bridge_as_without(photos, capsys):
    """The index's own model may be named."""
    asked = ("query", "red", "--index", photos / "index", "--where", "kind=odd", "--model", "m")
    assert run(*asked, encoder=ColorEncoder(name="another")) == 1
    assert "mmsearch bridge" in capsys.readouterr().err
    assert run(*asked) == 0


def test_shards_need_something_to_serve(capsys):
    """Neither directories nor --stop, or both, is a usage error before Ray is started."""
    assert run("serve-shards") == 2
    assert run("serve-shards", "x", "--stop") == 2
    assert "--stop" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from mmsearch.progress import SilentProgress
from mmsearch.scale.push import push

class Kills(SilentProgress):
    def advance(self, n, *, note=""):
        os.kill(os.getpid(), signal.SIGKILL)

push(sys.argv[1], sys.argv[2], batch=7, progress=Kills())
"""


@pytest.mark.engines
def test_a_push_killed_by_the_system_leaves_a_collection_that_the_next_one_completes(database, tmp_path):
    """SIGKILL after one batch: that batch is there, whole; the lock is free; the next push sends the rest."""
    index, address = make_index(tmp_path / "i", entries(20)), f"{database('pgserver')}&collection=killed"
    ended = subprocess.run([sys.executable, "-c", KILLED, index, address], check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    engine = open_engine(address)
    assert engine.count(Modality.IMAGE) == 7
    engine.close()
    report = push(index, address)
    assert (report.added, report.unchanged) == (13, 7)


def test_the_command_line_shows_no_password(capsys, monkeypatch):
    """Wherever an address came from, and whatever is wrong with it."""
    secret = "postgresql://me:geheim@127.0.0.1:9/db?collection=a-b"
    monkeypatch.setenv("MMSEARCH_INDEX", secret)
    runs = [
        ("query", "x"),
        ("info",),
        ("verify",),
        ("query", "x", "--index", secret, "--index", "y"),
        ("push", "x", secret),
    ]
    for words in runs:
        assert run(*words) in (1, 2)
    shown = capsys.readouterr()
    assert "geheim" not in shown.out + shown.err
    assert "me@127.0.0.1" in shown.err
