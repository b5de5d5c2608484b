"""A bridge from end to end: made from an index, kept in it, and asked by another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reindex_kit import JoiningColors, TurnedEncoder, make_index, paint, photos, shades

from mmsearch.bridge import LEAST, Bridge
from mmsearch.bridge_build import build_bridge
from mmsearch.errors import IndexDamagedError, IndexMismatchError, UsageError
from mmsearch.exchange import import_vectors
from mmsearch.reindex import reindex
from mmsearch.searcher import Searcher
from mmsearch.store import Batch, IndexStore
from mmsearch.store.bridge_file import NAME
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker
from mmsearch.types import Modality, Source


def captioned(folder: Path, count: int = 60) -> list[Source]:
    """Pictures of single colours, each with a caption that says which of the named ones is nearest."""
    sources = []
    for file, colour in zip(shades(folder, count), np.random.default_rng(0).integers(0, 256, (count, 3)), strict=True):
        name = min(COLORS, key=lambda n: float(np.abs(np.array(COLORS[n]) - colour).sum()))
        sources.append(Source("/table", file.stem, str(file), None, (f"a {name} thing",), {}))
    return sources


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of `ColorEncoder`, and the same with a bridge to `TurnedEncoder`. Read only."""
    folder = tmp_path_factory.mktemp("made")
    plain_one = make_index(folder / "plain", captioned(folder / "photos"))
    bridged_one = Path(shutil.copytree(plain_one, folder / "bridged"))
    return plain_one, bridged_one, build_bridge(bridged_one, encoder=TurnedEncoder(), workers=1)


@pytest.fixture
def index(made, tmp_path):
    """An index without a bridge."""
    return Path(shutil.copytree(made[0], tmp_path / "index"))


@pytest.fixture
def bridged(made, tmp_path):
    """The same index with a bridge."""
    return Path(shutil.copytree(made[1], tmp_path / "bridged"))


def hits(path: Path, encoder, text: str = "red", **options):
    with Searcher.open(path, encoder=encoder) as searcher:
        found = searcher.search_text(text, **{"k": 5, **options})
        return [(hit.item.id, round(hit.score, 2)) for hit in found], found.notes


def test_another_model_asks_the_index_at_once(index, bridged, made):
    """Without a bridge it is refused; with one it finds what it would find among its own rows, and a note says so."""
    with pytest.raises(IndexMismatchError, match="reindex"):
        Searcher.open(index, encoder=TurnedEncoder())
    assert (made[2].pictures, made[2].texts, made[2].skipped) == (60, 60, 0)
    for options in ({}, {"to": "text"}, {"to": "any"}, {"threshold": 0.3}):
        found, notes = hits(bridged, TurnedEncoder(), **options)
        own = hits(index, ColorEncoder(), **options)[0]
        assert [score for _, score in found] == pytest.approx([score for _, score in own], abs=0.011)
        assert options.get("to") or [id_ for id_, _ in found] == [id_ for id_, _ in own]  # captions may be alike
        assert any("bridged" in note for note in notes)
    with Searcher.open(bridged, encoder=TurnedEncoder()) as searcher:
        first = searcher.search_image(paint(bridged.parent / "q.png", COLORS["red"]), k=1)[0]
        assert searcher.search_text("red", k=1)[0].item == first.item
    with pytest.raises(IndexMismatchError):
        Searcher.open(bridged, encoder=TurnedEncoder(name="third"))


def test_only_a_sample_is_encoded(index):
    """That is what a bridge is for."""
    encoder = TurnedEncoder()
    report = build_bridge(index, encoder=encoder, workers=1, sample=20, queries=["red", "blue"])
    assert (encoder.images, report.pictures) == (20, 20)
    assert report.bridge.cost["text_to_image"]["gallery"] == 20
    assert report.bridge.cost["found_again"]["queries"] == 2
    text = "\n".join(report.lines())
    assert "colors -> turned" in text
    assert "bridged - new" in text
    json.dumps(report.to_json())


def test_after_the_switch_the_bridge_is_gone_and_an_open_searcher_goes_on(bridged):
    """The searcher of the new model looks at the newest generation: first bridged rows, then its own."""
    with Searcher.open(bridged, encoder=TurnedEncoder()) as searcher:
        before = searcher.search_text("red", k=3)
        reindex(bridged, encoder=TurnedEncoder(), workers=1)
        assert not (bridged / NAME).exists()
        searcher.refresh()
        after = searcher.search_text("red", k=3)
    assert [hit.item.id for hit in before] == [hit.item.id for hit in after]
    assert any("bridged" in note for note in before.notes)
    assert after.notes == ()


def test_removed_items_are_not_found_over_the_bridge(bridged):
    """Dead rows stay out, also those that died after the bridge was made."""
    first = hits(bridged, TurnedEncoder(), "red")[0][0][0]
    with IndexStore.open(str(bridged), write=True) as store:
        with store.snapshot() as snapshot:
            gone = next(known.item for known in snapshot.items() if known.id == first)
        store.commit(Batch(removals=[gone]))
    assert first not in [id_ for id_, _ in hits(bridged, TurnedEncoder(), "red")[0]]


def test_what_is_re_ranked_sees_bridged_rows(bridged):
    """A second stage of the new model compares its own rows with what the bridge makes of the old ones."""

    class Turned(ColorReranker):
        def __init__(self):
            super().__init__(size=24)
            self.towers = TurnedEncoder().identity

    with Searcher.open(bridged, encoder=TurnedEncoder(), reranker=Turned()) as searcher:
        found = searcher.search_text("red", k=3, rerank=10)
        cosines = [hit.parts["cosine"] for hit in found]
        plain_ones = {hit.item.id: hit.score for hit in searcher.search_text("red", k=60)}
        assert cosines == pytest.approx([plain_ones[hit.item.id] for hit in found], abs=1e-3)


