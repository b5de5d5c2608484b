"""What a run of the second stage begins with."""

import dataclasses

import numpy as np
import pytest
import torch

from mmsearch.errors import ModelError, UsageError
from mmsearch.rerank.checkpoint import load_rerank_model
from mmsearch.testing import TINY_CONFIG, TINY_RERANK, tiny_checkpoint, tiny_reranker
from mmsearch.towers.checkpoint import load_dual_encoder
from mmsearch.train.rerank_start import build_reranker, earlier_banks, start_identity, with_start
from mmsearch.train.settings import Rerank

SHAPE = {name: TINY_RERANK[name] for name in ("patch_dim", "grid", "hidden")}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A late-interaction re-ranker, and an image backbone of its own."""
    return tiny_reranker(
        tmp_path_factory.mktemp("before"), fusion="late-interaction", own_backbone=True, bank=4, seed=5
    )


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Of the same sizes as those that `before` reads, with other weights."""
    return load_dual_encoder(tiny_checkpoint(tmp_path_factory.mktemp("towers"), seed=9))


def test_going_on_takes_shape_and_weights_but_not_the_banks(before, towers):
    """The settings' own fusion is not read; dropout and banks are of this run; words come from this run's towers."""
    wanted = Rerank(start=str(before.directory), fusion="concat", dropout=0.4, bank=100, image_train=1)
    model = build_reranker(wanted, towers, captions=7)
    assert model.config == dataclasses.replace(before.config, dropout=0.4, bank=7)
    assert model.towers is towers
    old = load_rerank_model(before).state_dict()
    new = model.state_dict()
    assert new["caption_bank"].shape == (7, 8) and not new["caption_bank"].any()
    kept = [name for name in old if not name.endswith("_bank")]
    assert len(kept) > 10 and all(torch.equal(old[name], new[name]) for name in kept)


def test_a_start_that_does_not_fit_is_refused(before, towers, plain_checkpoint, tmp_path):
    """Towers of another width, no re-ranker there, a backbone that it does not have."""
    shared = tiny_reranker(tmp_path / "shared", own_backbone=False)
    other = load_dual_encoder(tiny_checkpoint(tmp_path / "other", config={**TINY_CONFIG, "dim": 6}))
    with pytest.raises(ModelError, match="do not fit"):
        build_reranker(Rerank(start=str(tiny_reranker(tmp_path / "r", fusion="gated").directory)), other, captions=7)
    with pytest.raises(ModelError, match="a model with a re-ranker"):
        build_reranker(Rerank(start=str(plain_checkpoint.directory)), towers, captions=7)
    with pytest.raises(UsageError, match="no image backbone of its own"):
        build_reranker(Rerank(start=str(shared.directory), image_train=1), towers, captions=7)


def test_the_start_is_part_of_what_a_run_is(before, tmp_path):
    """Other weights in the same folder are another start; without one there is nothing to tell apart."""
    assert start_identity(Rerank(start="")) == ""
    folder = tmp_path / "model"
    first = start_identity(Rerank(start=str(tiny_reranker(folder, seed=1).directory)))
    assert first == start_identity(Rerank(start=str(folder)))
    assert first != start_identity(Rerank(start=str(tiny_reranker(folder, seed=2).directory)))


def test_the_towers_own_re_ranker_is_gone_on_with_where_it_fits(before, plain_checkpoint):
    """Unless another shape, another fusion, a teacher or another start is asked for; towers without one begin anew."""
    own = str(before.directory)
    assert Rerank().start == "auto"
    assert with_start(Rerank(), towers=own).start == own
    assert with_start(Rerank(dropout=0.4, mined=8), towers=own).start == own
    for other in ({"fusion": "gated"}, {"grid": 7}, {"image_train": 2}, {"teacher": "t"}, {"start": ""}):
        assert with_start(Rerank(**other), towers=own).start == ""
    assert with_start(Rerank(start="bundled"), towers=own).start == "bundled"
    assert with_start(Rerank(), towers=str(plain_checkpoint.directory)).start == ""
    assert with_start(Rerank(), towers=own) == Rerank(start=own)


def test_banks_are_gone_on_with_where_the_towers_are_the_same(before):
    """Rows of other towers are of another space, and without a start there are none."""
    same, other = before.towers.identity, dataclasses.replace(before.towers.identity, weights="others")
    captions, pictures = earlier_banks(Rerank(start=str(before.directory)), same)
    assert captions.shape == pictures.shape == (4, 8)
    assert np.array_equal(captions, before.bank("caption")) and np.array_equal(pictures, before.bank("picture"))
    assert not np.array_equal(captions, pictures)
    for wanted, towers in ((Rerank(start=""), same), (Rerank(start=str(before.directory)), other)):
        assert [rows.shape for rows in earlier_banks(wanted, towers)] == [(0, 8), (0, 8)]


def test_without_a_start_the_settings_say_the_shape(towers):
    """Vector fusions have no use for a backbone of their own."""
    model = build_reranker(Rerank(start="", fusion="cross-attention", layers=1, **SHAPE), towers, captions=3)
    assert (model.config.fusion, model.config.layers, model.config.bank) == ("cross-attention", 1, 3)
    with pytest.raises(UsageError, match="reads no patches"):
        build_reranker(Rerank(start="", fusion="gated", image_train=1, **SHAPE), towers, captions=3)
