"""`mmsearch query`: which index, which question, and hits in every form."""

import json
import os
from pathlib import Path

import pytest
from cli_fakes import FakeLibrary, hit

from mmsearch.rerank.request import Rerank

ODD = os.fsdecode(b"/photos/caf\xe9.jpg")


def asked(library: FakeLibrary) -> tuple:
    return library.searcher.asked[0]


def opened(library: FakeLibrary) -> Path:
    return dict(library.calls)["open"]["path"]


def test_words_and_options_reach_the_searcher(mmsearch):
    """Defaults are ten pictures; every option is handed on."""
    library = FakeLibrary()
    mmsearch("query", "a dog", "--index", "i", library=library)
    assert asked(library) == ("a dog", {"k": 10, "to": "image", "threshold": None, "rerank": Rerank("auto")})
    library = FakeLibrary()
    mmsearch("query", "a dog", "--index", "i", "-k", "3", "--to", "text", "--threshold", "0.2", library=library)
    assert asked(library) == ("a dog", {"k": 3, "to": "text", "threshold": 0.2, "rerank": Rerank("auto")})


def test_a_picture_is_a_path_and_words_are_never_guessed_to_be_one(mmsearch, tmp_path):
    """Only --image opens a file, even where the words are the name of one."""
    (tmp_path / "cat.jpg").write_bytes(b"")
    library = FakeLibrary()
    mmsearch("query", "cat.jpg", "--index", "i", library=library)
    assert asked(library)[0] == "cat.jpg"
    library = FakeLibrary()
    mmsearch("query", "--image", "cat.jpg", "--index", "i", library=library)
    assert asked(library)[0] == Path("cat.jpg")


@pytest.mark.parametrize(
    "args",
    [(), ("",), (" \t",), ("a dog", "--image", "x.jpg"), ("a", "--threshold", "2"), ("a", "--threshold", "nan")],
)
def test_questions_without_an_answer_are_usage_errors(mmsearch, args):
    """Nothing, blank words, words and a picture at once, impossible thresholds: exit 2, nothing loaded."""
    library = FakeLibrary()
    ended = mmsearch("query", *args, "--index", "i", library=library)
    assert ended.code == 2
    assert library.calls == []
    assert len(ended.err_lines) == 1


def test_composed_queries_are_refused_in_words(mmsearch):
    """Not silently half answered."""
    assert "not in this version" in mmsearch("query", "a dog", "--image", "x.jpg", "--index", "i").err


def test_an_index_that_was_not_named_is_said(mmsearch, monkeypatch):
    """$MMSEARCH_INDEX first, then the last one updated; a named one needs no words."""
    library = FakeLibrary(found=Path("indexes/photos"), hits=[hit("a")])
    assert mmsearch("query", "a", library=library).err_lines[0].startswith("index: indexes/photos (")
    assert opened(library) == Path("indexes/photos")
    monkeypatch.setenv("MMSEARCH_INDEX", "elsewhere")
    library = FakeLibrary(found=Path("indexes/photos"), hits=[hit("a")])
    assert "elsewhere" in mmsearch("query", "a", library=library).err
    assert opened(library) == Path("elsewhere")
    library = FakeLibrary(hits=[hit("a")])
    assert mmsearch("query", "a", "--index", "named", library=library).err == ""
    assert opened(library) == Path("named")


def test_no_index_at_all_is_one_clear_line(mmsearch):
    """Exit 1 and the folder that was looked in."""
    ended = mmsearch("query", "a", library=FakeLibrary())
    assert ended.code == 1
    assert "indexes" in ended.err


def test_in_a_pipe_hits_are_score_tab_path(mmsearch):
    """Stable columns, the matched text third; names cannot break a line."""
    hits = [
        hit("/p/a.jpg", score=0.25),
        hit("/p/new\nline\t.jpg", rank=2),
        hit("/p/c.jpg", rank=3, caption="two\nlines"),
    ]
    assert mmsearch("query", "x", "--index", "i", library=FakeLibrary(hits=hits)).out.splitlines() == [
        "0.2500\t/p/a.jpg",
        "0.5000\t/p/new\\nline\\t.jpg",
        "0.5000\t/p/c.jpg\ttwo\\nlines",
    ]


def test_json_lines_have_every_field_and_round_trip_any_name(mmsearch):
    """One object a line; the bytes of an undecodable name come back."""
    hits = [
        hit(ODD, score=0.123456789, captions=("first", "second"), metadata={"tag": "é"}),
        hit("/b", rank=2, caption="c"),
    ]
    lines = mmsearch("query", "x", "--index", "i", "--json", library=FakeLibrary(hits=hits)).out.splitlines()
    one, two = (json.loads(line) for line in lines)
    assert os.fsencode(one["path"]) == b"/photos/caf\xe9.jpg"
    assert one | {"path": ""} == {
        "rank": 1, "score": 0.123457, "id": "0000000000000001", "path": "", "modality": "image",
        "caption": "first", "metadata": {"tag": "é"},
    }  # fmt: skip
    assert (two["modality"], two["caption"], two["metadata"]) == ("text", "c", {})
    assert "é" in lines[0]  # readable, not \u00e9


def test_paths_alone_are_for_programs(mmsearch):
    """-f one a line; -0 ended by NUL, so that a newline in a name survives."""
    hits = [hit("/p/a.jpg"), hit("/p/new\nline.jpg", rank=2)]
    library = FakeLibrary(hits=hits)
    assert mmsearch("query", "x", "--index", "i", "-f", library=library).out == "/p/a.jpg\n/p/new\nline.jpg\n"
    assert mmsearch("query", "x", "--index", "i", "-0", library=library).out == "/p/a.jpg\0/p/new\nline.jpg\0"
    assert mmsearch("query", "x", "--index", "i", "-f", "-0", library=library).out.count("\0") == 2


def test_notes_and_no_hits_are_talk(mmsearch):
    """They go to stderr; stdout stays empty and the exit code is 0."""
    ended = mmsearch("query", "x", "--index", "i", library=FakeLibrary(notes=["2 hits are not shown"]))
    assert (ended.code, ended.out) == (0, "")
    assert ended.err_lines == ["2 hits are not shown", "no hits"]


@pytest.mark.parametrize("flag", ["-k", "-t", "--top"])
def test_the_number_of_hits_has_the_flags_that_people_know(mmsearch, flag):
    """-k as in papers, -t as in rclip."""
    library = FakeLibrary()
    mmsearch("query", "x", "--index", "i", flag, "4", library=library)
    assert asked(library)[1]["k"] == 4
