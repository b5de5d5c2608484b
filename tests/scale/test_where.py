"""Filters: what can be asked, and what it means."""

import pytest
from engine_kit import COLLECTION, entries, make_index
from hypothesis import given
from hypothesis import strategies as st

from mmsearch.errors import UsageError
from mmsearch.store import listing
from mmsearch.store.directory import IndexStore
from mmsearch.types import Item, Modality
from mmsearch.where import MOST_VALUES, Condition, Op, facts_of, fulfils, parse_condition, scalar, tagged


@pytest.mark.parametrize(
    ("value", "counts_as"),
    [
        ("2020", 2020), (2020.0, 2020), ("2e3", 2000), ("-0", 0), ("007", "007"), ("1.5", 1.5), (" 1", " 1"),
        ("true", True), ("True", "True"), (True, True), ("", ""), (None, None), ([1], None), ({}, None),
        (float("nan"), None), ("NaN", "NaN"), ("1e999", "1e999"), (10**400, None), (2**60, float(2**60)),
        ("a\0b", "a\\x00b"), ("\udcff", "\\udcff"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_a_table_s_text_counts_as_the_number_it_reads_as(value, counts_as):
    """CSV knows texts only; a filter on a year must work all the same. Truth, number and text stay apart."""
    found = scalar(value)
    assert found == counts_as
    assert type(found) is type(counts_as)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("year>=2020", Condition("year", Op.AT_LEAST, (2020,))),
        (" year <= 1e3 ", Condition("year", Op.AT_MOST, (1000,))),
        ("a=b=c", Condition("a", Op.EQUAL, ("b=c",))),
        ("a==b", Condition("a", Op.EQUAL, ("b",))),
        ('a=" b "', Condition("a", Op.EQUAL, (" b ",))),
        ("a=", Condition("a", Op.EQUAL, ("",))),
        ('city in ["A", 2, true]', Condition("city", Op.IN, ("A", 2, True))),
        ("born in=x", Condition("born in", Op.EQUAL, ("x",))),
    ],
)
def test_conditions_are_read_as_they_are_written(text, condition):
    """The command line's words for the same values."""
    assert repr(parse_condition(text)) == repr(condition)


@pytest.mark.parametrize(
    "text",
    ["year", "=5", "year>2020", "", "x in [", "x in []", "x in [[1]]", "x in [null]", f"x in {[1] * (MOST_VALUES + 1)}",
     "x>=true", "x" * 5000 + "=1", "x=" + "y" * 5000, "x in " + "[" * 5000 + "]" * 5000],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text):
    """One line that says what can be written, whatever was."""
    with pytest.raises(UsageError):
        parse_condition(text)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@given(st.dictionaries(st.text(min_size=1), scalars, max_size=4), st.text(min_size=1), st.text(max_size=30))
def test_any_metadata_and_any_value_have_an_answer(metadata, name, text):
    """Facts are finite and of one kind each; comparing never raises; equal values are found equal."""
    facts = facts_of(Item("a", None, (), metadata))
    assert sum(map(len, tagged(facts).values())) == len(facts)
    for op in (Op.EQUAL, Op.AT_MOST, Op.AT_LEAST):
        if op is Op.EQUAL or not isinstance(scalar(text), bool):
            fulfils(facts, (Condition(name, op, (text,)),))
    for field, value in facts.items():
        if not isinstance(value, str) or len(value) <= 4096:
            assert fulfils(facts, (Condition(field, Op.EQUAL, (value,)),))


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("x=1", True, False), ("x=true", 1, False), ("x=true", True, True), ("x=1", 1.0, True), ("x=a", "a", True),
        ("x in [1, true]", True, True), ("x in [1]", True, False), ("x<=5", True, False), ("x<=5", "4", False),
        ("x>=a", 5, False), ("x>=a", "b", True), ("x>=B", "a", True), ("x>=a", "B", False), ("x<=2", 2, True),
        ("x>=2", 2, True), ("x=1", None, False), ("x<=1", None, False),
    ],
)  # fmt: skip
def test_values_of_two_kinds_are_never_equal_and_never_in_order(text, value, holds):
    """Python would call True and 1 equal; a filter does not. Bounds belong to the range."""
    assert parse_condition(text).holds(value) is holds


def test_a_field_of_the_picture_gives_way_to_metadata_of_that_name():
    """`width` is the picture's, unless the table says something else by that name."""
    assert facts_of(Item("a", None, (), {}, 640, 480, "2020-01-01"))["width"] == 640
    assert facts_of(Item("a", None, (), {"width": "wide"}, 640))["width"] == "wide"


def test_items_come_in_pages_with_their_rows(tmp_path):
    """No item is left out or comes twice, whatever the page's size."""
    have = entries(7)
    with IndexStore.open(make_index(tmp_path / "i", have)) as store, store.snapshot() as snapshot:
        for size in (1, 3, 7, 100):
            found = [one for page in listing.pages(snapshot, size=size) for one in page]
            assert [one.item for one in found] == [one.item for one in have]
            assert all(len(one.rows()) == 3 for one in found)
        assert listing.known_ids(snapshot, ["e001", "x", "\udcff"]) == {"e001"}
        rows = listing.rows_where(snapshot, Modality.TEXT, (parse_condition("year<=1991"),))
        assert sorted(one.item.id for one in snapshot.locate(rows)) == ["e000", "e000", "e001", "e001"]
        assert COLLECTION.model.same_space(store.model)
