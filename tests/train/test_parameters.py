"""Which parameters learn, how fast, and in which mode: on tiny towers, counted by hand."""

import pytest
import torch
from torch import nn

from mmsearch.errors import ModelError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder
from mmsearch.towers.stages import stages
from mmsearch.train.parameters import Tuning, first_trained_stage, parameter_groups, set_mode

ALL, HEAD, NONE = Tuning(), Tuning("head"), Tuning("none")


def groups_of(model, *, text=ALL, image=ALL, rate=1.0, weight_decay=0.1, extra=()):
    return parameter_groups(model, text=text, image=image, rate=rate, weight_decay=weight_decay, extra=extra)


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def rate_of(model, groups):
    """Rate by parameter name, of those that learn."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group["rate"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("text", [ALL, HEAD, NONE, Tuning(1), Tuning(embeddings=False), Tuning(layer_decay=0.5)])
@pytest.mark.parametrize("image", [ALL, HEAD, NONE, Tuning(1)])
def test_groups_hold_exactly_what_learns_each_once(text, image):
    """No parameter is stepped twice, none that has a gradient is forgotten."""
    if text is image is NONE:
        return
    model = tiny_dual_encoder()
    found = [id(p) for group in groups_of(model, text=text, image=image) for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}


def test_all_is_everything_but_the_photo_classifier():
    """The anchors' classifier is what was known; their mixing scalar learns."""
    model = tiny_dual_encoder()
    groups_of(model)
    assert {n for n, _ in model.named_parameters()} - learning(model) == {
        "image.anchors.classifier.weight",
        "image.anchors.classifier.bias",
    }


def test_head_freezes_the_backbone_and_none_the_whole_tower():
    """A locked image tower under a learning text tower, and the temperature learns in any case."""
    model = tiny_dual_encoder()
    groups_of(model, text=HEAD, image=NONE)
    assert {name.split(".")[1] for name in learning(model) if "." in name} == {"projection"}
    assert not any(name.startswith("image.") for name in learning(model))
    assert "log_logit_scale" in learning(model)
    groups_of(model, text=NONE, image=HEAD)
    assert {name.split(".")[1] for name in learning(model) if "." in name} == {"projection", "anchors"}


def test_the_last_stages_are_those_at_the_output():
    """One of two layers, one of two convolutions; and a later call thaws what an earlier one froze."""
    model = tiny_dual_encoder()
    groups_of(model, text=Tuning(1), image=Tuning(1))
    backbones = {name for name in learning(model) if ".backbone." in name}
    assert {name.rsplit(".", 2)[0] for name in backbones if name.startswith("image")} == {"image.backbone.stages"}
    assert {name.split(".stages.")[1] for name in backbones if ".stages." in name} == {"3.weight", "4.weight", "4.bias"}
    assert all(".encoder.layer.1." in name for name in backbones if name.startswith("text"))
    groups_of(model)
    assert "text.backbone.embeddings.word_embeddings.weight" in learning(model)


def test_a_frozen_token_table_leaves_positions_and_norms_learning():
    """Only the table stays."""
    model = tiny_dual_encoder()
    groups_of(model, text=Tuning(embeddings=False), image=NONE)
    everything = {n for n, _ in model.text.named_parameters()}
    assert everything - {n.removeprefix("text.") for n in learning(model)} == {
        "backbone.embeddings.word_embeddings.weight"
    }


def test_rates_are_base_times_factor_times_decay_from_the_top_down():
    """Base 2, factor 0.1, decay 0.5: heads 2, top layer 0.2, the one below 0.1, embeddings 0.05."""
    model = tiny_dual_encoder()
    groups = groups_of(model, text=Tuning(rate=0.1, layer_decay=0.5), image=Tuning(rate=0.01), rate=2.0)
    rates = rate_of(model, groups)
    for part, expected in (
        ("text.projection.branch.1.weight", 2.0),
        ("text.backbone.encoder.layer.1.output.dense.weight", 0.2),
        ("text.backbone.encoder.layer.0.output.dense.weight", 0.1),
        ("text.backbone.embeddings.word_embeddings.weight", 0.05),
        ("image.backbone.stages.0.weight", 0.02),
        ("image.anchors.scale", 2.0),
        ("log_logit_scale", 2.0),
    ):
        assert rates[part] == pytest.approx(expected), part
    assert all(group["lr"] == group["rate"] for group in groups)


def test_backbones_and_heads_are_told_apart():
    """By `part`, which a schedule uses to start one of them later."""
    groups = groups_of(tiny_dual_encoder())
    assert {g["part"] for g in groups if "head" in g["name"] or "shared" in g["name"]} == {"head"}
    assert {g["part"] for g in groups if "stages" in g["name"] or "encoder" in g["name"]} == {"backbone"}


