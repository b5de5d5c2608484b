"""The smaller verbs: info, verify, models, demo, eval, and the table that people see."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_fakes import FakeLibrary, hit

from mmsearch.cli.demo import PHOTOS, QUERIES, sample_photos
from mmsearch.cli.hits import print_table
from mmsearch.cli.terminal import as_json, plural, shown
from mmsearch.evaluate.classification import classify_rows, compare_classes
from mmsearch.evaluate.comparison import compare
from mmsearch.evaluate.metrics import Ranked
from mmsearch.evaluate.report import Evaluation, summarise
from mmsearch.store.base import Problem
from mmsearch.types import Skipped, SkipReason


def evaluation(**values) -> Evaluation:
    way = summarise(Ranked.of([[1], [4]]), clusters=Ranked.of([[1], [1]]).first * 0 + [0, 1])
    return Evaluation("bundled", 2, 2, way, way, **values)


def test_info_prints_nested_facts_one_a_line(mmsearch):
    """Readable lines by default, the same facts as JSON on request."""
    facts = {"items": 3, "model": {"name": "m", "dim": 8}, "roots": ["/a", "/b\n"], "note": None}
    ended = mmsearch("info", "--index", "i", library=FakeLibrary(facts=facts))
    assert [line.split(maxsplit=1) for line in ended.out.splitlines()] == [
        ["items", "3"], ["model.name", "m"], ["model.dim", "8"], ["roots", "/a, /b\\n"], ["note", "-"],
    ]  # fmt: skip
    assert json.loads(mmsearch("info", "--index", "i", "--json", library=FakeLibrary(facts=facts)).out) == facts


def test_verify_says_ok_or_what_is_wrong(mmsearch):
    """Exit 0 or 4; every problem on its own line with its repair."""
    assert mmsearch("verify", "--index", "i").code == 0
    library = FakeLibrary(problems=[Problem("vectors.f16", "row 3 differs", "Index again.")])
    ended = mmsearch("verify", "--index", "i", library=library)
    assert ended.code == 4
    assert ended.out == "vectors.f16: row 3 differs. Index again.\n"
    read = json.loads(mmsearch("verify", "--index", "i", "--json", library=library).out)
    assert read["ok"] is False
    assert read["problems"] == [{"file": "vectors.f16", "what": "row 3 differs", "repair": "Index again."}]


def test_eval_prints_shares_as_json(mmsearch):
    """One object, both directions, shares between 0 and 1."""
    ended = mmsearch("eval", "pairs.jsonl", "--json", "--rerank", "0", library=FakeLibrary(facts=evaluation()))
    read = json.loads(ended.out)
    assert (read["images"], read["texts"]) == (2, 2)
    assert read["text_to_image"]["hit@1"] == 0.5
    assert read["text_to_image"]["median_rank"] == 2.5
    assert set(read["image_to_text"]) >= {"hit@1", "hit@5", "hit@10", "recall@5", "mrr@10", "ndcg@10", "mean_rank"}
    assert len(read["ci95"]["text_to_image"]["hit@1"]) == 2


def test_eval_prints_a_table_in_per_cent(mmsearch):
    """The same numbers for people, and how many pictures were left out."""
    skipped = (Skipped("x.jpg", SkipReason.EMPTY),)
    ended = mmsearch("eval", "pairs.jsonl", library=FakeLibrary(facts=evaluation(skipped=skipped)))
    row = next(line for line in ended.out.splitlines() if line.startswith("hit@1 "))
    assert row.split()[:2] == ["hit@1", "50.0"]
    assert "skipped 1 picture, the first: x.jpg: empty file" in ended.err


def test_eval_options_reach_the_evaluator(mmsearch):
    """What the user asked for is what the library is told."""
    library = FakeLibrary(facts=evaluation())
    mmsearch("eval", "p", "--split", "test", "--model", "m", "--limit", "9", "--device", "cpu", library=library)
    told = dict(library.calls)["evaluate"]
    told.pop("progress")
    assert told == {
        "pairs": "p", "split": "test", "model": "m", "limit": 9, "device": "cpu", "batch_size": 64, "workers": None,
    }  # fmt: skip


def classification():
    rows = np.eye(2, dtype=np.float32)
    named = classify_rows(rows[[0, 1, 0]], rows, labels=np.array([0, 1, 1]), names=["cat", "d\x1bog"], model="bundled")
    return dataclasses.replace(named, warnings=("no readable picture of emu: the class is left out",))


def test_eval_compare_shows_both_models_and_what_changed(mmsearch):
    """Both tables, then before, after, difference and a word; --model is what is measured against --compare."""
    library = FakeLibrary(facts=compare(evaluation(), evaluation()))
    ended = mmsearch("eval", "p", "--model", "mine", "--compare", "bundled", "--split", "test", library=library)
    told = dict(library.calls)["compare"]
    assert (told["before"], told["after"], told["split"], told["pairs"]) == ("bundled", "mine", "test", "p")
    assert sum(line.startswith("mrr@10") for line in ended.out.splitlines()) == 2
    assert ended.out.count("no clear change") == 6
    read = json.loads(mmsearch("eval", "p", "--compare", "bundled", "--json", library=library).out)
    assert read["differences"]["text_to_image"]["hit@1"]["verdict"] == "no clear change"
    assert set(read) == {"before", "after", "differences"}


def test_eval_of_class_folders(mmsearch, tmp_path):
    """Shares in per cent, the worst classes made harmless to a terminal, warnings on stderr; JSON on request."""
    library = FakeLibrary(facts=classification())
    line = ("eval", "--classes", "birds", "--templates", "t.txt", "--exclude", "B*", "--limit", "4")
    ended = mmsearch(*line, library=library)
    told = dict(library.calls)["classify"]
    assert (told["folder"], told["templates"], told["exclude"], told["limit"]) == ("birds", Path("t.txt"), ["B*"], 4)
    assert next(row for row in ended.out.splitlines() if row.startswith("top-1")).split()[1] == "66.7"
    assert "d\\x1bog" in ended.out
    assert ended.err == "warning: no readable picture of emu: the class is left out\n"
    assert json.loads(mmsearch("eval", "--classes", "b", "--json", library=library).out)["top1"] == pytest.approx(2 / 3)


def test_eval_of_class_folders_with_two_models(mmsearch):
    """--compare works for names too."""
    library = FakeLibrary(facts=compare_classes(classification(), classification()))
    ended = mmsearch("eval", "--classes", "birds", "--compare", "bundled", library=library)
    assert dict(library.calls)["compare_classes"]["before"] == "bundled"
    assert ended.out.count("no clear change") == 1


@pytest.mark.parametrize(
    "line",
    [
        "",
        "p --classes c",
        "p --templates t",
        "p --exclude x",
        "--classes c --split test",
        "--classes c --rerank 5",
        "p --rerank 5 --compare m",
    ],
)
def test_eval_refuses_what_does_not_go_together(mmsearch, line):
    """Said before a model is loaded, with exit 2."""
    library = FakeLibrary(facts=evaluation())
    assert mmsearch("eval", *line.split(), library=library).code == 2
    assert library.calls == []


def test_the_demo_indexes_real_photos_and_asks_three_questions(mmsearch):
    """About a dozen files that are really there, found without importing scikit-image."""
    pytest.importorskip("skimage")
    library = FakeLibrary(hits=[hit("/photos/cat.png")])
    ended = mmsearch("demo", library=library)
    assert ended.code == 0
    told = dict(library.calls)["build"]
    assert 10 <= len(told["paths"]) <= len(PHOTOS)
    assert str(told["out"]) == "indexes/demo"
    assert [text for text, _ in library.searcher.asked] == list(QUERIES)
    assert all(f'"{query}"' in ended.out for query in QUERIES)
    assert "cat.png" in ended.out
    assert "/photos/" not in ended.out  # the folder is said once, on stderr


def test_without_scikit_image_the_demo_names_the_extra(mmsearch, monkeypatch):
    """The way out is the line to type."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = mmsearch("demo")
    assert ended.code == 1
    assert "pip install 'mmsearch[demo]'" in ended.err


