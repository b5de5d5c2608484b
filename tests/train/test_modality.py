"""Items that lose a side in training: who may, who never does, and that a head learns to use both."""

import math

import pytest
import torch
from torch.nn import functional

from mmsearch.errors import UsageError
from mmsearch.towers.config import ITEM_FUSIONS, ItemConfig
from mmsearch.towers.item import build_item_fusion
from mmsearch.train.losses import InfoNce
from mmsearch.train.modality import ItemBatch, another_caption, item_loss, modality_dropout
from mmsearch.types import Pair


def photo(*captions):
    return Pair("a.jpg", captions, "a")


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(count, *, dim=8, seed=0):
    return functional.normalize(torch.randn(count, dim, generator=draws(seed)), dim=-1)


def whole(images, texts):
    there = torch.ones(len(images), dtype=torch.bool)
    return ItemBatch(images, texts, there, there)


def loss_of(fusion, queries, items, *, groups=None, scale=10.0):
    given = torch.arange(len(items.images)) if groups is None else torch.tensor(groups)
    return item_loss(
        fusion, queries, items, objective=InfoNce(), logit_scale=torch.tensor(scale), groups=given
    )  # fmt: skip


def test_the_items_text_is_another_caption():
    """Every other one is drawn sooner or later, the query's never; the same seed draws the same."""
    pair = photo("a dog", "a hound", "an animal")
    found = {another_caption(pair, 1, seed=seed) for seed in range(40)}
    assert found == {"a dog", "an animal"}
    assert another_caption(pair, 1, seed=3) == another_caption(pair, 1, seed=3)


@pytest.mark.parametrize("captions", [("a dog",), ("a dog", "A  dog."), ("a dog", " ", "...")])
def test_the_querys_own_words_are_never_the_items_text(captions):
    """Alone, written twice, or beside captions without a word: the item has no text."""
    assert another_caption(photo(*captions), 0, seed=0) is None


def test_dropout_takes_one_side_at_the_rate_asked_for():
    """At 0.4 of 20,000 items, 0.2 lose the picture and 0.2 the text."""
    both = torch.ones(20_000, dtype=torch.bool)
    image, text = modality_dropout(both, both, probability=0.4, generator=draws())
    assert (image | text).all()
    assert (~image).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (~text).float().mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("probability", "left"), [(0.0, 2), (1.0, 1)])
def test_dropout_has_known_values_at_its_ends(probability, left):
    """Nothing goes at 0; at 1 every item keeps exactly one side."""
    both = torch.ones(100, dtype=torch.bool)
    image, text = modality_dropout(both, both, probability=probability, generator=draws())
    assert (image.int() + text.int() == left).all()


def test_dropout_never_takes_the_only_side():
    """Items that came with one side keep it at any rate."""
    image = torch.tensor([True, False] * 50)
    found = modality_dropout(image, ~image, probability=1.0, generator=draws())
    assert torch.equal(found[0], image) and torch.equal(found[1], ~image)


