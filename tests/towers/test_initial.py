"""Weights from disk: by name, by order, from packages; and what does not fit is named."""

import pytest
import torch
from safetensors.torch import save_file

from mmsearch.errors import ModelError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.towers.config import DualEncoderConfig
from mmsearch.towers.initial import initial_dual_encoder
from mmsearch.towers.sources import read_weights, resolve_place

CONFIG = DualEncoderConfig.from_json(TINY_CONFIG)


def bert_state(*, prefix=""):
    """Another tiny BERT's tensors, as transformers names them, with a pooler nobody asked for."""
    state = {prefix + k: v.clone() for k, v in tiny_dual_encoder(seed=7).text.backbone.state_dict().items()}
    return {**state, prefix + "pooler.dense.weight": torch.ones(16, 16)}


def image_state(*, classes=5, rename=lambda name: name):
    """A tiny photo classifier: the backbone's tensors and a classifier behind them."""
    image = tiny_dual_encoder(seed=7).image
    state = {rename(k): v.clone() for k, v in image.backbone.state_dict().items()}
    return {**state, "fc.weight": torch.randn(classes, 16), "fc.bias": torch.randn(classes)}


def numbered(name, seen={}):  # noqa: B006 - the table is the point: names that say nothing
    return seen.setdefault(name, f"{len(seen)}.tensor")


def stored(tmp_path, state, name="weights.safetensors"):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(module, state, *, prefix=""):
    return all(torch.equal(v, state[prefix + k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "bert.", "0.auto_model."])
def test_a_text_backbone_is_filled_by_name_whatever_stands_before_the_names(tmp_path, prefix):
    """Plain, from a model with a head, from a wrapper; the pooler is left out and the heads stay random."""
    state = bert_state(prefix=prefix)
    model = initial_dual_encoder(CONFIG, text_weights=stored(tmp_path, state))
    assert same(model.text.backbone, state, prefix=prefix)
    assert not model.training


def test_the_names_of_the_first_bert_are_understood(tmp_path):
    """LayerNorm.gamma and .beta."""
    state = bert_state()
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in state.items()}  # fmt: skip
    assert same(initial_dual_encoder(CONFIG, text_weights=stored(tmp_path, old)).text.backbone, state)


def test_a_folder_is_read_whole_or_in_shards(tmp_path):
    """model.safetensors when it is there, else all shards together."""
    state, names = bert_state(), sorted(bert_state())
    stored(tmp_path, {k: state[k] for k in names[:9]}, "model-00001-of-00002.safetensors")
    stored(tmp_path, {k: state[k] for k in names[9:]}, "model-00002-of-00002.safetensors")
    assert same(initial_dual_encoder(CONFIG, text_weights=tmp_path).text.backbone, state)
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    stored(tmp_path, other, "model.safetensors")
    stored(tmp_path, state, "z-left-over.safetensors")
    assert same(initial_dual_encoder(CONFIG, text_weights=tmp_path).text.backbone, other)