def test_sample_photos_are_found_without_importing_their_package():
    """scikit-image would bring SciPy in: seconds, for a folder's name."""
    pytest.importorskip("skimage")
    before = set(sys.modules)
    assert sample_photos()
    assert not {name for name in set(sys.modules) - before if name.startswith(("skimage", "scipy"))}


def test_the_table_shows_what_a_person_needs(capsys):
    """Rank, score, path; the matched text where texts matched; no markup is read out of names."""
    print_table([hit("/p/[red]a.jpg", score=0.4321), hit("/p/b\x1b.jpg", rank=2, caption="a caption")])
    out = capsys.readouterr().out
    assert "0.432" in out
    assert "[red]a.jpg" in out
    assert "a caption" in out
    assert "\x1b" not in out


def test_json_keeps_lone_surrogates_as_escapes():
    """The text is valid UTF-8 whatever a name or a table holds."""
    assert as_json({"a": "\ud83d é"}) == '{"a": "\\ud83d é"}'
    assert json.loads(as_json("\udce9")) == "\udce9"


def test_shown_text_is_one_harmless_line():
    """Emoji and accents stay, control characters do not."""
    assert shown("é🐕\r\n\x9b") == "é🐕\\r\\n\\x9b"


def test_counts_read_like_sentences():
    """1 file, 2 files."""
    assert (plural(1, "file"), plural(2, "file"), plural(0, "entry", "entries")) == ("1 file", "2 files", "0 entries")
