"""Every fusion keeps one contract; then what each of them alone promises."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from mmsearch.errors import ModelError, UsageError
from mmsearch.rerank.base import Fusion, ImageSide, TextSide, build_fusion
from mmsearch.rerank.config import FUSIONS, RerankConfig
from mmsearch.rerank.late_interaction import _chunks
from mmsearch.rerank.layers import mask_bias

DIM, TEXT_WIDTH = 6, 16
SMALL = {
    "patch_dim": 10,
    "grid": 3,
    "text_layer": 1,
    "layers": 2,
    "width": 16,
    "heads": 4,
    "hidden": 24,
    "dropout": 0.0,
}
VECTORS, READERS = FUSIONS[:4], FUSIONS[4:]
ALL = pytest.mark.parametrize("name", FUSIONS)
READING = pytest.mark.parametrize("name", READERS)


def small(name, **changes):
    return RerankConfig(name, **{**SMALL, **changes})


def fusion(name, *, trained=True, **changes):
    """A small one in eval mode; `trained`: nothing in it stands at its starting value."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = build_fusion(small(name, **changes), dim=DIM, text_width=TEXT_WIDTH).eval()
        for parameter in made.parameters() if trained else ():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return made


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(*lengths, seed=1):
    """A text of each length, padded to the longest."""
    mask = torch.tensor([[int(i < length) for i in range(max(lengths))] for length in lengths])
    rows = functional.normalize(draw(len(lengths), DIM, seed=seed), dim=-1)
    return TextSide(rows, draw(*mask.shape, TEXT_WIDTH, seed=seed + 1), mask)


def pictures(count, *, seed=5):
    rows = functional.normalize(draw(count, DIM, seed=seed), dim=-1)
    return ImageSide(rows, draw(count, 9, 10, seed=seed + 1))


def backbone(**changes):
    settings = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        made = BertModel(BertConfig(vocab_size=30, **{**settings, **changes}), add_pooling_layer=False).eval()
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return made


def close(left, right, *, within=1e-5):
    return torch.allclose(left, right, rtol=0.0, atol=within)


# The contract


@ALL
def test_a_logit_is_one_float32_a_pair(name):
    """(b,) float32, and not the same for all."""
    logits = fusion(name)(texts(3, 5, 4), pictures(3))
    assert logits.shape == (3,) and logits.dtype == torch.float32 and logits.std() > 0


@ALL
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_masked_tokens_change_nothing(name, garbage):
    """Whatever stands there, in values, in attention of the words and in gradients."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    dirty = text._replace(tokens=torch.where(text.mask.bool().unsqueeze(-1), text.tokens, torch.tensor(garbage)))
    logits = made(dirty, image)
    assert torch.equal(logits, made(text, image))
    logits.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in made.parameters())


@ALL
def test_padding_and_batch_change_nothing(name):
    """A pair alone, without padding, has the logit that it has in a padded batch."""
    made, text, image = fusion(name), texts(3, 7, 5), pictures(3)
    logits = made(text, image)
    for i, length in enumerate((3, 7, 5)):
        alone = TextSide(text.rows[i : i + 1], text.tokens[i : i + 1, :length], text.mask[i : i + 1, :length])
        assert close(made(alone, image.cut(i, i + 1)), logits[i : i + 1])


@ALL
def test_one_text_meets_many_pictures_and_the_other_way_round(name):
    """A side of batch 1 counts as repeated, in logits and in attention."""
    made, text, image = fusion(name), texts(4, 6, 2), pictures(3)
    first = torch.zeros(3, dtype=torch.int64)
    assert close(made(text.cut(0, 1), image), made(text.take(first), image))
    assert close(made(text, image.cut(0, 1)), made(text, image.take(first)))
    attention = made.attention(text, image.cut(0, 1))
    assert attention is None or close(attention, made.attention(text, image.take(first)))


@ALL
@pytest.mark.parametrize(("b", "n"), [(2, 5), (5, 2), (1, 1), (3, 3)])
def test_pairwise_is_forward_of_every_pair(name, b, n):
    """Entry (i, j) is the logit of text i with picture j."""
    made, text, image = fusion(name), texts(*range(2, 2 + b)), pictures(n)
    wide = made.pairwise(text, image)
    assert wide.shape == (b, n)
    rows, columns = torch.arange(b).repeat_interleave(n), torch.arange(n).repeat(b)
    assert close(wide.flatten(), made(text.take(rows), image.take(columns)))


@ALL
def test_pairwise_of_nothing_is_empty(name):
    """No pictures: (b, 0)."""
    assert fusion(name).pairwise(texts(3, 2), pictures(2).cut(0, 0)).shape == (2, 0)


@ALL
def test_both_sides_get_a_gradient_before_training(name):
    """From the first step on; a fusion that reads tokens passes it to words and patches, the others to rows."""
    text, image = texts(3, 5), pictures(2)
    watched = [text.tokens, image.patches] if name in READERS else [text.rows, image.rows]
    for part in watched:
        part.requires_grad_()
    fusion(name, trained=False)(text, image).sum().backward()
    assert all(part.grad.norm() > 1e-6 for part in watched)


@ALL
def test_it_learns_what_the_rows_or_the_words_alone_decide(name):
    """Four kinds of texts and of pictures; a pair matches when the picture's kind is the next one."""
    text, image, matches = toy(name in READERS)
    made = fusion(name, trained=False).train()
    optimiser = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(150):
        logits = made(text, image)
        loss = functional.binary_cross_entropy_with_logits(logits, matches)
        if loss < 0.3 and ((logits > 0) == matches.bool()).all():
            return
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    pytest.fail(f"loss {loss:.2f} after 150 steps")


