"""Texts to token ids, by a tokenizer.json and nothing else: no transformers, no torch.

Decisions:
- Texts are cut to a number of characters before they are tokenised: ten megabytes cost no more than a page.
  `truncated` says so either way.
- NUL bytes become spaces and lone surrogates (undecodable bytes of file names) question marks: every str has
  an embedding. An empty text is encoded as it is, special tokens only.
- One text at a time takes the single call: the library's thread pool costs more than it saves there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmsearch.errors import ModelError, UsageError

_CHARACTERS_A_TOKEN, _FEWEST_CHARACTERS = 32, 4096
_MAX_FILE = 128 << 20
_PADS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


@dataclass(frozen=True, slots=True)
class Tokens:
    """`ids`, `mask`: (b, t) int64, mask 1 for tokens and 0 for padding. `truncated`: which texts were cut."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    truncated: tuple[bool, ...]


class Tokeniser:
    """Thread-safe: the settings are made once, encoding changes nothing.

    `fixed`: pad every text to `max_tokens` (SigLIP was trained so) instead of to the longest of its batch.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, fixed: bool = False, pad: str | None = None) -> None:  # noqa: ANN401 - a tokenizers.Tokenizer
        self.max_tokens = max_tokens
        self._characters = max(_FEWEST_CHARACTERS, _CHARACTERS_A_TOKEN * max_tokens)
        self._tokenizer = tokenizer
        names = ([pad] if pad else []) + list(_PADS)
        known = [(n, tokenizer.token_to_id(n)) for n in names if tokenizer.token_to_id(n) is not None]
        token, number = known[0] if known else ("[PAD]", 0)
        tokenizer.enable_truncation(max_tokens)
        tokenizer.enable_padding(pad_id=number, pad_token=token, length=max_tokens if fixed else None)

    @classmethod
    def from_file(cls, path: Path, *, max_tokens: int, fixed: bool = False, pad: str | None = None) -> Tokeniser:
        """Read a tokenizer.json; `ModelError` when it is not one."""
        try:
            if path.stat().st_size > _MAX_FILE:
                raise ModelError(str(path), expected=f"at most {_MAX_FILE} bytes", got=str(path.stat().st_size))
            return cls(Tokenizer.from_file(str(path)), max_tokens=max_tokens, fixed=fixed, pad=pad)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                str(path), expected="a tokenizer.json", got=str(error)[:120], do="Copy the model again."
            ) from error

    @classmethod
    def from_json(cls, text: str, *, max_tokens: int) -> Tokeniser:
        """As `from_file`, from the JSON text itself."""
        try:
            return cls(Tokenizer.from_str(text), max_tokens=max_tokens)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError("tokenizer.json", expected="a tokenizer", got=str(error)[:120]) from error

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """(b) texts -> `Tokens`, cut at `max_tokens`."""
        clean = [self._clean(text) for text in texts]
        one = len(clean) == 1
        encoded = [self._tokenizer.encode(clean[0])] if one else self._tokenizer.encode_batch(clean)
        ids = np.array([e.ids for e in encoded], dtype=np.int64).reshape(len(encoded), -1)
        mask = np.array([e.attention_mask for e in encoded], dtype=np.int64).reshape(ids.shape)
        cut = tuple(bool(e.overflowing) or len(text) > self._characters for e, text in zip(encoded, texts, strict=True))
        return Tokens(ids, mask, cut)

    def spelling(self, text: str) -> list[str]:
        """The tokens of one text as strings, special ones included, padding left out, cut at `max_tokens`."""
        found = self._tokenizer.encode(self._clean(text))
        return [token for token, kept in zip(found.tokens, found.attention_mask, strict=True) if kept]

    def _clean(self, text: str) -> str:
        if not isinstance(text, str):
            raise UsageError("text", expected="a str", got=type(text).__name__)
        return text[: self._characters].replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
