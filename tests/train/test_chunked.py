"""Gradient caching: the gradients of chunks are those of the whole batch."""

import copy

import pytest
import torch
from torch import nn

from mmsearch.errors import UsageError
from mmsearch.testing import tiny_dual_encoder
from mmsearch.train.chunked import Side, backward_in_chunks, chunks_of


class Tower(nn.Module):
    """(c, 6) -> (c, 4) unit rows, with dropout, in float64."""

    def __init__(self, *, dropout=0.3, batch_norm=False):
        super().__init__()
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).double()
        self.calls = 0

    def forward(self, chunk):
        self.calls += 1
        return nn.functional.normalize(self.layers(chunk), dim=-1)


class Contrast(nn.Module):
    """Symmetric cross-entropy with a learned temperature; images beyond the texts are negatives."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, texts, images):
        logits = self.log_scale.exp() * texts @ images.T
        targets = torch.arange(len(texts))
        both = nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T[targets], targets)
        return both / 2


def towers(**options):
    torch.manual_seed(1)
    return Tower(**options), Tower(**options), Contrast()


def rows_of(count, *, seed):
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pieces(data, lengths):
    return list(data.split(list(lengths)))


def gradients(*modules):
    return [parameter.grad.clone() for module in modules for parameter in module.parameters()]


def at_once(texts, images, loss, chunked_texts, chunked_images):
    """The dumb way: every chunk with a graph, one loss, one backward pass."""
    rows = [
        torch.cat([tower(c) for c in chunks]) for tower, chunks in ((texts, chunked_texts), (images, chunked_images))
    ]
    value = loss(*rows)
    value.backward()
    return value.detach()


def same(first, second, tolerance=1e-10):
    return all((a - b).abs().max() < tolerance for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("cuts", "image_cuts"), [((3, 3, 1), (2, 5)), ((1,) * 7, (7,)), ((7,), (4, 3)), ((7,), (7,))])
def test_chunked_gradients_are_those_of_the_whole_batch(cuts, image_cuts):
    """Dropout on, uneven chunks, one chunk on either side, the temperature included: equal to 1e-10."""
    data = pieces(rows_of(7, seed=0), cuts), pieces(rows_of(7, seed=1), image_cuts)
    ours, whole = towers(), towers()
    torch.manual_seed(5)
    value = backward_in_chunks([Side(ours[0], data[0]), Side(ours[1], data[1])], ours[2])
    torch.manual_seed(5)
    expected = at_once(*whole, *data)
    assert abs(value - expected) < 1e-12
    assert not value.requires_grad
    assert same(gradients(*ours), gradients(*whole))


def test_without_dropout_the_size_of_a_chunk_changes_nothing():
    """1, 2, 3 or all seven pairs at a time, and two images more than texts."""
    results = []
    for size in (1, 2, 3, 9):
        texts, images, loss = towers(dropout=0.0)
        sides = [Side(t, [c for (c,) in chunks_of(size, rows_of(n, seed=n))]) for t, n in ((texts, 7), (images, 9))]
        backward_in_chunks(sides, loss)
        results.append(gradients(texts, images, loss))
    assert all(same(results[0], other) for other in results[1:])


def test_gradients_are_added_to_those_that_are_there():
    """Two steps, each halved by `scale`, are the mean of two batches; the returned loss is not scaled."""
    texts, images, loss = towers(dropout=0.0)
    data = [[pieces(rows_of(4, seed=s), (2, 2)) for s in seeds] for seeds in ((0, 1), (2, 3))]
    values = [
        backward_in_chunks([Side(texts, t), Side(images, i)], loss, scale=lambda value: value / 2) for t, i in data
    ]
    whole = towers(dropout=0.0)
    expected = [at_once(*whole, *one) for one in data]
    assert torch.allclose(torch.stack(values), torch.stack(expected))
    assert same(gradients(texts, images, loss), [g / 2 for g in gradients(*whole)])


def test_the_generators_end_where_one_pass_would_leave_them():
    """What is drawn after the step does not depend on whether it was cached, even when the loss draws as well."""
    data = pieces(rows_of(6, seed=0), (3, 3)), pieces(rows_of(6, seed=1), (2, 4))
    drawn, values = [], []
    for way in ("cached", "at once"):
        texts, images, loss = towers()
        noisy = lambda t, i, loss=loss: loss(t + torch.rand(1), i)  # noqa: E731
        torch.manual_seed(9)
        if way == "cached":
            values.append(backward_in_chunks([Side(texts, data[0]), Side(images, data[1])], noisy))
        else:
            values.append(at_once(texts, images, noisy, *data))
        drawn.append(torch.rand(3))
    assert torch.allclose(*values)
    assert torch.equal(*drawn)


def test_batch_norm_statistics_count_a_batch_once():
    """Running means after a cached step are those of one pass over the same chunks."""
    chunks = pieces(rows_of(6, seed=0), (3, 3))
    ours, whole = towers(batch_norm=True), towers(batch_norm=True)
    backward_in_chunks([Side(ours[0], chunks, ours[0]), Side(ours[1], chunks, ours[1])], ours[2])
    at_once(*whole[:2], whole[2], chunks, chunks)
    for name, buffer in whole[0].named_buffers():
        assert torch.allclose(dict(ours[0].named_buffers())[name], buffer), name


def test_a_locked_side_is_encoded_once():
    """Nothing in its module trains: no second pass, no gradient, and the other side's gradients are unchanged."""
    data = pieces(rows_of(6, seed=0), (3, 3)), pieces(rows_of(6, seed=1), (2, 2, 2))
    ours, whole = towers(), towers()
    for modules in (ours, whole):
        modules[1].requires_grad_(False).eval()
    torch.manual_seed(3)
    backward_in_chunks([Side(ours[0], data[0], ours[0]), Side(ours[1], data[1], ours[1])], ours[2])
    torch.manual_seed(3)
    at_once(*whole, *data)
    assert (ours[0].calls, ours[1].calls) == (4, 3)
    assert all(parameter.grad is None for parameter in ours[1].parameters())
    assert same(gradients(ours[0], ours[2]), gradients(whole[0], whole[2]))


