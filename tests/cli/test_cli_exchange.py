"""`mmsearch import` and `mmsearch export`: what they ask of the library, and what a user reads."""

import json

import numpy as np
import pytest
from cli_fakes import FakeLibrary

from mmsearch.cli.library import Library
from mmsearch.exchange.reports import ExportReport, ImportReport
from mmsearch.testing import COLORS, ColorEncoder
from mmsearch.types import Skipped, SkipReason


class Exchanging(FakeLibrary):
    """Remembers imports and exports."""

    def import_vectors(self, paths, out, **options):
        self._called("import", paths=list(paths), out=out, **options)
        bad = tuple(Skipped(str(n), SkipReason.BAD_EMBEDDING, "no direction") for n in range(5))
        return ImportReport(
            out, rows=2000, added=1995, skipped_count=5, skipped=bad, notes=("noted",), read_seconds=2.0, seconds=3.0
        )

    def export_vectors(self, index, to, **options):
        self._called("export", index=index, to=to, **options)
        return ExportReport(to, options["format"], image_rows=3, text_rows=1, files=2, bytes=1_500_000, seconds=0.5)


def test_import_hands_over_what_was_said(mmsearch, tmp_path):
    """Every option reaches the library under its name; the summary is on stderr, stdout is empty."""
    library = Exchanging()
    ended = mmsearch(
        "import", "a.npy", "b", "--out", "i", "--model", "m", "--id-column", "key", "--vector-column", "v",
        "--modality", "text", "--strict", library=library,
    )  # fmt: skip
    ((name, asked),) = library.calls
    assert ended.code == 0 and name == "import" and asked["paths"] == ["a.npy", "b"] and str(asked["out"]) == "i"
    expected = {
        "model": "m", "space": None, "ids": None, "id_column": "key", "vector_column": "v", "modality": "text",
        "strict": True,
    }  # fmt: skip
    assert {key: asked[key] for key in expected} == expected
    assert ended.out == "" and ended.err_lines == [
        "i: 1,995 added in 3.0 s (read at 1,000 rows/s)", "skipped 5 vectors (--json names them):",
        "      0: no direction", "      1: no direction", "      2: no direction", "      ... and 2 more", "noted",
    ]  # fmt: skip


def test_import_prints_its_report_as_json(mmsearch):
    """--json is one object on stdout, every skipped vector in it."""
    ended = mmsearch("import", "a.npy", "--out", "i", "--json", library=Exchanging())
    report = json.loads(ended.out)
    assert (report["index"], report["added"], report["rows_per_s"], len(report["skipped"])) == ("i", 1995, 1000.0, 5)


def test_export_hands_over_what_was_said(mmsearch):
    """The format by its name, and one line about what was written."""
    library = Exchanging()
    ended = mmsearch("export", "i", "--to", "o", "--format", "clip-retrieval", "--modality", "image", library=library)
    ((_, asked),) = library.calls
    assert (asked["format"], asked["modality"], asked["rows_per_file"]) == ("clip-retrieval", "image", 250_000)
    assert ended.err_lines == ["o: 3 vectors of pictures and 1 vector of a text in 2 files, 1.5 MB, in 0.5 s"]


@pytest.mark.parametrize(
    "line",
    [["import"], ["import", "a.npy"], ["export"], ["export", "i", "--to", "o"], ["export", "i", "--format", "npy"],
     ["export", "i", "--to", "o", "--format", "csv"], ["import", "a.npy", "--out", "i", "--modality", "sound"]],
)  # fmt: skip
def test_half_a_command_line_is_a_usage_error(mmsearch, line):
    """Exit code 2 and one line, and nothing is asked of the library."""
    library = Exchanging()
    ended = mmsearch(*line, library=library)
    assert ended.code == 2 and len(ended.err_lines) == 1 and library.calls == []


def test_ctrl_c_says_how_to_go_on(mmsearch):
    """An import keeps what is committed; an export leaves nothing."""
    ended = mmsearch("import", "a.npy", "--out", "i", library=Exchanging(fails=KeyboardInterrupt()))
    assert ended.code == 130 and "Run the same command again to go on" in ended.err
    ended = mmsearch("export", "i", "--to", "o", "--format", "npy", library=Exchanging(fails=KeyboardInterrupt()))
    assert ended.code == 130 and "nothing was exported" in ended.err


def test_vectors_come_in_are_found_and_go_out(mmsearch, tmp_path):
    """The whole way with a model whose answers are known: import, query in words, export, import elsewhere."""
    np.save("colours.npy", ColorEncoder().encode_texts(list(COLORS)))
    (tmp_path / "names.txt").write_text("\n".join(COLORS) + "\n")
    library = Library(encoder=ColorEncoder())
    assert (
        mmsearch("import", "colours.npy", "--ids", "names.txt", "--model", "colors", "--out", "i", library=library).code
        == 0
    )
    assert (
        json.loads(mmsearch("query", "a cyan car", "--index", "i", "-k", "1", "--json", library=library).out)["id"]
        == "cyan"
    )
    assert mmsearch("export", "i", "--to", "o", "--format", "npy", library=library).code == 0
    assert mmsearch("import", "o", "--out", "j", library=library).code == 0
    refused = mmsearch("query", "a cyan car", "--index", "j", library=Library())
    assert refused.code == 1 and len([line for line in refused.err_lines if "error" in line]) == 1
    assert "Say whose they are: mmsearch import PATH --out INDEX --model NAME" in refused.err
    assert mmsearch("import", "o", "--out", "i", "--space", "other", library=library).code == 1
    assert (
        "expected vectors of colors" in mmsearch("import", "o", "--out", "i", "--space", "other", library=library).err
    )


def test_strict_exits_with_three(mmsearch):
    """The rest is in the index."""
    np.save("x.npy", np.array([[1.0, 0.0], [0.0, 0.0]]))
    ended = mmsearch("import", "x.npy", "--out", "i", "--strict", library=Library())
    assert ended.code == 3 and "1 vectors were skipped" in ended.err
