"""The library as the commands see it: each call imports what it needs when it is made.

Decisions:
- Collaborators come in as arguments: a test hands the command line another `Library`, or this one with
  an encoder whose answers are known.
- Nothing here is imported by `mmsearch --help`: no numpy, no torch, no FAISS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmsearch.encoder import Encoder, Encodes
    from mmsearch.evaluate.classification import Classification
    from mmsearch.evaluate.comparison import Comparison
    from mmsearch.evaluate.report import Evaluation
    from mmsearch.evidence import Reranks
    from mmsearch.explain import Explanation
    from mmsearch.matcher import Matcher
    from mmsearch.searcher import Searcher
    from mmsearch.store import Problem
    from mmsearch.train.rerank_report import RerankReport
    from mmsearch.train.run import TrainReport
    from mmsearch.types import BuildReport, Hit


class Library:
    """What the commands call. `encoder`, `reranker`: used by all of them instead of loading a model's."""

    def __init__(self, encoder: Encoder | None = None, reranker: Reranks | None = None) -> None:
        self._encoder, self._reranker = encoder, reranker

    def build(
        self,
        paths: Sequence[str],
        out: Path,
        *,
        max_pixels: int | None = None,
        **options: Any,  # noqa: ANN401 - as `build` has them
    ) -> BuildReport:
        """`mmsearch.builder.build`; options that are None are left to it."""
        from mmsearch.builder import build
        from mmsearch.data.images import Limits

        limits = Limits() if max_pixels is None else Limits(max_pixels=max_pixels)
        given = {name: value for name, value in options.items() if value is not None}
        return build(paths, out, encoder=self._encoder, reranker=self._reranker, limits=limits, **given)

    def open(self, path: Path, *, device: str, reranker: Path | None = None) -> Searcher:
        """`mmsearch.searcher.Searcher.open`; `reranker`: the model directory that has it."""
        from mmsearch.searcher import Searcher

        return Searcher.open(path, encoder=self._encoder, device=device, reranker=reranker or self._reranker)

    def explain(self, searcher: Searcher, hit: Hit, *, text: str | None, picture: str | None) -> Explanation:
        """`mmsearch.explain.explain` with the models of a searcher."""
        from mmsearch.explain import explain

        return explain(hit, reranker=searcher.reranker, encoder=searcher.encoder, text=text, picture=picture)

    def draw(self, searcher: Searcher, explanation: Explanation, target: Path) -> bool:
        """`mmsearch.explain.draw`."""
        from mmsearch.explain import draw

        return draw(explanation, target, preprocessing=searcher.preprocessing)

    def matcher(self, model: str | None, *, device: str) -> Matcher:
        """`mmsearch.matcher.Matcher.load`."""
        from mmsearch.matcher import Matcher

        if self._encoder is not None and self._reranker is not None:
            return Matcher(self._encoder, self._reranker)
        return Matcher.load(model, device=device)

    def find_index(self, home: Path) -> Path:
        """The most recently updated index under `home`."""
        from mmsearch.searcher import find_index

        return find_index(home)

    def info(self, path: Path) -> dict[str, Any]:
        """Facts about an index; loads no model."""
        from mmsearch.store import IndexStore

        with IndexStore.open(str(path)) as store:
            return store.info()

    def train(
        self,
        pairs: Sequence[str],
        out: Path,
        *,
        recipe: Path | None,
        given: Mapping[str, Any],
        assignments: Sequence[str],
        stage: str = "towers",
        **options: Any,  # noqa: ANN401 - as `train` has them
    ) -> TrainReport | RerankReport:
        """`train.run.train`, or `train.rerank_run.train_reranker`, with settings of recipe, command line and --set."""
        from mmsearch.train.rerank_run import train_reranker
        from mmsearch.train.run import train
        from mmsearch.train.settings import gathered

        settings = gathered(pairs, recipe=recipe, given=given, assignments=assignments)
        return (train_reranker if stage == "rerank" else train)(settings, out, **options)

    def verify(self, path: Path) -> list[Problem]:
        """What is wrong with an index, also one that is too damaged to open."""
        from mmsearch.store.directory import verify

        return verify(str(path))

    def evaluate(
        self,
        pairs: str,
        *,
        model: str | None,
        device: str,
        **options: Any,  # noqa: ANN401 - as `evaluate_file` has them
    ) -> Evaluation:
        """`mmsearch.evaluate.evaluator.evaluate_file`."""
        from mmsearch.evaluate.evaluator import evaluate_file

        return evaluate_file(pairs, encoder=self._load(model, device=device), **options)

    def compare(
        self,
        pairs: str,
        *,
        before: str | None,
        after: str | None,
        device: str,
        **options: Any,  # noqa: ANN401 - as `compare_file` has them
    ) -> Comparison[Evaluation]:
        """`mmsearch.evaluate.evaluator.compare_file`."""
        from mmsearch.evaluate.evaluator import compare_file

        first, second = (partial(self._load, model, device=device) for model in (before, after))
        return compare_file(pairs, before=first, after=second, **options)

    def evaluate_stages(
        self,
        pairs: str,
        *,
        model: str | None,
        device: str,
        **options: Any,  # noqa: ANN401 - as `evaluate_stages` has them
    ) -> Comparison[Evaluation]:
        """`mmsearch.evaluate.rerank_eval.evaluate_stages`."""
        from mmsearch.evaluate.rerank_eval import evaluate_stages

        def load() -> tuple[Encodes, Reranks]:
            matcher = self.matcher(model, device=device)
            return matcher.encoder, matcher.reranker

        return evaluate_stages(pairs, load=load, **options)

    def classify(
        self,
        folder: str,
        *,
        model: str | None,
        device: str,
        templates: Path | None,
        **options: Any,  # noqa: ANN401 - as `evaluate_classes` has them
    ) -> Classification:
        """`mmsearch.evaluate.zeroshot.evaluate_classes`."""
        from mmsearch.evaluate.zeroshot import evaluate_classes, read_templates

        if templates is not None:
            options["templates"] = read_templates(templates)
        return evaluate_classes(folder, encoder=self._load(model, device=device), **options)

    def compare_classes(
        self,
        folder: str,
        *,
        before: str | None,
        after: str | None,
        device: str,
        templates: Path | None,
        **options: Any,  # noqa: ANN401 - as `compare_class_folders` has them
    ) -> Comparison[Classification]:
        """`mmsearch.evaluate.zeroshot.compare_class_folders`."""
        from mmsearch.evaluate.zeroshot import compare_class_folders, read_templates

        if templates is not None:
            options["templates"] = read_templates(templates)
        first, second = (partial(self._load, model, device=device) for model in (before, after))
        return compare_class_folders(folder, before=first, after=second, **options)

    def bundled_model(self) -> dict[str, Any]:
        """Facts about the bundled model as JSON values; reads its config and card, none of its weights."""
        from mmsearch.towers.checkpoint import CARD, Checkpoint
        from mmsearch.towers.locate import BUNDLED

        opened = Checkpoint.open(BUNDLED, verify=False)
        config, card = opened.config, opened.directory / CARD
        files = [opened.directory / name for name in opened.files]
        return {
            "name": opened.name,
            "dim": config.dim,
            "text tower": config.text.kind,
            "max tokens": config.max_tokens,
            "image tower": config.image.backbone,
            "image size": config.preprocessing.size,
            "megabytes": round(sum(file.stat().st_size for file in files if file.exists()) / 1e6, 1),
            "weights": opened.identity.weights,
            "card": str(card),
            "figures": last_table(card.read_text(encoding="utf-8")) if card.exists() else [],
        }

    def _load(self, model: str | None, *, device: str) -> Encoder:
        """The encoder of all commands, else the model; "bundled" is one."""
        from mmsearch.encoder import Encoder

        return self._encoder or Encoder.load(model, device=device)


def last_table(markdown: str) -> list[str]:
    """The lines of the last table of a page: where a model card has its figures."""
    tables: list[list[str]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return next((table for table in reversed(tables) if table), [])
