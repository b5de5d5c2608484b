"""The item heads: known values, absent sides that never leak, and the way through a checkpoint."""

import json
import math
import resource

import pytest
import torch
from torch.nn import functional

from mmsearch.errors import ModelError, UsageError
from mmsearch.testing import TINY_CONFIG, tiny_checkpoint, tiny_dual_encoder
from mmsearch.towers.checkpoint import Checkpoint, load_dual_encoder, load_item_fusion
from mmsearch.towers.config import ITEM_FUSIONS, DualEncoderConfig, ItemConfig
from mmsearch.towers.item import build_item_fusion
from mmsearch.towers.locate import BUNDLED

KINDS = pytest.mark.parametrize("kind", ITEM_FUSIONS)
PLAIN_IDENTITY = "c2ce4b3bbf7163c1a649112ea5b29e54"
"""What the tiny model was identified by before there were item heads: indexes on disk remember such numbers."""


def unit(count, *, dim=6, seed=0):
    return functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def trained(kind, *, dim=6):
    """A head whose parameters are not those it starts with."""
    head = build_item_fusion(ItemConfig(kind, hidden=8), dim=dim).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return head


def with_item(kind, **config):
    return {**TINY_CONFIG, "item": {"kind": kind, **config}}


@KINDS
def test_a_head_starts_as_the_mean_of_both_sides(kind):
    """(1, 0) and (0, 1) -> both by 1/sqrt(2), whatever the kind."""
    head = build_item_fusion(ItemConfig(kind), dim=2)
    row = head(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert row[0].tolist() == pytest.approx([0.5**0.5] * 2)


def test_the_weight_has_known_values():
    """balance log(3) is a share of 3/4 for the picture: (3, 1) made unit."""
    head = build_item_fusion(ItemConfig("weighted"), dim=2)
    with torch.no_grad():
        head.balance.fill_(math.log(3.0))
    row = head(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert row[0].tolist() == pytest.approx([3 / 10**0.5, 1 / 10**0.5])


def test_the_gate_is_a_number_for_each_dimension():
    """A gate of 1 for the first and 0 for the second number takes the picture's first and the text's second."""
    head = build_item_fusion(ItemConfig("gated"), dim=2)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor([100.0, -100.0]))
    row = head(torch.tensor([[0.6, 0.8]]), torch.tensor([[-0.8, 0.6]]))
    assert row[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_the_gate_looks_at_both_sides():
    """Two items with one picture and other texts are mixed by other gates."""
    head, image, text = trained("gated"), unit(1).expand(2, -1), unit(2, seed=2)
    rows = head(image, text)
    gates = torch.sigmoid(head.gate(torch.cat([image, text], dim=1) * 6**0.5))
    assert not torch.allclose(gates[0], gates[1], atol=1e-2)
    assert torch.allclose(rows, functional.normalize(gates * image + (1 - gates) * text, dim=-1), atol=1e-6)


@pytest.mark.parametrize("kind", ["weighted", "gated"])
def test_one_side_alone_is_the_items_row(kind):
    """However the head was trained: a picture without a text is found as the picture, and the other way round."""
    head, image, text = trained(kind), unit(2), unit(2, seed=2)
    rows = head(image, text, has_image=torch.tensor([True, False]), has_text=torch.tensor([False, True]))
    assert torch.allclose(rows, torch.stack([image[0], text[1]]), atol=1e-6)


def test_concat_starts_with_one_side_as_it_is_and_learns_what_stands_for_the_other():
    """Before training the identity; afterwards the row for an absent side is a parameter with a gradient."""
    image, only_image = unit(1), {"has_text": torch.tensor([False])}
    fresh = build_item_fusion(ItemConfig("concat"), dim=6)
    assert torch.allclose(fresh(image, image, **only_image), image, atol=1e-6)
    head = trained("concat")
    head(image, image, **only_image)[0, 0].backward()
    assert head.absent.grad[1].abs().sum() > 0 == head.absent.grad[0].abs().sum()


@KINDS
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e38])
def test_an_absent_side_never_leaks(kind, junk):
    """Whatever stands in the row of a side that is not there, no number and no gradient changes."""
    head, image, text = trained(kind), unit(3), unit(3, seed=2)
    masks = {"has_image": torch.tensor([True, False, True]), "has_text": torch.tensor([True, True, False])}
    found = []
    for filler in (0.0, junk):
        sides = [image.clone(), text.clone()]
        sides[0][1] = sides[1][2] = filler
        sides = [side.requires_grad_() for side in sides]
        rows = head(*sides, **masks)
        found.append([rows, *torch.autograd.grad(rows[:, 0].sum(), [*sides, *head.parameters()])])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*found, strict=True))
    assert all(part.isfinite().all() for part in found[1])


@KINDS
def test_rows_are_unit_and_do_not_depend_on_the_batch(kind):
    """Norm 1 for every mixture of sides; an item alone gets the row that it gets among others."""
    head, image, text = trained(kind), unit(5), unit(5, seed=2)
    masks = {
        "has_image": torch.tensor([True, False, True, True, False]),
        "has_text": torch.tensor([True, True, False, True, True]),
    }
    rows = head(image, text, **masks)
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-6)
    one_by_one = [head(image[i : i + 1], text[i : i + 1], **{k: m[i : i + 1] for k, m in masks.items()})
                  for i in range(5)]  # fmt: skip
    assert torch.allclose(rows, torch.cat(one_by_one), atol=1e-6)


