"""One contract for every engine: whatever holds a collection answers the same."""

from dataclasses import replace

import numpy as np
import pytest
from engine_kit import (
    CITIES,
    COLLECTION,
    DIM,
    MODEL,
    OTHER,
    change_index,
    entries,
    entry,
    expected,
    make_index,
    same_hits,
    unit,
)

from mmsearch.errors import IndexMismatchError, IndexNotFoundError, StoreError, UsageError
from mmsearch.scale.engine import Collection, Entry, open_engine
from mmsearch.scale.push import push
from mmsearch.types import Item, Modality
from mmsearch.where import Condition, Op, parse_condition

pytestmark = pytest.mark.engines

QUERIES = unit(9999, 4)


@pytest.fixture
def engine(made):
    """An empty collection, open."""
    with_model = open_engine(made(), create=COLLECTION)
    yield with_model
    with_model.close()


def test_what_went_in_comes_out(engine):
    """Path, captions, metadata and picture facts of an item are kept whole, whatever is in them."""
    odd = Item(
        "ünï-😀", "/p/\udcff \n.jpg", ("a 'quoted' \"text\"", "日本語; DROP TABLE x"),
        {"née": "ça", "n": 1, "deep": {"a": [1, None]}, 'we"ird\\ {key}': "x", "nul": "a\0b"},
        640, 480, "2024-05-01T10:00:00",
    )  # fmt: skip
    rows = unit(1, 3)
    engine.upsert([Entry(odd, rows[0], rows[1:], (0, 1))])
    assert engine.fetch(["ünï-😀", "no such"]) == {"ünï-😀": odd}
    assert (engine.count(Modality.IMAGE), engine.count(Modality.TEXT)) == (1, 2)
    assert [one for page in engine.ids() for one in page] == ["ünï-😀"]
    found = engine.search(rows[2:], 1, modality=Modality.TEXT)
    assert (found.ids, found.parts) == ([["ünï-😀"]], [[1]])


@pytest.mark.parametrize("k", [1, 7, 60, 500])
@pytest.mark.parametrize("modality", list(Modality))
def test_hits_are_those_of_exact_search(filled, modality, k):
    """Every engine finds what looking at every row finds, also when k is larger than the collection."""
    engine, have = filled
    answer = engine.search(QUERIES, k, modality=modality)
    assert answer.scores.shape == (4, k)
    assert answer.missing == ()
    for number, query in enumerate(QUERIES):
        same_hits(answer, number, expected(have, query, k, modality=modality))


@pytest.mark.parametrize(
    "text",
    [
        "year=1991", "year=1990.0", "year>=2030", "year<=2000", "year>=nineties", "city=Bern", "city=bern", "city>=C",
        'city in ["Bern", "Zürich", 7]', "day>=2024-05-20", "flag=true", "flag=1", "flag=false", "rating<=2.55",
        "rating in [0.1, 0.2, 1]", "rating=-1", "tags=a", "nothing=1", "width>=50", "height=10", "city=O'Hare",
        'city=the "Old" town \\ 100%', "year<=1e300", "year>=-5",
    ],
)  # fmt: skip
def test_a_filter_means_the_same_everywhere(filled, text):
    """One condition leaves the items that plain Python leaves; those without the field never fulfil it."""
    engine, have = filled
    where = (parse_condition(text),)
    answer = engine.search(QUERIES[:1], 100, modality=Modality.IMAGE, where=where)
    same_hits(answer, 0, expected(have, QUERIES[0], 100, modality=Modality.IMAGE, where=where))


def test_several_conditions_all_hold(filled):
    """Conditions are joined by and, and filters reach captions too."""
    engine, have = filled
    where = (parse_condition("year>=2000"), parse_condition("year<=2030"), Condition("city", Op.IN, CITIES[:2]))
    for modality in Modality:
        wanted = expected(have, QUERIES[0], 5, modality=modality, where=where)
        assert wanted
        same_hits(engine.search(QUERIES[:1], 5, modality=modality, where=where), 0, wanted)


@pytest.mark.parametrize(
    "text",
    [
        "' OR '1'='1", '" or "" == "', "x') OR TRUE --", "'; DROP TABLE mm_contract; --", '"] or true or facts["a',
        "%", "\\", '\\"', "{0}", "%s", "$1", "a\nb", "\x01", "😀", "", "\udcff", "a\0b", '" || true || "',
    ],
)  # fmt: skip
def test_a_filter_is_never_more_than_a_value(filled, text):
    """Whatever stands in a value or a field name finds items that have just that, and changes nothing."""
    engine, have = filled
    asked = [Condition("city", Op.EQUAL, (text,)), Condition("city", Op.IN, (text, "no"))]
    if text:
        asked += [Condition(text, Op.EQUAL, (text,)), Condition(text, Op.AT_LEAST, (text,))]
    for condition in asked:
        assert engine.search(QUERIES[:1], 9, modality=Modality.IMAGE, where=(condition,)).ids == [[]]
    assert engine.count(Modality.IMAGE) == len(have)


