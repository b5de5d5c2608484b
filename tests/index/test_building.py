"""A build that is killed goes on; what it finds half made is believed only when it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from index_kit import RowsOfFile, Told, clustered, off

from mmsearch.errors import UsageError
from mmsearch.index import building
from mmsearch.index.building import build, pieces_of
from mmsearch.index.exact_answers import overlap
from mmsearch.index.layouts import layout_of
from mmsearch.index.opening import open_index


class Killed(BaseException):
    """Stands for the end of the process."""


class DiesAfter(Told):
    """Ends the 'process' once so many rows are told."""

    def __init__(self, rows):
        super().__init__()
        self._rows = rows

    def advance(self, n, *, note=""):
        super().advance(n)
        if self.advanced >= self._rows:
            raise Killed


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Three thousand rows that are added a thousand at a time."""
    monkeypatch.setattr("mmsearch.index.building._AT_ONCE", 1000)
    return RowsOfFile(tmp_path, clustered(3000))


def layout(rows, kind="ivf-pq-fs"):
    return layout_of(kind, n=rows.count, d=rows.dim)


def look_hard(index, rows, kind):
    """The five best of nine queries, every list and many nodes looked at."""
    facts = {"rescore": True, "tuned": {"parameters": {"probes": 64, "effort": 400, "factor": 8}}}
    return open_index(index, facts, kind=kind, stored=rows.all, row_of=lambda: rows.numbers).search(off(9), 5)[1]


@pytest.mark.parametrize("kind", ["ivf-pq-fs", "hnsw-sq8"])
def test_a_killed_build_goes_on_where_its_checkpoint_is(kind, rows):
    """Nothing is learned again, no row twice, and the answers are those of a build that was not killed."""
    whole = build(layout(rows, kind), rows, told=Told()).index
    with pytest.raises(Killed):
        build(layout(rows, kind), rows, told=DiesAfter(3000), checkpoint_s=0.0)
    told = Told()
    again = build(layout(rows, kind), rows, told=told, checkpoint_s=0.0)
    assert told.advanced == 3000 - again.resumed
    assert again.resumed in (1000, 2000)  # a second one costs more than adding a thousand rows
    assert not any("training" in part for part in told.parts)
    assert again.index.ntotal == 3000
    both = [look_hard(one, rows, kind) for one in (again.index, whole)]
    assert overlap(*both) >= (1.0 if kind == "ivf-pq-fs" else 0.95)  # a graph's levels are drawn anew after reading


@pytest.mark.parametrize("what", ["other layout", "other vectors", "flipped byte", "no facts", "cut facts"])
def test_a_checkpoint_that_does_not_fit_is_left(what, rows):
    """It begins anew, and says nothing wrong."""
    with pytest.raises(Killed):
        build(layout(rows), rows, told=DiesAfter(3000), checkpoint_s=0.0)
    (file,), facts = list(Path(rows.work).glob("partial-*.faiss")), Path(rows.work, "partial.json")
    asked = layout(rows)
    if what == "other layout":
        asked = layout(rows, "ivf-sq8")
    elif what == "other vectors":
        rows.vectors_path += "2"
    elif what == "flipped byte":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    elif what == "no facts":
        facts.unlink()
    else:
        facts.write_text(facts.read_text()[:-9])
    built = build(asked, rows, told=Told())
    assert built.resumed == 0
    assert built.index.ntotal == 3000


def test_dying_while_a_checkpoint_is_written_leaves_the_one_before(rows, monkeypatch):
    """The new one counts when its facts do; until then the old file is there."""
    real, calls = building._digest, []

    def dies_at_the_second(path):
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return real(path)

    monkeypatch.setattr(building, "_CHECKPOINT_SHARE", 0.0)
    monkeypatch.setattr(building, "_digest", dies_at_the_second)
    with pytest.raises(Killed):
        build(layout(rows), rows, told=Told(), checkpoint_s=0.0)
    monkeypatch.setattr(building, "_digest", real)
    assert build(layout(rows), rows, told=Told()).resumed == 1000


def test_a_checkpoint_counts_when_rows_were_added_meanwhile(rows):
    """The vector file only grows."""
    with pytest.raises(Killed):
        build(layout(rows), rows, told=DiesAfter(3000), checkpoint_s=0.0)
    asked = replace(layout(rows), row_bytes=1.0, train_rows=2999)
    assert build(asked, rows, told=Told()).resumed >= 1000


def test_a_short_build_leaves_no_checkpoint(rows):
    """Writing one costs more than it saves."""
    build(layout(rows), rows, told=Told())
    assert not Path(rows.work).exists()


def test_what_faiss_does_not_take_is_a_usage_error(rows):
    """One line, with the string."""
    with pytest.raises(UsageError, match="IVF16,Nonsense9"):
        build(layout(rows, "IVF16,Nonsense9"), rows, told=Told())


def test_the_pieces_of_a_file_are_that_file(rows):
    """And what they were read from is gone afterwards."""
    import faiss

    index = build(layout(rows), rows, told=Told()).index
    path = Path(rows.work, "whole.faiss")
    size, pieces = pieces_of(index, str(path))
    data = b"".join(pieces)
    assert len(data) == size
    assert data == faiss.serialize_index(index).tobytes()
    assert not path.exists()
