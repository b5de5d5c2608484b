"""`mmsearch query` and `eval` with a second stage: options, what is shown, and what stays as it was."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_fakes import FakeLibrary, hit
from PIL import Image

from mmsearch.cli.explaining import explained
from mmsearch.cli.hits import print_table
from mmsearch.cli.library import Library
from mmsearch.rerank.request import Rerank
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker


@pytest.fixture
def library() -> Library:
    return Library(ColorEncoder(), ColorReranker())


@pytest.fixture
def photos(tmp_path, mmsearch, library) -> Path:
    """Pictures of two colours; white-black is not what the first stage puts first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for left, right in (("white", "black"), ("red", "red"), ("white", "white"), ("black", "black"), ("cyan", "black")):
        image = Image.new("RGB", (16, 16), COLORS[left])
        image.paste(COLORS[right], (8, 0, 16, 16))
        image.save(folder / f"{left}-{right}.png")
    (folder / "red-red.txt").write_text("a red thing\n")
    assert mmsearch("index", "photos", "--tokens", "--workers", "1", library=library).code == 0
    return folder


def re_ranked(path: str, **values):
    parts = {"cosine": 0.25, "log_odds": 2.0}
    return replace(hit(path, score=0.88, **values), probability=0.88, parts=parts)


def test_the_options_reach_the_searcher(mmsearch):
    """One checked wish; the model that has the re-ranker is opened with the index."""
    library = FakeLibrary()
    line = "query dog --index i --rerank 64 --min-probability 0.5 --auto --budget-ms 80"
    assert mmsearch(*line.split(), library=library).code == 0
    assert library.searcher.asked[0][1]["rerank"] == Rerank(64, min_probability=0.5, cut="auto", budget_ms=80.0)
    library = FakeLibrary()
    mmsearch("query", "dog", "--index", "i", "--rerank", "off", library=library)
    assert library.searcher.asked[0][1]["rerank"] == Rerank(0)


@pytest.mark.parametrize(
    "options", ["--rerank many", "--rerank -1", "--rerank 1001", "--min-probability 0", "--min-probability nan",
                "--budget-ms 0", "--rerank off --auto", "--rerank 0 --min-probability 0.5"],
)  # fmt: skip
def test_wishes_that_mean_nothing_are_usage_errors(mmsearch, options):
    """Exit 2 and one line, before the index is opened."""
    library = FakeLibrary()
    ended = mmsearch("query", "dog", "--index", "i", *options.split(), library=library)
    assert (ended.code, len(ended.err_lines), library.calls) == (2, 1, [])


def test_a_table_shows_probability_and_cosine_of_re_ranked_hits(capsys):
    """And nothing new for others."""
    print_table([re_ranked("/a.jpg")])
    out = capsys.readouterr().out
    assert "probability" in out and "0.880" in out and "0.250" in out
    print_table([hit("/a.jpg")])
    assert "probability" not in capsys.readouterr().out


def test_json_shows_the_parts_of_re_ranked_hits(mmsearch):
    """Two more fields; without a second stage the fields are those they always were."""
    library = FakeLibrary(hits=[re_ranked("/a.jpg")])
    read = json.loads(mmsearch("query", "x", "--index", "i", "--json", library=library).out)
    assert (read["score"], read["probability"], read["parts"]) == (0.88, 0.88, {"cosine": 0.25, "log_odds": 2.0})
    plain = mmsearch("query", "x", "--index", "i", "--json", library=FakeLibrary(hits=[hit("/a.jpg")]))
    assert {"probability", "parts", "explain"}.isdisjoint(json.loads(plain.out))


def test_stored_tokens_are_used_without_being_asked_for(mmsearch, photos, library):
    """`--rerank auto` is the default; `off` is the first stage; in a pipe the score comes first."""
    first = mmsearch("query", "white and black", "-k", "1", "--rerank", "off", library=library)
    assert "white-black" not in first.out
    ended = mmsearch("query", "white and black", "-k", "1", library=library)
    score, path = ended.out.rstrip("\n").split("\t")
    assert Path(path).stem == "white-black" and float(score) > 0.99


def test_nothing_found_is_said(mmsearch, photos, library):
    """No lines, exit 0, and why."""
    ended = mmsearch("query", "green and magenta", "--auto", library=library)
    assert (ended.code, ended.out) == (0, "")
    assert "nothing in this index matches" in ended.err


def test_probabilities_need_tokens_or_a_depth(mmsearch, photos, library):
    """One line that names both ways out."""
    assert mmsearch("index", "photos", "--no-tokens", "--workers", "1", library=library).code == 0
    ended = mmsearch("query", "red", "--auto", "--index", "indexes/photos", library=library)
    assert ended.code == 2 and "index --tokens" in ended.err and "--rerank 64" in ended.err
    ended = mmsearch("query", "red", "--auto", "--rerank", "64", "--index", "indexes/photos", library=library)
    assert [Path(line.split("\t")[1]).stem for line in ended.out.splitlines()] == ["red-red"]