def test_a_frozen_side_without_its_module_does_no_harm():
    """Rows that need no gradient are left alone, also where nobody said that they are frozen."""
    texts, images, loss = towers()
    images.requires_grad_(False)
    backward_in_chunks([Side(t, pieces(rows_of(4, seed=0), (2, 2))) for t in (texts, images)], loss)
    assert all(parameter.grad is None for parameter in images.parameters())
    assert all(parameter.grad is not None for parameter in texts.parameters())


@pytest.mark.parametrize("lengths", [(2, 2, 2), (6,)])
def test_autocast_around_the_step_cuts_no_weight_off(lengths):
    """bfloat16 autocast keeps casts of the weights; those of the pass without a graph must not be used in the other."""
    ours, whole = (tuple(module.float() for module in towers()) for _ in range(2))
    data = [pieces(rows_of(6, seed=s).float(), lengths) for s in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        value = backward_in_chunks([Side(ours[0], data[0]), Side(ours[1], data[1])], ours[2])
        torch.manual_seed(3)
        expected = at_once(*whole, *data)
    assert torch.allclose(value, expected, atol=1e-3)
    for ours_, whole_ in zip(gradients(*ours), gradients(*whole), strict=True):
        assert torch.allclose(ours_, whole_, rtol=0.05, atol=2e-3)


def test_a_layer_that_encodes_and_compares_is_not_cut_off_by_autocast():
    """A layer used in `encode` and again inside the loss gets the gradient of both places."""
    got = []
    for lengths in ((3, 3), (6,)):
        texts, images, loss = (module.float() for module in towers(dropout=0.0))
        again = texts.layers[-1]
        sides = [Side(tower, pieces(rows_of(6, seed=s).float(), lengths)) for s, tower in enumerate((texts, images))]
        with torch.autocast("cpu", torch.bfloat16):
            backward_in_chunks(sides, lambda t, i, again=again, loss=loss: loss(again(t.repeat(1, 2)), i))
        got.append(again.weight.grad)
    assert torch.allclose(*got, rtol=0.05, atol=5e-3)


def test_both_towers_of_a_real_model_in_chunks():
    """The tiny dual encoder in training mode: its temperature, texts (ids, mask) and pixels; float32 to 1e-5."""
    ours = tiny_dual_encoder()
    whole = copy.deepcopy(ours)
    draw = torch.Generator().manual_seed(0)
    ids, pixels = torch.randint(4, 20, (6, 5), generator=draw), torch.randint(0, 256, (6, 32, 32, 3), generator=draw)
    mask, pixels = torch.ones_like(ids), pixels.to(torch.uint8)

    def sides(model, size):
        texts = Side(lambda chunk: model.encode_texts(*chunk), chunks_of(size, ids, mask), model.text)
        return [texts, Side(lambda chunk: model.encode_images(*chunk), chunks_of(size, pixels), model.image)]

    for model, size in ((ours, 4), (whole, 6)):
        contrast = Contrast().float()
        value = backward_in_chunks(
            sides(model, size), lambda t, i, m=model, c=contrast: m.logit_scale * c(t, i), scale=lambda v: 8 * v
        )
        assert value > 0
    got, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, whole))
    assert got.keys() == expected.keys()
    assert "log_logit_scale" in got
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-5), name


def test_pieces_of_a_batch_keep_their_order():
    """5 rows by 2 are 2, 2 and 1, of every tensor alike."""
    got = chunks_of(2, torch.arange(5), torch.arange(10).reshape(5, 2))
    assert [len(first) for first, _ in got] == [2, 2, 1]
    assert torch.equal(torch.cat([second for _, second in got]), torch.arange(10).reshape(5, 2))


@pytest.mark.parametrize("wrong", ["no sides", "no chunks", "loss of two numbers", "size 0", "unlike lengths"])
def test_what_cannot_be_a_batch_is_refused(wrong):
    """Each says what was expected."""
    texts, images, loss = towers()
    good = [Side(texts, [rows_of(2, seed=0)]), Side(images, [rows_of(2, seed=1)])]
    tries = {
        "no sides": lambda: backward_in_chunks([], loss),
        "no chunks": lambda: backward_in_chunks([good[0], Side(images, [])], loss),
        "loss of two numbers": lambda: backward_in_chunks(good, lambda t, i: (t * i).sum(1)),
        "size 0": lambda: chunks_of(0, torch.zeros(2)),
        "unlike lengths": lambda: chunks_of(2, torch.zeros(2), torch.zeros(3)),
    }
    with pytest.raises(UsageError, match="expected"):
        tries[wrong]()
