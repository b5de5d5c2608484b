"""`train --stage rerank`: towers that stay as they are, a fusion over them, and a report.

    OUT/best -> epoch-0003/   the towers and the re-ranker in one model directory
    OUT/reliability.png       probabilities on held-out pairs against what is true
    the rest as in the first stage

Decisions:
- What is reported is the best state in full precision; the checkpoint holds it in half, banks in 8 bits.
- A score is fitted on all held-out pairs at the end, and figures are of the same pairs: `mmsearch eval --split test`
  on rows that the run never opened is free of that.
- With 0 epochs, what `rerank.start` holds stays as it is: scores, probabilities and cut-off are fitted on the data.
- One process; the second stage is small, and its batches need no other rank's negatives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsearch.encoder import Encoder
from mmsearch.errors import InputError, ModelError, UsageError
from mmsearch.evaluate.comparison import compare
from mmsearch.evaluate.matching import evaluate_matching
from mmsearch.evaluate.reliability_picture import draw_reliability
from mmsearch.rerank.checkpoint import RerankCheckpoint, copy_towers, load_rerank_model, save_reranker
from mmsearch.rerank.commonness import rarity
from mmsearch.rerank.model import RerankModel
from mmsearch.rerank.present import has_reranker
from mmsearch.rerank.scores import Scoring
from mmsearch.towers.checkpoint import TOKENIZER, Checkpoint, is_checkpoint, load_dual_encoder
from mmsearch.towers.locate import BEST, locate
from mmsearch.train.bench import Bench, Silent, show
from mmsearch.train.curves import CURVES, draw_curves
from mmsearch.train.depthwise import fast_depthwise
from mmsearch.train.distributed import Ranks
from mmsearch.train.encoding import Texts, TowerPass, pick_device, pick_precision
from mmsearch.train.examples import read_examples
from mmsearch.train.feed import PixelFeed, plain_pixels
from mmsearch.train.journal import METRICS, Journal
from mmsearch.train.negatives import mine
from mmsearch.train.pictures import Feed, KeptFeed
from mmsearch.train.rerank_pictures import PictureReader
from mmsearch.train.rerank_report import RerankReport, card_of, of_picture, plain_scoring, with_cutoff
from mmsearch.train.rerank_start import build_reranker, earlier_banks, start_identity, with_start
from mmsearch.train.rerank_trainer import RerankParts, RerankTrainer
from mmsearch.train.rerank_validation import HeldOut, RerankValidation, a_part
from mmsearch.train.run import HELD_OUT, REPORT, SETTINGS, claimed, forget, resources, write_json, write_pairs
from mmsearch.train.settings import TrainSettings
from mmsearch.train.setup import Beginning
from mmsearch.train.trainer import Watcher, digest_of, standing
from mmsearch.train.workshop import AUTO_VIEWS, filled_views, resident_feed
from mmsearch.types import Pair

RELIABILITY = "reliability.png"
_ENCODE, _TEXTS = 64, 2048


def train_reranker(
    settings: TrainSettings, out: str | os.PathLike[str], *, watcher: Watcher | None = None, force: bool = False,
    environ: Mapping[str, str] | None = None,
) -> RerankReport:  # fmt: skip
    """Train a re-ranker over `settings.start.model` as `settings.rerank` says; it ends in `out` with its towers.

    Raises as `run.train` does, and `UsageError` (none) or `InputError` (fewer than 8 that can be read) for held-out
    pairs too few to fit a score on; `UsageError` under torchrun, and for settings that would teach nothing.
    """
    started, folder = time.monotonic(), Path(out)
    if int((environ or {}).get("WORLD_SIZE", "1")) > 1:
        raise UsageError("torchrun", expected="one process for --stage rerank", got="several", do="Start it plainly.")
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    device = pick_device(settings.run.device)
    with ExitStack() as stack:
        stack.enter_context(resources(folder))
        stack.enter_context(claimed(folder, force=force))
        examples = read_examples(
            settings.sources, val_share=settings.data.val_share, seed=settings.run.seed, limit=settings.data.limit
        )
        if not examples.val:
            raise UsageError(
                "held-out pairs", expected="some to fit scores and probabilities on", got="none",
                do="Set data.val_share above 0, or name a validation split.",
            )  # fmt: skip
        directory, name = locate(settings.start.model)
        if not is_checkpoint(directory):
            raise ModelError(str(directory), expected="a checkpoint that mmsearch trained", got="another model")
        settings = replace(settings, rerank=with_start(settings.rerank, towers=settings.start.model))
        if not settings.run.epochs and not settings.rerank.start:
            raise UsageError("run.epochs", expected="1 or more without rerank.start", got="0")
        start = Beginning(load_dual_encoder(directory), (directory / TOKENIZER).read_text("utf-8"), name, known=True)
        bench = Bench(
            settings, folder, watcher or Silent(), Ranks(device), examples, start, skipped=list(examples.skipped)
        )
        begun = (Checkpoint.open(directory).identity.weights, start_identity(settings.rerank))
        digest = "-".join([digest_of(settings, examples, world=1), *(one[:12] for one in begun if one)])
        standing(bench.folder, digest)
        for warning in examples.warnings:
            bench.warn(warning)
        write_pairs(folder / HELD_OUT, examples.val)
        write_json(folder / SETTINGS, settings.to_json())
        return _Job(bench, directory, stack, digest=digest).run(started=started)


class _Job:
    """One run, from towers to report."""

    def __init__(self, bench: Bench, directory: Path, stack: ExitStack, *, digest: str) -> None:
        self.bench, self._directory, self._digest = bench, directory, digest
        self._encoder = Encoder.load(directory, device=str(bench.ranks.device))
        settings, towers = bench.settings, bench.start.model.eval()
        self.passes = TowerPass(
            towers, dtype=pick_precision(settings.run.precision, bench.ranks.device), device=bench.ranks.device
        )
        torch.manual_seed(settings.run.seed)
        self._earlier = earlier_banks(settings.rerank, self._encoder.identity)
        captions = sum(len(pair.captions) for pair in bench.examples.train) + len(self._earlier[0])
        self.model = build_reranker(settings.rerank, bench.start.model, captions=captions).to(bench.ranks.device)
        self.pixels = PixelFeed(
            bench.examples.train, preprocessing=towers.config.preprocessing, tokeniser=bench.start.tokeniser(),
            augmentation=settings.augment, workers=settings.data.workers, on_skip=bench.skip,
            captions=settings.data.captions,
        )  # fmt: skip
        stack.callback(self.pixels.close)

    def run(self, *, started: float) -> RerankReport:
        """All of it."""
        bench, settings = self.bench, self.bench.settings
        teacher = self._teacher()  # first: what is refused is refused before hours of encoding
        bench.watcher.note("encoding the training captions")
        captions = [caption for pair in bench.examples.train for caption in pair.captions]
        text_rows = torch.from_numpy(Texts(captions, self.passes, self.pixels.tokens).rows())
        held, kept_val = self._held_out()
        self._fill_banks(text_rows)
        held.rarity = self._rarity(held)
        wanted = settings.run.views if settings.run.views >= 0 else AUTO_VIEWS * (self.passes.device.type == "cpu")
        wanted *= bool(settings.run.epochs)  # without an epoch nothing is looked at twice
        reader = PictureReader(self.model, self.passes, learning=settings.rerank.image_train, keep=bool(wanted))
        feed = self._feed(reader, views=wanted)
        held.maps = self._encoded(kept_val, reader)
        part = a_part(
            held, pictures=settings.rerank.val_pictures, texts=settings.rerank.val_texts, seed=settings.run.seed
        )
        starts = np.cumsum([0, *(len(pair.captions) for pair in bench.examples.train)]).tolist()
        parts = RerankParts(
            self.model, reader, feed, text_rows, starts, self._validation(part, reader), bench.folder, bench.watcher,
            keep_best=lambda epoch: None, digest=self._digest, teacher=teacher,
            neighbours=self._neighbours(text_rows, starts),
        )  # fmt: skip
        bench.folder.mkdir(parents=True, exist_ok=True)
        trainer = RerankTrainer(settings, bench.examples, parts)
        parts.keep_best = lambda epoch: self._keep(f"epoch-{epoch + 1:04d}")
        resumed = trainer.resume()
        with Journal(bench.out, resume_step=trainer.progress.step if resumed else None) as journal:
            for note in journal.notes:
                bench.watcher.note(note)
            if resumed:
                bench.watcher.note(f"going on at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")
            with fast_depthwise(self.model.image_backbone):
                trainer.run(journal)
        return self._finished(trainer, held, reader, started=started)

    # What it works with

    def _text_rows(self, pairs: Sequence[Pair], *, what: str) -> Tensor:
        captions = [caption for pair in pairs for caption in pair.captions]
        self.bench.watcher.start(len(captions), what=what, unit="texts")
        parts = []
        for start in range(0, len(captions), _TEXTS):
            parts.append(self._encoder.encode_texts(captions[start : start + _TEXTS]))
            self.bench.watcher.advance(len(parts[-1]))
        return torch.from_numpy(np.concatenate(parts))

    def _feed(self, reader: PictureReader, *, views: int) -> Feed:
        bench = self.bench
        if not reader.keeps:
            # Without an epoch nothing is looked at, and nothing need be held.
            held = resident_feed(bench, self.pixels) if bench.settings.run.epochs else None
            return held or self.pixels
        kept = filled_views(
            bench, self.passes, views=1 if bench.settings.augment is None else views, count=reader.count
        )
        if kept is None:
            reader.keeps, self.passes.prefix, self.passes.compiled = False, None, None
            return self.pixels
        return KeptFeed(bench.examples.train, kept, pixels=self.pixels)

    def _held_out(self) -> tuple[HeldOut, np.ndarray]:
        """Rows of the held-out pairs, without maps yet, and the pixels of their pictures."""
        bench, towers = self.bench, self.bench.start.model
        pairs = bench.examples.val
        bench.watcher.start(len(pairs), what="held-out pictures", unit="images")
        size = towers.config.preprocessing.size
        pixels, there = np.zeros((len(pairs), size, size, 3), np.uint8), np.zeros(len(pairs), bool)
        rows = np.zeros((len(pairs), towers.config.dim), np.float32)
        for where, found in self._plain(pairs):
            pixels[where], there[where] = found, True
            rows[where] = self._rows_of(found)
            bench.watcher.advance(len(where))
        kept = np.flatnonzero(there)
        if len(kept) < 8:
            raise InputError(
                "held-out pairs", expected="8 pictures that can be read", got=str(len(kept)), do="Hold out more."
            )
        texts = self._text_rows([pairs[i] for i in kept], what="held-out captions").numpy()
        captions = [caption for i in kept for caption in pairs[i].captions]
        owners = np.repeat(np.arange(len(kept)), [len(pairs[i].captions) for i in kept])
        names = {group: number for number, group in enumerate(dict.fromkeys(pair.group for pair in pairs))}
        groups = np.array([names[pairs[i].group] for i in kept], np.int64)
        nothing = (np.zeros(len(kept)), np.zeros(len(captions)))
        return HeldOut(torch.zeros(0), rows[kept], texts, captions, owners, groups, nothing), pixels[kept]

    def _plain(self, pairs: Sequence[Pair]) -> Any:  # noqa: ANN401 - an iterator of (positions, pixels)
        return plain_pixels(
            [pair.image for pair in pairs], preprocessing=self.bench.start.model.config.preprocessing,
            batch_size=_ENCODE, workers=self.bench.settings.data.workers, on_skip=self.bench.skip,
        )  # fmt: skip

    def _rows_of(self, pixels: np.ndarray) -> np.ndarray:
        """(b, s, s, 3) uint8 -> (b, d) rows as a search has them; zeros where the towers give none."""
        return self._encoder.encode_pixels(pixels, batch_size=_ENCODE)[0]

    def _encoded(self, pixels: np.ndarray, reader: PictureReader) -> Tensor:
        self.bench.watcher.start(len(pixels), what="held-out maps", unit="images")
        parts = []
        for start in range(0, len(pixels), _ENCODE):
            parts.append(reader.kept(torch.from_numpy(pixels[start : start + _ENCODE])))
            self.bench.watcher.advance(len(parts[-1]))
        return torch.cat(parts)

    @torch.no_grad()
    def _fill_banks(self, text_rows: Tensor) -> None:
        """Rows of training captions and pictures, chosen by the seed, then those that what is gone on with has.

        Fewer than asked for are taken several times.
        """
        bench, count = self.bench, self.model.config.bank
        if not count:
            return
        path = bench.folder / f"banks-{self._digest}.npy"
        draw = np.random.default_rng(bench.settings.run.seed)
        texts, pictures = self._earlier
        chosen = text_rows.numpy()[draw.permutation(len(text_rows))]
        self.model.caption_bank.copy_(_filled_up(np.concatenate([chosen, texts]), count))
        pairs = bench.examples.train
        wanted = np.sort(draw.permutation(len(pairs))[: min(count, len(pairs))])
        if path.exists():  # of the run that this one goes on from
            rows = np.load(path)
        else:
            bench.watcher.start(len(wanted), what="picture bank", unit="images")
            rows = np.zeros((len(wanted), self.model.picture_bank.shape[1]), np.float32)
            for where, found in self._plain([pairs[i] for i in wanted]):
                rows[where] = self._rows_of(found)
                bench.watcher.advance(len(where))
            bench.folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft.npy")
            np.save(draft, rows)
            draft.replace(path)
        there = rows[draw.permutation(np.flatnonzero(np.linalg.norm(rows, axis=1) > 0.5))]
        self.model.picture_bank.copy_(_filled_up(np.concatenate([there, pictures]), count))

    def _rarity(self, held: HeldOut) -> tuple[np.ndarray, np.ndarray]:
        captions, pictures = (bank.cpu().numpy() for bank in (self.model.caption_bank, self.model.picture_bank))
        return rarity(held.images, captions), rarity(held.texts, pictures)

    def _validation(self, held: HeldOut, reader: PictureReader) -> RerankValidation:
        wanted = self.bench.settings.rerank
        return RerankValidation(
            held, self.model, read=self._read, reader=reader, depth=wanted.depth, seed=self.bench.settings.run.seed
        )

    @torch.no_grad()
    def _read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.pixels.tokens(captions)
        ids, mask = ids.to(self.passes.device), mask.to(self.passes.device)
        with self.passes.autocast():
            return self.model.words(ids, mask).float(), mask

    def _teacher(self) -> RerankModel | None:
        wanted = self.bench.settings.rerank.teacher
        if not wanted:
            return None
        directory = locate(wanted)[0]
        if not has_reranker(directory):
            raise ModelError(str(directory), expected="a model with a re-ranker as teacher", got="one without")
        opened = RerankCheckpoint.open(directory)
        own = Checkpoint.open(self._directory).identity
        if not opened.towers.identity.same_space(own):
            raise ModelError(str(directory), expected="a teacher over the very same towers", got=opened.towers.name)
        if opened.config.own_backbone or self.model.backbone is not None:
            who = "teacher" if opened.config.own_backbone else "student"
            expected = "teacher and student that read the towers' image backbone"
            raise ModelError(str(directory), expected=expected, got=f"a {who} with one of its own")
        if opened.config.grid != self.model.config.grid or opened.config.text_layer != self.model.config.text_layer:
            raise ModelError(str(directory), expected="the student's grid and text_layer", got="others")
        return load_rerank_model(opened).to(self.passes.device).eval()

    def _neighbours(self, text_rows: Tensor, starts: Sequence[int]) -> np.ndarray | None:
        """Pairs whose captions say nearly the same: by the text tower, which has not seen the pictures."""
        wanted, pairs = self.bench.settings.rerank.mined, self.bench.examples.train
        if not wanted:
            return None
        self.bench.watcher.note("mining hard negatives")
        first = text_rows[torch.tensor(starts[:-1])].numpy()
        return mine(first, first, groups=[pair.group for pair in pairs], count=wanted)

    # Ending

    def _keep(self, name: str, *, final: tuple[Scoring, str, bool] | None = None) -> None:
        """Store towers and re-ranker in OUT/`name`, and let OUT/best be that in one rename."""
        bench = self.bench
        while (bench.out / name).exists():
            name += "-again"
        target = bench.out / name
        copy_towers(self._directory, target)
        scoring, card, graphs = final or (plain_scoring(), "A re-ranker of a run that has not ended.\n", False)
        save_reranker(
            self.model, target, name=bench.out.resolve().name, scoring_json=scoring.to_json(), card=card, graphs=graphs
        )
        show(bench, name)

    def _finished(
        self, trainer: RerankTrainer, held: HeldOut, reader: PictureReader, *, started: float
    ) -> RerankReport:
        bench, progress = self.bench, trainer.progress
        name = f"epoch-{progress.best_epoch + 1:04d}-final"
        validation = self._validation(held, reader)
        bench.watcher.note("measuring the best state on all held-out pairs")
        found = validation.measure(name="re-ranked")
        scoring = with_cutoff(found, held)
        probabilities = scoring.probability(of_picture(found))
        match = found.pairs.match.astype(np.float64)
        matching = evaluate_matching(probabilities, match, clusters=found.pairs.group, model="re-ranked")
        comparison = compare(found.first, found.second)
        card = card_of(bench, self.model, comparison, matching)
        self._keep(name, final=(scoring, card, bench.settings.run.graphs))
        if progress.step:
            draw_curves(bench.out / METRICS, bench.out / CURVES)
        draw_reliability(probabilities, match, bench.out / RELIABILITY, title="held-out pairs")
        report = RerankReport(
            bench.out / BEST, bench.settings.rerank.fusion, parameters=sum(p.numel() for p in self.model.parameters()),
            pairs=len(bench.examples.train), held_out=len(held.images), steps=progress.step,
            best_epoch=progress.best_epoch + 1, comparison=comparison, matching=matching, scoring=scoring,
            warnings=tuple(bench.warnings), skipped=tuple(bench.skipped), seconds=time.monotonic() - started,
        )  # fmt: skip
        write_json(bench.out / REPORT, report.to_json())
        forget(bench.out)
        return report


def _filled_up(rows: np.ndarray, count: int) -> Tensor:
    """(n, d) -> the first `count` of them, from the first on again where there are fewer."""
    return torch.from_numpy(np.resize(rows, (count, rows.shape[1])))