@pytest.mark.parametrize("wrapped", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_image_backbone_and_the_anchors_classifier_are_filled_by_name(tmp_path, prefix, wrapped):
    """From a torch file as training scripts leave them."""
    state = image_state(rename=lambda name: prefix + name)
    path = stored(tmp_path, {wrapped: state} if wrapped else state, "photos.pth")
    image = initial_dual_encoder(CONFIG, image_weights=path).image
    assert same(image.backbone, state, prefix=prefix)
    assert torch.equal(image.anchors.classifier.weight, state["fc.weight"])
    assert torch.equal(image.anchors.classifier.bias, state["fc.bias"])


def test_a_timm_backbone_takes_the_names_of_timm(tmp_path):
    """Its own names, not those of the module around it; a 1 x 1 convolution is a classifier too."""
    image = {**TINY_CONFIG["image"], "backbone": "timm:test_resnet"}
    config = {**TINY_CONFIG, "image": image, "preprocessing": {"size": 32}}
    other = tiny_dual_encoder(config, seed=3).image
    state = {k: v.clone() for k, v in other.backbone.model.state_dict().items()}
    state |= {"fc.weight": torch.randn(5, other.width, 1, 1), "fc.bias": torch.zeros(5)}
    model = initial_dual_encoder(DualEncoderConfig.from_json(config), image_weights=stored(tmp_path, state))
    assert same(model.image.backbone.model, state)
    assert torch.equal(model.image.anchors.classifier.weight, state["fc.weight"].flatten(1))


@pytest.mark.parametrize("counters", [True, False])
def test_an_image_backbone_of_other_names_is_filled_in_order(tmp_path, counters):
    """Another library's port, also one from before batches were counted."""
    state = image_state(rename=numbered)
    kept = {k: v for k, v in state.items() if counters or v.ndim}
    image = initial_dual_encoder(CONFIG, image_weights=stored(tmp_path, kept, "port.pth")).image
    wanted = image.backbone.state_dict()
    assert all(torch.equal(v, state[numbered(k)]) for k, v in wanted.items() if v.ndim)
    assert torch.equal(image.anchors.classifier.weight, state["fc.weight"])


def test_a_checkpoint_of_mmsearch_is_a_source_of_either_backbone(plain_checkpoint):
    """Its token table in 8 bits becomes floats."""
    path = plain_checkpoint.directory / "model.safetensors"
    model = initial_dual_encoder(CONFIG, text_weights=path, image_weights=path)
    table = read_weights(path)["text.backbone.embeddings.word_embeddings.weight"]
    assert torch.equal(model.text.backbone.embeddings.word_embeddings.weight, table)


def test_without_weights_both_sides_are_random():
    """From scratch; the same seed gives the same model."""
    torch.manual_seed(3)
    one = initial_dual_encoder(CONFIG).state_dict()
    torch.manual_seed(3)
    two = initial_dual_encoder(CONFIG).state_dict()
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_the_first_missing_tensor_is_named(tmp_path):
    """A name that is gone from either side; and an image file is never filled in order when its names fit."""
    text, image = bert_state(), image_state()
    del text["encoder.layer.1.output.dense.bias"], image["stages.3.weight"]
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        initial_dual_encoder(CONFIG, text_weights=stored(tmp_path, text))
    with pytest.raises(ModelError, match=r"expected a tensor stages\.3\.weight"):
        initial_dual_encoder(CONFIG, image_weights=stored(tmp_path, image, "image.pth"))


def test_tensors_of_another_shape_are_named_with_both_shapes(tmp_path):
    """By name and in order."""
    text, image = bert_state(), image_state(rename=numbered)
    text["embeddings.position_embeddings.weight"] = torch.zeros(9, 16)
    with pytest.raises(ModelError, match=r"position_embeddings.*\(64, 16\).*\(9, 16\)"):
        initial_dual_encoder(CONFIG, text_weights=stored(tmp_path, text))
    image[numbered("stages.0.weight")] = torch.zeros(8, 3, 5, 5)
    with pytest.raises(ModelError, match=r"\(8, 3, 3, 3\).*\(8, 3, 5, 5\)"):
        initial_dual_encoder(CONFIG, image_weights=stored(tmp_path, image, "other.pth"))


def test_a_sorted_file_of_other_names_is_not_filled_in_order(tmp_path):
    """safetensors sorts by name: what fits would fit by chance."""
    with pytest.raises(ModelError, match=r"stages\.0\.weight"):
        initial_dual_encoder(CONFIG, image_weights=stored(tmp_path, image_state(rename=numbered)))


def test_too_few_tensors_in_another_naming_are_refused(tmp_path):
    """Order needs all of them."""
    few = dict(list(image_state(rename=numbered).items())[:4])
    with pytest.raises(ModelError, match="expected 10 tensors"):
        initial_dual_encoder(CONFIG, image_weights=stored(tmp_path, few, "few.pth"))


def test_anchors_without_a_classifier_of_their_size_are_refused(tmp_path):
    """A random classifier would add noise to every picture."""
    with pytest.raises(ModelError, match="classifier of 5 classes from 16"):
        initial_dual_encoder(CONFIG, image_weights=stored(tmp_path, image_state(classes=6)))


def test_a_package_is_found_without_being_run(tmp_path, monkeypatch):
    """Its __init__ would raise."""
    package = tmp_path / "some_weights"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('ran')")
    stored(package / "inner", bert_state(), "bert.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_place("package:some_weights/inner") == package / "inner"
    assert "embeddings.LayerNorm.weight" in read_weights("package:some_weights/inner/bert.safetensors")
    with pytest.raises(ModelError, match="nothing there"):
        resolve_place("package:some_weights/outer")


@pytest.mark.parametrize(
    "place",
    ["package:no_such_weights/x", "package:torch/../torch", "package:torch", "package:torch.nn/x", "no/such/file"],
)
def test_places_that_are_nowhere_are_refused(place):
    """Not installed, outside the package, or not there."""
    with pytest.raises(ModelError):
        resolve_place(place)


def test_a_torch_file_that_would_run_code_is_refused(tmp_path):
    """Anything but tensors: a whole module, a function."""
    for value in ({"a": print}, torch.nn.Linear(1, 1), [1, 2], {"a": 1}):
        with pytest.raises(ModelError, match="tensors"):
            read_weights(stored(tmp_path, value, "bad.pth"))


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_file_cut_short_is_named(tmp_path, name):
    """At every tenth of its length."""
    path = stored(tmp_path, {"a": torch.ones(64)}, name)
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ModelError, match="cut"):
            read_weights(path)


def test_a_folder_of_pickles_alone_is_refused(tmp_path):
    """A folder is never searched for torch files; one can be named."""
    stored(tmp_path, {"a": torch.ones(1)}, "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        read_weights(tmp_path)
    assert read_weights(tmp_path / "pytorch_model.bin")["a"].item() == 1.0