def test_dropout_is_repeatable_and_leaves_its_arguments_alone():
    """One generator state, one outcome; the global generator is not touched when one is given."""
    both, state = torch.ones(64, dtype=torch.bool), torch.random.get_rng_state()
    first, again = (modality_dropout(both, both, probability=0.5, generator=draws(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert both.all() and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(probability):
    """Below 0, above 1, not a number."""
    both = torch.ones(2, dtype=torch.bool)
    with pytest.raises(UsageError, match="modality dropout"):
        modality_dropout(both, both, probability=probability)


@pytest.mark.parametrize("kind", ITEM_FUSIONS)
def test_the_loss_is_that_of_the_joined_rows(kind):
    """An untrained head gives the mean of both sides: InfoNCE over those rows, written out."""
    queries, images, texts, own = unit(4), unit(4, seed=1), unit(4, seed=2), torch.arange(4)
    logits = 10.0 * queries @ functional.normalize(images + texts, dim=-1).T
    wanted = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    got = loss_of(build_item_fusion(ItemConfig(kind), dim=8), queries, whole(images, texts))
    assert got.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_items_and_queries_that_are_all_alike_cost_log_n():
    """Four of each that nobody can tell apart."""
    same = unit(1).expand(4, -1)
    head = build_item_fusion(ItemConfig("gated"), dim=8)
    assert loss_of(head, same, whole(same, same)).item() == pytest.approx(math.log(4), abs=1e-5)


def test_items_of_one_photo_do_not_repel_each_other():
    """Two draws of one photo whose items changed places: they are no rivals, as in every other loss."""
    head, queries = build_item_fusion(ItemConfig("weighted"), dim=8), torch.eye(3, 8)
    items = whole(queries[[1, 0, 2]], queries[[1, 0, 2]])
    apart = loss_of(head, queries, items, groups=[0, 1, 2], scale=100.0)
    together = loss_of(head, queries, items, groups=[0, 0, 2], scale=100.0)
    assert together < 1.0 < apart


def test_items_beyond_the_queries_are_rivals_only():
    """A mined item makes the loss larger and needs no query of its own."""
    head, queries = build_item_fusion(ItemConfig("weighted"), dim=8), unit(2)
    mined = whole(queries[[0, 1, 0]], queries[[0, 1, 0]])
    assert loss_of(head, queries, mined) > loss_of(head, queries, whole(queries, queries)) + 0.1


@pytest.mark.parametrize("kind", ITEM_FUSIONS)
def test_gradients_reach_everything_that_took_part(kind):
    """Head, queries, pictures, texts and temperature; nothing of a side that was dropped."""
    head = build_item_fusion(ItemConfig(kind), dim=8)
    rows = [unit(3, seed=seed).requires_grad_() for seed in range(3)]
    there, scale = torch.tensor([True, True, False]), torch.tensor(10.0, requires_grad=True)
    items = ItemBatch(rows[1], rows[2], there, torch.ones(3, dtype=torch.bool))
    item_loss(head, rows[0], items, objective=InfoNce(), logit_scale=scale, groups=torch.arange(3)).backward()
    assert all(part.grad.abs().sum() > 0 for part in (*rows, scale))
    assert rows[1].grad[2].abs().sum() == 0
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def puzzle(count=64):
    """Queries (n, 8), pictures that know the first four numbers of each and texts that know the last four; the rest
    of both is noise.
    """
    queries, noise = unit(count), 0.6 * torch.randn(2, count, 8, generator=draws(3))
    knows = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4])
    sides = [functional.normalize(queries * own + noise[i] * (1 - own), dim=-1) for i, own in enumerate(knows)]
    return queries, whole(*sides)


def trained(kind, *, dropout):
    """A head after 80 steps on the puzzle."""
    queries, items = puzzle()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = build_item_fusion(ItemConfig(kind), dim=8)
    step, draw = torch.optim.Adam(head.parameters(), lr=0.02), draws()
    for _ in range(80):
        masks = modality_dropout(items.has_image, items.has_text, probability=dropout, generator=draw)
        step.zero_grad()
        loss_of(head, queries, ItemBatch(items.images, items.texts, *masks)).backward()
        step.step()
    return head


@pytest.mark.parametrize("kind", ["gated", "concat"])
def test_a_head_learns_which_side_to_believe_in_what(kind):
    """Clearly below the plain mean it started from, although sides were dropped on the way."""
    start = loss_of(build_item_fusion(ItemConfig(kind), dim=8), *puzzle())
    assert loss_of(trained(kind, dropout=0.3), *puzzle()) < 0.8 * start


def test_dropout_is_what_teaches_a_head_to_do_without_a_side():
    """An MLP that never saw an item without a text is lost with one; the one that did is not."""
    queries, items = puzzle()
    alone = ItemBatch(items.images, items.texts, items.has_image, ~items.has_text)
    losses = [loss_of(trained("concat", dropout=rate), queries, alone) for rate in (0.0, 0.5)]
    assert losses[1] < 0.8 * losses[0]
