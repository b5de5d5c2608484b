"""What an export writes: other programs read it, an import brings it back, and it is there as a whole or not at all."""

import json
import os
from pathlib import Path

import faiss
import numpy as np
import pytest
from exchange_kit import DIM, bits, everything, held, item, make_index, unit, varied
from pyarrow import ipc, parquet

from mmsearch.errors import IndexDamagedError, InputError, UsageError
from mmsearch.exchange import export_vectors, exporting, import_vectors
from mmsearch.progress import SilentProgress
from mmsearch.store import Batch, IndexStore, Skip
from mmsearch.types import Skipped, SkipReason, Source


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of items of every sort. Read only."""
    return make_index(tmp_path_factory.mktemp("index") / "i", varied(60))


def files_of(folder):
    return sorted(
        os.path.relpath(os.path.join(inside, name), folder) for inside, _, names in os.walk(folder) for name in names
    )


@pytest.mark.parametrize("format", ["clip-retrieval", "parquet", "arrow"])
@pytest.mark.parametrize("rows_per_file", [1000, 7])
def test_everything_comes_back_bit_by_bit(tmp_path, index, format, rows_per_file):
    """Pictures, all captions' vectors, ids, captions, metadata, paths and facts survive the way out and in."""
    report = export_vectors(index, tmp_path / "out", format=format, rows_per_file=rows_per_file)
    told = import_vectors(tmp_path / "out", tmp_path / "back")
    before, after = held(index), held(tmp_path / "back")
    assert after == before and told.notes == () and told.skipped_count == 0
    assert report.image_rows == sum(one["image"] is not None for one in before.values())
    assert report.text_rows == sum(len(one["texts"]) for one in before.values())


@pytest.mark.parametrize("format", ["npy", "faiss"])
def test_pictures_come_back_from_npy_and_faiss(tmp_path, index, format):
    """Formats of plain rows bring back every picture with its facts."""
    export_vectors(index, tmp_path / "out", format=format, rows_per_file=7)
    import_vectors(tmp_path / "out", tmp_path / "back")
    before = {name: one | {"texts": {}} for name, one in held(index).items() if one["image"] is not None}
    assert held(tmp_path / "back") == before


@pytest.mark.parametrize("format", ["npy", "faiss"])
def test_texts_come_back_from_npy_and_faiss_as_items_of_their_own(tmp_path, index, format):
    """One item a caption: its vector and its text, under the item's id and which caption it is."""
    export_vectors(index, tmp_path / "out", format=format, modality="text", rows_per_file=7)
    import_vectors(tmp_path / "out", tmp_path / "back", modality="text")
    texts = {
        (f"{name}#{part}" if len(one["texts"]) > 1 else name): (one["captions"][part], row)
        for name, one in held(index).items() for part, row in one["texts"].items()
    }  # fmt: skip
    assert {n: (one["captions"][0], one["texts"][0]) for n, one in held(tmp_path / "back").items()} == texts


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("format", ["clip-retrieval", "parquet"])
def test_one_modality_leaves_the_other_out(tmp_path, index, format, modality):
    """Only items that have such vectors, and only those vectors."""
    export_vectors(index, tmp_path / "out", format=format, modality=modality)
    import_vectors(tmp_path / "out", tmp_path / "back")
    gone = {"image": {"texts": {}}, "text": {"image": None}}[modality]
    wanted = {"image": "image", "text": "texts"}[modality]
    assert held(tmp_path / "back") == {name: one | gone for name, one in held(index).items() if one[wanted]}


