"""The re-ranker at work: numpy in, numpy out, the same answer by every way."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from mmsearch.errors import ModelError, ResourceError, UsageError
from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.checkpoint import RerankCheckpoint, load_rerank_model, save_reranker
from mmsearch.rerank.reranker import Reranker, Words, _in_batches
from mmsearch.rerank.run_torch import TorchRun
from mmsearch.rerank.scores import Evidence
from mmsearch.rerank.tokens import Patches, dequantise, pack, quantise, unpack
from mmsearch.similarity import normalise
from mmsearch.testing import tiny_reranker

TEXTS = ["a dog on the beach", "cat", "the red car of a cat"]
ONE_TEXT = [(0, i) for i in range(4)]
ONE_PICTURE = [(i, 2) for i in range(3)]
EVERY = [(i, j) for i in range(3) for j in range(4)]
MIXED = [(2, 0), (0, 3), (1, 1), (0, 3)]


def unit_rows(n, *, seed):
    return normalise(np.random.default_rng(seed).normal(size=(n, 8)))


def pixels(n, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def given(reranker, texts=TEXTS, pictures=4):
    """Both sides of some texts and pictures, as `logits` takes them."""
    words, patches = reranker.read_texts(texts), reranker.read_pixels(pixels(pictures))
    return words, unit_rows(len(texts), seed=1), patches, unit_rows(pictures, seed=2)


@pytest.fixture(scope="module")
def by_onnx(graph_reranker):
    return Reranker.load(graph_reranker.directory, backend="onnx", threads=1)


@pytest.fixture(scope="module")
def by_torch(graph_reranker):
    return Reranker.load(graph_reranker.directory, backend="torch")


@pytest.mark.parametrize("pairs", [ONE_TEXT, ONE_PICTURE, EVERY, MIXED, [(1, 1)] * 3, [(0, 0)]], ids=len)
def test_logits_are_the_same_by_onnxruntime_and_by_torch(by_onnx, by_torch, pairs):
    """One text with many pictures, one picture with many texts, any pairs, one pair again and again."""
    one, other = by_onnx.logits(*given(by_onnx), pairs=pairs), by_torch.logits(*given(by_torch), pairs=pairs)
    assert one.dtype == np.float32
    assert one.shape == (len(pairs),)
    assert np.allclose(one, other, atol=1e-4)
    assert np.allclose(one, by_onnx.logits(*given(by_torch), pairs=pairs), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_batch_size_changes_nothing(by_onnx, batch_size):
    """Neither patches nor logits."""
    sides = given(by_onnx)
    assert np.allclose(by_onnx.logits(*sides, pairs=EVERY, batch_size=batch_size), by_onnx.logits(*sides, pairs=EVERY))
    whole, parts = by_onnx.read_pixels(pixels(7)), by_onnx.read_pixels(pixels(7), batch_size=batch_size)
    assert np.allclose(dequantise(whole), dequantise(parts), atol=1e-2)


def test_padding_and_company_change_nothing(by_onnx):
    """A text alone, among longer ones, and with padding of huge numbers: the same words and the same logits."""
    together = given(by_onnx)
    logits = by_onnx.logits(*together, pairs=EVERY)
    assert not together[0].tokens[together[0].mask == 0].any()
    for i, text in enumerate(TEXTS):
        alone = by_onnx.read_texts([text])
        length = int(together[0].mask[i].sum())
        assert alone.tokens.shape[1] == length == len(by_onnx.words_of(text))
        assert np.allclose(alone.tokens[0], together[0].tokens[i, :length], atol=1e-5)
        found = by_onnx.logits(alone, together[1][i : i + 1], *together[2:], pairs=ONE_TEXT)
        assert np.allclose(found, logits[4 * i : 4 * i + 4], atol=1e-5)
    loud = np.where(together[0].mask[..., None] > 0, together[0].tokens, np.float32(1e6))
    assert np.allclose(by_onnx.logits(Words(loud, together[0].mask), *together[1:], pairs=EVERY), logits, atol=1e-5)


def test_logits_are_those_of_the_model(by_onnx, graph_reranker):
    """Against torch by hand, pair by pair, from the very patches that were read."""
    model, (words, text_rows, patches, image_rows) = load_rerank_model(graph_reranker), given(by_onnx)
    wide = torch.from_numpy(dequantise(patches))
    found = by_onnx.logits(words, text_rows, patches, image_rows, pairs=EVERY)
    for (i, j), logit in zip(EVERY, found, strict=True):
        text = TextSide(*(torch.from_numpy(side[i : i + 1]) for side in (text_rows, words.tokens, words.mask)))
        with torch.no_grad():
            wanted = model(text, ImageSide(torch.from_numpy(image_rows[j : j + 1]), wide[j : j + 1]))
        assert logit == pytest.approx(float(wanted), abs=1e-4)
    assert found.std() > 1e-4


def test_cached_patches_give_the_very_same_logits(by_onnx):
    """Packed, unpacked, put together again in another order: not a bit of difference."""
    words, text_rows, patches, image_rows = given(by_onnx)
    stored = [pack(patches.take([i])) for i in (3, 1, 0, 2)]
    cached = Patches.concatenate([unpack(stored[i], p=9, c=8) for i in (2, 1, 3, 0)])
    assert len(stored[0]) == by_onnx.config.bytes_per_picture
    fresh = by_onnx.logits(words, text_rows, patches, image_rows, pairs=EVERY)
    assert np.array_equal(by_onnx.logits(words, text_rows, cached, image_rows, pairs=EVERY), fresh)


def test_quantised_patches_are_within_half_a_step_of_the_models(by_onnx, graph_reranker):
    """Half a 127th of each token's largest number; logits move by less than a hundredth."""
    words, text_rows, patches, image_rows = given(by_onnx)
    with torch.no_grad():
        exact = load_rerank_model(graph_reranker).patches(torch.from_numpy(pixels(4))).numpy()
    step = np.abs(exact).max(axis=2, keepdims=True) / 127
    assert (np.abs(dequantise(patches) - exact) <= 0.51 * step + 1e-6).all()
    runs = by_onnx._runs("match.onnx")
    sides = by_onnx._sides((words, text_rows), (patches, image_rows)).gather(np.array(ONE_TEXT))
    quantised, unrounded = runs.match(sides)[0], runs.match({**sides, "patches": exact})[0]
    assert 0 < np.abs(quantised - unrounded).max() < 0.01


