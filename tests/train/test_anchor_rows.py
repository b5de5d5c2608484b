"""Class names that follow the text tower: said anew, in evaluation mode, and only where they are known."""

import pytest
import torch
from train_kit import passes, tokens

from mmsearch.errors import InputError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.train.anchor_rows import IMAGENET_CLASSES, AnchorRows

NAMES = "dog\ncat\ncar\nbeach, photo\nred\n"


def rows_of(model, folder, *, names: str | None = NAMES, **options) -> AnchorRows:
    if names is not None:
        (folder / "names.txt").write_text(names)
    prompts = "" if names is None else str(folder / "names.txt")
    return AnchorRows(passes(model), prompts=prompts, tokens=tokens, **options)


def without_anchors():
    return tiny_dual_encoder({**TINY_CONFIG, "image": {"backbone": "plain_cnn:8,16"}})


def test_names_are_what_the_text_tower_says_of_them(tmp_path):
    """One sentence a name; synonyms of a class are one unit row, in which the usual name weighs three times."""
    model = tiny_dual_encoder()
    rows_of(model, tmp_path).refresh()
    said = ["a photo of a dog", "a photo of a beach", "a photo of a photo"]
    with torch.no_grad():
        dog, beach, photo = model.encode_texts(*tokens(said))
    names = model.image.anchors.names
    assert (names[0] - dog).abs().max() < 1e-5
    assert (names[3] - torch.nn.functional.normalize(3 * beach + photo, dim=0)).abs().max() < 1e-5


@pytest.mark.parametrize("keep", [False, True])
def test_a_refresh_changes_no_mode_and_follows_the_head(keep, tmp_path):
    """Dropout is off while names are said, and on again for what was training; no gradient is left behind."""
    model = tiny_dual_encoder()
    anchors = rows_of(model, tmp_path, keep_texts=keep)
    model.train()
    model.text.backbone.eval()
    modes = [module.training for module in model.modules()]
    anchors.refresh()
    first = model.image.anchors.names.clone()
    anchors.refresh()
    assert torch.equal(model.image.anchors.names, first)
    assert [module.training for module in model.modules()] == modes
    assert not model.image.anchors.names.requires_grad
    with torch.no_grad():
        for parameter in model.text.projection.parameters():
            parameter.add_(0.1)
    anchors.refresh()
    assert not torch.allclose(model.image.anchors.names, first)


def test_names_that_nobody_knows_stay_as_they_are(tmp_path):
    """Five classes without a file are not ImageNet's thousand; a model without anchors has none."""
    model = tiny_dual_encoder()
    before = model.image.anchors.names.clone()
    anchors = rows_of(model, tmp_path, names=None)
    anchors.refresh()
    assert (anchors.known, torch.equal(model.image.anchors.names, before)) == (False, True)
    rows_of(without_anchors(), tmp_path, names=None).refresh()


def test_a_thousand_classes_are_taken_for_those_of_imagenet():
    """Their names are known; no file is needed."""
    image = {"backbone": "plain_cnn:4", "anchors": {"classes": IMAGENET_CLASSES}}
    model = tiny_dual_encoder({**TINY_CONFIG, "image": image})
    assert AnchorRows(passes(model), prompts="", tokens=tokens).known


def test_names_that_do_not_fit_the_model_are_refused_at_once(tmp_path):
    """Too few, a file that is not there, an empty line, and names for a model without anchors."""
    model = tiny_dual_encoder()
    with pytest.raises(UsageError, match=r"5 classes.*2"):
        rows_of(model, tmp_path, names="dog\ncat")
    with pytest.raises(InputError, match=r"none\.txt"):
        AnchorRows(passes(model), prompts=str(tmp_path / "none.txt"), tokens=tokens)
    with pytest.raises(InputError, match="line 2"):
        rows_of(model, tmp_path, names="dog\n\ncat")
    with pytest.raises(UsageError, match="with anchors"):
        rows_of(without_anchors(), tmp_path)
