"""Held-out pairs under a re-ranker: the logits are the model's, the texts are others' words, places stay right."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from train_kit import passes, pixels, tokens

from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.calibration import Temperature
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.model import RerankModel
from mmsearch.rerank.score_fitting import fit_scoring
from mmsearch.rerank.scores import CASES, Case, Scoring
from mmsearch.testing import COLORS, TINY_RERANK, tiny_dual_encoder
from mmsearch.train.rerank_pictures import PictureReader
from mmsearch.train.rerank_validation import HeldOut, RerankValidation, a_part


def scoring_of(part: str) -> Scoring:
    """The final score is that part, as it is."""
    cases = {}
    for name, parts in CASES.items():
        weights = tuple(float(one == part) for one in parts)
        cases[name] = Case((0.0,) * len(parts), (1.0,) * len(parts), weights, 0.0, Temperature(1.0), None)
    return Scoring(cases)


def unit(count: int, dim: int = 8, *, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def held_out(counts=(2, 3, 1, 2, 1, 2), *, groups=None, maps=None, seed=0) -> HeldOut:
    """Pictures with so many captions each, "NUMBER LETTER"; the first stage knows nothing of them."""
    owners = np.repeat(np.arange(len(counts)), counts)
    captions = [f"{owner} {'abc'[k]}" for owner, count in enumerate(counts) for k in range(count)]
    numbers = torch.arange(len(counts), dtype=torch.float32).reshape(-1, 1, 1) if maps is None else maps
    rare = (np.arange(len(counts)) / 100, np.arange(len(owners)) / 100)
    named = np.arange(len(counts)) if groups is None else np.array(groups)
    return HeldOut(
        numbers, unit(len(counts), seed=seed), unit(len(owners), seed=seed + 1), captions, owners, named, rare
    )


# A model that knows every answer, and one that is wrong about all


class Knows(nn.Module):
    """`sign` · 8 where the number in a caption is the picture's, -8 · sign elsewhere; pictures are their numbers."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.patch_projection, self.sign = nn.Identity(), sign

    def forward(self, text: TextSide, image: ImageSide) -> torch.Tensor:
        same = text.tokens[:, 0, 0] == image.patches[:, 0, 0]
        return torch.where(same, 8.0 * self.sign, -8.0 * self.sign)


def known(held: HeldOut, *, depth=64, sign=1.0) -> RerankValidation:
    def read(captions):
        numbers = torch.tensor([float(caption.split()[0]) for caption in captions]).reshape(-1, 1, 1)
        return numbers, torch.ones(len(captions), 1, dtype=torch.int64)

    reader = SimpleNamespace(read=lambda kept: (kept, None), passes=SimpleNamespace(autocast=nullcontext))
    return RerankValidation(held, Knows(sign), read=read, reader=reader, depth=depth)


def hits(evaluation, k=1) -> list[float]:
    return [way.values[f"hit@{k}"] for way in (evaluation.text_to_image, evaluation.image_to_text)]


@pytest.mark.parametrize("scoring", [scoring_of("logit"), None])
def test_a_model_that_knows_everything_finds_everything(scoring):
    """Both ways, with given weights and with fitted ones; the first stage is what it was."""
    found = known(held_out()).measure(name="fused", scoring=scoring)
    assert hits(found.second) == [1.0, 1.0]
    assert max(hits(found.first)) < 0.7
    assert (found.first.model, found.second.model) == ("first stage", "fused")
    assert found.pairs.match.sum() == 11 and bool((found.pairs.evidence.logit[found.pairs.match] == 8.0).all())
    assert bool((found.pairs.evidence.logit[~found.pairs.match] == -8.0).all())