def test_a_marked_picture_costs_itself_only(by_onnx):
    """Its logits are NaN, which scoring reads as missing; those of the others stay."""
    words, text_rows, patches, image_rows = given(by_onnx)
    wide = dequantise(patches)
    wide[1, 4, 2] = np.inf
    logits = by_onnx.logits(words, text_rows, quantise(wide), image_rows, pairs=EVERY)
    fresh = by_onnx.logits(words, text_rows, patches, image_rows, pairs=EVERY)
    marked = np.array([picture == 1 for _, picture in EVERY])
    assert np.isnan(logits[marked]).all()
    assert np.allclose(logits[~marked], fresh[~marked], atol=1e-6)
    probabilities = by_onnx.scoring.probability(Evidence.of(cosine=np.zeros(len(EVERY)), logit=logits))
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert by_onnx.attention(words, text_rows, quantise(wide), image_rows, pair=(0, 1)) is None


def test_attention_says_where_each_word_looks(by_onnx, by_torch):
    """(t, p), a row for each of `words_of`, summing to 1; the same by both ways."""
    for text in range(3):
        found = by_onnx.attention(*given(by_onnx), pair=(text, 2))
        assert found.shape == (len(by_onnx.words_of(TEXTS[text])), 9)
        assert np.allclose(found.sum(axis=1), 1.0, atol=1e-5)
        assert np.allclose(found, by_torch.attention(*given(by_torch), pair=(text, 2)), atol=1e-4)


def test_words_are_spelt_as_they_are_read(by_onnx):
    """Special tokens included, cut where the tokeniser cuts (12 here), unknown words as such."""
    assert by_onnx.words_of("A red zebra") == ["[CLS]", "a", "red", "[UNK]", "[SEP]"]
    long = "dog " * 40
    assert len(by_onnx.words_of(long)) == by_onnx.read_texts([long]).mask.sum() == by_onnx.max_tokens == 12


