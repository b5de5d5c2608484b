"""What a run starts from: a checkpoint, or towers built anew, with everything that goes with them."""

import pytest
import torch
from safetensors.torch import save_file
from train_kit import anew

from mmsearch.errors import ModelError, UsageError
from mmsearch.testing import TINY_TEXT, tiny_dual_encoder, tiny_tokenizer_json, tiny_transformers_directory
from mmsearch.towers.checkpoint import load_dual_encoder, save_checkpoint
from mmsearch.train.settings import Start
from mmsearch.train.setup import begin, set_anchors


def start(**values) -> Start:
    return Start(**{"model": "", **values})


def same(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_gone_on_from(plain_checkpoint):
    """Its weights, its tokenizer and its name; it was trained before."""
    found = begin(start(model=str(plain_checkpoint.directory)), seed=0)
    assert same(found.model, load_dual_encoder(plain_checkpoint))
    assert (found.known, found.name, found.model.training) == (True, "plain", False)
    assert found.tokeniser()(["a red dog"]).ids.shape == (1, 5)


def test_towers_are_built_anew_from_the_seed_alone(tmp_path):
    """The same seed gives the same numbers whatever was drawn before; another seed other ones."""
    made = anew(tmp_path)
    first = begin(start(**made), seed=3)
    torch.rand(5)
    assert same(first.model, begin(start(**made), seed=3).model)
    assert not same(first.model, begin(start(**made), seed=4).model)
    assert (first.known, first.name) == (False, "random weights")


def test_backbones_are_filled_from_weights_on_disk(tmp_path):
    """The rest is random; the name says that something was known. A folder may hold the tokenizer."""
    made, source = anew(tmp_path), tiny_dual_encoder(seed=7)
    save_file(source.text.backbone.state_dict(), str(tmp_path / "bert.safetensors"))
    made["tokenizer"] = str(tmp_path)
    found = begin(start(**made, text_weights=str(tmp_path / "bert.safetensors")), seed=0)
    assert same(found.model.text.backbone, source.text.backbone)
    assert not same(found.model.text.projection, source.text.projection)
    assert found.name == "untrained heads"


def test_anchors_are_sharpened_and_boosted_as_the_settings_say(plain_checkpoint, tmp_path):
    """In the tower and in what is stored of it; nothing said changes nothing."""
    before = load_dual_encoder(plain_checkpoint)
    wanted = start(model=str(plain_checkpoint.directory), anchor_peak=0.3, anchor_boost=2.0)
    model = begin(wanted, seed=0).model
    assert same(model, before)  # it is measured first
    set_anchors(model, wanted)
    assert (model.image.anchors.peak, model.config.image.anchors.peak) == (0.3, 0.3)
    assert torch.equal(model.image.anchors.scale, 2.0 * before.image.anchors.scale)
    pooled = torch.randn(3, model.image.width)
    assert not torch.allclose(model.image.embed(pooled), before.image.embed(pooled))
    save_checkpoint(model, tmp_path / "made", tokenizer_json=tiny_tokenizer_json(), name="made", card="")
    assert torch.allclose(
        load_dual_encoder(tmp_path / "made").image.embed(pooled), model.image.embed(pooled), atol=1e-2
    )


def test_anchors_that_are_not_there_cannot_be_sharpened(tmp_path):
    made = anew(tmp_path, image={"backbone": "plain_cnn:8,16"})
    with pytest.raises(UsageError, match="a model with anchors"):
        begin(start(**made, anchor_boost=2.0), seed=0)


@pytest.mark.parametrize("kind", ["weighted", "gated", "concat"])
def test_a_head_for_items_is_added_to_a_checkpoint(kind, plain_checkpoint):
    """The towers keep their numbers; a model that has such a head keeps that, too."""
    found = begin(start(model=str(plain_checkpoint.directory), item=kind), seed=0)
    before = load_dual_encoder(plain_checkpoint)
    assert found.model.config.item.kind == kind
    assert same(found.model.text, before.text) and same(found.model.image, before.image)
    assert found.model.mean.abs().max() > 0  # what is not stored is there, too


def test_a_checkpoint_with_a_config_is_one_too_many(plain_checkpoint, tmp_path):
    """Which of them is meant cannot be guessed."""
    with pytest.raises(UsageError, match="both"):
        begin(start(**{**anew(tmp_path), "model": str(plain_checkpoint.directory)}), seed=0)


def test_without_a_model_config_and_tokenizer_are_needed(tmp_path):
    """One of them is not enough."""
    for missing in ("config", "tokenizer"):
        with pytest.raises(UsageError, match="a config and a tokenizer"):
            begin(start(**{name: value for name, value in anew(tmp_path).items() if name != missing}), seed=0)


def test_a_model_of_another_making_can_be_a_teacher_only(tmp_path):
    """CLIP and SigLIP are refused with what they are good for."""
    with pytest.raises(ModelError, match="teacher"):
        begin(start(model=str(tiny_transformers_directory(tmp_path / "clip", kind="clip"))), seed=0)


@pytest.mark.parametrize("content", [None, "no json", "{}", b"\xff"])
def test_a_tokenizer_that_is_none_is_refused_before_data_is_read(content, tmp_path):
    """Missing, no JSON, another JSON, no text."""
    made = anew(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match="tokenizer"):
        begin(start(**made), seed=0)


def test_a_tokenizer_with_more_words_than_the_tower_is_refused(tmp_path):
    """It would be an index error in the middle of an epoch, at the first rare word."""
    made = anew(tmp_path, text={"backbone": {**TINY_TEXT, "vocab_size": 20}})
    with pytest.raises(ModelError, match=r"at most 20 tokens.*21"):
        begin(start(**made), seed=0)


def test_a_config_that_cannot_be_is_refused(tmp_path):
    """An unknown backbone, an unknown item head."""
    with pytest.raises(ModelError, match="backbone"):
        begin(start(**anew(tmp_path, image={"backbone": "timm:no_such_model"})), seed=0)
    with pytest.raises(ModelError, match="item kind"):
        begin(start(**anew(tmp_path), item="both"), seed=0)
