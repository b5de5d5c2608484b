"""Texts to ids: bounded, defined for every str, the same alone and in a batch."""

import time

import numpy as np
import pytest
from tokenizers import Tokenizer

from mmsearch.errors import ModelError, UsageError
from mmsearch.testing import tiny_tokenizer_json
from mmsearch.towers.tokenise import Tokeniser


def tiny(max_tokens=8, **settings):
    return Tokeniser(Tokenizer.from_str(tiny_tokenizer_json()), max_tokens=max_tokens, **settings)


def test_a_text_becomes_its_words_between_the_special_tokens():
    """[CLS] a red dog [SEP], then padding with mask 0."""
    tokens = tiny()(["a red dog", "dog"])
    assert tokens.ids.tolist() == [[2, 4, 13, 8, 3], [2, 8, 3, 0, 0]]
    assert tokens.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert tokens.ids.dtype == tokens.mask.dtype == np.int64


def test_truncated_says_which_texts_were_cut():
    """Six words fit beside two special tokens; seven do not."""
    tokens = tiny()(["dog " * 6, "dog " * 7, ""])
    assert tokens.truncated == (False, True, False)
    assert tokens.ids.shape == (3, 8)
    assert tokens.ids[1, -1] == 3


def test_an_empty_text_is_its_special_tokens():
    """Defined, not an error."""
    assert tiny()([""]).ids.tolist() == [[2, 3]]


def test_ten_megabytes_cost_no_more_than_a_page():
    """Characters are cut first, and that counts as truncated, also where the tail is only spaces."""
    start = time.perf_counter()
    assert tiny()(["dog " * 2_500_000]).truncated == (True,)
    assert tiny()(["dog" + " " * 10_000_000]).truncated == (True,)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("text", ["dog\0cat", "dog\udcffcat", "\ud800", "🐕", "\u202edog", "犬" * 50, "\0"])
def test_every_str_has_tokens(text):
    """NUL bytes, lone surrogates, emoji, right-to-left marks, other scripts."""
    assert tiny()([text]).ids.shape[0] == 1


def test_nul_separates_words_as_a_space_does():
    """Not dropped, which would join the words beside it."""
    assert tiny()(["dog\0cat"]).ids.tolist() == tiny()(["dog cat"]).ids.tolist()


def test_fixed_pads_every_text_to_the_full_length():
    """As SigLIP wants it, whatever else is in the batch."""
    assert tiny(fixed=True)(["dog"]).ids.shape == (1, 8)


def test_something_that_is_no_str_is_refused():
    """bytes are not a text."""
    with pytest.raises(UsageError, match="bytes"):
        tiny()([b"dog"])


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_broken_tokenizer_file_is_a_model_error(content, tmp_path):
    """Empty, nested without end, of an unknown kind."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokeniser.from_file(tmp_path / "tokenizer.json", max_tokens=8)
