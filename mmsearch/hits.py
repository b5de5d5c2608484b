"""What one search is asked for and what it gives back, the same for every kind of searcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from mmsearch.errors import UsageError
from mmsearch.rerank.request import MAX_DEPTH, Rerank
from mmsearch.types import Embeddings, Hit
from mmsearch.where import Where

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

TO = ("image", "text", "any")
MAX_K = 10_000


class Hits(Sequence[Hit]):
    """Hits, best first; `notes` says what the user should know about how they came about.

    `partial`: a part of the collection did not answer, so better hits may be missing; the notes name it.
    """

    __slots__ = ("_hits", "notes", "partial")

    def __init__(self, hits: Iterable[Hit], *, notes: Iterable[str] = (), partial: bool = False) -> None:
        self._hits, self.notes, self.partial = tuple(hits), tuple(notes), partial

    @overload
    def __getitem__(self, index: int) -> Hit: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...

    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self._hits[index]

    def __len__(self) -> int:
        return len(self._hits)

    def __repr__(self) -> str:
        return f"Hits({list(self._hits)!r}, notes={self.notes!r})"


@dataclass(frozen=True, slots=True)
class Asked:
    """One search, checked. `k` of 1..10000, with a depth of re-ranking 1..1000; see `Searcher.search_text`.

    `where`: as `mmsearch.where.conditions` gives them.
    """

    k: int
    to: str
    threshold: float | None
    rerank: Rerank
    where: Where = ()

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise UsageError("k", expected=f"1 to {MAX_K}", got=str(self.k))
        if self.to not in TO:
            raise UsageError("to", expected=" or ".join(TO), got=self.to)
        if self.threshold is not None and not -1.0 <= self.threshold <= 1.0:
            raise UsageError("threshold", expected="a cosine from -1 to 1", got=str(self.threshold))
        if self.k > MAX_DEPTH and self.rerank.depth and (self.rerank.needs_probabilities or not self.rerank.is_auto):
            raise UsageError("k", expected=f"1 to {MAX_DEPTH} hits, re-ranked", got=str(self.k))


def check_words(text: object, *, where: str) -> None:
    """`UsageError` for what is no text, or one without words; `where`: what it was given as."""
    if not isinstance(text, str):
        raise UsageError(where, expected="a text", got=type(text).__name__)
    if not text.strip():
        raise UsageError(where, expected="some words", got="an empty text")


def text_answered(text: str, encoder: Callable[[], Encodes], search: Callable[[Embeddings], Hits]) -> Hits:
    """What `search` finds for the text's row, with a note where only the text's beginning could be used.

    `encoder` is called for texts with words only. Raises `UsageError` for one without, and for what is no text.
    """
    check_words(text, where="query")
    reads = encoder()
    found = search(reads.encode_texts([text]))
    if reads.truncated([text])[0]:
        note = f"the text is longer than {reads.max_tokens} tokens; only its beginning was used"
        return Hits(found, notes=(note, *found.notes), partial=found.partial)
    return found


def hidden_note(hidden: int) -> list[str]:
    """A note about hits that were left out because their files are gone; none where there are none."""
    return [f"{hidden} better or equal hits are not shown: their files are gone"] if hidden else []
