"""Several indexes on the command line: searched as one, merged, split."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_fakes import FakeHits, FakeLibrary, FakeSearcher

from mmsearch.cli.library import Library
from mmsearch.reshard import CopyReport
from mmsearch.store import Batch, IndexStore, Upsert
from mmsearch.testing import COLORS, ColorEncoder
from mmsearch.types import Source


class Shelf(FakeLibrary):
    """Remembers also what several indexes were asked for with."""

    def open(self, path, *, device, **options):
        self._called("open", path=path, device=device, **options)
        return self.searcher

    def info(self, path, **options):
        self._called("info", path=path, **options)
        return self.facts

    def merge(self, indexes, out, *, progress):
        self._called("merge", indexes=indexes, out=out)
        return CopyReport(out, (out,), items=3, image_rows=3, superseded=1, notes=("a note",))

    def split(self, index, out, *, progress, **options):
        self._called("split", index=index, out=out, **options)
        return CopyReport(out, (out / "shard-00", out / "shard-01"), items=1, image_rows=1, tokens=1)


def index(path: Path, *colours: str, name: str = "colors") -> Path:
    """An index of table rows that are named like colours and found by them."""
    encoder = ColorEncoder(name=name)
    made = IndexStore.create(str(path), model=encoder.identity, preprocessing=encoder.preprocessing)
    with made as store:
        rows = encoder.encode_texts(colours)
        store.commit(
            Batch(
                upserts=[
                    Upsert(Source("table", colour, None, None), image_vector=row, id=colour)
                    for colour, row in zip(colours, rows, strict=True)
                ]
            )
        )
        store.finish()
    return path


def ids(ended) -> list[str]:
    return [json.loads(line)["id"] for line in ended.out.splitlines()]


def called(library: Shelf) -> dict:
    return dict(library.calls)


def test_several_indexes_are_opened_as_one(mmsearch):
    """In the order named; one alone stays a path, an address stays as it is written."""
    for names, expected in (
        (["a", "b"], [Path("a"), Path("b")]),
        (["a"], Path("a")),
        (["pgvector://host:5432/db"], "pgvector://host:5432/db"),
    ):
        for verb in (["query", "words"], ["info"]):
            library = Shelf()
            assert mmsearch(*verb, *(f"--index={name}" for name in names), library=library).code == 0
            assert called(library)[verb[0].replace("query", "open")]["path"] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"a{os.pathsep}b", [Path("a"), Path("b")]),
        (f"a{os.pathsep}", Path("a")),
        ("milvus://host:19530/photos", "milvus://host:19530/photos"),
    ],
)
def test_the_environment_names_several_as_path_does(mmsearch, monkeypatch, value, expected):
    """Separated like PATH; an address holds that separator too and is not torn apart."""
    monkeypatch.setenv("MMSEARCH_INDEX", value)
    library = Shelf()
    ended = mmsearch("query", "words", library=library)
    assert called(library)["open"]["path"] == expected
    assert ended.err_lines[0] == f"index: {value} (from MMSEARCH_INDEX)"


def test_an_engine_is_searched_by_itself(mmsearch):
    """Its hits cannot be merged here: said before anything is opened."""
    library = Shelf()
    ended = mmsearch("query", "words", "--index", "a", "--index", "ray://x", library=library)
    assert ended.code == 2 and library.calls == [] and len(ended.err_lines) == 1


def test_what_needs_one_index_says_so(mmsearch, monkeypatch):
    """`verify` compares one directory."""
    monkeypatch.setenv("MMSEARCH_INDEX", f"a{os.pathsep}b")
    ended = mmsearch("verify", library=Shelf())
    assert ended.code == 2 and "one index directory" in ended.err_lines[-1]


def test_partial_is_handed_on_only_when_asked_for(mmsearch):
    """The default is that nothing may be missing."""
    for verb, name in ((["query", "words"], "open"), (["info"], "info")):
        library = Shelf()
        mmsearch(*verb, "--index=a", "--index=b", library=library)
        assert "partial" not in called(library)[name]
        mmsearch(*verb, "--index=a", "--index=b", "--partial", library=library)
        assert called(library)[name]["partial"] is True


def test_query_and_info_over_real_shards(mmsearch, tmp_path):
    """The best of both, and the sums of both."""
    a, b = index(tmp_path / "a", "red", "green"), index(tmp_path / "b", "blue", "cyan")
    library = Library(encoder=ColorEncoder())
    ended = mmsearch("query", "blue", "--index", a, "--index", b, "--json", library=library)
    assert ids(ended)[0] == "blue" and set(ids(ended)) == {"red", "green", "blue", "cyan"}
    shown = mmsearch("info", "--index", a, "--index", b, library=library).out
    assert f"shards.{a} " in shown and shown.count("2 items, 2 rows, generation 1") == 2
    another = Library(encoder=ColorEncoder(name="another"))
    facts = json.loads(mmsearch("info", "--index", a, "--index", b, "--json", library=another).out)
    assert facts["items"] == 4 and [one["items"] for one in facts["shards"].values()] == [2, 2]


def test_a_missing_shard_is_an_error_or_a_note(mmsearch, tmp_path):
    """Exit 1 with its name; with --partial exit 0, the hits there are, and its name on stderr."""
    a, library = index(tmp_path / "a", "red"), Library(encoder=ColorEncoder())
    named = ("query", "red", "--json", "--index", a, "--index", tmp_path / "gone")
    ended = mmsearch(*named, library=library)
    assert ended.code == 1 and "gone" in ended.err and not ended.out
    ended = mmsearch(*named, "--partial", library=library)
    assert ended.code == 0 and ids(ended) == ["red"]
    assert "1 of 2 indexes missing" in ended.err and "gone" in ended.err


def test_shards_of_two_models_are_one_line(mmsearch, tmp_path):
    """Both models are named; exit 1."""
    a, b = index(tmp_path / "a", "red"), index(tmp_path / "b", "blue", name="other")
    ended = mmsearch("query", "red", "--index", a, "--index", b, library=Library(encoder=ColorEncoder()))
    assert ended.code == 1 and len(ended.err_lines) == 1
    assert "colors" in ended.err and "other" in ended.err


def test_merge_and_split_hand_their_arguments_on_and_tell(mmsearch):
    """One call each; talk on stderr, the report on stdout with --json."""
    library = Shelf()
    ended = mmsearch("merge", "a", "b", "--out", "c", "--json", library=library)
    assert called(library)["merge"] == {"indexes": ["a", "b"], "out": Path("c")}
    assert json.loads(ended.out) == {
        "out": "c", "indexes": ["c"], "items": 3, "skipped": 0, "image_rows": 3, "text_rows": 0, "superseded": 1,
        "tokens": 0, "notes": ["a note"], "seconds": 0.0,
    }  # fmt: skip
    assert ended.err_lines == [
        "c: 3 items, 3 rows in 0.0 s",
        "1 item left out: another index has a newer one of the same name or id",
        "a note",
    ]
    ended = mmsearch("split", "c", "--out", "d", "--shards", "2", library=library)
    assert called(library)["split"] == {"index": "c", "out": Path("d"), "shards": 2, "rows": None}
    assert ended.err_lines == ["d: 2 indexes, 1 item, 1 row in 0.0 s", "patch tokens of 1 picture copied"]
    assert ended.out == ""


def test_merge_and_split_for_real(mmsearch, tmp_path):
    """Split, search the folder, merge it again: the same hits all along."""
    library = Library(encoder=ColorEncoder())
    a = index(tmp_path / "a", *COLORS)
    expected = ids(mmsearch("query", "red", "--index", a, "--json", library=library))
    assert mmsearch("split", a, "--out", "parts", "--rows", "3", library=library).code == 0
    assert len(list(Path("parts").glob("shard-*"))) == 3
    assert ids(mmsearch("query", "red", "--index", "parts", "--json", library=library)) == expected
    assert mmsearch("merge", "parts", "--out", "again", library=library).code == 0
    assert ids(mmsearch("query", "red", "--index", "again", "--json", library=library)) == expected
    assert mmsearch("verify", "--index", "again", library=library).code == 0
    assert mmsearch("verify", "--index", "parts", library=library).out == "parts: ok\n"
    with open("parts/shard-01/vectors.f16", "r+b") as file:
        file.write(b"x")
    ended = mmsearch("verify", "--index", "parts", library=library)
    assert ended.code == 4 and ended.out.startswith("parts/shard-01/vectors.f16: ")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("merge", "a"), 2),
        (("merge", "--out", "c"), 2),
        (("merge", "a", "nowhere", "--out", "c"), 1),
        (("merge", "a", "--out", "a"), 1),
        (("split", "a", "--out", "c"), 2),
        (("split", "a", "--out", "c", "--shards", "2", "--rows", "2"), 2),
        (("split", "a", "--out", "c", "--shards", "0"), 2),
        (("split", "nowhere", "--out", "c", "--shards", "2"), 1),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_what_cannot_be_merged_or_split_is_one_line(mmsearch, args, code, tmp_path):
    """The exit codes of the manual, and nothing made."""
    index(tmp_path / "a", "red")
    ended = mmsearch(*args, library=Library(encoder=ColorEncoder()))
    assert ended.code == code and len(ended.err_lines) == 1
    assert not Path("c").exists()


def test_ctrl_c_says_how_to_go_on(mmsearch):
    """Exit 130, and what the next run will do."""

    class Interrupted(Shelf):
        def merge(self, indexes, out, *, progress):
            raise KeyboardInterrupt

        split = merge

    ended = mmsearch("merge", "a", "--out", "b", library=Interrupted())
    assert ended.code == 130 and "same command again" in ended.err


def test_a_searcher_of_an_engine_answers_like_any_other(mmsearch):
    """What an address opens has the same methods: hits are printed the same way."""
    library = Shelf()
    library.searcher = FakeSearcher(FakeHits([], ["from afar"]))
    ended = mmsearch("query", "words", "--index", "pgvector://host/db", library=library)
    assert ended.code == 0 and ended.err_lines == ["from afar", "no hits"]