@KINDS
def test_the_gradient_is_the_derivative(kind):
    """gradcheck in double precision, both sides and one side alone, to rows and parameters."""
    head = trained(kind).double()
    sides = [rows.double().requires_grad_() for rows in (unit(3), unit(3, seed=2))]
    masks = {"has_image": torch.tensor([True, True, False]), "has_text": torch.tensor([True, False, True])}
    parameters = list(head.parameters())
    assert torch.autograd.gradcheck(lambda image, text, *_: head(image, text, **masks), (*sides, *parameters))


def test_two_rows_that_cancel_out_give_the_pictures():
    """x and -x have no direction together, and a zero row would be found by nothing; NaN is not hidden that way."""
    head, image = build_item_fusion(ItemConfig("weighted"), dim=6), unit(2)
    assert torch.allclose(head(image, -image), image)
    with torch.no_grad():
        head.balance.fill_(math.nan)
    assert head(image, unit(2, seed=2)).isnan().all()


@pytest.mark.parametrize(
    ("image", "text", "masks", "says"),
    [
        (unit(2), unit(2), {"has_image": torch.tensor([1, 0]).bool(), "has_text": torch.tensor([1, 0]).bool()},
         r"item 1: expected a picture, a text or both"),
        (unit(2), unit(3), {}, r"\(2, 6\) and \(3, 6\)"),
        (unit(2, dim=4), unit(2, dim=4), {}, r"\(b, 6\)"),
        (unit(2), unit(2), {"has_text": torch.tensor([True])}, r"torch.bool \(2,\)"),
        (unit(2), unit(2), {"has_text": torch.tensor([1, 1])}, "int64"),
    ],
)  # fmt: skip
@KINDS
def test_what_cannot_be_joined_is_one_usage_error(kind, image, text, masks, says):
    """Neither side, other shapes, masks that are none."""
    with pytest.raises(UsageError, match=says):
        build_item_fusion(ItemConfig(kind), dim=6)(image, text, **masks)


@KINDS
def test_a_model_with_a_head_survives_its_checkpoint(kind, tmp_path):
    """Config equal, rows equal to half precision, through the whole model and through the head alone."""
    config = with_item(kind, hidden=8, dropout=0.25)
    model = tiny_dual_encoder(config)
    opened = tiny_checkpoint(tmp_path, config=config)
    assert opened.config.item == ItemConfig(kind, hidden=8, dropout=0.25)
    assert DualEncoderConfig.from_json(json.loads(json.dumps(opened.config.to_json()))) == opened.config
    image, text, masks = unit(2, dim=8), unit(2, dim=8, seed=2), {"has_image": torch.tensor([True, False])}
    wanted = model.item_rows(image, text, **masks)
    loaded, alone = load_dual_encoder(opened), load_item_fusion(opened)
    assert not alone.training
    assert torch.allclose(loaded.item_rows(image, text, **masks), wanted, atol=2e-3)
    assert torch.equal(loaded.item_rows(image, text, **masks), alone(image, text, **masks))


def test_the_identity_changes_with_the_head_and_only_then(tmp_path):
    """A model without one is identified by the same parts as ever; another kind is another model."""
    plain = tiny_checkpoint(tmp_path / "plain")
    assert "item" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    others = [tiny_checkpoint(tmp_path / kind, config=with_item(kind)).identity for kind in ITEM_FUSIONS]
    assert len({plain.identity.weights, *(other.weights for other in others)}) == 4


def test_two_heads_over_the_same_bytes_are_two_models(tmp_path):
    """What stands in config.json about the head is part of what rows can be compared with."""
    configs = [DualEncoderConfig.from_json(with_item("concat", hidden=hidden)) for hidden in (0, 16)]
    files = {"model.safetensors": "0" * 32, "tokenizer.json": "1" * 32}
    first, second = (Checkpoint(tmp_path, "x", config, files).identity for config in configs)
    assert not first.same_space(second)


def test_a_model_without_a_head_is_identified_as_before_there_were_heads(tmp_path):
    """Else every index made until now would be refused, and encoded anew."""
    files = {"model.safetensors": "0" * 32, "tokenizer.json": "1" * 32}
    opened = Checkpoint(tmp_path, "x", DualEncoderConfig.from_json(TINY_CONFIG), files)
    assert opened.identity.weights == PLAIN_IDENTITY
    assert Checkpoint.open(BUNDLED, verify=False).config.item is None


def test_a_model_without_a_head_says_so(plain_checkpoint):
    """Instead of an AttributeError somewhere below."""
    for ask in (lambda: tiny_dual_encoder().item_rows(unit(1, dim=8), unit(1, dim=8)),
                lambda: load_item_fusion(plain_checkpoint)):  # fmt: skip
        with pytest.raises(ModelError, match="joins an item's picture and text"):
            ask()


def test_a_head_that_does_not_fit_its_weights_is_a_model_error(tmp_path):
    """A config that asks for a wide MLP over a narrow one, or for another kind, costs a sentence."""
    tiny_checkpoint(tmp_path, config=with_item("concat", hidden=8))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for item in ({"kind": "concat", "hidden": 65_536}, {"kind": "gated"}):
        path.write_text(json.dumps({**values, "item": item}))
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load_item_fusion(Checkpoint.open(tmp_path))
        with pytest.raises(ModelError, match=r"item\.|do not fit"):
            load_dual_encoder(tmp_path)


def test_a_config_that_asks_for_too_much_takes_no_memory(tmp_path):
    """A gigabyte and a half, were the head built before it is compared with its weights."""
    tiny_checkpoint(tmp_path, config=with_item("concat", hidden=8))
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "dim": 2048, "item": {"kind": "concat", "hidden": 65_536}})
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_item_fusion(Checkpoint.open(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