def test_explanations_are_lines_numbers_and_pictures(mmsearch, photos, library):
    """stdout stays data; JSON has the shares; the folder has a picture a hit."""
    plain = mmsearch("query", "white and black", "-k", "2", library=library)
    ended = mmsearch("query", "white and black", "-k", "2", "--explain-to", "why", library=library)
    assert ended.out == plain.out
    assert "log-odds" in ended.err and re.search(r"covered \(row,column\): white \d,[1-4] -\d", ended.err)
    summed, given = re.search(r"log-odds ([+-][\d.]+) \((.+?)\)", ended.err).groups()
    shares = [float(value) for value in re.findall(r"[+-][\d.]+", given)]
    assert sum(shares) == pytest.approx(float(summed), abs=0.006 * len(shares))
    drawn = sorted(path.name for path in Path("why").iterdir())
    assert drawn[0] == "001-white-black.png" and len(drawn) == 2
    with Image.open(Path("why") / drawn[0]) as sheet:
        assert sheet.width > 300
    read = json.loads(mmsearch("query", "white", "-k", "1", "--explain", "--json", library=library).out)
    assert read["explain"]["words"] == ["white"] and read["heat_map"] is None
    assert sum(map(sum, read["explain"]["attention"][0])) == pytest.approx(1.0, abs=1e-3)
    assert np.shape(read["explain"]["occlusion"]["words"]["white"]) == (7, 7)
    read = json.loads(
        mmsearch("query", "--image", photos / "red-red.png", "--to", "text", "--explain", "--json", library=library).out
    )
    assert read["explain"]["words"] == ["a", "red", "thing"]


def test_what_a_line_names_adds_up():
    """The bend of the calibration is a part like the others."""
    parts = {"from_bias": -1.0, "from_cosine": 0.5, "from_calibration": 0.25, "log_odds": -0.25}
    own = {"parts": parts, "words": [], "attention": None, "occlusion": None}
    (line,) = explained([hit("a.png")], [{"explain": own, "heat_map": None}])
    assert line == "1: log-odds -0.25 (cosine +0.50, beforehand -1.00, calibration +0.25)"


def test_explaining_without_a_re_ranker_still_answers(mmsearch, photos):
    """The hits are there, and that nothing was re-ranked is said."""
    ended = mmsearch("query", "red", "-k", "1", "--explain", library=Library(ColorEncoder()))
    assert ended.code == 0 and "red-red" in ended.out
    assert "not re-ranked" in ended.err


def test_eval_shows_both_stages_and_what_changed(mmsearch, photos, library):
    """Three tables, or one JSON object with both and the differences."""
    rows = [f"photos/{left}-{right}.png,{left} and {right}" for left, right in (("white", "black"), ("cyan", "black"))]
    Path("pairs.csv").write_text("image,caption\n" + "\n".join([*rows, "photos/red-red.png,red"]) + "\n")
    ended = mmsearch("eval", "pairs.csv", "--rerank", "3", "--workers", "1", library=library)
    assert ended.code == 0
    assert ended.out.count("text -> image") == 3
    assert "before: colors, after: colors, top 3 re-ranked" in ended.out
    read = json.loads(mmsearch("eval", "pairs.csv", "--rerank", "3", "--workers", "1", "--json", library=library).out)
    assert set(read) == {"before", "after", "differences", "matching", "absence"}
    assert "yes or no: 6 pairs, 3 of them true" in ended.out and "turned away, absent" in ended.out
    assert read["matching"]["accuracy"] == read["absence"]["kept"] == 1.0
    assert read["after"]["text_to_image"]["hit@1"] == 1.0
    assert mmsearch("eval", "pairs.csv", "--rerank", "1001", library=library).code == 2


def test_eval_asks_captions_of_another_collection(mmsearch, photos, library):
    """None of these colours is there: all are turned away; without --rerank there is nobody to turn them away."""
    Path("pairs.csv").write_text("image,caption\nphotos/white-black.png,white and black\nphotos/red-red.png,red\n")
    Path("others.csv").write_text("image,caption\nphotos/red-red.png,green and blue\nphotos/cyan-black.png,magenta\n")
    line = ["eval", "pairs.csv", "--rerank", "3", "--workers", "1", "--absent", "others.csv"]
    read = json.loads(mmsearch(*line, "--json", library=library).out)["absence"]
    assert (read["strangers"], read["strangers_rejected"]) == (2, 1.0)
    assert "turned away of 2 strange ones" in mmsearch(*line, library=library).out
    assert mmsearch("eval", "pairs.csv", "--absent", "others.csv", library=library).code == 2


def test_without_tokens_a_query_imports_nothing_of_the_second_stage(mmsearch, photos, library):
    """The cold start is what it was."""
    assert mmsearch("index", "photos", "--no-tokens", "--workers", "1", library=library).code == 0
    code = (
        "import sys\nfrom mmsearch.cli.app import main\nfrom mmsearch.cli.library import Library\n"
        "from mmsearch.testing import ColorEncoder\n"
        "before = set(sys.modules)\n"
        "main(['query', 'red', '--index', 'indexes/photos'], library=Library(ColorEncoder()))\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "red-red" in ended.stdout
    new = ended.stderr.split()
    late = ("second_stage", "evidence", "explain", "rerank.checkpoint", "rerank.reranker")
    for name in ("torch", *(f"mmsearch.{one}" for one in late)):
        assert name not in new