def test_odd_fields_and_values_are_found_as_they_are(engine):
    """What looks like an attack is, as somebody's metadata, a value like any other."""
    values = ["' OR '1'='1", '" or "" == "', "\\", "%s {0} $1", "a\tb\r\nc", "\x01", "日本"]
    engine.upsert([entry(f"v{i}", i, **{value: value, "same": value}) for i, value in enumerate(values)])
    for i, value in enumerate(values):
        for name in (value, "same"):
            where = (Condition(name, Op.EQUAL, (value,)),)
            assert engine.search(QUERIES[:1], 9, modality=Modality.IMAGE, where=where).ids == [[f"v{i}"]]


def test_what_the_metadata_says_goes_before_what_the_picture_is(engine):
    """A table with a column `width` means its own, whatever the picture measures; null says nothing at all."""
    engine.upsert([entry("a", 50, width="wide"), entry("b", 50), entry("c", 50, width=None)])
    for text, ids in (("width>=1", ["b"]), ("width=wide", ["a"]), ("height=10", ["a", "b", "c"])):
        found = engine.search(QUERIES[:1], 9, modality=Modality.IMAGE, where=(parse_condition(text),))
        assert sorted(found.ids[0]) == ids


def test_an_upsert_replaces_an_item_whole(engine):
    """Its old vector, its old captions and their rows are gone; others stay."""
    engine.upsert([entry("a", 1, year=1), entry("b", 2, year=1)])
    new = entry("a", 77, captions=("only one",), year=2)
    engine.upsert([new])
    assert engine.fetch(["a"]) == {"a": new.item}
    assert (engine.count(Modality.IMAGE), engine.count(Modality.TEXT)) == (2, 3)
    for modality in Modality:
        for number, query in enumerate(QUERIES):
            wanted = expected([new, entry("b", 2, year=1)], query, 10, modality=modality)
            same_hits(engine.search(QUERIES, 10, modality=modality), number, wanted)
    where = (parse_condition("year=1"),)
    assert engine.search(QUERIES[:1], 9, modality=Modality.IMAGE, where=where).ids == [["b"]]


def test_delete_removes_an_item_and_all_its_rows(engine):
    """A removed item is not found by picture, caption or id; one that was never there is passed over."""
    engine.upsert([entry("a", 1), entry("b", 2), entry("' OR 1=1 --", 3)])
    engine.delete(["a", "no such", "' OR 1=1"])
    engine.delete([])
    assert set(engine.fetch(["a", "b", "' OR 1=1 --"])) == {"b", "' OR 1=1 --"}
    assert (engine.count(Modality.IMAGE), engine.count(Modality.TEXT)) == (2, 4)
    assert "a" not in engine.search(QUERIES, 99, modality=Modality.TEXT).ids[0]


def test_items_need_not_have_pictures_or_captions(engine):
    """Captions alone and pictures alone are items too."""
    rows = unit(5, 3)
    engine.upsert([
        Entry(Item("words", None, ("x", "y")), None, rows[:1], (1,)),
        Entry(Item("picture", "/p.jpg"), rows[1]),
    ])  # fmt: skip
    assert engine.search(rows[:1], 5, modality=Modality.IMAGE).ids == [["picture"]]
    found = engine.search(rows[:1], 5, modality=Modality.TEXT)
    assert (found.ids, found.parts) == ([["words"]], [[1]])


def test_digests_are_those_of_the_entries(filled):
    """An engine says exactly what it has, so that a push sends only what differs."""
    engine, have = filled
    wanted = {one.item.id: one.digest() for one in have[:7]}
    assert engine.digests([*wanted, "no such"]) == wanted
    assert sorted(one for page in engine.ids() for one in page) == [one.item.id for one in have]


def test_wrong_vectors_are_refused(filled):
    """Another dimension, a row that is not of norm 1, and k = 0 are errors, not answers."""
    engine, _ = filled
    for bad in (np.ones((1, DIM + 1), np.float32), 2 * QUERIES[:1], np.full((1, DIM), np.nan, np.float32)):
        with pytest.raises(UsageError, match=r"shape|norm"):
            engine.search(bad, 3, modality=Modality.IMAGE)
        with pytest.raises(UsageError, match=r"shape|norm"):
            engine.upsert([Entry(Item("bad", None), bad[0])])
    with pytest.raises(UsageError, match="k"):
        engine.search(QUERIES, 0, modality=Modality.IMAGE)
    assert engine.fetch(["bad"]) == {}


