"""What Milvus needs beyond the contract: no transactions, limits of its own, an approximate index."""

import contextlib

import numpy as np
import pytest
from engine_kit import COLLECTION, change_index, entries, entry, expected, make_index, unit

from mmsearch.errors import StoreError, UsageError
from mmsearch.scale.engine import open_engine
from mmsearch.scale.milvus_expr import expression, key, key_of, literal
from mmsearch.scale.push import push
from mmsearch.types import Modality
from mmsearch.where import Condition, Op

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
pytestmark = pytest.mark.engines


@pytest.fixture
def uri(tmp_path):
    return f"milvus-lite://{tmp_path}/lite.db?collection=c"


def test_an_item_that_was_written_half_is_written_again(uri, tmp_path):
    """Killed between two of its rows, an item does not count as there, and the next push makes it whole."""
    index = make_index(tmp_path / "i", entries(6))
    push(index, uri)
    engine = open_engine(uri)
    engine._remove([key("e002", 1)])  # what is left when its first caption never arrived
    engine._write([{**next(engine._get([key("e003", 2)], "*")), "digest": "0" * 32}])  # rows of two upserts
    assert set(engine.digests([f"e{i:03d}" for i in range(6)])) == {"e000", "e001", "e004", "e005"}
    engine.set_mark(engine.mark().replace('"whole": true', '"whole": false'))
    engine.close()
    report = push(index, uri)
    assert (report.added + report.changed, report.unchanged) == (2, 4)
    engine = open_engine(uri)
    assert len(engine.digests([f"e{i:03d}" for i in range(6)])) == 6
    engine.close()


class Killed(BaseException):
    """What ends a request in the middle."""


@pytest.mark.parametrize("written", range(4))
def test_no_row_is_lost_sight_of_wherever_an_upsert_was_killed(uri, written):
    """Fewer captions than before, killed after each request: the next upsert leaves exactly the new rows."""
    engine = open_engine(uri, create=COLLECTION)
    engine.upsert([entry("a", 1, captions=("1", "2", "3", "4"))])
    new, client, left = entry("a", 2, captions=("one",)), engine._client, iter(range(written))

    class Dying:
        """The client, until its last request."""

        def __getattr__(self, name):
            if name in ("upsert", "delete") and next(left, None) is None:
                raise Killed
            return getattr(client, name)

    engine._client = Dying()
    if written < 3:
        with pytest.raises(Killed):
            engine.upsert([new])
    engine._client = client
    assert engine.digests(["a"]) in (
        {},
        {"a": new.digest()},
        {"a": entry("a", 1, captions=("1", "2", "3", "4")).digest()},
    )
    engine.upsert([new])
    assert engine.digests(["a"]) == {"a": new.digest()}
    assert (engine.count(Modality.IMAGE), engine.count(Modality.TEXT)) == (1, 1)
    engine.delete(["a"])
    assert (engine.count(Modality.IMAGE), engine.count(Modality.TEXT)) == (0, 0)
    engine.close()


@pytest.mark.parametrize("had", [(), ("1",)])
@pytest.mark.parametrize("written", range(4))
def test_rows_of_an_upsert_that_was_killed_go_with_their_item(uri, had, written):
    """More captions than before, or an item that is new, killed after each request: deleting it leaves nothing."""
    engine = open_engine(uri, create=COLLECTION)
    if had:
        engine.upsert([entry("a", 1, captions=had)])
    client, left = engine._client, iter(range(written))

    class Dying:
        """The client, until its last request."""

        def __getattr__(self, name):
            if name in ("upsert", "delete") and next(left, None) is None:
                raise Killed
            return getattr(client, name)

    engine._client = Dying()
    with contextlib.suppress(Killed):
        engine.upsert([entry("a", 2, captions=("1", "2", "3"))])
    engine._client = client
    known = [one for page in engine.ids() for one in page]
    assert known == (["a"] if had or written else [])
    assert (engine.digests(["a"]) == {"a": entry("a", 2, captions=("1", "2", "3")).digest()}) == (written > 2)
    engine.delete(known)
    assert (engine.count(Modality.IMAGE), engine.count(Modality.TEXT)) == (0, 0)
    engine.close()


def test_an_item_that_fits_no_more_is_not_left_as_it_was(uri, tmp_path):
    """It is skipped, and its old state is not found any more."""
    index = make_index(tmp_path / "i", entries(3))
    push(index, uri)
    change_index(index, [entry("e001", 1, captions=("word " * 20_000,))])
    report = push(index, uri)
    assert (len(report.skipped), report.removed, report.unchanged) == (1, 1, 2)
    engine = open_engine(uri)
    assert sorted(one for page in engine.ids() for one in page) == ["e000", "e002"]
    engine.close()


def test_an_item_that_milvus_cannot_hold_costs_itself_only(uri, tmp_path):
    """Its texts have an end at 65,535 bytes; the report names the item, the others are there."""
    have = [*entries(3), entry("long", 5, captions=("word " * 20_000,))]
    report = push(make_index(tmp_path / "i", have), uri)
    assert report.added == 3
    assert [(one.path, one.reason) for one in report.skipped] == [("/photos/long.jpg", "too large")]


def test_an_approximate_index_finds_nearly_all(uri):
    """index=hnsw is chosen when the collection is made, and kept."""
    engine, have = open_engine(f"{uri}&index=hnsw&ef=200", create=COLLECTION), entries(300)
    engine.upsert(have)
    engine.finish()
    queries = unit(5, 8)
    found = engine.search(queries, 10, modality=Modality.IMAGE)
    shares = [
        len(set(ids) & {name for _, name, _ in expected(have, query, 10, modality=Modality.IMAGE)}) / 10
        for ids, query in zip(found.ids, queries, strict=True)
    ]
    assert np.mean(shares) >= 0.95
    with pytest.raises(UsageError, match="Milvus"):
        engine.search(queries, 20_000, modality=Modality.IMAGE)
    engine.close()


def test_a_collection_of_somebody_else_is_left_alone(uri):
    """One that has no word of ours in it, and rows, is refused: nothing of it is changed."""
    engine = open_engine(uri, create=COLLECTION)
    engine.upsert(entries(2))
    engine._remove(["meta"])
    engine.close()
    with pytest.raises(StoreError, match="another one"):
        open_engine(uri, create=COLLECTION)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ('a"b', '"a\\"b"'), ("a\\", '"a\\\\"'), ("a\nb\tc\rd", '"a\\nb\\tc\\rd"'), (True, "true"), (-2, "-2"),
        (0.5, "0.5"),
    ],
)  # fmt: skip
def test_a_literal_cannot_end_early(value, written):
    """What would end or break it is escaped, and nothing else."""
    assert literal(value) == written


def test_names_of_fields_are_identifiers_or_hex_digits():
    """So that no name is ever part of an expression."""
    assert key_of("year") == "year"
    assert key_of('a"] or true') == "-" + b'a"] or true'.hex()
    where = (Condition("é", Op.IN, ("x", 1)),)
    assert expression(Modality.TEXT, where) == (
        'modality == "text" and (facts["t"]["-c3a9"] == "x" or facts["n"]["-c3a9"] == 1)'
    )