def toy(reads):
    """All 16 pairs of kinds, twice. Without tokens the rows tell; with them, one word and one patch among fillers."""
    kinds = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1)
    names = functional.one_hot(kinds, DIM).float()  # (32, 2, 6)
    rows = names if not reads else torch.ones_like(names) / DIM**0.5
    tokens, patches = draw(32, 5, TEXT_WIDTH, seed=3) * 0.1, draw(32, 9, 10, seed=4) * 0.1
    if reads:
        tokens[:, 2, :DIM] += 3.0 * names[:, 0]
        patches[torch.arange(32), torch.arange(32) % 9, :DIM] += 3.0 * names[:, 1]
    text = TextSide(rows[:, 0], tokens, torch.ones(32, 5, dtype=torch.int64))
    return text, ImageSide(rows[:, 1], patches), ((kinds[:, 0] + 1) % 4 == kinds[:, 1]).float()


@ALL
def test_dropout_acts_in_training_only(name):
    """Two calls in training differ, two in evaluation do not. "weighted" has nothing to drop."""
    made, text, image = fusion(name, dropout=0.5), texts(4, 3), pictures(2)
    assert torch.equal(made(text, image), made(text, image))
    made.train()
    assert torch.equal(made(text, image), made(text, image)) == (name == "weighted")


@ALL
def test_half_precision_by_autocast_stays_near(name):
    """bfloat16 products, float32 softmax and logits."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(text, image)
    assert logits.dtype == torch.float32 and close(logits, made(text, image), within=0.15)


@ALL
def test_the_state_comes_back(name):
    """All that was learned is in the state dict."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    other = build_fusion(small(name), dim=DIM, text_width=TEXT_WIDTH).eval()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(text, image), made(text, image))


@ALL
def test_other_widths_are_refused_by_name(name):
    """Rows of another model: `UsageError`."""
    text = texts(3, 5)
    with pytest.raises(UsageError, match="text rows"):
        fusion(name)(text._replace(rows=text.rows[:, :4]), pictures(2))


# Fusions of rows


@pytest.mark.parametrize("name", VECTORS)
def test_a_fusion_of_rows_starts_as_ten_times_the_cosine(name):
    """So re-ranking by it changes no order before training; and words and patches may be missing."""
    text, image = texts(3, 5, 2), pictures(3)
    bare = TextSide(text.rows, torch.empty(0), torch.empty(0)), ImageSide(image.rows, torch.empty(0))
    made = fusion(name, trained=False)
    assert not made.reads_tokens and made.attention(*bare) is None
    assert close(made(*bare), 10.0 * (text.rows * image.rows).sum(dim=1))
    assert close(made.pairwise(*bare), 10.0 * text.rows @ image.rows.T)


def test_the_rank_of_bilinear_is_rounded_up_to_fours():
    """hidden 10 -> rank 12."""
    assert fusion("bilinear", hidden=10).text.out_features == 12


