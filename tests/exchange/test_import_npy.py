"""`.npy` files with ids from anywhere: what becomes of their rows, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pytest
from exchange_kit import DIM, bits, held, npy, pictures, progress_of, skipped, unit
from pyarrow import parquet

from mmsearch.derive import tune_index
from mmsearch.errors import InputError, PartialError, UsageError
from mmsearch.exchange import import_vectors
from mmsearch.exchange.matrices import NpyMatrix
from mmsearch.exchange.units import unit_rows
from mmsearch.store import IndexStore
from mmsearch.types import SkipReason


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_rows_without_ids_are_known_by_their_number(tmp_path, dtype):
    """Unit rows of any float arrive bit by bit, as half floats, under the numbers that numpy gives them."""
    report = import_vectors(npy(tmp_path / "x.npy", unit(50).astype(dtype)), tmp_path / "i")
    assert (report.added, report.normalised, report.skipped_count) == (50, 0, 0)
    assert pictures(tmp_path / "i") == bits(unit(50))


def test_rows_in_fortran_order_are_read_as_rows(tmp_path):
    """The transpose of an array is not taken for the array."""
    import_vectors(npy(tmp_path / "x.npy", np.asfortranarray(unit(30))), tmp_path / "i")
    assert pictures(tmp_path / "i") == bits(unit(30))


def test_rows_that_are_not_unit_are_scaled_and_counted(tmp_path):
    """Cosines are wanted, whatever lengths the vectors come with; the report says how many had another one."""
    rows = unit(10).astype(np.float32)
    rows[3:6] *= 37.5
    report = import_vectors(npy(tmp_path / "x.npy", rows), tmp_path / "i")
    assert report.normalised == 3 and any("3 vectors were scaled" in note for note in report.notes)
    stored = np.stack([np.frombuffer(row, np.float16) for row in pictures(tmp_path / "i").values()])
    assert np.allclose(stored, unit(10), atol=1e-3)


def test_rows_without_a_direction_are_skipped_and_shift_nobody(tmp_path):
    """Zeros, NaN and infinity are named with a reason, and remembered; their neighbours keep their own vectors."""
    rows = unit(12).astype(np.float32)
    rows[0], rows[5, 2], rows[11, 0] = 0.0, np.nan, np.inf
    report = import_vectors(npy(tmp_path / "x.npy", rows), tmp_path / "i")
    assert [one.path for one in report.skipped] == ["0", "5", "11"] == sorted(skipped(tmp_path / "i"), key=int)
    assert {one.reason for one in report.skipped} == {SkipReason.BAD_EMBEDDING}
    good = [row for row in range(12) if row not in (0, 5, 11)]
    assert pictures(tmp_path / "i") == bits(unit(12)[good], good)


def test_strict_makes_a_skip_an_error_after_the_rest_is_in(tmp_path):
    """`strict` is for those who want to know; what is good is imported all the same."""
    rows = unit(4)
    rows[1] = 0
    source = npy(tmp_path / "x.npy", rows)
    for _ in range(2):  # what was skipped is told again by a run that finds nothing to do
        with pytest.raises(PartialError, match="1 vectors were skipped"):
            import_vectors(source, tmp_path / "i", strict=True)
    assert len(held(tmp_path / "i")) == 3
    report = import_vectors(source, tmp_path / "i")
    assert (report.rows, report.unchanged, [one.path for one in report.skipped]) == (0, 3, ["1"])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0005, 1e20, 1e300])
def test_a_direction_is_found_at_any_length(scale):
    """Squares that overflow or vanish in single precision are no reason to lose a vector."""
    rows = np.array([[3.0, 4.0]]) * scale / 5.0
    found, ok, _ = unit_rows(rows)
    assert ok.all() and np.allclose(found, [[0.6, 0.8]], atol=1e-3)


def write_ids(kind, path, names):
    if kind == "lines":
        path.write_text("\n".join(names) + "\n", encoding="utf-8")
    elif kind == "texts":
        path = path.with_suffix(".npy")
        np.save(path, np.array(names))
    elif kind == "numbers":
        path = path.with_suffix(".npy")
        np.save(path, np.arange(len(names)) * 7)
    elif kind == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"id": name}) + "\n" for name in names), encoding="utf-8")
    else:
        path = path.with_suffix(".parquet")
        parquet.write_table(pa.table({"id": names}), path)
    return path


@pytest.mark.parametrize("kind", ["lines", "texts", "numbers", "jsonl", "parquet"])
def test_ids_come_from_lines_arrays_json_lines_and_tables(tmp_path, kind):
    """Whatever holds the ids, row i gets the i-th; results show them as public ids."""
    names = [f"näme {i}" for i in range(40)]
    ids = write_ids(kind, tmp_path / "ids.txt", names)
    import_vectors(npy(tmp_path / "x.npy", unit(40)), tmp_path / "i", ids=ids)
    assert pictures(tmp_path / "i") == bits(unit(40), [7 * i for i in range(40)] if kind == "numbers" else names)


def test_a_table_beside_the_vectors_brings_captions_and_metadata(tmp_path):
    """Columns mean for vectors what they mean for pictures; a row without an id is known by its number."""
    table = pa.table(
        {"id": ["a", None, "c"], "Caption 1": ["red", "", "blue"], "year": [1, 2, None], "width": [10, 20, 30],
         "metadata": ['{"x": [1]}', "no JSON", None]}
    )  # fmt: skip
    parquet.write_table(table, tmp_path / "facts.parquet")
    import_vectors(npy(tmp_path / "x.npy", unit(3)), tmp_path / "i", ids=tmp_path / "facts.parquet")
    found = held(tmp_path / "i")
    assert {name: one["captions"] for name, one in found.items()} == {"a": ("red",), "1": (), "c": ("blue",)}
    assert found["a"]["metadata"] == {"year": 1, "x": [1]}
    assert found["1"]["metadata"] == {"year": 2, "metadata": "no JSON"}
    assert found["c"]["facts"] == (30, None, None)


def test_ids_that_are_too_few_are_refused_before_anything_is_made(tmp_path):
    """Nobody can say which id is missing; the index is not even created."""
    ids = write_ids("lines", tmp_path / "ids.txt", ["a", "b"])
    with pytest.raises(InputError, match="3 rows of ids, one a vector, got 2"):
        import_vectors(npy(tmp_path / "x.npy", unit(3)), tmp_path / "i", ids=ids)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.array([{"a": 1}], dtype=object), "object"),
        (np.arange(6).reshape(2, 3), "floats of shape"),
        (np.zeros(5, np.float32), "floats of shape"),
        (np.zeros((0, 4), np.float32), "at least one vector"),
    ],
)
def test_arrays_that_are_no_vectors_are_refused(tmp_path, array, what):
    """Pickled objects above all: they are never loaded. Integers, single rows and nothing are no vectors either."""
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=what):
        import_vectors(tmp_path / "x.npy", tmp_path / "i")


def test_pickled_ids_are_refused(tmp_path):
    """An array of Python texts is a pickle; one of numpy texts is not."""
    np.save(tmp_path / "ids.npy", np.array(["a", "b"], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"ids\.npy: expected a \.npy file of plain"):
        import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i", ids=tmp_path / "ids.npy")


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    """A header that promises more rows than there are is damage, found before the first commit."""
    data = npy(tmp_path / "x.npy", unit(100)).read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:-10])
    with pytest.raises(InputError, match=r"x\.npy"):
        import_vectors(tmp_path / "x.npy", tmp_path / "i")


def test_a_file_that_is_cut_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    """Rows are read, not mapped: there is no SIGBUS."""
    matrix = NpyMatrix(str(npy(tmp_path / "x.npy", unit(1000))))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:5000])
    with pytest.raises(InputError, match="1000 rows, got fewer"):
        matrix.rows(900, 1000)


def test_an_id_met_again_stands_with_its_last_row(tmp_path):
    """In one block or blocks apart: one item, the later vector, and a note."""
    ids = write_ids("lines", tmp_path / "ids.txt", ["a", "b", "a", "c"])
    report = import_vectors(npy(tmp_path / "x.npy", unit(4)), tmp_path / "i", ids=ids)
    assert pictures(tmp_path / "i") == bits(unit(4)[[1, 2, 3]], ["b", "a", "c"])
    assert any("1 rows have an id that comes again" in note for note in report.notes)


def test_a_second_run_does_nothing(tmp_path):
    """An unchanged source costs a look at its files: no commit, no row read."""
    source = npy(tmp_path / "x.npy", unit(20))
    import_vectors(source, tmp_path / "i")
    with IndexStore.open(str(tmp_path / "i")) as store:
        generation = store.generation
    report = import_vectors(source, tmp_path / "i")
    with IndexStore.open(str(tmp_path / "i")) as store:
        assert store.generation == generation
    assert (report.rows, report.unchanged) == (0, 20)


def test_a_changed_source_costs_only_what_differs(tmp_path):
    """Equal rows stay, others are replaced, new ones come, and what the source no longer holds goes."""
    first, second = unit(30), unit(34)
    second[7] = unit(1, seed=9)[0]
    names = [f"n{i}" for i in range(34)]
    source = npy(tmp_path / "x.npy", first)
    import_vectors(source, tmp_path / "i", ids=write_ids("lines", tmp_path / "ids.txt", names[:30]))
    np.save(source, second[2:])
    report = import_vectors(source, tmp_path / "i", ids=write_ids("lines", tmp_path / "ids.txt", names[2:]))
    assert (report.added, report.changed, report.unchanged, report.removed) == (4, 1, 27, 2)
    assert pictures(tmp_path / "i") == bits(second[2:], names[2:])
    with IndexStore.open(str(tmp_path / "i")) as store:
        assert store.info()["dead_rows"] == 3, "equal rows are not written again"


def test_a_record_that_does_not_fit_is_not_believed(tmp_path):
    """An index that lost items meanwhile gets them back from an unchanged source."""
    source = npy(tmp_path / "x.npy", unit(20))
    import_vectors(source, tmp_path / "i")
    from mmsearch.store import Batch

    with IndexStore.open(str(tmp_path / "i"), write=True) as store:
        store.commit(Batch(removals=[3, 4]))
    report = import_vectors(source, tmp_path / "i")
    assert (report.added, report.unchanged) == (2, 18)
    assert pictures(tmp_path / "i") == bits(unit(20)) and progress_of(tmp_path / "i")["x.npy"].complete


def test_items_of_two_sources_never_replace_each_other(tmp_path):
    """The same number in another file is another item; it gets an id of its own, and a note says so."""
    one, two = npy(tmp_path / "one.npy", unit(5)), npy(tmp_path / "two.npy", unit(3, seed=1))
    report = import_vectors([one, two], tmp_path / "i")
    assert report.added == 8 and any("3 ids belong to items of other sources" in note for note in report.notes)
    assert set(bits(unit(5)).items()) <= set(pictures(tmp_path / "i").items())
    assert import_vectors([one, two], tmp_path / "i").rows == 0


def test_ids_for_several_files_are_refused(tmp_path):
    """One list of ids belongs to one file."""
    files = [npy(tmp_path / f"{name}.npy", unit(2)) for name in "ab"]
    with pytest.raises(UsageError, match="one file of vectors"):
        import_vectors(files, tmp_path / "i", ids=tmp_path / "ids.txt")


def test_texts_are_known_by_their_captions_or_ids(tmp_path):
    """`modality="text"`: rows are those of texts, and searches for texts find them."""
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"id": "a", "caption": "a red car"}\n{"id": "b"}\n')
    import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i", ids=ids, modality="text")
    found = held(tmp_path / "i")
    assert [one["captions"] for one in found.values()] == [("a red car",), ("b",)]
    assert [one["texts"][0] for one in found.values()] == list(bits(unit(2)).values())


def test_ids_of_any_bytes_survive(tmp_path):
    """Names that are no UTF-8, and half a surrogate pair in JSON, cost nobody anything."""
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe\nplain\n")
    import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i", ids=tmp_path / "ids.txt")
    (tmp_path / "ids.jsonl").write_text('{"id": "\\ud800"}\n{"id": "b"}\n')
    import_vectors(npy(tmp_path / "y.npy", unit(2, seed=1)), tmp_path / "i", ids=tmp_path / "ids.jsonl")
    assert len(held(tmp_path / "i")) == 4


def test_vectors_of_another_dimension_are_refused(tmp_path):
    """By the index that is there, and among the paths of one call."""
    import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i")
    with pytest.raises(Exception, match=f"d = {DIM}.*got d = 5"):
        import_vectors(npy(tmp_path / "y.npy", unit(2, d=5)), tmp_path / "i")


@pytest.mark.parametrize("kind", ["lines", "texts", "jsonl", "parquet", None])
def test_a_column_of_ids_that_is_not_there_is_an_error(tmp_path, kind):
    """Whatever holds the ids: a slip of the pen must not number a million rows."""
    ids = None if kind is None else write_ids(kind, tmp_path / "ids.txt", ["a", "b"])
    with pytest.raises((InputError, UsageError), match="naem"):
        import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i", ids=ids, id_column="naem")
    assert not (tmp_path / "i").exists()


def test_a_line_may_lack_the_id_that_others_have(tmp_path):
    """It is known by its number, as a row of a table without an id is."""
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"n": 1}\n{"key": "b"}\n')
    import_vectors(npy(tmp_path / "x.npy", unit(2)), tmp_path / "i", ids=ids, id_column="key")
    assert set(held(tmp_path / "i")) == {"0", "b"}


def test_a_second_run_takes_no_lock_where_rows_are_scanned_either(tmp_path):
    """An index of kind "exact" has no file to be up to date."""
    source = npy(tmp_path / "x.npy", unit(20))
    import_vectors(source, tmp_path / "i")
    tune_index(tmp_path / "i", kind="exact")
    with IndexStore.open(str(tmp_path / "i"), write=True):
        assert import_vectors(source, tmp_path / "i").unchanged == 20