def test_a_reader_of_clip_retrievals_layout_reads_ours(tmp_path):
    """numpy and pyarrow alone: files of one number, row by row, under the names that layout has."""
    items = [item(f"i{n}", n, captions=[f"caption {n}"], path=f"/pictures/{n}.jpg") for n in range(10)]
    export_vectors(make_index(tmp_path / "i", items), tmp_path / "out", format="clip-retrieval", rows_per_file=4)
    assert [name for name in files_of(tmp_path / "out") if name.startswith("img")] == [
        f"img_emb/img_emb_000{n}.npy" for n in range(3)
    ]
    rows, captions, paths = [], [], []
    for n in range(3):
        images = np.load(tmp_path / "out" / "img_emb" / f"img_emb_000{n}.npy", mmap_mode="r", allow_pickle=False)
        texts = np.load(tmp_path / "out" / "text_emb" / f"text_emb_000{n}.npy", mmap_mode="r", allow_pickle=False)
        table = parquet.read_table(tmp_path / "out" / "metadata" / f"metadata_000{n}.parquet")
        assert images.dtype == texts.dtype == np.float16 and len(images) == len(texts) == table.num_rows
        rows.append(images)
        captions += table["caption"].to_pylist()
        paths += table["image_path"].to_pylist()
    assert captions == [f"caption {n}" for n in range(10)] and paths == [f"/pictures/{n}.jpg" for n in range(10)]
    assert np.array_equal(np.concatenate(rows), np.stack([unit(2, seed=n)[0] for n in range(10)]))


def test_any_faiss_reads_the_faiss_file(tmp_path, index):
    """Row r of the file is line r beside it; a vector finds itself."""
    export_vectors(index, tmp_path / "out", format="faiss", modality="image")
    assert files_of(tmp_path / "out") == ["image.faiss", "image.ids.jsonl"]
    loaded = faiss.read_index(str(tmp_path / "out" / "image.faiss"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "image.ids.jsonl").read_text().splitlines()]
    assert (loaded.ntotal, loaded.d, loaded.metric_type) == (len(lines), DIM, faiss.METRIC_INNER_PRODUCT)
    query = np.frombuffer(held(index)[lines[5]["id"]]["image"], np.float16).astype(np.float32)[None]
    assert loaded.search(query, 1)[1].tolist() == [[5]]


def test_tables_can_be_read_without_us(tmp_path, index):
    """Vectors are fixed lists in a column `vector`: single precision in Parquet, halves in Arrow."""
    for format in ("parquet", "arrow"):
        export_vectors(index, tmp_path / format, format=format, modality="image")
    whole = parquet.read_table(tmp_path / "parquet" / "part_0000.parquet")
    with ipc.open_file(str(tmp_path / "arrow" / "part_0000.arrow")) as file:
        mapped = file.read_all()
    for table, dtype in ((whole, np.float32), (mapped, np.float16)):
        rows = np.stack([np.array(row, dtype) for row in table["vector"].to_pylist()])
        names = table["id"].to_pylist()
        assert bits(rows, names) == {name: one["image"] for name, one in held(index).items() if one["image"]}


def test_names_that_are_no_text_are_escaped_in_tables_and_whole_in_json_lines(tmp_path):
    """A table holds text only; JSON lines bring any file name back."""
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff\xfe.jpg"))
    with open(path, "wb"):
        pass
    made = make_index(tmp_path / "i", [item("a", 1, path=path)])
    for format in ("parquet", "npy"):
        export_vectors(made, tmp_path / format, format=format)
        import_vectors(tmp_path / format, tmp_path / f"{format}-back")
    assert held(tmp_path / "npy-back")["a"]["path"] == path
    assert held(tmp_path / "parquet-back")["a"]["metadata"]["image_path"].endswith("\\udcff\\udcfe.jpg")


def test_what_is_dead_or_skipped_stays_behind(tmp_path):
    """Rows that were replaced or removed, and files that were never indexed, are nobody's vectors."""
    made = make_index(tmp_path / "i", [item(f"i{n}", n) for n in range(5)])
    with IndexStore.open(str(made), write=True) as store:
        bad = Skipped("broken", SkipReason.TRUNCATED)
        store.commit(Batch(removals=[2], upserts=[item("i3", 77)], skips=[Skip(Source("/made", "x", None, None), bad)]))
        store.finish()
    report = export_vectors(made, tmp_path / "out", format="npy")
    assert np.load(tmp_path / "out" / "image_0000.npy").shape == (4, DIM) and report.image_rows == 4


