"""A build from URIs without a cluster: fetched ahead, indexed as local pictures are, followed when they move."""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from mmsearch.builder import build
from mmsearch.errors import InputError
from mmsearch.explain import explain
from mmsearch.searcher import Searcher
from mmsearch.store import IndexStore
from mmsearch.testing import ColorEncoder, ColorReranker
from mmsearch.types import Modality, SkipReason

PHOTOS = "memory://bucket/photos"


@pytest.fixture
def memory():
    found = fsspec.filesystem("memory")
    for number in range(9):
        put(found, f"{number}.png", (25 * number, 10, 200))
    yield found
    found.rm("/bucket", recursive=True)


def put(memory, name, colour):
    data = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(data, "PNG")
    memory.pipe_file(f"/bucket/photos/{name}", data.getvalue())


def run(index: Path, *paths, **options):
    return build(list(paths or [PHOTOS]), index, encoder=ColorEncoder(), workers=1, batch_size=4, **options)


def rows(index: Path) -> dict[str, tuple[str, bytes]]:
    """File name -> id and vector."""
    with IndexStore.open(str(index)) as store, store.snapshot() as snapshot:
        alive = snapshot.alive_rows(Modality.IMAGE)
        vectors = snapshot.vectors(alive)
        items = [one.item for one in snapshot.locate(alive)]
        return {Path(str(i.path)).name: (i.id, v.tobytes()) for i, v in zip(items, vectors, strict=True)}


def test_remote_pictures_have_the_rows_of_local_ones(memory, tmp_path):
    """Where a picture lies changes its name, nothing else; unreadable ones cost themselves only."""
    memory.pipe_file("/bucket/photos/broken.png", b"\x89PNG\r\n\x1a\n and no more")
    memory.pipe_file("/bucket/photos/empty.png", b"")
    memory.get("/bucket/photos", str(tmp_path / "photos"), recursive=True)
    report = run(tmp_path / "remote")
    run(tmp_path / "local", tmp_path / "photos")
    remote, local = rows(tmp_path / "remote"), rows(tmp_path / "local")
    assert {name: row for name, (_, row) in remote.items()} == {name: row for name, (_, row) in local.items()}
    assert len(remote) == 9
    assert {(s.path, s.reason) for s in report.skipped} == {
        (f"{PHOTOS}/broken.png", SkipReason.TRUNCATED), (f"{PHOTOS}/empty.png", SkipReason.EMPTY),
    }  # fmt: skip


def test_remote_pictures_are_re_ranked_and_explained_without_stored_tokens(memory, tmp_path):
    """A URI that becomes a path on its way loses a slash, and every picture would count as gone."""
    run(tmp_path / "index")
    encoder, reranker = ColorEncoder(), ColorReranker()
    with Searcher.open(tmp_path / "index", encoder=encoder, reranker=reranker) as searcher:
        hits = searcher.search_text("blue", k=2, rerank=9)
    assert (reranker.read, hits.notes) == (9, ())
    why = explain(hits[0], reranker=reranker, encoder=encoder, text="blue")
    assert why.grid is not None and why.picture.startswith("memory://")


def test_only_what_changed_is_fetched_again(memory, tmp_path):
    """Unchanged pictures cost a listing; changed ones are encoded, gone ones dropped, moved ones keep their ids."""
    run(tmp_path / "index")
    before = rows(tmp_path / "index")
    put(memory, "0.png", (1, 255, 1))
    memory.rm(f"{PHOTOS}/1.png")
    memory.mv(f"{PHOTOS}/2.png", f"{PHOTOS}/else/2moved.png")
    report = run(tmp_path / "index")
    found = (report.unchanged, report.changed, report.moved, report.removed, report.added, report.encoded_images)
    assert found == (6, 1, 1, 1, 0, 2)
    with IndexStore.open(str(tmp_path / "index")) as store:
        assert store.info()["dead_rows"] == 2, "of the changed and the gone picture: the moved one keeps its row"
    after = rows(tmp_path / "index")
    assert after["2moved.png"] == before["2.png"] and after["0.png"][0] == before["0.png"][0]


def test_a_picture_that_lies_elsewhere_still_is_no_move(memory, tmp_path):
    """A copy on this disk of a remote picture that another run indexed is an item of its own."""
    run(tmp_path / "index")
    (tmp_path / "photos").mkdir()
    memory.get(f"{PHOTOS}/3.png", str(tmp_path / "photos" / "copy.png"))
    report = run(tmp_path / "index", tmp_path / "photos")
    assert (report.added, report.moved) == (1, 0)
    assert len(rows(tmp_path / "index")) == 10


def test_a_bucket_that_shows_nothing_looks_unmounted(memory, tmp_path):
    """Its items stay and a note says so; --prune drops them."""
    run(tmp_path / "index")
    names = memory.ls("/bucket/photos", detail=False)
    for name in names:
        memory.mv(name, name.replace("photos", "away"))
    assert "--prune" in run(tmp_path / "index").notes[0]
    assert len(rows(tmp_path / "index")) == 9
    assert run(tmp_path / "index", prune=True).removed == 9


def test_a_remote_table_and_an_empty_place_are_refused(tmp_path):
    """One line says what to do instead, and no index is made."""
    with pytest.raises(InputError, match="a local copy"):
        run(tmp_path / "index", "s3://bucket/captions.csv")
    with pytest.raises(InputError, match="at least one picture"):
        run(tmp_path / "index", "memory://nothing/here")
    assert not (tmp_path / "index").exists()
