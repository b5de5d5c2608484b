"""How well a re-ranker orders the first stage's best, on pairs that were held out, and the scoring fitted on them.

Decisions:
- Pictures and captions are encoded once: the towers do not learn. Only the pairs are read again after each epoch.
- A part of the held-out pairs is measured between epochs (whole groups, chosen by hash), all of it at the end.
- The weights of the score are fitted on the same lists that are measured: three numbers from thousands of lists. The
  share that this flatters is far below the interval; figures on a test split are free of it.
- Figures are of balanced pairs, true and hard false ones. The scoring is fitted on as many random false pairs besides:
  all that is false among hard ones looks alike to the first stage, so what it thinks little of would only be true pairs
  that it got wrong, and something unrelated would be called one chance in five.
- A query whose right answer is not among its candidates teaches no weights, and stays where the first stage put it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsearch.evaluate.metrics import Ints
from mmsearch.evaluate.report import Evaluation
from mmsearch.evaluate.reranked import Candidates, best_candidates, drawn_apart, evaluate_reranked
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.model import RerankModel
from mmsearch.rerank.score_fitting import CandidateLists, MatchPairs, fit_scoring
from mmsearch.rerank.scores import Evidence, Scoring
from mmsearch.train.rerank_pictures import PictureReader
from mmsearch.types import Embeddings

_PAIRS_AT_ONCE, _TEXTS_AT_ONCE = 512, 64
_TRIES = 8
"""Random pictures looked at for one of another group."""


@dataclass(slots=True)
class HeldOut:
    """Held-out pictures and captions as the towers give them; place i of `maps` and `images` is one picture.

    `maps` (n, ...) what `PictureReader.kept` keeps, `images` (n, d), `texts` (m, d) unit rows, `captions` (m), `owners`
    (m,) the picture of each caption, `groups` (n,), `rarity`: of pictures (n,) and of captions (m,), see
    `rerank.commonness`.
    """

    maps: Tensor
    images: Embeddings
    texts: Embeddings
    captions: list[str]
    owners: Ints
    groups: Ints
    rarity: tuple[NDArray[np.float64], NDArray[np.float64]]

    def part(self, pictures: Ints, texts: Ints) -> HeldOut:
        """Only those pictures and those captions; every caption's picture must be among them."""
        place = np.full(len(self.images), -1)
        place[pictures] = np.arange(len(pictures))
        return HeldOut(
            self.maps[torch.from_numpy(pictures)], self.images[pictures], self.texts[texts],
            [self.captions[i] for i in texts], place[self.owners[texts]], self.groups[pictures],
            (self.rarity[0][pictures], self.rarity[1][texts]),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """What a measurement gives: both stages, the scoring, candidates with their final scores, and balanced pairs.

    `pairs`: true pairs, then a hard false one for each.
    """

    first: Evaluation
    second: Evaluation
    scoring: Scoring
    to_image: Candidates
    to_text: Candidates
    pairs: MatchPairs


class RerankValidation:
    """Measures `model` on `held_out`. `read`: captions -> (tokens, mask), the words as the fusion reads them."""

    def __init__(
        self, held_out: HeldOut, model: RerankModel, *, read: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        reader: PictureReader, depth: int, seed: int = 0,
    ) -> None:  # fmt: skip
        self.held_out, self._model, self._read, self._reader = held_out, model, read, reader
        self._depth, self._seed = depth, seed
        groups = held_out.groups
        self._first = evaluate_rows(
            held_out.texts, held_out.images, text_groups=groups[held_out.owners], image_groups=groups,
            model="first stage",
        )  # fmt: skip
        self._lists = (
            best_candidates(held_out.texts, held_out.images, min(depth, len(groups))),
            best_candidates(held_out.images, held_out.texts, min(depth, len(held_out.texts))),
        )

    @torch.no_grad()
    def measure(self, *, name: str, scoring: Scoring | None = None) -> Found:
        """Read all candidates with the model as it stands; `scoring` None: fit one on what comes out."""
        held, count = self.held_out, len(self.held_out.images)
        rows = (np.arange(len(held.texts))[:, None] * count + self._lists[0].rows, None)
        numbers = (rows[0].ravel(), (self._lists[1].rows * count + np.arange(count)[:, None]).ravel())
        true = np.arange(len(held.texts)) * count + held.owners
        hard, random = self._false_pairs()
        every = np.unique(np.concatenate([*numbers, true, hard, random]))
        logits = self._logits(every)

        def evidence(wanted: Ints, *, of_text: bool) -> Evidence:
            text, image = wanted // count, wanted % count
            cosines = np.einsum("md,md->m", held.texts[text], held.images[image]).astype(np.float64)
            rarity = held.rarity[1][text] if of_text else held.rarity[0][image]
            return Evidence.of(
                cosine=np.clip(cosines, -1, 1), logit=logits[np.searchsorted(every, wanted)], rarity=rarity
            )

        found = (evidence(numbers[0], of_text=False), evidence(numbers[1], of_text=True))
        pairs = self._match_pairs(true, hard, evidence)
        if scoring is None:
            more = self._match_pairs(true, np.concatenate([hard, random]), evidence)
            scoring = fit_scoring(self._as_lists(numbers, found), more, seed=self._seed)
        finals = [scoring.final(one).reshape(lists.rows.shape) for one, lists in zip(found, self._lists, strict=True)]
        both = [Candidates(lists.rows, lists.cosines, final) for lists, final in zip(self._lists, finals, strict=True)]
        second = evaluate_reranked(self._first, both[0], both[1], groups=(held.groups[held.owners], held.groups))
        return Found(self._first, replace(second, model=name), scoring, both[0], both[1], pairs)

    def _as_lists(self, numbers: tuple[Ints, Ints], found: tuple[Evidence, Evidence]) -> CandidateLists:
        held, count = self.held_out, len(self.held_out.images)
        relevant = [held.groups[held.owners[one // count]] == held.groups[one % count] for one in numbers]
        queries = (numbers[0] // count, len(held.texts) + numbers[1] % count)
        parts = {part: np.concatenate([getattr(one, part) for one in found]) for part in ("cosine", "logit", "rarity")}
        texts = np.concatenate([self._text_cosines(numbers[0]), np.full(len(numbers[1]), np.nan)])
        joined = Evidence.of(**parts, text_cosine=texts)
        direction = np.repeat([0, 1], [len(one) for one in numbers])
        return CandidateLists(np.concatenate(queries), joined, np.concatenate(relevant), direction)

    def _false_pairs(self) -> tuple[Ints, Ints]:
        """For each caption a picture of another group: one among its best, and any; those that have one."""
        held, count = self.held_out, len(self.held_out.images)
        draw = np.random.default_rng(self._seed)

        def drawn(pictures: Ints) -> Ints:
            places = drawn_apart(held.groups[pictures] != held.groups[held.owners][:, None], draw)
            kept = np.flatnonzero(places >= 0)
            found: Ints = kept * count + pictures[kept, places[kept]]
            return found

        return drawn(self._lists[0].rows), drawn(draw.integers(count, size=(len(held.texts), _TRIES)))

    def _match_pairs(self, true: Ints, false: Ints, evidence: Callable[..., Evidence]) -> MatchPairs:
        held, count = self.held_out, len(self.held_out.images)
        both = np.concatenate([true, false])
        match = np.repeat([True, False], [len(true), len(false)])
        found = evidence(both, of_text=False)
        parts = {part: getattr(found, part) for part in ("cosine", "logit", "rarity")}
        joined = Evidence.of(**parts, text_cosine=self._text_cosines(both))
        return MatchPairs(joined, match, held.groups[held.owners[both // count]])

    def _text_cosines(self, numbers: Ints) -> NDArray[np.float64]:
        """(m,) pairs of a caption and a picture -> cosine with another caption of that picture, NaN where it has none.

        So a held-out picture stands for an item that has a text as well; the query itself is not that text.
        """
        held, count = self.held_out, len(self.held_out.images)
        order = np.argsort(held.owners, kind="stable")
        starts = np.searchsorted(held.owners[order], np.arange(count + 1))
        text, image = numbers // count, numbers % count
        sizes = (starts[1:] - starts[:-1])[image]
        place = np.minimum(starts[:-1][image] + text % np.maximum(sizes, 1), len(order) - 1)
        other = order[place]
        clash = (other == text) & (sizes > 1)
        place = np.where(clash, starts[:-1][image] + (place - starts[:-1][image] + 1) % np.maximum(sizes, 1), place)
        other = order[place]
        found = np.einsum("md,md->m", held.texts[text], held.texts[other]).astype(np.float64)
        return np.where((other == text) | (sizes == 0), np.nan, np.clip(found, -1.0, 1.0))

    def _logits(self, every: Ints) -> NDArray[np.float32]:
        """(m,) sorted numbers caption · n + picture -> (m,) logits."""
        held, count = self.held_out, len(self.held_out.images)
        self._model.eval()
        patches = self._patches()
        images = torch.from_numpy(held.images)
        out = np.empty(len(every), np.float32)
        for low in range(0, len(held.captions), _TEXTS_AT_ONCE):
            high = min(low + _TEXTS_AT_ONCE, len(held.captions))
            tokens, mask = self._read(held.captions[low:high])
            texts = TextSide(torch.from_numpy(held.texts[low:high]).to(tokens.device), tokens, mask)
            for caption in range(low, high):  # one at a time: its words are read once for all of its pictures
                start, stop = np.searchsorted(every, [caption * count, (caption + 1) * count])
                one, length = slice(caption - low, caption - low + 1), max(1, int(mask[caption - low].sum()))
                text = TextSide(texts.rows[one], texts.tokens[one, :length], texts.mask[one, :length])
                places = torch.from_numpy(every[start:stop] % count)
                for some in torch.split(places, _PAIRS_AT_ONCE):
                    with self._reader.passes.autocast():
                        logits = self._model(
                            text, ImageSide(images[some].to(tokens.device), patches[some].to(tokens.device))
                        )
                    out[start : start + len(some)] = logits.float().cpu().numpy()
                    start += len(some)
        return out

    def _patches(self) -> Tensor:
        """(n, p, c) float32 of all held-out pictures, as the model is now."""
        parts = []
        for kept in torch.split(self.held_out.maps, 64):
            maps, _ = self._reader.read(kept)
            with self._reader.passes.autocast():
                parts.append(self._model.patch_projection(maps).float().cpu())
        return torch.cat(parts)


def a_part(held_out: HeldOut, *, pictures: int, texts: int, seed: int) -> HeldOut:
    """At most so many pictures, whole groups, with at most so many of their captions, at least one a picture."""
    draw = np.random.default_rng(seed)
    count = len(held_out.images)
    chosen = np.arange(count)
    if count > pictures:
        order = draw.permutation(np.unique(held_out.groups))
        sizes = np.array([np.count_nonzero(held_out.groups == group) for group in order])
        kept = order[: max(2, int(np.searchsorted(np.cumsum(sizes), pictures, side="right")))]
        chosen = np.flatnonzero(np.isin(held_out.groups, kept))
    own = np.flatnonzero(np.isin(held_out.owners, chosen))
    own = own[draw.permutation(len(own))]
    _, first = np.unique(held_out.owners[own], return_index=True)
    order = np.concatenate([first, np.setdiff1d(np.arange(len(own)), first)])[: max(texts, len(first))]
    return held_out.part(chosen, np.sort(own[order]))