def test_another_model_is_refused_with_both_fingerprints(made):
    """Vectors of two models are never compared: the message says which is which."""
    uri = made()
    with pytest.raises(IndexMismatchError, match=f"{MODEL.weights}.*{OTHER.weights}"):
        open_engine(uri, create=replace(COLLECTION, model=OTHER))


def test_a_collection_is_what_it_was_when_it_is_opened_again(made):
    """Model, preprocessing, mark and items outlive the connection."""
    uri = made()
    first = open_engine(uri, create=COLLECTION)
    first.upsert(entries(5))
    first.set_mark("half")
    first.set_mark("whole")
    first.finish()
    first.close()
    again = open_engine(uri)
    assert isinstance(again.collection, Collection)
    assert again.collection.model == MODEL
    assert again.collection.preprocessing == COLLECTION.preprocessing
    assert again.mark() == "whole"
    assert again.count(Modality.IMAGE) == 5
    assert again.info()
    again.close()


def test_a_collection_that_is_not_there_is_not_found(places):
    """Without being asked to, opening makes nothing."""
    with pytest.raises(IndexNotFoundError):
        open_engine(places())


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index directory of 25 items to push from."""
    return make_index(tmp_path_factory.mktemp("source") / "index", entries(25))


def has(uri: str) -> dict[str, str]:
    """Digest by id of everything in a collection."""
    engine = open_engine(uri)
    found = {name: digest for page in engine.ids() for name, digest in engine.digests(page).items()}
    engine.close()
    return found


def wanted(have: list[Entry]) -> dict[str, str]:
    return {one.item.id: one.digest() for one in have}


def test_a_push_makes_a_mirror_and_repeats_nothing(made, tmp_path):
    """New, changed and gone items are told apart; a second push sends and deletes nothing."""
    index, uri = make_index(tmp_path / "i", entries(25)), made()
    first = push(index, uri)
    assert (first.added, first.changed, first.removed, first.unchanged) == (25, 0, 0, 0)
    assert has(uri) == wanted(entries(25))
    again = push(index, uri)
    assert (again.added, again.changed, again.removed, again.unchanged) == (0, 0, 0, 25)
    encoded_anew = replace(entries(6)[5], image=unit(600)[0])  # the same item in every word, another vector
    now = [entry("e003", 500, captions=("new",)), encoded_anew, *entries(27)[25:]]
    change_index(index, now, remove=["e000", "e001"])
    third = push(index, uri)
    assert (third.added, third.changed, third.removed, third.unchanged) == (2, 2, 2, 21)
    kept = {one.item.id: one for one in entries(27)} | {"e003": now[0], "e005": now[1]}
    engine = open_engine(uri)
    assert engine.search(unit(600), 1, modality=Modality.IMAGE).ids == [["e005"]]
    engine.close()
    assert has(uri) == wanted([one for name, one in kept.items() if name not in ("e000", "e001")])


class Killed(BaseException):
    """What ends a push in the middle, as Ctrl-C would."""


class KilledAfter:
    """Progress that ends the push after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def start(self, total, *, what="", unit=""):
        pass

    def advance(self, n, *, note=""):
        self.left -= 1
        if not self.left:
            raise Killed

    def note(self, text):
        pass


@pytest.mark.parametrize("batches", [1, 3])
def test_a_push_that_was_killed_goes_on(made, index, batches):
    """What was sent stays, the next push sends the rest, and the collection is as if nothing had happened."""
    uri = made()
    with pytest.raises(Killed):
        push(index, uri, batch=5, progress=KilledAfter(batches))
    assert len(has(uri)) == 5 * batches
    report = push(index, uri, batch=5)
    assert (report.added, report.changed, report.unchanged) == (25 - 5 * batches, 0, 5 * batches)
    assert has(uri) == wanted(entries(25))


def test_a_collection_stays_the_mirror_of_one_index(made, index, tmp_path):
    """Pushing another index would delete what the first one put there: it is refused, and nothing changes."""
    uri = made()
    push(index, uri)
    with pytest.raises(StoreError, match="another collection"):
        push(make_index(tmp_path / "other", entries(3)), uri)
    assert len(has(uri)) == 25
    with pytest.raises(IndexMismatchError, match=f"{MODEL.weights}.*{OTHER.weights}"):
        push(make_index(tmp_path / "foreign", [], collection=replace(COLLECTION, model=OTHER)), uri)
