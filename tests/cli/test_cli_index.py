"""`mmsearch index`: what reaches the builder, and what is said at the end."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from cli_fakes import FakeLibrary

from mmsearch.types import BuildReport, Skipped, SkipReason

ODD = os.fsdecode(b"caf\xe9.jpg")


def report(**values) -> BuildReport:
    return BuildReport(Path("indexes/photos"), **values)


def stdin(monkeypatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def built(library: FakeLibrary) -> dict:
    return dict(library.calls)["build"]


@pytest.mark.parametrize(
    ("path", "out"),
    [("./photos", "indexes/photos"), ("a/b/", "indexes/b"), ("pairs.csv", "indexes/pairs"), ("/", "indexes/all")],
)
def test_the_index_is_named_after_the_first_path(mmsearch, path, out):
    """`mmsearch index ./photos` builds indexes/photos."""
    library = FakeLibrary()
    assert mmsearch("index", path, "more", library=library).code == 0
    assert built(library)["out"] == Path(out)


def test_a_folder_keeps_its_dots_and_a_link_its_own_name(mmsearch, tmp_path):
    """photos.2020 is not a file called photos, and a link is called what the user calls it."""
    (tmp_path / "photos.2020").mkdir()
    (tmp_path / "mine").symlink_to("photos.2020")
    for path in ("photos.2020", "mine"):
        library = FakeLibrary()
        mmsearch("index", path, library=library)
        assert built(library)["out"] == Path("indexes", path)


def test_home_moves_the_default_folder(mmsearch, monkeypatch):
    """MMSEARCH_HOME is where indexes are built; an empty value counts as unset."""
    for value, out in (("/big/disk", "/big/disk/photos"), ("", "indexes/photos")):
        monkeypatch.setenv("MMSEARCH_HOME", value)
        library = FakeLibrary()
        mmsearch("index", "photos", library=library)
        assert built(library)["out"] == Path(out)


def test_the_index_may_be_named_as_all_other_commands_name_it(mmsearch):
    """`--index` says where the index goes, as it says elsewhere which one is meant."""
    library = FakeLibrary()
    assert mmsearch("index", "photos", "--index", "here", library=library).code == 0
    assert built(library)["out"] == Path("here")


def test_every_option_reaches_the_builder(mmsearch):
    """What the user asked for is what the library is told."""
    library = FakeLibrary()
    line = (
        "index a b --out o --model m --exclude *.tmp --exclude raw --include-hidden --prune --batch-size 8 "
        "--workers 3 --max-pixels 1000 --device cpu --force --item-vectors fused --tokens "
        "--engine ray --address auto --work /nfs --kind ivf-pq-fs --memory 4G --overlap 0.98 --queries q.txt"
    )
    assert mmsearch(*line.split(), library=library).code == 0
    told = built(library)
    told.pop("progress")
    assert told == {
        "paths": ["a", "b"], "out": Path("o"), "model": "m", "exclude": ("*.tmp", "raw"), "include_hidden": True,
        "prune": True, "batch_size": 8, "workers": 3, "max_pixels": 1000, "device": "cpu", "force": True,
        "item_vectors": "fused", "tokens": True, "engine": "ray", "address": "auto", "work": "/nfs",
        "kind": "ivf-pq-fs", "memory": "4G", "overlap": 0.98, "queries": "q.txt",
    }  # fmt: skip


def test_a_dash_reads_paths_from_stdin(mmsearch, monkeypatch):
    """One path a line, among other paths, undecodable bytes kept."""
    stdin(monkeypatch, b"one.jpg\ncaf\xe9.jpg\n\n")
    library = FakeLibrary()
    mmsearch("index", "first", "-", "last", library=library)
    assert built(library)["paths"] == ["first", "one.jpg", ODD, "last"]


def test_null_separated_names_may_hold_newlines(mmsearch, monkeypatch):
    """`find -print0 | mmsearch index -0` takes any name there is."""
    stdin(monkeypatch, b"two\nlines.jpg\0plain.jpg\0")
    library = FakeLibrary()
    mmsearch("index", "-0", library=library)
    assert built(library)["paths"] == ["two\nlines.jpg", "plain.jpg"]


def test_no_path_is_a_usage_error(mmsearch, monkeypatch):
    """Neither on the command line nor on stdin."""
    assert mmsearch("index").code == 2
    stdin(monkeypatch, b"\n\n")
    assert mmsearch("index", "-").code == 2


def test_the_summary_counts_and_groups_what_was_skipped(mmsearch):
    """Numbers first, then reasons with a few paths each, all on stderr: stdout is for data."""
    skipped = [Skipped(f"p/{n}.jpg", SkipReason.TRUNCATED) for n in range(5)] + [
        Skipped("p/x.jpg", SkipReason.EMPTY, "0 bytes")
    ]
    done = report(added=7, unchanged=2, encoded_images=7, seconds=3.5, skipped=tuple(skipped), notes=("a note",))
    ended = mmsearch("index", "p", library=FakeLibrary(report=done))
    assert ended.out == ""
    assert ended.code == 0
    assert ended.err_lines == [
        "indexes/photos: 7 added, 2 unchanged in 3.5 s (2.0 images/s)",
        "skipped 6 files (--report FILE lists all):",
        "  5 truncated",
        "      p/0.jpg",
        "      p/1.jpg",
        "      p/2.jpg",
        "      ... and 2 more",
        "  1 empty file",
        "      p/x.jpg: 0 bytes",
        "a note",
    ]


def test_json_and_the_report_file_hold_every_skip(mmsearch, tmp_path):
    """Also those whose names are not UTF-8: the bytes come back."""
    done = report(added=1, skipped=(Skipped(ODD, SkipReason.EMPTY),))
    ended = mmsearch("index", "p", "--json", "--report", tmp_path / "r.json", library=FakeLibrary(report=done))
    for text in (ended.out, (tmp_path / "r.json").read_text(encoding="utf-8")):
        read = json.loads(text)
        assert read["added"] == 1
        assert read["index"] == "indexes/photos"
        assert os.fsencode(read["skipped"][0]["path"]) == b"caf\xe9.jpg"
        assert read["skipped"][0]["reason"] == "empty file"


def test_a_report_that_cannot_be_written_is_one_clear_line(mmsearch):
    """The index is built all the same; the exit code says that something went wrong."""
    ended = mmsearch("index", "p", "--report", "no/such/folder/r.json")
    assert ended.code == 1
    assert "no/such/folder/r.json" in ended.err_lines[-1]


def test_strict_turns_skips_into_exit_code_3(mmsearch, tmp_path):
    """After the summary and the report, so that neither is lost."""
    done = report(added=1, skipped=(Skipped("p/x.jpg", SkipReason.EMPTY),))
    file = tmp_path / "r.json"
    ended = mmsearch("index", "p", "--strict", "--report", file, library=FakeLibrary(report=done))
    assert ended.code == 3
    assert file.exists()
    assert "1 added" in ended.err
    assert mmsearch("index", "p", "--strict", library=FakeLibrary(report=report(added=1))).code == 0


def test_file_names_cannot_forge_lines(mmsearch):
    """Newlines, escape sequences and direction marks in names are shown, not obeyed."""
    skipped = (Skipped("a\nmmsearch: error: \x1b[2J\u202e.jpg", SkipReason.EMPTY),)
    ended = mmsearch("index", "p", library=FakeLibrary(report=report(skipped=skipped)))
    assert "      a\\nmmsearch: error: \\x1b[2J\\u202e.jpg" in ended.err_lines
