"""Parquet and Arrow files that hold vectors."""

import numpy as np
import pyarrow as pa
import pytest
from exchange_kit import arrow_file, bits, fixed, held, pictures, unit
from pyarrow import parquet

from mmsearch.errors import InputError
from mmsearch.exchange import import_vectors
from mmsearch.exchange.arrow_tables import ArrowTable
from mmsearch.types import SkipReason

KINDS = ["parquet", "file", "stream"]


def write(kind, path, table, chunk=7):
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=chunk)
        return path
    return arrow_file(path, table, stream=kind == "stream", chunk=chunk)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
def test_a_column_of_vectors_is_found_whatever_it_is_called(tmp_path, kind, number):
    """Fixed lists of any float: the only such column holds the vectors, `id` the ids, the rest are facts."""
    rows = unit(20)
    table = pa.table(
        {"id": pa.array(range(20)), "emb9": fixed(rows).cast(pa.list_(number, 8)),
         "caption": [f"c{i}" for i in range(20)], "lang": ["de"] * 20}
    )  # fmt: skip
    import_vectors(write(kind, tmp_path / "x.bin", table), tmp_path / "i")
    found = held(tmp_path / "i")
    assert {name: one["image"] for name, one in found.items()} == bits(rows)
    assert found["3"]["captions"] == ("c3",) and found["3"]["metadata"] == {"lang": "de"}


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_any_length_hold_vectors_too(tmp_path, kind):
    """A missing vector and one of another length cost their rows only; nobody else moves."""
    lists = [row.tolist() for row in unit(9).astype(np.float32)]
    lists[2], lists[4], lists[8] = None, [1.0, 2.0], [None, *lists[8][1:]]
    table = pa.table({"id": list("abcdefghi"), "vector": pa.array(lists, pa.list_(pa.float32()))})
    report = import_vectors(write(kind, tmp_path / "x.bin", table, chunk=4), tmp_path / "i")
    good = [0, 1, 3, 5, 6, 7]
    assert pictures(tmp_path / "i") == bits(unit(9)[good], [list("abcdefghi")[i] for i in good])
    assert [(one.path, one.reason) for one in report.skipped] == [(name, SkipReason.BAD_EMBEDDING) for name in "cei"]


def test_of_several_columns_the_usual_name_counts_or_the_named_one(tmp_path):
    """`vector` beside other lists of floats is taken; without a usual name the user says which."""
    table = pa.table({"id": ["a"], "boxes": [[0.5, 0.5]], "vector": fixed(unit(1)), "other": fixed(unit(1, seed=1))})
    path = write("parquet", tmp_path / "x.parquet", table)
    import_vectors(path, tmp_path / "i")
    assert pictures(tmp_path / "i") == bits(unit(1), ["a"])
    import_vectors(path, tmp_path / "j", vector_column="other")
    assert pictures(tmp_path / "j") == bits(unit(1, seed=1), ["a"])
    with pytest.raises(InputError, match="--vector-column"):
        import_vectors(write("file", tmp_path / "y.arrow", table.drop_columns(["vector"])), tmp_path / "k")


def test_columns_that_are_not_there_are_named(tmp_path):
    """A wrong --id-column or --vector-column lists what there is."""
    path = write("parquet", tmp_path / "x.parquet", pa.table({"key": ["a"], "vector": fixed(unit(1))}))
    with pytest.raises(InputError, match="a column 'id' of vectors, got vector"):
        import_vectors(path, tmp_path / "i", vector_column="id")
    with pytest.raises(InputError, match="a column 'uuid'"):
        import_vectors(path, tmp_path / "i", id_column="uuid")
    import_vectors(path, tmp_path / "i", id_column="key")
    assert list(held(tmp_path / "i")) == ["a"]


def test_pictures_inside_a_table_stay_there(tmp_path):
    """A column of encoded pictures is neither read nor turned into metadata."""
    table = pa.table(
        {"id": ["a"], "image": [{"bytes": b"x" * 100, "path": "a.jpg"}], "jpg": [b"y"], "vector": fixed(unit(1))}
    )
    import_vectors(write("parquet", tmp_path / "x.parquet", table), tmp_path / "i")
    assert held(tmp_path / "i")["a"]["metadata"] == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20, 49])
def test_a_block_may_begin_anywhere(tmp_path, kind, start):
    """What a resumed import reads is what an undisturbed one would have read from there on."""
    table = pa.table({"id": [str(i) for i in range(50)], "vector": fixed(unit(50))})
    opened = ArrowTable(str(write(kind, tmp_path / "x.bin", table)))
    for size in (1, 5, 7, 16, 100):
        blocks = list(opened.batches(start, size))
        assert [block.num_rows for block in blocks[:-1]] == [size] * (len(blocks) - 1)
        assert [name for block in blocks for name in block.column("id").to_pylist()] == [
            str(i) for i in range(start, 50)
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_that_names_the_file(tmp_path, kind):
    """Cut short or overwritten, a table is refused; it never crashes the program."""
    path = write(kind, tmp_path / "x.bin", pa.table({"id": [str(i) for i in range(500)], "vector": fixed(unit(500))}))
    data = path.read_bytes()
    for cut in (len(data) // 2, len(data) - 5, 40):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"x\.bin"):
            import_vectors(path, tmp_path / "i")


def test_a_folder_of_tables_is_one_source(tmp_path):
    """Files in the order of their names; an id met again in a later file replaces its row."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, names in enumerate((["a", "b"], ["b", "c"])):
        table = pa.table({"id": names, "vector": fixed(unit(2, seed=number))})
        parquet.write_table(table, folder / f"part-{number}.parquet")
    report = import_vectors(folder, tmp_path / "i")
    expected = {**bits(unit(2), ["a", "b"]), **bits(unit(2, seed=1), ["b", "c"])}
    assert pictures(tmp_path / "i") == expected and (report.added, report.changed) == (3, 1)
    assert import_vectors(folder, tmp_path / "i").rows == 0


def test_files_of_several_kinds_in_a_folder_are_refused(tmp_path):
    """Nobody guesses which of them is meant."""
    np.save(tmp_path / "x.npy", unit(2))
    parquet.write_table(pa.table({"vector": fixed(unit(2))}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="files of several kinds"):
        import_vectors(tmp_path, tmp_path / "i")


@pytest.mark.parametrize("data", [b"", b"hello world", b"\x80\x04\x95pickle", b"PAR1 but no more"])
def test_what_is_no_vector_file_is_refused(tmp_path, data):
    """By its first bytes, whatever it is called."""
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.npy"):
        import_vectors(tmp_path / "x.npy", tmp_path / "i")