def test_an_index_of_few_captions_leaves_them_out_and_says_so(tmp_path):
    """A map that nothing was fitted on is not used."""
    sources = captioned(tmp_path / "photos", 30)
    few = [Source(s.root, s.name, s.path, None, s.captions if i < 5 else (), {}) for i, s in enumerate(sources)]
    index = make_index(tmp_path / "index", few)
    build_bridge(index, encoder=TurnedEncoder(), workers=1)
    found, notes = hits(index, TurnedEncoder(), to="any")
    assert len(found) == 5
    assert any("text rows are left out" in note for note in notes)
    assert hits(index, TurnedEncoder(), to="text")[0] == []


def test_an_index_without_captions_is_measured_by_its_pictures(tmp_path):
    """What the new model finds like a picture is looked for again."""
    shades(tmp_path / "photos", 30)
    index = make_index(tmp_path / "index", [tmp_path / "photos"])
    report = build_bridge(index, encoder=TurnedEncoder(), workers=1)
    assert set(report.bridge.cost) == {"found_again"}
    assert report.bridge.cost["found_again"]["bridged"]["hit@5"][0] > 0.95
    assert set(report.bridge.maps) == {Modality.IMAGE}


def test_pictures_that_are_gone_or_changed_are_no_part_of_the_sample(tmp_path):
    """Their rows are of something else."""
    index = make_index(tmp_path / "index", captioned(tmp_path / "photos", 20))
    files = sorted((tmp_path / "photos").iterdir())
    files[0].unlink()
    paint(files[1], COLORS["red"], size=(31, 31))
    report = build_bridge(index, encoder=TurnedEncoder(), workers=1)
    assert (report.pictures, report.skipped) == (18, 2)


def test_copies_are_taken_once(tmp_path):
    """One in another fold would give the answer away."""
    files = shades(tmp_path / "photos", 20)
    for file in files:
        (tmp_path / "photos" / f"copy-{file.name}").write_bytes(file.read_bytes())
    index = make_index(tmp_path / "index", [tmp_path / "photos"])
    assert build_bridge(index, encoder=TurnedEncoder(), workers=1).pictures == 20


def test_what_cannot_be_bridged_is_refused_before_any_work(tmp_path, index):
    """The same model, too few pictures, fused item vectors, a sample of nothing."""
    with pytest.raises(UsageError, match="another model"):
        build_bridge(index, encoder=ColorEncoder())
    with pytest.raises(UsageError, match="sample"):
        build_bridge(index, encoder=TurnedEncoder(), sample=LEAST - 1)
    small = make_index(tmp_path / "small", [photos(tmp_path / "few")[0].parent])
    with pytest.raises(UsageError, match="16 pictures"):
        build_bridge(small, encoder=TurnedEncoder())
    fused = make_index(
        tmp_path / "fused", captioned(tmp_path / "more", 20), encoder=JoiningColors(), item_vectors="fused"
    )
    with pytest.raises(UsageError, match="fused"):
        build_bridge(fused, encoder=TurnedEncoder())


# The file


def test_a_bridge_survives_its_file(bridged, made):
    """Matrices, models, figures: what is loaded is what was saved."""
    saved, loaded = made[2].bridge, Bridge.load(str(bridged))
    assert loaded.facts() == json.loads(json.dumps(saved.facts()))
    assert all(np.array_equal(loaded.maps[m].matrix, saved.maps[m].matrix) for m in saved.maps)
    with IndexStore.open(str(bridged)) as store:
        assert store.info()["bridge"]["model"]["name"] == "turned"
        assert store.verify() == []


def test_damage_is_found_and_never_answered_from(bridged):
    """A flipped byte anywhere, half a file, another: the new model is refused, the old one answers, verify tells."""
    whole = (bridged / NAME).read_bytes()
    before = hits(bridged, ColorEncoder())
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    for content in [*flipped, whole[: len(whole) // 2], b"", b"not safetensors at all"]:
        (bridged / NAME).write_bytes(content)
        with pytest.raises(IndexDamagedError):
            Searcher.open(bridged, encoder=TurnedEncoder())
    assert hits(bridged, ColorEncoder()) == before
    with IndexStore.open(str(bridged)) as store:
        assert [problem.file for problem in store.verify()] == [NAME]
    build_bridge(bridged, encoder=TurnedEncoder(), workers=1, sample=16)
    with IndexStore.open(str(bridged)) as store:
        assert store.verify() == []


def test_a_bridge_of_another_index_counts_for_nothing(bridged, tmp_path):
    """One that was copied in leads from somewhere else; the next writer removes it."""
    other = make_index(tmp_path / "other", [photos(tmp_path / "few")[0].parent], encoder=TurnedEncoder(name="third"))
    shutil.copy(bridged / NAME, other / NAME)
    with pytest.raises(IndexMismatchError):
        Searcher.open(other, encoder=TurnedEncoder())
    IndexStore.open(str(other), write=True).close()
    assert not (other / NAME).exists()


def test_texts_that_nobody_kept_are_no_example_for_a_bridge(tmp_path):
    """Their captions are ids: fitted on those, a bridge would lead anywhere."""
    index, vectors = make_index(tmp_path / "index", [shades(tmp_path / "photos", 20)[0].parent]), tmp_path / "x.npy"
    np.save(vectors, ColorEncoder().encode_texts(list(COLORS)))
    import_vectors(vectors, index, encoder=ColorEncoder(), modality="text")
    encoder = TurnedEncoder()
    assert build_bridge(index, encoder=encoder, workers=1).texts == 0 and encoder.texts == 0
