"""Addresses of engines: what they say, and what they never show."""

import pytest

from mmsearch.errors import IndexNotFoundError, MissingExtraError, StoreError, UsageError
from mmsearch.scale import engine
from mmsearch.scale.address import Address
from mmsearch.scale.engine import open_engine


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:geheim@db.example:5432/photos?collection=a",
        "postgresql:///photos?host=/run/pg&password=geheim&collection=a",
        "milvus://me:geheim@host:19530/db?collection=a",
        "milvus://host/db?token=geheim",
        "postgresql://me:ge%68eim@db/photos",
    ],
)
def test_a_password_is_never_shown(uri):
    """Neither the address as it is shown nor a driver's words have it."""
    address = Address.parse(uri)
    for shown in (address.shown, repr(address), address.clean("login with geheim failed")):
        assert "geheim" not in shown
        assert "ge%68eim" not in shown
    if "%" in uri:
        assert "ge%68eim" not in address.clean("cannot read postgresql://me:ge%68eim@db")


def test_options_are_ours_or_the_driver_s():
    """What we understand is taken out of the address that the driver reads."""
    address = Address.parse("postgresql://me@db/x?collection=c1&sslmode=require&index=hnsw&host=/a%20b")
    assert address.collection == "c1"
    assert address.without({"collection", "index"}) == "postgresql://me@db/x?sslmode=require&host=%2Fa%20b"
    assert address.choice("index", "auto", "hnsw") == "hnsw"
    local = Address.parse("postgresql:///x?host=/run/pg&collection=c1")
    assert local.shown == "postgresql:///x?host=/run/pg&collection=c1"
    assert local.without({"collection"}) == "postgresql:///x?host=%2Frun%2Fpg"
    assert Address.parse("ray://photos").collection == "mmsearch"


@pytest.mark.parametrize("name", ["a-b", "a b", "é", "x" * 49, "", "a;drop table b", 'a"b', "1a"])
def test_a_collection_is_a_plain_identifier(name):
    """It becomes the name of a table: nothing else may be in it."""
    with pytest.raises(UsageError, match="collection"):
        _ = Address("postgresql", "x", Address.parse("a://b").parts, {"collection": name}).collection


@pytest.mark.parametrize(
    "uri",
    ["photos", "://x", "foo://x", "postgresql://h:99999/db", "milvus://h?what=1", "milvus://h?ef=0", "milvus://h?tls=maybe",
     "milvus-lite://host/x.db", "milvus-lite:///x/y.txt", "ray://", "ray://x?missing=maybe", "ray://x?deadline_ms=-1",
     "file://host/x", "file:///x?a=1", "postgresql://h/d?index=ivf", "postgresql://h/d?overlap=2",
     "postgresql://h/d?overlap=0.4", "milvus://h?a"],
)  # fmt: skip
def test_an_address_that_means_nothing_is_a_usage_error(uri):
    """Before anything is connected."""
    with pytest.raises(UsageError):
        open_engine(uri)


def test_an_engine_whose_package_is_missing_says_what_brings_it():
    """The name of the package and the extra, in one line."""
    table = {"postgresql": ("mmsearch.scale.pgvector", "PgvectorEngine", "no_such_package", "pgvector")}
    with pytest.raises(MissingExtraError, match=r"no_such_package.*mmsearch\[pgvector\]"):
        open_engine("postgresql://h/d", engines=table)
    assert all(scheme.isascii() for scheme in engine._ENGINES)


@pytest.mark.engines
@pytest.mark.parametrize("uri", ["postgresql://me:geheim@127.0.0.1:9/db", "milvus://me:geheim@127.0.0.1:9/db"])
def test_a_server_that_is_not_there_is_one_clear_line(uri):
    """Where, what was expected, and no password."""
    pytest.importorskip("psycopg" if uri.startswith("post") else "pymilvus")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9.*expected.*(PostgreSQL|Milvus)") as raised:
        open_engine(uri)
    assert "geheim" not in str(raised.value)
    assert not isinstance(raised.value, IndexNotFoundError)
