"""Centres in two levels: as many as asked for, wherever there are rows, and nearly as good as in one."""

from __future__ import annotations

import numpy as np
import pytest
from index_kit import RowsOfFile, Told, clustered, off

from mmsearch.index import centroids
from mmsearch.index.building import build
from mmsearch.index.centroids import two_level
from mmsearch.index.exact_answers import exact_answers, overlap
from mmsearch.index.layouts import layout_of
from mmsearch.index.opening import open_index


@pytest.mark.parametrize(("n", "lists"), [(2000, 64), (2000, 400), (70, 70), (50, 7), (10, 1)])
def test_there_are_exactly_as_many_as_asked_for(n, lists):
    """Of length one, also when groups are tiny or all rows are needed; twice the same."""
    rows = clustered(n, of=5)
    centres = two_level(rows, lists)
    assert centres.shape == (lists, 32)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.0, atol=1e-3)
    np.testing.assert_array_equal(centres, two_level(rows, lists))


@pytest.mark.parametrize("factory", ["OPQ8_16,IVF128,SQfp16", "PCA16,IVF128,Flat"])
def test_lists_behind_a_transformation_are_learned_behind_it(factory, tmp_path, monkeypatch):
    """Their rows are not the rows that were brought."""
    monkeypatch.setattr(centroids, "FROM", 1)
    rows, queries = RowsOfFile(tmp_path, clustered(6000)), off(50)
    index = build(layout_of(factory, n=6000, d=32), rows, told=Told()).index
    facts = {"rescore": True, "tuned": {"parameters": {"probes": 40, "effort": 0, "factor": 20}}}
    opened = open_index(index, facts, kind="x", stored=rows.all, row_of=lambda: rows.numbers)
    right = exact_answers(queries, rows.blocks(), 10, dead=rows.dead)[1]
    assert overlap(opened.search(queries, 10)[1], right) >= 0.8  # rows of the wrong space: below 0.4


def test_rows_are_nearly_as_close_to_them_as_to_those_of_one_level(tmp_path, monkeypatch):
    """And an index over them finds as much."""
    rows, right = RowsOfFile(tmp_path, clustered(6000)), None
    queries = off(100)
    right = exact_answers(queries, rows.blocks(), 10, dead=rows.dead)[1]
    layout = layout_of("IVF128,SQfp16", n=6000, d=32)
    found = {}
    for name, bound in (("one", 1 << 30), ("two", 1)):
        monkeypatch.setattr(centroids, "FROM", bound)
        index = build(layout, rows, told=Told()).index
        facts = {"tuned": {"parameters": {"probes": 24, "effort": 0, "factor": 1}}}
        opened = open_index(index, facts, kind="x", stored=rows.all, row_of=lambda: rows.numbers)
        found[name] = overlap(opened.search(queries, 10)[1], right)
    assert found["two"] >= found["one"] - 0.05