def test_only_matrices_decay():
    """Norms, biases, the temperature and the mixing scalar do not."""
    groups = groups_of(tiny_dual_encoder(), weight_decay=0.3)
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim > 1} == {0.3}
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim <= 1} == {0.0}


def test_class_tokens_and_positions_do_not_decay():
    """They are matrices by shape only."""
    image = {**TINY_CONFIG["image"], "backbone": "timm:test_vit", "anchors": None}
    model = tiny_dual_encoder({**TINY_CONFIG, "image": image, "preprocessing": {"size": 160}})
    decays = {id(p): g["weight_decay"] for g in groups_of(model) for p in g["params"]}
    loose = stages(model.image.backbone)[0].loose
    assert len(loose) >= 2
    assert {decays[id(p)] for p in loose} == {0.0}


def test_an_objectives_own_parameters_learn_at_the_base_rate():
    """A learned bias of a loss, without decay."""
    bias = nn.Parameter(torch.zeros(()))
    (group,) = [g for g in groups_of(tiny_dual_encoder(), extra=[bias], rate=3.0) if g["name"].startswith("extra")]
    assert (group["params"], group["rate"], group["weight_decay"]) == ([bias], 3.0, 0.0)


def test_groups_are_what_an_optimiser_takes():
    """One step changes what learns and nothing else."""
    model = tiny_dual_encoder()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(groups_of(model, text=Tuning(1), image=HEAD, rate=0.1))
    pixels = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    texts, images, scale = model(torch.tensor([[2, 8, 3], [2, 9, 3]]), torch.ones(2, 3), pixels)
    (scale * (texts @ images.T)).square().sum().backward()
    optimiser.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # The bias of a key projection adds the same to every logit of a softmax: its gradient is zero but for rounding.
    assert learning(model) - changed <= {"text.backbone.encoder.layer.1.attention.self.key.bias"}
    assert changed <= learning(model)


def test_nothing_to_learn_is_an_error():
    """A temperature alone is no training."""
    with pytest.raises(UsageError, match="none"):
        groups_of(tiny_dual_encoder(), text=NONE, image=NONE)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "some"}, {"train": 0}, {"train": True}, {"rate": 0.0}, {"rate": -1.0}, {"layer_decay": 0.0},
        {"layer_decay": 1.5}, {"lora": -1}, {"train": "head", "lora": 4}, {"rate": float("nan")},
    ],
)  # fmt: skip
def test_impossible_tunings_are_refused(settings):
    """When they are made, not an epoch later."""
    with pytest.raises(UsageError):
        Tuning(**settings)


def test_more_stages_than_there_are_is_an_error_that_counts_them():
    """Two convolutions, five asked for."""
    with pytest.raises(UsageError, match="at most 2 stages"):
        groups_of(tiny_dual_encoder(), image=Tuning(5))


def test_a_tower_without_a_backbone_is_refused():
    """Nothing is known about its stages."""
    with pytest.raises(ModelError, match="backbone"):
        first_trained_stage(nn.Linear(2, 2), ALL)


@pytest.mark.parametrize(("tuning", "text", "image"), [(ALL, 0, 0), (Tuning(1), 2, 1), (HEAD, 3, 2), (NONE, 3, 2)])
def test_the_first_trained_stage_is_where_the_graph_begins(tuning, text, image):
    """Embeddings and two layers; two convolutions."""
    model = tiny_dual_encoder()
    assert first_trained_stage(model.text, tuning) == text
    assert first_trained_stage(model.image, tuning) == image


def modes(module, kind):
    return {child.training for child in module.modules() if isinstance(child, kind)}


def test_frozen_parts_run_without_dropout():
    """The last layer and the head learn: below them nothing is random."""
    model = tiny_dual_encoder()
    set_mode(model, text=Tuning(1), image=HEAD)
    assert modes(model.text.backbone.embeddings, nn.Dropout) == {False}
    assert modes(model.text.backbone.encoder.layer[0], nn.Dropout) == {False}
    assert modes(model.text.backbone.encoder.layer[1], nn.Dropout) == {True}
    assert modes(model.text.projection, nn.Dropout) == {True}
    assert not model.image.backbone.training
    set_mode(model, text=NONE, image=ALL)
    assert modes(model.text, nn.Module) == {False}
    set_mode(model, text=ALL, image=ALL)
    assert modes(model.text, nn.Module) == {True}


@pytest.mark.parametrize("update", [False, True])
def test_batch_norm_keeps_its_statistics_unless_asked(update):
    """A forward pass of noise moves the running mean of a learning stage only with `batch_norm`."""
    model = tiny_dual_encoder()
    norms = [m for m in model.image.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    set_mode(model, text=ALL, image=Tuning(1, batch_norm=update))
    model.encode_images(torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8))
    assert not norms[0].running_mean.any()  # a frozen stage's, in any case
    assert bool(norms[1].running_mean.any()) is update
