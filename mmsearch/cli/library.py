"""The library as the commands see it: each call imports what it needs when it is made.

Decisions:
- Collaborators come in as arguments: a test hands the command line another `Library`, or this one with
  an encoder whose answers are known.
- Nothing here is imported by `mmsearch --help`: no numpy, no torch, no FAISS.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmsearch.bridge_build import BridgeReport
    from mmsearch.encoder import Encoder, Encodes
    from mmsearch.evaluate.classification import Classification
    from mmsearch.evaluate.comparison import Comparison
    from mmsearch.evaluate.report import Evaluation
    from mmsearch.evidence import Reranks
    from mmsearch.exchange.reports import ExportReport, ImportReport
    from mmsearch.explain import Explanation
    from mmsearch.matcher import Matcher
    from mmsearch.reindex import ReindexReport
    from mmsearch.reshard import CopyReport
    from mmsearch.scale.engine_searcher import EngineSearcher
    from mmsearch.scale.push import PushReport
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
        engine: str = "local",
        address: str | None = None,
        work: str | None = None,
        **options: Any,  # noqa: ANN401 - as `build` has them
    ) -> BuildReport:
        """`mmsearch.builder.build`; options that are None are left to it. `address`, `work`: of the engine "ray"."""
        from mmsearch.builder import build
        from mmsearch.cli.engine_asked import check_no_cluster
        from mmsearch.data.images import Limits

        limits = Limits() if max_pixels is None else Limits(max_pixels=max_pixels)
        given = {name: value for name, value in options.items() if value is not None}
        models: dict[str, Any] = {"encoder": self._encoder, "reranker": self._reranker}
        if engine == "local":
            check_no_cluster(address=address, work=work)
            return build(paths, out, limits=limits, **models, **given)
        from mmsearch.scale.ray_encode import RayEngine

        spread = RayEngine(address=address, work=work, device=str(given.get("device", "auto")))
        with redirect_stdout(sys.stderr):  # Ray prints there what becomes of its nodes; stdout is data
            return build(paths, out, limits=limits, engine=spread, **models, **given)

    def open(
        self,
        path: Path | str | Sequence[Path],
        *,
        device: str,
        reranker: Path | None = None,
        partial: bool = False,
        model: str | None = None,
    ) -> Searcher | EngineSearcher:
        """`mmsearch.searcher.Searcher.open`; `reranker`: the model directory that has it. An address: an engine.

        `model`: asks instead of the index's own, over a bridge.
        """
        encoder = self._encoder if model is None else self._load(model, device=device)
        if isinstance(path, str) and "://" in path:
            from mmsearch.cli.engine_asked import open_engine_searcher

            return open_engine_searcher(path, encoder, device=device, partial=partial, reranker=reranker)
        from mmsearch.searcher import Searcher

        return Searcher.open(path, encoder=encoder, device=device, reranker=reranker or self._reranker, partial=partial)

    def explain(
        self, searcher: Searcher | EngineSearcher, hit: Hit, *, text: str | None, picture: str | None
    ) -> Explanation:
        """`mmsearch.explain.explain` with the models of a searcher; nothing where it has no re-ranker."""
        from mmsearch.explain import Explanation, explain

        if not searcher.has_reranker:
            return Explanation(parts=hit.parts)
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

    def info(self, path: Path | str | Sequence[Path], *, partial: bool = False) -> dict[str, Any]:
        """Facts about an index, or several, or what an engine holds; loads no model."""
        if isinstance(path, str) and "://" in path:
            with self.open(path, device="auto") as engine:
                return engine.info()
        from mmsearch.searcher import Searcher

        with Searcher.open(path, partial=partial) as searcher:  # whatever the encoder of all commands is
            return searcher.info()

    def tune(self, index: Path, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - as `tune_index` has them
        """`mmsearch.derive.tune_index`."""
        from mmsearch.derive import tune_index

        return tune_index(index, encoder=self._encoder, **options)

    def reindex(
        self,
        index: Path,
        *,
        model: str,
        **options: Any,  # noqa: ANN401 - as `reindex` has them
    ) -> ReindexReport:
        """`mmsearch.reindex.reindex`; options that are None are left to it."""
        from mmsearch.reindex import reindex

        given = {name: value for name, value in options.items() if value is not None}
        return reindex(index, model=model, encoder=self._encoder, reranker=self._reranker, **given)

    def abort_reindex(self, index: Path) -> bool:
        """`mmsearch.reindex.abort`."""
        from mmsearch.reindex import abort

        return abort(index)

    def bridge(
        self,
        index: Path,
        *,
        model: str,
        anew: bool = True,
        device: str,
        **options: Any,  # noqa: ANN401 - as `build_bridge` has them
    ) -> BridgeReport | None:
        """`mmsearch.bridge_build.build_bridge`; options that are None are left to it.

        Without `anew` only where it is needed: None when the index has that model, or a bridge to it.
        """
        from mmsearch.bridge_build import build_bridge, needs_bridge

        given = {name: value for name, value in options.items() if value is not None}
        if not anew and not needs_bridge(index, self._load(model, device=device)):
            return None
        return build_bridge(index, model=model, encoder=self._encoder, device=device, **given)

    def push(
        self,
        index: str,
        address: str,
        **options: Any,  # noqa: ANN401 - as `push` has them
    ) -> PushReport:
        """`mmsearch.scale.push.push`."""
        from mmsearch.scale.push import push

        return push(index, address, **options)

    def serve_shards(self, indexes: Sequence[str], name: str, *, address: str) -> dict[str, Any]:
        """`mmsearch.scale.ray_serve.serve`."""
        from mmsearch.scale.ray_serve import serve

        return serve(indexes, name, address=address)

    def stop_shards(self, name: str, *, address: str) -> int:
        """`mmsearch.scale.ray_serve.stop`."""
        from mmsearch.scale.ray_serve import stop

        return stop(name, address=address)

    def merge(
        self,
        indexes: Sequence[str],
        out: Path,
        **options: Any,  # noqa: ANN401 - as `merge` has them
    ) -> CopyReport:
        """`mmsearch.reshard.merge`."""
        from mmsearch.reshard import merge

        return merge(indexes, out, encoder=self._encoder, **options)

    def split(
        self,
        index: str,
        out: Path,
        **options: Any,  # noqa: ANN401 - as `split` has them
    ) -> CopyReport:
        """`mmsearch.reshard.split`."""
        from mmsearch.reshard import split

        return split(index, out, encoder=self._encoder, **options)

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

    def import_vectors(
        self,
        paths: Sequence[str],
        out: Path,
        **options: Any,  # noqa: ANN401 - as `import_vectors` has them
    ) -> ImportReport:
        """`mmsearch.exchange.import_vectors`."""
        from mmsearch.exchange import import_vectors

        encoder = self._encoder if options.get("model") is not None else None
        return import_vectors(paths, out, encoder=encoder, **options)

    def export_vectors(
        self,
        index: Path,
        to: Path,
        **options: Any,  # noqa: ANN401 - as `export_vectors` has them
    ) -> ExportReport:
        """`mmsearch.exchange.export_vectors`."""
        from mmsearch.exchange import export_vectors

        return export_vectors(index, to, **options)

    def verify(self, path: Path) -> list[Problem]:
        """What is wrong with an index, also one that is too damaged to open; or with all shards of a folder."""
        from dataclasses import replace

        from mmsearch.opened import directories
        from mmsearch.store.directory import verify

        folders = directories([path])
        if folders == [str(path)]:
            return verify(str(path))
        return [replace(one, file=str(Path(folder, one.file))) for folder in folders for one in verify(folder)]

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