def test_what_is_no_candidate_is_not_found():
    """Perfect within two candidates: hit@1 is the share of right answers among them."""
    held = held_out()
    found = known(held, depth=2).measure(name="a", scoring=scoring_of("logit"))
    cosines = held.texts @ held.images.T
    among = (np.argsort(-cosines, axis=1)[:, :2] == held.owners[:, None]).any(axis=1)
    assert hits(found.second)[0] == pytest.approx(among.mean())
    assert found.to_image.rows.shape == (11, 2) and found.to_text.rows.shape == (6, 2)


def test_a_model_that_is_wrong_gets_no_weight():
    """Fitted weights are not negative: what speaks against the truth is left out, and nothing gets worse than that."""
    scoring = known(held_out(), sign=-1.0).measure(name="a").scoring
    assert scoring.cases["picture"].weights[1] == 0.0


def test_captions_of_a_group_belong_to_all_its_pictures():
    """A picture of the own group is no false pair, and it counts as found."""
    groups = [0, 0, 1, 1, 2, 3]
    held = held_out(groups=groups)
    validation = known(held)
    found = validation.measure(name="a", scoring=scoring_of("logit"))
    assert hits(found.second) == [1.0, 1.0]
    false = found.pairs.group[11:]
    assert len(false) == 11
    whole = known(held_out(groups=[0] * 6)).measure(name="a", scoring=scoring_of("logit"))
    assert whole.pairs.match.all()  # nothing is false where all is one group