def test_bilinear_has_a_value_and_a_slope_where_nothing_agrees():
    """The signed root has none at 0 by itself."""
    made = fusion("bilinear")
    torch.nn.init.zeros_(made.text.weight)
    torch.nn.init.zeros_(made.text.bias)
    logits = made(texts(3, 5), pictures(2))
    logits.sum().backward()
    assert logits.isfinite().all() and made.text.weight.grad.isfinite().all()


# Fusions of words and patches


@READING
def test_attention_is_a_distribution_over_patches(name):
    """(b, t, p), not negative, sums to 1, and masked words do not move that of the others."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    attention = made.attention(text, image)
    assert attention.shape == (2, 5, 9) and (attention >= 0).all()
    assert close(attention.sum(dim=2), torch.ones(2, 5))
    dirty = text._replace(tokens=torch.where(text.mask.bool().unsqueeze(-1), text.tokens, torch.tensor(math.nan)))
    assert close(made.attention(dirty, image)[0, :3], attention[0, :3], within=1e-7)


@READING
def test_the_place_of_a_patch_counts(name):
    """The same patches in another order are another picture."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    assert not close(made(text, image._replace(patches=image.patches.flip(1))), made(text, image), within=1e-3)


@READING
def test_a_permutation_of_patches_comes_back_in_attention(name):
    """With no places learned, patches in reverse have the same logit and their attention in reverse."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    with torch.no_grad():
        made.patch_input.position.zero_()
    logits, attention = made.read(text, image)
    reverse, turned = made.read(text, image._replace(patches=image.patches.flip(1)))
    assert close(reverse, logits) and close(turned, attention.flip(2))


@READING
def test_a_text_without_words_has_a_finite_logit(name):
    """A mask of zeros is no NaN, in value or gradient."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    logits = made(text._replace(mask=torch.zeros_like(text.mask)), image)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in made.parameters())


@READING
def test_patches_of_another_grid_are_refused(name):
    """One patch would broadcast to all places."""
    image = pictures(2)
    with pytest.raises(UsageError, match="patches"):
        fusion(name)(texts(3, 5), image._replace(patches=image.patches[:, :1]))


@READING
def test_the_rows_count_once_their_scale_is_learned(name):
    """It starts at 0: other rows, same logit; then logit + scale · cosine."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    with torch.no_grad():
        made.cosine_scale.zero_()
        without = made(text, image)
        made.cosine_scale.fill_(2.0)
    assert fusion(name, trained=False).cosine_scale == 0.0
    assert close(made(text, image), without + 2.0 * (text.rows * image.rows).sum(dim=1))


def test_a_layer_less_reader_is_refused_but_for_late_interaction():
    """0 layers of text are an answer; a fusion that never reads the picture is not."""
    assert close(fusion("late-interaction", layers=0)(texts(3), pictures(1)).isfinite(), torch.tensor([True]))
    for name in ("cross-attention", "single-stream"):
        with pytest.raises(ModelError, match="layers"):
            small(name, layers=0)


def test_late_interaction_refuses_heads_that_do_not_divide_the_words():
    """Its layers have the words' width, not `config.width`."""
    with pytest.raises(ModelError, match="divisor of 16"):
        fusion("late-interaction", width=18, heads=6)


def test_late_interaction_has_known_values():
    """Very sharp and without context: the mean over words of the largest cosine, as FILIP has it."""
    made, text, image = fusion("late-interaction", layers=0, trained=False), texts(4, 4), pictures(2)
    with torch.no_grad():
        made.log_sharpness.fill_(12.0)
        made.mixture.copy_(torch.tensor([99.0, 0.0, 0.0]))
    words = functional.normalize(made.word_projection(text.tokens), dim=-1)
    patches = functional.normalize(made.patch_projection(made.patch_input(image.patches)), dim=-1)
    best = (words @ patches.transpose(1, 2)).amax(dim=2)
    assert close(made(text, image), 10.0 * best.mean(dim=1), within=1e-4)


@pytest.mark.parametrize("floats", [1, 9 * 6 * 2, 9 * 6 * 7, 1 << 24])
@pytest.mark.parametrize("lengths", [(6, 3, 5), (6, 3, 0, 1), (2, 0)])
def test_late_pairwise_is_the_same_in_any_chunks(floats, lengths):
    """One pair at a time, a few, or all at once; texts without a word among them."""
    made, text, image = fusion("late-interaction"), texts(*lengths), pictures(4)
    whole = made.pairwise(text, image)
    made.floats_at_once = floats
    assert close(made.pairwise(text, image), whole)
    assert close(whole, Fusion.pairwise(made, text, image))


