"""Adapters: they start as nothing, learn alone, and are merged without a trace."""

import pytest
import torch
from torch import nn

from mmsearch.errors import ModelError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_dual_encoder, tiny_tokenizer_json
from mmsearch.towers.checkpoint import load_dual_encoder, save_checkpoint
from mmsearch.towers.dual_encoder import build_dual_encoder
from mmsearch.train.averaging import Average
from mmsearch.train.lora import add_lora, has_lora, merge_lora, plain_state
from mmsearch.train.parameters import Tuning, first_trained_stage, parameter_groups, set_mode

pytest.importorskip("peft")

IDS, MASK = torch.tensor([[2, 8, 10, 3], [2, 9, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
BACKBONES = ["plain_cnn:8,16", "timm:test_vit", "timm:test_resnet", "timm:test_efficientnet", "timm:test_convnext"]


def config_of(backbone):
    image = {**TINY_CONFIG["image"], "backbone": backbone, "anchors": None}
    return {**TINY_CONFIG, "image": image, "preprocessing": {"size": 160 if "vit" in backbone else 32}}


def rows_of(model):
    size = model.config.preprocessing.size
    pixels = torch.arange(2 * size * size * 3).remainder(251).to(torch.uint8).reshape(2, size, size, 3)
    with torch.no_grad():
        return torch.cat([model.encode_texts(IDS, MASK), model.encode_images(pixels)])


def adapted(backbone="plain_cnn:8,16", *, sides=("text", "image"), learned=True, **settings):
    """A model with adapters, which `learned` fills with noise in place of training."""
    model = tiny_dual_encoder(config_of(backbone))
    for side in sides:
        add_lora(model, side=side, rank=2, **settings)
    if learned:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_adapted_model_starts_as_the_model_it_was(backbone):
    """Bit for bit: B is zero."""
    assert torch.equal(rows_of(adapted(backbone, learned=False)), rows_of(tiny_dual_encoder(config_of(backbone))))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_merged_model_is_plain_and_equals_the_adapted_one(backbone):
    """The same names as before, the same rows to rounding, and not the rows it started with."""
    model = adapted(backbone)
    plain, before = tiny_dual_encoder(config_of(backbone)), rows_of(model)
    merge_lora(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.allclose(rows_of(model), before, atol=1e-5)
    assert not torch.allclose(rows_of(plain), before, atol=1e-3)
    assert not has_lora(model)
    assert not any(hasattr(module, "peft_config") for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("backbone", ["plain_cnn:8,16", "timm:test_vit"])
def test_the_plain_state_loads_into_a_plain_model_and_leaves_the_adapted_one_alone(backbone):
    """A checkpoint in the middle of a run."""
    model = adapted(backbone)
    before = rows_of(model)
    plain = build_dual_encoder(config_of(backbone)).eval()
    plain.load_state_dict(plain_state(model))
    assert torch.allclose(rows_of(plain), before, atol=1e-5)
    assert has_lora(model)
    assert torch.equal(rows_of(model), before)


def test_without_adapters_state_and_merging_change_nothing():
    """The state is the model's own."""
    model = tiny_dual_encoder()
    state = plain_state(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    before = rows_of(model)
    merge_lora(model)
    assert torch.equal(rows_of(model), before)


def test_only_adapters_and_heads_get_gradients():
    """The backbone's own weights, its norms and its embeddings stay as they are."""
    model = adapted()
    tuning = Tuning(lora=2, rate=0.5)
    groups = parameter_groups(model, text=tuning, image=tuning, rate=1.0, weight_decay=0.1)
    (rows := model.encode_texts(IDS, MASK)).sum().backward()
    model.encode_images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and ".backbone." in n}
    adapters = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert rows.requires_grad
    assert moved == adapters
    assert {g["rate"] for g in groups if g["part"] == "backbone"} == {0.5}
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".backbone." in n} == adapters


def test_every_adapter_of_a_bert_and_of_a_convolutional_tower_learns():
    """A step on a loss moves each B from zero, on both sides."""
    model = adapted("timm:test_resnet", learned=False)
    for norm in (m for m in model.image.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.ones_(norm.weight)  # the last of a block starts at zero, and nothing before it would learn
    tuning = Tuning(lora=2)
    optimiser = torch.optim.SGD(parameter_groups(model, text=tuning, image=tuning, rate=1.0, weight_decay=0.0))
    set_mode(model, text=tuning, image=tuning)
    pixels = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    (model.encode_texts(IDS, MASK).square() * torch.arange(8)).sum().backward()
    (model.encode_images(pixels).square() * torch.arange(8)).sum().backward()
    optimiser.step()
    ups = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert {n.split(".")[0] for n in ups} == {"text", "image"}
    assert [n for n, p in ups.items() if not p.any()] == []


def test_a_bert_has_adapters_on_attention_and_on_what_follows():
    """Six linear layers in each of two layers; `last` leaves out the lower one."""
    assert add_lora(tiny_dual_encoder(), side="text", rank=2) == 12
    model = tiny_dual_encoder()
    assert add_lora(model, side="text", rank=2, last=1) == 6
    assert all(".encoder.layer.1." in n for n, _ in model.named_parameters() if "lora_" in n)
    assert first_trained_stage(model.text, Tuning(lora=2)) == 2


def test_depthwise_and_padded_convolutions_are_left_alone():
    """In an EfficientNet the 1 x 1 convolutions have adapters, the stem and the depthwise ones do not."""
    model = adapted("timm:test_efficientnet", sides=("image",))
    kinds = {n.rsplit(".lora_A", 1)[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert kinds
    assert not any("dw" in kind for kind in kinds)
    tensorflow = config_of("timm:tf_efficientnet_lite0")
    with torch.device("meta"):
        model = build_dual_encoder(tensorflow)
        assert add_lora(model, side="image", rank=2) > 20
    downs = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert {tuple(p.shape[2:]) for p in downs} == {(1, 1)}


def test_attention_inside_torch_is_left_alone():
    """Its output layer's weight is read past the layer: an adapter there would never run."""
    with torch.device("meta"):
        model = build_dual_encoder({**config_of("torchvision:vit_b_16"), "preprocessing": {"size": 32}})
        add_lora(model, side="image", rank=2)
    assert not any("out_proj" in n for n, _ in model.named_parameters() if "lora_" in n)


def test_an_average_and_a_checkpoint_work_on_adapted_models(tmp_path):
    """The average of adapters is merged like the adapters; the checkpoint is one of plain towers."""
    model = adapted()
    tuning = Tuning(lora=2)
    parameter_groups(model, text=tuning, image=tuning, rate=1.0, weight_decay=0.0)
    average = Average(model)
    with average.applied(model):
        wanted = rows_of(model)
        plain = build_dual_encoder(model.config)
        plain.load_state_dict(plain_state(model))
    save_checkpoint(plain, tmp_path / "m", tokenizer_json=tiny_tokenizer_json(), name="m", card="", graphs=False)
    assert torch.allclose(rows_of(load_dual_encoder(tmp_path / "m")), wanted, atol=2e-2)  # half precision on disk


@pytest.mark.parametrize("settings", [{"side": "sound"}, {"rank": 0}, {"dropout": 1.0}, {"last": 0}, {"last": 9}])
def test_impossible_adapters_are_refused(settings):
    """Before anything is changed."""
    model = tiny_dual_encoder()
    with pytest.raises(UsageError):
        add_lora(model, **{"side": "text", "rank": 2, **settings})
    assert not has_lora(model)


def test_adapters_are_added_once_and_asked_for_before_they_are_trained():
    """A second set would be merged in the wrong order; a rank without adapters would train nothing."""
    with pytest.raises(UsageError, match="adapters"):
        add_lora(adapted(), side="text", rank=2)
    with pytest.raises(UsageError, match="add_lora"):
        parameter_groups(tiny_dual_encoder(), text=Tuning(lora=2), image=Tuning(), rate=1.0, weight_decay=0.0)


def test_a_backbone_without_a_layer_to_adapt_is_refused():
    """Norms alone have no matrix."""
    model = tiny_dual_encoder()
    model.image.backbone = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ModelError, match="none"):
        add_lora(model, side="image", rank=2)