def test_damaged_rows_are_named_not_copied(tmp_path):
    """Whatever damages a row before it is copied: nothing is exported of rows that are not those written."""
    made = make_index(tmp_path / "i", [item(f"i{n}", n) for n in range(5)])
    before = files_of(made)

    class Damages(SilentProgress):
        """Flips a bit once the index is open."""

        def start(self, total, *, what="", unit=""):
            data = bytearray((made / "vectors.f16").read_bytes())
            data[40] ^= 1
            (made / "vectors.f16").write_bytes(bytes(data))

    with pytest.raises(IndexDamagedError, match="rows 0 to 4 that are not those written"):
        export_vectors(made, tmp_path / "out", format="npy", progress=Damages())
    assert files_of(tmp_path) == [f"i/{name}" for name in before]


def test_an_export_is_there_as_a_whole_or_not_at_all(tmp_path, index):
    """Interrupted, it leaves nothing; killed, a folder that the next export to that place takes over."""

    class Interrupted(SilentProgress):
        def advance(self, n, *, note=""):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_vectors(index, tmp_path / "out", format="parquet", progress=Interrupted())
    assert os.listdir(tmp_path) == []
    left = tmp_path / "out.part"
    left.mkdir()
    (left / ".mmsearch-export").touch()
    (left / "part_0000.parquet").write_bytes(b"half of it")
    export_vectors(index, tmp_path / "out", format="parquet")
    assert os.listdir(tmp_path) == ["out"] and files_of(tmp_path / "out") == ["part_0000.parquet"]


def test_nothing_of_anybody_is_overwritten(tmp_path, index):
    """A folder with files in it, and one that only looks like what an export left, are refused; an empty one is not."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "out.part").mkdir()
    for place in ("full", "full/mine.txt", "out"):
        with pytest.raises(InputError):
            export_vectors(index, tmp_path / place, format="npy")
    (tmp_path / "empty").mkdir()
    export_vectors(index, tmp_path / "empty", format="npy")
    assert files_of(tmp_path / "full") == ["mine.txt"] and os.listdir(tmp_path / "out.part") == []


def test_an_export_changes_nothing_in_the_index(tmp_path, index):
    """It reads one generation and takes no lock."""
    before = everything(index)
    with IndexStore.open(str(index), write=True):
        export_vectors(index, tmp_path / "out", format="arrow")
    assert everything(index) == before


def test_what_cannot_be_meant_is_refused(tmp_path, index):
    """Unknown formats and modalities, and vectors that are not there."""
    for wrong in ({"format": "csv"}, {"format": "npy", "modality": "sound"}, {"format": "npy", "rows_per_file": 0}):
        with pytest.raises(UsageError):
            export_vectors(index, tmp_path / "out", **wrong)
    made = make_index(tmp_path / "i", [item("a", 1)])
    with pytest.raises(InputError, match=r"vectors \(text\), got none"):
        export_vectors(made, tmp_path / "out", format="npy", modality="text")


def test_an_export_is_known_as_one_until_it_has_its_name(tmp_path):
    """Stopped while its files are made durable, it is still what the next export may take over."""
    left = Path(exporting._begin(str(tmp_path / "out")))
    (left / "lost.npy").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        exporting._finish(str(left), str(tmp_path / "out"))
    (Path(exporting._begin(str(tmp_path / "out"))) / "whole.npy").write_bytes(b"12345")
    assert exporting._finish(str(left), str(tmp_path / "out")) == (1, 5)
    assert os.listdir(tmp_path) == ["out"] and files_of(tmp_path / "out") == ["whole.npy"]