def test_nothing_to_do_is_done(by_onnx):
    """No texts, no pictures, no pairs: empty arrays of the right shapes."""
    assert by_onnx.read_texts([]).tokens.shape[::2] == (0, 16)
    assert by_onnx.read_pixels(pixels(0)).values.shape == (0, 9, 8)
    assert by_onnx.logits(*given(by_onnx), pairs=[]).shape == (0,)
    assert by_onnx.logits(*given(by_onnx), pairs=np.empty((0, 2), np.int64)).dtype == np.float32


@pytest.mark.parametrize("pairs", [[(0, 4)], [(3, 0)], [(-1, 0)], [(0.0, 1.0)], [0, 1], [(0, 1, 2)]], ids=str)
def test_pairs_that_are_not_there_are_refused(by_onnx, pairs):
    """Beyond the end, negative, not whole, of another shape."""
    with pytest.raises(UsageError, match="pairs"):
        by_onnx.logits(*given(by_onnx), pairs=pairs)


def test_sides_that_do_not_fit_are_refused(by_onnx):
    """More rows than words, another dimension, other patches, none at all, one str, pixels of another size."""
    words, text_rows, patches, image_rows = given(by_onnx)
    other = quantise(np.zeros((4, 4, 8), np.float32))
    for sides in (
        (words, text_rows[:2], patches, image_rows),
        (words, text_rows, patches, image_rows[:3]),
        (words, text_rows[:, :7], patches, image_rows),
        (words, text_rows, other, image_rows),
        (None, text_rows, patches, image_rows),
        (words, text_rows, None, image_rows),
    ):
        with pytest.raises(UsageError, match="re-ranker"):
            by_onnx.logits(*sides, pairs=[(0, 0)])
    with pytest.raises(UsageError, match="one str"):
        by_onnx.read_texts("a dog")
    with pytest.raises(UsageError, match="pixels"):
        by_onnx.read_pixels(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(UsageError, match="batch_size"):
        by_onnx.logits(*given(by_onnx), pairs=[(0, 0)], batch_size=0)


def test_a_fusion_of_rows_alone_needs_neither_words_nor_patches(tmp_path):
    """They may be left out; what is given is not looked at."""
    reranker = Reranker.load(tiny_reranker(tmp_path, fusion="gated").directory)
    words, text_rows, patches, image_rows = given(reranker)
    assert not reranker.reads_tokens
    found = reranker.logits(None, text_rows, None, image_rows, pairs=EVERY)
    assert np.array_equal(found, reranker.logits(words, text_rows, patches, image_rows, pairs=EVERY))
    assert found.std() > 1e-4
    assert reranker.attention(words, text_rows, patches, image_rows) is None


@pytest.mark.parametrize(("fusion", "whole"), [("late-interaction", 1), ("cross-attention", 0)])
def test_a_whole_table_gives_what_pairs_give(tmp_path, monkeypatch, fusion, whole):
    """Many pairs of few sides come from one table, where the fusion makes it at once; a marked picture stays NaN."""
    reranker = Reranker.load(tiny_reranker(tmp_path, fusion=fusion).directory)
    words, text_rows, patches, image_rows = given(reranker)
    patches.scales[1] = np.nan
    one_by_one = reranker.logits(words, text_rows, patches, image_rows, pairs=EVERY[:-1])
    tables, matrix = [], TorchRun.matrix
    monkeypatch.setattr(TorchRun, "matrix", lambda self, sides: tables.append(sides) or matrix(self, sides))
    monkeypatch.setattr("mmsearch.rerank.reranker._WORTH_TORCH", 3)
    at_once = reranker.logits(words, text_rows, patches, image_rows, pairs=EVERY[:-1])
    assert len(tables) == whole
    assert np.isnan(at_once).sum() == 3
    assert np.allclose(at_once, one_by_one, atol=1e-5, equal_nan=True)


def test_a_batch_that_does_not_fit_is_halved():
    """The smaller size is kept; a batch of one that does not fit is an error of ours."""
    sizes = []

    def run(part):
        sizes.append(part.stop - part.start)
        if sizes[-1] > 2:
            raise MemoryError
        return list(range(part.start, part.stop))

    assert [one for part in _in_batches(run, 7, batch_size=5) for one in part] == list(range(7))
    assert sizes == [5, 2, 2, 2, 1]

    def never(part):
        raise MemoryError

    with pytest.raises(ResourceError, match="a batch of one"):
        _in_batches(never, 7, batch_size=5)


def test_a_logit_that_is_no_number_never_leaves(tmp_path):
    """A fusion whose weights are NaN: the pair is named."""
    opened = tiny_reranker(tmp_path)
    model = load_rerank_model(opened)
    with torch.no_grad():
        model.fusion.cosine_scale.fill_(float("nan"))
    reranker = Reranker(save_reranker(model, tmp_path, name="nan", scoring_json={}, graphs=False))
    with pytest.raises(ModelError, match="text 0 and picture 3"):
        reranker.logits(*given(reranker), pairs=[(0, 3), (1, 1)])


def test_threads_get_what_one_gets(by_onnx):
    """Four at once, with texts of different lengths."""
    sides = given(by_onnx)
    wanted = by_onnx.logits(*sides, pairs=EVERY)
    fresh = Reranker(RerankCheckpoint.open(by_onnx._opened.directory))
    found = [None] * 4

    def work(i):
        found[i] = fresh.logits(*given(fresh), pairs=EVERY)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.allclose(one, wanted, atol=1e-5) for one in found)