def test_late_chunks_hold_what_they_may_and_little_padding():
    """Many short texts and a long one: not in one chunk as long as that."""
    lengths = sorted([8] * 100 + [9, 12, 13, 40])
    for most in (1, 50, 100, 1 << 20):
        found = list(_chunks(lengths, most=most))
        assert [place for start, stop in found for place in range(start, stop)] == list(range(len(lengths)))
        assert all((stop - start) * lengths[stop - 1] <= most or stop == start + 1 for start, stop in found)
    assert found == [(0, 102), (102, 103), (103, 104)]


def test_late_pairs_of_rows_keep_their_digits_under_autocast():
    """What the cosine of unit rows adds is not rounded to three digits: neighbours would tie."""
    made, text, image = fusion("late-interaction"), texts(6, 3, 5), pictures(4)
    found = []
    for scale in (0.0, 1.0):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            made.cosine_scale.fill_(scale)
            found.append(made.pairwise(text, image).double())
    assert close(found[1] - found[0], (text.rows @ image.rows.T).double(), within=1e-5)


# Starting from the text backbone


def test_cross_attention_that_reads_nothing_is_the_backbone():
    """Layers 1 and 2 of a BERT, copied: the first token is BERT's, from the hidden states after layer 1."""
    bert, made = backbone(), fusion("cross-attention")
    made.start_from(bert)
    for layer in made.layers:
        torch.nn.init.zeros_(layer.cross.out.weight)
        torch.nn.init.zeros_(layer.cross.out.bias)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    hidden = bert(torch.arange(10).reshape(2, 5), attention_mask=mask, output_hidden_states=True).hidden_states
    first, _ = made.read_words(TextSide(draw(2, DIM), hidden[1], mask), pictures(2))
    assert first.shape == (2, 1, 16) and close(first[:, 0], hidden[3][:, 0], within=2e-5)


@READING
def test_layers_are_the_backbones_after_start_from(name):
    """Every one of them, as a function: all words after layer 2 of the BERT, from those after layer 1."""
    bert, made, mask = backbone(), fusion(name), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    made.start_from(bert)
    hidden = bert(torch.arange(8).reshape(2, 4), attention_mask=mask, output_hidden_states=True).hidden_states
    words, _ = made.layers[0].attention(hidden[1], mask_bias(mask))
    kept = mask.bool()
    assert close(made.layers[0].feed(words)[kept], hidden[2][kept], within=2e-5)


@READING
def test_start_from_takes_what_fits_and_no_more(name):
    """Other heads: nothing. Another inner width: attention only. Fewer layers above: those there are."""
    started = fusion(name)
    before = {key: value.clone() for key, value in started.state_dict().items()}

    def changed(**settings):
        made = fusion(name)
        made.start_from(backbone(**settings))
        return {key for key, value in made.state_dict().items() if not torch.equal(value, before[key])}

    assert changed(num_attention_heads=2) == set()
    assert changed(hidden_size=32) == set()
    attention_only = changed(intermediate_size=32)
    assert attention_only and all(".attention." in key for key in attention_only)
    one = changed(num_hidden_layers=2)
    assert one and all(key.startswith("layers.0.") for key in one)
    assert {key.split(".")[1] for key in changed()} == {"0", "1"}


@pytest.mark.parametrize("name", ["cross-attention", "single-stream"])
def test_words_of_another_width_are_projected_and_nothing_is_copied(name):
    """Width 8 above words of 16: works, and `start_from` leaves it alone."""
    made, text, image = fusion(name, width=8), texts(3, 5), pictures(2)
    before = made(text, image)
    made.start_from(backbone(hidden_size=8))
    assert torch.equal(made(text, image), before)


@pytest.mark.parametrize("name", VECTORS)
def test_a_fusion_of_rows_has_no_use_for_the_backbone(name):
    """`start_from` changes nothing."""
    made, text, image = fusion(name), texts(3, 5), pictures(2)
    before = made(text, image)
    made.start_from(backbone())
    assert torch.equal(made(text, image), before)
