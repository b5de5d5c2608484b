"""Plain FAISS files, as other programs leave them."""

import faiss
import numpy as np
import pytest
from exchange_kit import bits, pictures, unit

from mmsearch.errors import InputError
from mmsearch.exchange import import_vectors
from mmsearch.index.faiss_files import FaissFile


def write(path, factory, rows, ids=None):
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    if ids is None:
        index.add(rows)
    else:
        index.add_with_ids(rows, ids)
    faiss.write_index(index, str(path))
    return path


@pytest.fixture
def rows():
    return unit(400, d=16).astype(np.float32)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "HNSW8", "IVF4,Flat", "IVF4_HNSW8,Flat", "PQ4x4,RFlat"])
def test_rows_come_out_as_they_went_in(tmp_path, rows, factory):
    """Flat, graph and inverted-list indexes that hold vectors as such: row i is item i, bit by bit."""
    report = import_vectors(write(tmp_path / "x.faiss", factory, rows), tmp_path / "i")
    assert pictures(tmp_path / "i") == bits(rows) and report.notes == ()


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap2,HNSW8", "IDMap,IVF4,Flat", "IVF4,Flat"])
def test_ids_of_the_file_are_kept(tmp_path, rows, factory):
    """Those of an IDMap, and those that inverted lists hold themselves."""
    ids = np.random.default_rng(0).permutation(400) * 3 + (1 << 40)
    import_vectors(write(tmp_path / "x.faiss", factory, rows, ids), tmp_path / "i")
    assert pictures(tmp_path / "i") == bits(rows, ids.tolist())


@pytest.mark.parametrize("factory", ["SQ8", "PQ4x4", "IVF4,SQ8", "PCA8,SQ8", "RaBitQ"])
def test_compressed_rows_are_taken_as_they_are_with_a_note(tmp_path, rows, factory):
    """What FAISS approximates is imported as the approximation, and the user is told."""
    report = import_vectors(write(tmp_path / "x.faiss", factory, rows), tmp_path / "i")
    assert report.added == 400 and "keeps vectors approximately" in report.notes[0]


def test_fast_scan_lists_are_refused(tmp_path, rows):
    """FAISS would crash when asked for their rows; an error says what to do instead."""
    with pytest.raises(InputError, match="rows can be taken out, got IndexIVFPQFastScan"):
        import_vectors(write(tmp_path / "x.faiss", "IVF4,PQ4x4fs", rows), tmp_path / "i")


def test_damaged_files_are_refused(tmp_path, rows):
    """Cut short, or not FAISS's at all behind the first letters."""
    path = write(tmp_path / "x.faiss", "Flat", rows)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:20], b"IxF2" + b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"x\.faiss"):
            import_vectors(path, tmp_path / "i")


def test_any_block_can_be_read(tmp_path, rows):
    """From any row to any other, also where lists have ids of their own (then in order of the ids)."""
    ids = np.arange(400)[::-1].copy() + 5
    opened = FaissFile.open(str(write(tmp_path / "x.faiss", "IVF4,Flat", rows, ids)))
    assert opened.ids is not None and opened.ids.tolist() == sorted(ids.tolist())
    assert np.allclose(opened.rows(17, 40), rows[::-1][17:40])


def test_an_empty_index_holds_no_vectors(tmp_path, rows):
    """Nothing is made of nothing."""
    with pytest.raises(InputError, match="at least one vector"):
        import_vectors(write(tmp_path / "x.faiss", "Flat", rows[:0]), tmp_path / "i")
    assert not (tmp_path / "i").exists()