def test_identities_and_settings_are_those_of_the_checkpoint(by_onnx, graph_reranker):
    """And which unit rows belong to it."""
    assert by_onnx.identity == graph_reranker.identity
    assert by_onnx.tokens_identity == graph_reranker.tokens_identity
    assert by_onnx.towers == graph_reranker.towers.identity
    assert by_onnx.config == graph_reranker.config
    assert by_onnx.preprocessing == graph_reranker.towers.config.preprocessing
    assert by_onnx.scoring.to_json() == by_onnx.scoring_json


def test_banks_are_there_for_those_who_ask(plain_reranker, by_onnx):
    """Four rows a side, or none."""
    reranker = Reranker(plain_reranker)
    assert reranker.caption_bank.shape == reranker.picture_bank.shape == (4, 8)
    assert by_onnx.caption_bank.shape == by_onnx.picture_bank.shape == (0, 8)


def test_onnxruntime_alone_needs_graphs(plain_reranker):
    """The missing ones are named; left open, torch does the work."""
    with pytest.raises(ModelError, match=r"no words\.onnx"):
        Reranker.load(plain_reranker.directory, backend="onnx")
    reranker = Reranker.load(plain_reranker.directory)
    assert np.isfinite(reranker.logits(*given(reranker), pairs=EVERY)).all()


def test_a_model_without_a_reranker_is_one_sentence(plain_checkpoint):
    """Of a directory, and of nothing."""
    with pytest.raises(ModelError, match=r"no rerank\.json"):
        Reranker.load(plain_checkpoint.directory)
    with pytest.raises(ModelError, match="nothing there"):
        Reranker.load(plain_checkpoint.directory / "nowhere")


def test_a_search_with_graphs_never_imports_torch(graph_reranker):
    """Words, patches, logits, attention and scoring."""
    code = f"""
import sys
import numpy as np
from mmsearch.rerank.reranker import Reranker
reranker = Reranker.load({str(graph_reranker.directory)!r}, device="cpu")
words, patches = reranker.read_texts(["a dog"]), reranker.read_pixels(np.zeros((2, 32, 32, 3), np.uint8))
rows = np.eye(8, dtype=np.float32)
reranker.logits(words, rows[:1], patches, rows[:2], pairs=[(0, 0), (0, 1)])
reranker.attention(words, rows[:1], patches, rows[:2])
reranker.scoring, reranker.identity, reranker.tokens_identity, reranker.caption_bank
assert not {{"torch", "transformers", "timm"}} & set(sys.modules), "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
