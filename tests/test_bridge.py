"""Queries of one model over rows of another: what the map is, what it costs, and that searches use it rightly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reindex_kit import JoiningColors, TurnedEncoder, make_index, paint, photos, shades, turn

from mmsearch.bridge import LEAST, Bridge, Map, agreement, fit, procrustes, reduced, ridge
from mmsearch.bridge_build import build_bridge
from mmsearch.bridge_cost import Pairs, fitted, found_again
from mmsearch.bridged import BridgedIndex
from mmsearch.errors import IndexDamagedError, IndexMismatchError, UsageError
from mmsearch.index.exact import ExactIndex
from mmsearch.reindex import reindex
from mmsearch.searcher import Searcher
from mmsearch.similarity import normalise
from mmsearch.store import IndexStore
from mmsearch.store.bridge_file import NAME
from mmsearch.testing import COLORS, ColorEncoder, ColorReranker
from mmsearch.types import Modality, Source


def rows(count: int, dim: int = 8, *, seed: int = 0) -> np.ndarray:
    return normalise(np.random.default_rng(seed).standard_normal((count, dim)))


def noisy(clean: np.ndarray, share: float, *, seed: int = 1) -> np.ndarray:
    """Rows with noise of `share` of their length."""
    noise = np.random.default_rng(seed).standard_normal(clean.shape) * share / np.sqrt(clean.shape[1])
    return normalise(clean + noise)


def plain(matrix: np.ndarray) -> Map:
    lengths = np.linalg.norm(rows(500, matrix.shape[1], seed=9) @ matrix.T, axis=1)
    return Map(matrix.astype(np.float32), "given", 0, 0, 1.0, float(lengths.min()), float(lengths.max()))


def each(count: int) -> np.ndarray:
    return np.arange(count)


# The map


def test_a_rotation_is_found_exactly():
    """Rows that were only turned come back as they are, whatever the two dimensions."""
    old = rows(60)
    for dim in (8, 12):
        new = old @ turn(dim).T
        found, held = fit(old, new, queries=rows(20, dim), groups=each(60))
        assert found.method == "rotation"
        assert np.abs(found.matrix - turn(dim)).max() < 1e-4
        assert np.abs(held - new).max() < 1e-4
        assert found.agreement == pytest.approx(1.0, abs=1e-4)


def test_a_smaller_space_is_reached_as_well():
    """From 12 axes to 8: the rows lie in 8 of them."""
    small = rows(60)
    found, _ = fit(small @ turn(12).T, small, queries=rows(20), groups=each(60))
    assert found.matrix.shape == (8, 12)
    assert np.abs(found.carry(small @ turn(12).T) - small).max() < 1e-4


def test_few_noisy_pairs_get_a_rotation_and_a_stretched_space_a_regression():
    """What holds up on rows it was not fitted on is used, not what fits best."""
    few = rows(24, 16)
    assert fit(few, noisy(few, 0.3), queries=rows(40, 16, seed=5), groups=each(24))[0].method == "rotation"
    stretch = np.diag(np.linspace(0.2, 3.0, 16)).astype(np.float32)
    many = rows(400, 16)
    stretched = normalise(many @ stretch)
    assert fit(many, stretched, queries=rows(40, 16, seed=5), groups=each(400))[0].method.startswith("ridge")


def test_a_reduced_map_is_the_nearest_of_its_rank_where_the_rows_are():
    """Nearer than the map cut to its largest directions, which may be such that no row lies in."""
    flat = rows(80, 12) * np.linspace(0.05, 2.0, 12).astype(np.float32)
    matrix = np.random.default_rng(4).standard_normal((9, 12)).astype(np.float32)
    kept = reduced(matrix, flat, rank=3)
    left, sizes, right = np.linalg.svd(matrix)
    cut = (left[:, :3] * sizes[:3]) @ right[:3]
    assert np.linalg.matrix_rank(kept, tol=1e-4) == 3
    assert np.linalg.norm(flat @ (kept - matrix).T) < 0.9 * np.linalg.norm(flat @ (cut - matrix).T)


def test_the_families_are_what_their_names_say():
    """Procrustes keeps lengths; ridge without strength is least squares, with much of it next to nothing."""
    old, new = rows(50), rows(50, 6, seed=5)
    orthogonal = procrustes(old, new)
    assert np.allclose(orthogonal @ orthogonal.T, np.eye(6), atol=1e-5)
    assert np.allclose(ridge(old, new, strength=0.0), np.linalg.lstsq(old, new, rcond=None)[0].T, atol=1e-4)
    assert np.linalg.norm(ridge(old, new, strength=1e6)) < 1e-4


def test_what_a_fold_gets_was_not_fitted_on_it():
    """Rows without any relation are not learned by heart: on rows it never saw the map agrees with nothing."""
    old, new = rows(40, 32), rows(40, 32, seed=7)
    found, held = fit(old, new, queries=rows(50, 32, seed=8), groups=each(40))
    assert abs(found.agreement) < 0.3
    assert agreement(rows(50, 32, seed=8), held, new) == pytest.approx(found.agreement)
    assert np.einsum("nd,nd->n", found.carry(old), new).mean() > np.einsum("nd,nd->n", held, new).mean() + 0.2


def test_what_is_alike_is_in_one_fold():
    """Five captions of a picture would give each other's answer away."""
    old, new = np.repeat(rows(20, 32), 5, axis=0), np.repeat(rows(20, 32, seed=7), 5, axis=0)
    apart = fit(old, new, queries=rows(50, 32, seed=8), groups=each(100))[0].agreement
    together = fit(old, new, queries=rows(50, 32, seed=8), groups=each(100) // 5)[0].agreement
    assert apart > 0.8
    assert together < 0.3


def test_too_few_pairs_are_refused():
    """Fifteen pictures say nothing about a space."""
    with pytest.raises(UsageError, match="16"):
        fit(rows(15), rows(15), queries=rows(3), groups=each(15))
    with pytest.raises(UsageError, match="16"):
        fit(rows(60), rows(60), queries=rows(3), groups=each(60) // 5)


def test_agreement_is_a_mean_correlation():
    """1 for the same rows, whatever is added to all scores of a query; -1 for their opposites."""
    true, queries = rows(30), rows(10, seed=2)
    assert agreement(queries, true, true, block=3) == pytest.approx(1.0)
    assert agreement(queries, -true, true) == pytest.approx(-1.0)


# The search


@pytest.mark.parametrize("k", [1, 7, 300])
def test_searching_backwards_finds_what_searching_bridged_rows_finds(k):
    """The dumb way: carry every row over and compare. Row lengths differ by a factor of ten here."""
    matrix = np.diag(np.linspace(0.3, 3.0, 8)).astype(np.float32) @ turn(8, seed=4)
    old, queries, one = rows(3000, seed=6), rows(12, seed=7), plain(matrix)

    class Stored:
        def vectors(self, wanted):
            return old[wanted]

    found = BridgedIndex(ExactIndex(old), Stored(), one).search(queries, k)
    right = ExactIndex(one.carry(old)).search(queries, k)
    assert np.array_equal(found[1], right[1])
    assert np.allclose(found[0], right[0], atol=1e-5)


def test_searches_of_nothing_and_of_more_than_there_is_are_padded():
    """k beyond the rows, and rows that may not be returned."""
    old, one = rows(5), plain(turn(8))

    class Stored:
        def vectors(self, wanted):
            return old[wanted]

    index = BridgedIndex(ExactIndex(old), Stored(), one)
    scores, found = index.search(rows(2, seed=3), 8)
    assert (found[:, 5:] == -1).all()
    assert np.isneginf(scores[:, 5:]).all()
    assert sorted(found[0, :5].tolist()) == [0, 1, 2, 3, 4]
    assert set(index.search(rows(1, seed=3), 3, allowed=np.array([2, 4]))[1][0].tolist()) == {2, 4, -1}
    with pytest.raises(UsageError):
        index.search(rows(1, 9), 1)


# The cost


def test_a_perfect_bridge_costs_nothing_and_a_useless_one_everything():
    """hit@k of old, new and bridged, and their differences, on rows of which all is known."""
    pictures = rows(200, 16)
    texts = noisy(pictures, 0.3)

    def cost(new_pictures, new_texts):
        of = Pairs(pictures, new_pictures, each(200), each(200))
        with_texts = Pairs(texts, new_texts, each(200), 200 + each(200))
        return fitted(of, with_texts, others=with_texts.only(np.zeros(200, bool)))[1]["text_to_image"]

    spin = np.linalg.qr(np.random.default_rng(2).standard_normal((16, 16)))[0]
    perfect = cost(normalise(pictures @ spin.T), normalise(texts @ spin.T))
    assert perfect["old"] == perfect["new"] == perfect["bridged"]
    assert perfect["bridged - new"]["hit@1"] == [0.0, 0.0, 0.0]
    unrelated = rows(200, 16, seed=11)
    useless = cost(unrelated, noisy(unrelated, 0.3))
    assert useless["new"]["hit@1"][0] > 0.9
    assert useless["bridged"]["hit@10"][0] < 0.2
    assert useless["bridged - new"]["hit@10"][2] < -0.5
    low, high = useless["bridged"]["hit@10"][1:]
    assert 0.0 <= low <= useless["bridged"]["hit@10"][0] <= high


def test_the_new_model_s_first_hit_is_looked_for_among_others():
    """Pictures do not find themselves; equal scores count as found later."""
    true = rows(50)
    assert found_again(true, true, true, own=True)["bridged"]["hit@1"] == [1.0, 1.0, 1.0]
    three = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]], np.float32)
    turned = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0]], np.float32)
    assert found_again(three, three, turned, own=True)["bridged"]["hit@1"][0] == 0.0
    assert found_again(three, three, turned, own=False)["bridged"]["hit@1"][0] == pytest.approx(1 / 3)
    assert found_again(rows(20, seed=3), true, np.tile(true[:1], (50, 1)), own=False)["bridged"]["hit@10"][0] == 0.0


# End to end


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
        from mmsearch.store import Batch

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
