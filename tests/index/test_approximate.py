"""The contract of every approximate kind: what exact search says, up to a stated overlap, and never a wrong row."""

from __future__ import annotations

import numpy as np
import pytest
from index_kit import RowsOfFile, Told, clustered, off

from mmsearch.errors import IndexDamagedError, UsageError
from mmsearch.index.approximate import ApproximateIndex, Parameters, read_file
from mmsearch.index.building import build
from mmsearch.index.exact_answers import exact_answers, overlap
from mmsearch.index.layouts import kind_names, layout_of
from mmsearch.index.opening import open_index, parameters_of

NAMED = [name for name in kind_names() if name not in ("auto", "exact", "flat", "opq")]
KINDS = [*NAMED, "OPQ8_16,IVF16,PQ8", "PCA16,IVF16,Flat"]
WIDE = {"tuned": {"parameters": {"probes": 64, "effort": 400, "factor": 40}}}
SPANS = [(0, 1200), (1500, 2500), (2700, 3500)]


def opened(kind, rows, *, facts=WIDE):
    """An index of rows, and the same as it is opened from its file."""
    layout = layout_of(kind, n=rows.count, d=rows.dim)
    index = build(layout, rows, told=Told()).index
    facts = facts | {"rescore": layout.rescore}
    return open_index(index, facts, kind=layout.kind, stored=rows.all, row_of=lambda: rows.numbers)


def living(index, rows):
    """`rows` as ids of an index."""
    return rows if index.by_rows else np.searchsorted(np.concatenate([np.arange(a, b) for a, b in SPANS]), rows)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(kind's index, rows, right answers to 20 queries, the queries)."""
    rows = RowsOfFile(tmp_path_factory.mktemp("rows"), clustered(3000), spans=SPANS)
    queries = off(20)
    return opened(request.param, rows), rows, exact_answers(queries, rows.blocks(), 10, dead=rows.dead)[1], queries


def test_it_finds_what_exact_search_finds(made):
    """At least 95 % of the ten best, whatever gaps there are between its rows."""
    index, _, right, queries = made
    scores, ids = index.search(queries, 10)
    assert overlap(index.rows_of(ids), right) >= 0.95
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_scores_are_those_of_the_stored_rows(made):
    """Where candidates are scored again; else within what the codes lose."""
    index, rows, _, queries = made
    scores, ids = index.search(queries, 5)
    real = np.einsum("qkd,qd->qk", rows.vectors(index.rows_of(ids)), queries)
    np.testing.assert_allclose(scores, real, atol=1e-3 if index._stored is not None else 0.02)


def test_one_query_alone_answers_as_among_others(made):
    """Neither threads nor batches change an answer."""
    index, _, _, queries = made
    together = index.search(queries, 10)[1]
    alone = np.concatenate([index.search(queries[i : i + 1], 10)[1] for i in range(len(queries))])
    assert overlap(alone, together) >= 0.99


def test_excluded_rows_never_come_back(made):
    """The best answers are taken away; the next best come instead; one array after another."""
    index, rows, right, queries = made
    gone = np.unique(right[:, :5])
    _, expected = exact_answers(queries, rows.blocks(), 10, dead=gone)
    for _ in range(2):
        found = index.rows_of(index.search(queries, 10, excluded=living(index, gone))[1])
        assert not np.isin(found, gone).any()
        assert overlap(found, expected) >= 0.95
        others = np.unique(right[:, 5:])
        assert not np.isin(index.rows_of(index.search(queries, 10, excluded=living(index, others))[1]), others).any()


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_only_allowed_rows_come_back(made, share):
    """As many as there are, up to k, and the best of them."""
    index, rows, _, queries = made
    allowed = rows.numbers[np.random.default_rng(5).random(rows.count) < share]
    _, expected = exact_answers(queries, rows.blocks(), 10, dead=np.setdiff1d(rows.numbers, allowed))
    found = index.rows_of(index.search(queries, 10, allowed=living(index, allowed))[1])
    assert np.isin(found, allowed).all()
    assert overlap(found, expected) >= 0.9


def test_nothing_allowed_is_padding(made):
    """Row -1, score -inf."""
    index, _, _, queries = made
    scores, ids = index.search(queries[:2], 3, allowed=np.empty(0, np.int64))
    assert (ids == -1).all()
    assert np.isneginf(scores).all()


def test_as_many_answers_as_there_are_rows(made):
    """k beyond the rows pads; every row is there once."""
    index, rows, _, queries = made
    scores, ids = index.search(queries[:1], rows.count + 5)
    found = index.rows_of(ids)[0]
    assert sorted(found[found >= 0].tolist()) == rows.numbers.tolist()
    assert np.isneginf(scores[0, rows.count :]).all()


def test_queries_nobody_normalised_are_refused(made):
    """Their inner products would look like cosines."""
    index, _, _, queries = made
    with pytest.raises(UsageError, match="norm"):
        index.search(queries * 2, 3)
    with pytest.raises(UsageError, match="shape"):
        index.search(queries[:, :8], 3)
    with pytest.raises(UsageError, match="k"):
        index.search(queries, 0)


def test_a_file_answers_as_the_index_it_was_written_from(made, tmp_path):
    """Mapped, and read to be added to."""
    index, _, _, queries = made
    index.save(tmp_path / "file")
    for mapped in (True, False):
        again = ApproximateIndex(
            read_file(str(tmp_path / "file"), mapped=mapped), kind=index.kind, parameters=index.parameters,
            stored=index._stored, row_of=index._row_of,
        )  # fmt: skip
        np.testing.assert_array_equal(again.search(queries, 10)[1], index.search(queries, 10)[1])


def test_numpy_scores_again_as_faiss_does(tmp_path):
    """A FAISS without views of foreign memory costs speed, not answers."""
    rows = RowsOfFile(tmp_path, clustered(3000), spans=SPANS)
    index = opened("ivf-pq-fs", rows)
    by_faiss = index.search(off(20), 10)
    index._refined = None
    by_numpy = index.search(off(20), 10)
    np.testing.assert_array_equal(by_faiss[1], by_numpy[1])
    np.testing.assert_allclose(by_faiss[0], by_numpy[0], atol=1e-5)


@pytest.mark.parametrize("damage", [b"", b"hello" * 50, b"IwFl" + bytes(90)])
def test_a_file_that_is_no_index_is_named(damage, tmp_path):
    """Never a crash."""
    (tmp_path / "file").write_bytes(damage)
    with pytest.raises(IndexDamagedError, match="file"):
        read_file(str(tmp_path / "file"))


def test_parameters_are_those_recorded_or_sensible():
    """An index that was never tuned is searched all the same."""
    assert parameters_of(WIDE) == Parameters(probes=64, effort=400, factor=40)
    assert parameters_of({"rescore": True}).factor > 1
    with pytest.raises(TypeError):
        parameters_of({"tuned": {"parameters": {"nonsense": 3}}})


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq-fs", "hnsw"])
def test_an_answer_that_came_back_short_is_looked_for_again(kind, tmp_path):
    """One list holds fewer rows than are asked for, and the best of them may be deleted."""
    rows = RowsOfFile(tmp_path, clustered(3000), spans=SPANS)
    index = opened(kind, rows, facts={"tuned": {"parameters": {"probes": 1, "effort": 10, "factor": 1}}})
    _, ids = index.search(off(3), 700)
    assert (ids >= 0).all()
    near = np.unique(index.search(off(3), 600)[1])
    _, others = index.search(off(3), 20, excluded=near)
    assert (others >= 0).all()
    assert not np.isin(others, near).any()