def test_probabilities_are_fitted_on_random_false_pairs_too():
    """Hard ones are among a caption's best, random ones any; neither is of its group. Figures: of hard ones."""
    held = held_out(groups=[0, 0, 1, 2, 3, 4])
    validation = known(held, depth=2)
    hard, random = validation._false_pairs()
    best = np.argsort(-(held.texts @ held.images.T), axis=1)[:, :2]
    for numbers in (hard, random):
        text, image = numbers // 6, numbers % 6
        assert (held.groups[image] != held.groups[held.owners[text]]).all() and len(np.unique(text)) == len(text)
    assert (hard[:, None] % 6 == best[hard // 6]).any(axis=1).all()
    assert len(random) == 11 and (random[:, None] % 6 != best[random // 6]).all(axis=1).any()
    given = []
    with pytest.MonkeyPatch.context() as patch:
        fitted = fit_scoring
        patch.setattr(
            "mmsearch.train.rerank_validation.fit_scoring",
            lambda lists, pairs, **options: given.append(pairs) or fitted(lists, pairs, **options),
        )
        found = validation.measure(name="a")
    assert len(given[0].match) == 11 + len(hard) + 11
    assert len(found.pairs.match) == 11 + len(hard)


# The real model


@pytest.fixture(scope="module")
def real():
    """(held-out pairs, model, validation) of tiny towers and a cross-attention whose logits all differ."""
    towers = tiny_dual_encoder()
    torch.manual_seed(0)
    model = RerankModel(RerankConfig(**{**TINY_RERANK, "fusion": "cross-attention"}), towers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    one = passes(towers)
    reader = PictureReader(model, one, learning=0, keep=False)
    pictures = pixels(6)
    held = held_out(maps=reader.kept(pictures))
    names = list(COLORS)
    held.captions = [" ".join(names[: 1 + i % 5]) for i in range(len(held.captions))]

    def read(captions):
        ids, mask = tokens(captions)
        return model.words(ids, mask), mask

    return held, model, RerankValidation(held, model, read=read, reader=reader, depth=4, seed=1)


def forward(held, model, text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Aligned pairs all at once, padded to the longest."""
    ids, mask = tokens([held.captions[i] for i in text])
    with torch.no_grad():
        texts = TextSide(torch.from_numpy(held.texts[text]), model.words(ids, mask), mask)
        images = ImageSide(torch.from_numpy(held.images[image]), model.patches(held.maps[torch.from_numpy(image)]))
        return model(texts, images).numpy()


def test_the_logits_are_those_of_the_model(real):
    """Of true pairs, of false ones and of every candidate both ways, each in its place."""
    held, model, validation = real
    model.train()
    found = validation.measure(name="a", scoring=scoring_of("logit"))
    model.eval()
    true = forward(held, model, np.arange(11), held.owners)
    assert len(np.unique(true)) == 11
    assert np.allclose(found.pairs.evidence.logit[:11], true, atol=1e-4)
    rows = found.to_image.rows
    expected = forward(held, model, np.repeat(np.arange(11), rows.shape[1]), rows.ravel())
    assert np.allclose(found.to_image.final, expected.reshape(rows.shape), atol=1e-4)
    rows = found.to_text.rows
    expected = forward(held, model, rows.ravel(), np.repeat(np.arange(6), rows.shape[1]))
    assert np.allclose(found.to_text.final, expected.reshape(rows.shape), atol=1e-4)


def test_cosine_and_rarity_are_of_the_candidate(real):
    """A picture's for a caption, a caption's for a picture."""
    held, _, validation = real
    for part in ("cosine", "rarity"):
        found = validation.measure(name="a", scoring=scoring_of(part))
        for way, rare in ((found.to_image, held.rarity[0]), (found.to_text, held.rarity[1])):
            assert np.allclose(way.final, way.cosines if part == "cosine" else rare[way.rows], atol=1e-6)


def test_a_text_is_compared_with_another_text_of_the_picture(real):
    """Never with itself: NaN where a picture has no other; a false pair's is one of that picture's captions."""
    held, _, validation = real
    pairs = validation.measure(name="a", scoring=scoring_of("logit")).pairs
    found = pairs.evidence.text_cosine
    own = held.texts @ held.texts.T
    for text, owner in enumerate(held.owners):
        others = [i for i in np.flatnonzero(held.owners == owner) if i != text]
        assert np.isnan(found[text]) if not others else np.isclose(own[text, others], found[text]).any()
    for place in range(11, len(found)):
        cosine = pairs.evidence.cosine[place]
        text, image = np.unravel_index(np.abs(held.texts @ held.images.T - cosine).argmin(), (11, 6))
        assert held.owners[text] != image and text == place - 11
        assert np.isclose(own[text, held.owners == image], found[place]).any()


# Parts


def test_a_part_keeps_what_belongs_together():
    """Captions, rows, maps, groups and rarity of a picture, in its new place."""
    held = held_out(groups=[0, 0, 1, 1, 2, 3])
    pictures, texts = np.array([4, 1, 3]), np.array([2, 4, 6, 7, 8])
    part = held.part(pictures, texts)
    assert part.captions == [held.captions[i] for i in texts]
    for place, (owner, caption) in enumerate(zip(part.owners, part.captions, strict=True)):
        assert int(caption.split()[0]) == pictures[owner] == int(part.maps[owner])
        assert np.array_equal(part.images[owner], held.images[pictures[owner]])
        assert np.array_equal(part.texts[place], held.texts[texts[place]])
    assert part.groups.tolist() == [2, 0, 1]
    assert part.rarity[0].tolist() == [0.04, 0.01, 0.03] and part.rarity[1].tolist() == (texts / 100).tolist()


def test_a_part_for_between_epochs_has_whole_groups_and_a_caption_a_picture():
    """At most as many as asked for; the same for the same seed; all of it where that is not more."""
    held = held_out((2,) * 20, groups=np.arange(20) // 2)
    found = a_part(held, pictures=9, texts=12, seed=0)
    assert (len(found.images), len(found.captions)) == (8, 12)
    _, counts = np.unique(found.groups, return_counts=True)
    assert counts.tolist() == [2] * 4
    assert set(found.owners.tolist()) == set(range(8))
    assert a_part(held, pictures=9, texts=12, seed=0).captions == found.captions
    few = a_part(held, pictures=9, texts=2, seed=0)
    assert sorted(few.owners.tolist()) == list(range(8))
    assert a_part(held, pictures=20, texts=40, seed=0).captions == held.captions
