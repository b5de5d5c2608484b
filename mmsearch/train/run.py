"""`train`: settings and data in, a checkpoint and a report out.

    OUT/best -> epoch-0007/   a whole checkpoint, at any moment; a model's name may be OUT itself
    OUT/metrics.jsonl, tensorboard/, curves.png, settings.json, report.json
    OUT/run/                  what the run needs to go on after an interruption; removed when it has ended

Decisions:
- The table at the end is about the checkpoint as it was stored, read back from disk: half precision and the 8-bit
  token table are part of what is shipped.
- Before and after are measured on the same held-out pairs. They chose the epoch and the share of WiSE-FT, so the
  figures are a little kind; `mmsearch eval --split test` on rows that the run never opened is not.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from mmsearch.encoder import Encoder
from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.comparison import Comparison, compare
from mmsearch.evaluate.report import Evaluation
from mmsearch.towers.checkpoint import load_dual_encoder, save_checkpoint
from mmsearch.towers.locate import BEST
from mmsearch.train.anchor_rows import AnchorRows
from mmsearch.train.averaging import choose_share
from mmsearch.train.card import card_of
from mmsearch.train.curves import draw_curves
from mmsearch.train.distributed import Ranks, ranks_from
from mmsearch.train.encoding import TowerPass, checkpoint_activations, pick_device, pick_precision
from mmsearch.train.examples import Examples, read_examples
from mmsearch.train.feed import PixelFeed, plain_pixels
from mmsearch.train.journal import Journal
from mmsearch.train.losses import Distillation, build_objective
from mmsearch.train.parameters import first_trained_stage
from mmsearch.train.pictures import Feed, KeptFeed, joined_captions
from mmsearch.train.prefix import FrozenPrefix, KeptViews
from mmsearch.train.settings import TrainSettings
from mmsearch.train.setup import Beginning, begin
from mmsearch.train.state import STATE
from mmsearch.train.step import BatchGradient, StepParts, Taught
from mmsearch.train.trainer import Trainer, Watcher, Workshop
from mmsearch.train.validation import Validation, score_of
from mmsearch.types import Skipped

RUN, REPORT, SETTINGS = "run", "report.json", "settings.json"
WISE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_AUTO_VIEWS = 4
_FILL_BATCH = 64


class Silent:
    """Follows a run without a word."""

    def start(self, total: int | None) -> None:
        """Nothing."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """How a run ended. `checkpoint`: the directory of the best model. `share`: of the new weights (WiSE-FT), in [0, 1].

    `comparison`: before and after on the held-out pairs, None without any. `best_epoch` counts from 1.
    """

    checkpoint: Path
    pairs: int
    held_out: int
    steps: int
    epochs: int
    best_epoch: int
    share: float
    comparison: Comparison[Evaluation] | None
    warnings: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "checkpoint": str(self.checkpoint), "pairs": self.pairs, "held_out": self.held_out, "steps": self.steps,
            "epochs": self.epochs, "best_epoch": self.best_epoch, "share": self.share,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "warnings": list(self.warnings), "skipped": len(self.skipped), "seconds": round(self.seconds, 1),
        }  # fmt: skip


@dataclass(slots=True)
class _Bench:
    """What is at hand while a run is set up."""

    settings: TrainSettings
    out: Path
    watcher: Watcher
    ranks: Ranks
    examples: Examples
    start: Beginning
    warnings: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the state of the run is."""
        return self.out / RUN

    def warn(self, text: str) -> None:
        """Tell now, and again in the report."""
        self.warnings.append(text)
        if self.ranks.is_main:
            self.watcher.note(f"warning: {text}")

    def skip(self, skipped: Skipped) -> None:
        """A picture that cannot be used."""
        self.skipped.append(skipped)
        self.watcher.note(f"skipped {skipped.path}: {skipped.reason} {skipped.detail}")


def train(
    settings: TrainSettings,
    out: str | os.PathLike[str],
    *,
    watcher: Watcher | None = None,
    force: bool = False,
    environ: Mapping[str, str] | None = None,
) -> TrainReport:
    """Train as `settings` say and leave the best checkpoint in `out`; an interrupted run with the same settings goes on.

    `force` starts anew whatever is in `out`. `environ`: where torchrun's variables are looked up; none by default.
    Raises `InputError` and `UsageError` for data and settings that cannot mean anything (before any training),
    `ModelError` when the loss stops being a number, `ResourceError` when disk or memory run out.
    """
    started = time.monotonic()
    folder = Path(out)
    device = pick_device(settings.run.device)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    with ExitStack() as stack:
        ranks = stack.enter_context(ranks_from(environ or {}, device=device.type if device.index is None else str(device)))
        if ranks.is_main:
            stack.enter_context(_claimed(folder, force=force))
        examples = read_examples(
            settings.sources, val_share=settings.data.val_share, seed=settings.run.seed, limit=settings.data.limit
        )
        start = begin(settings.start, seed=settings.run.seed)
        bench = _Bench(settings, folder, watcher or Silent(), ranks, examples, start, skipped=list(examples.skipped))
        for warning in (*examples.warnings, *_about(settings, examples)):
            bench.warn(warning)
        if ranks.is_main:
            _write_json(folder / SETTINGS, settings.to_json())
        return _trained(bench, stack, started=started)


def _trained(bench: _Bench, stack: ExitStack, *, started: float) -> TrainReport:
    settings, model = bench.settings, bench.start.model
    for side in ("text", "image"):
        if rank := getattr(settings, side).lora:
            from mmsearch.train.lora import add_lora  # brings peft

            add_lora(model, side=side, rank=rank)
    shop = _workshop(bench, stack)
    trainer = Trainer(settings, bench.examples, shop)
    before = trainer.measure(name="before") if not bench.start.known else _first(bench, shop)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    bench.ranks.broadcast_state(model)
    resumed = trainer.resume()
    if resumed:
        bench.watcher.note(f"going on at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")
    journal = None
    if bench.ranks.is_main:
        journal = stack.enter_context(Journal(bench.out, resume_step=trainer.progress.step if resumed else None))
        for note in journal.notes:
            bench.watcher.note(note)
        if before is not None and not resumed:
            journal.log(0, {f"val/{way}/hit@{k}": v[f"hit@{k}"] for way, v in _ways(before) for k in (1, 5, 10)})
    trainer.run(journal)
    share = _wise(bench, trainer, shop, initial) if bench.ranks.is_main else 1.0
    return _finished(bench, trainer, shop, before=before, share=share, started=started)


def _first(bench: _Bench, shop: Workshop) -> Evaluation | None:
    """The model as it was given, its anchors' rows too."""
    if shop.validation is None or not bench.ranks.is_main:
        return None
    bench.watcher.note(f"measuring {bench.start.name} on {len(shop.validation)} held-out pictures")
    return shop.validation.evaluate(name=bench.start.name)


def _ways(found: Evaluation) -> list[tuple[str, Mapping[str, float]]]:
    return [("text_to_image", found.text_to_image.values), ("image_to_text", found.image_to_text.values)]


# Setting up


def _workshop(bench: _Bench, stack: ExitStack) -> Workshop:
    settings, model, start = bench.settings, bench.start.model, bench.start
    device = bench.ranks.device
    dtype = pick_precision(settings.run.precision, device)
    if settings.run.checkpointing and (unable := checkpoint_activations(model)):
        bench.warn(f"activation checkpointing is not known to the {' and '.join(unable)} backbone")
    passes = TowerPass(model, dtype=dtype, device=device, feature_dropout=settings.run.feature_dropout)
    tokeniser = start.tokeniser()
    pixels = PixelFeed(
        bench.examples.train, preprocessing=model.config.preprocessing, tokeniser=tokeniser,
        augmentation=settings.augment, workers=settings.data.workers, on_skip=bench.skip,
    )  # fmt: skip
    stack.callback(pixels.close)
    feed: Feed = _kept_feed(bench, passes, pixels) or pixels
    objective = build_objective(
        settings.objective.name, smoothing=settings.objective.smoothing, margin=settings.objective.margin,
        matryoshka_dims=(*settings.objective.matryoshka, model.config.dim) if settings.objective.matryoshka else (),
    ).to(device)  # fmt: skip
    if not start.known and objective.start_logit_scale is not None:
        nn.init.constant_(model.log_logit_scale, float(np.log(objective.start_logit_scale)))
    validation = None
    if bench.examples.val:
        validation = Validation(
            bench.examples.val, passes=passes, tokens=pixels.tokens, preprocessing=model.config.preprocessing,
            workers=settings.data.workers, on_skip=bench.skip,
        )  # fmt: skip
    gradient = BatchGradient(
        StepParts(
            passes, objective, bench.ranks, bench.examples.train, pixels.tokens, chunk=settings.run.chunk,
            taught=_taught(bench), modality_dropout=settings.objective.modality_dropout,
        )
    )  # fmt: skip
    anchors = AnchorRows(passes, prompts=settings.start.anchor_prompts, tokens=pixels.tokens)
    bench.folder.mkdir(parents=True, exist_ok=True)
    return Workshop(
        passes, feed, gradient, objective, anchors, validation, pixels.tokens, bench.ranks, bench.folder,
        bench.watcher, keep_best=lambda epoch: _keep(bench, f"epoch-{epoch + 1:04d}", graphs=False, card=""),
    )  # fmt: skip


def _kept_feed(bench: _Bench, passes: TowerPass, pixels: PixelFeed) -> KeptFeed | None:
    """Views kept as outputs of frozen stages, where that is wanted, possible and worth it."""
    settings, model, run = bench.settings, bench.start.model, bench.settings.run
    wanted = run.views if run.views >= 0 else (_AUTO_VIEWS if bench.ranks.device.type == "cpu" else 0)
    count = first_trained_stage(model.image, settings.image)
    if not wanted or not count or settings.image.batch_norm or bench.ranks.world > 1:
        return None
    prefix = FrozenPrefix(model.image.backbone, count)
    size = model.config.preprocessing.size
    model.eval()
    example = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if not prefix.fits(passes.normalised(example).float()):
        bench.warn("views are decoded anew at each step: the image backbone cannot be cut behind its frozen stages")
        return None
    passes.prefix = prefix
    wanted = 1 if settings.augment is None else wanted
    folder = Path(run.views_folder) if run.views_folder else bench.folder / "views"
    views = KeptViews(
        folder, bench.examples.train, views=wanted,
        made_by=(f"{prefix.digest()} {passes.dtype} {count}", model.config.preprocessing, settings.augment),
    )  # fmt: skip
    bench.watcher.note(f"keeping {wanted} views of {len(bench.examples.train)} pictures behind {count} frozen stages")
    bench.watcher.start(wanted * len(bench.examples.train))
    filler = PixelFeed(
        joined_captions(bench.examples.train), preprocessing=model.config.preprocessing,
        tokeniser=bench.start.tokeniser(), augmentation=settings.augment, workers=settings.data.workers,
        on_skip=bench.skip,
    )  # fmt: skip
    shape = tuple(passes.prefix_outputs(example).shape[1:])
    with filler:
        views.fill(
            filler.batches, shape=shape, batch_size=_FILL_BATCH, encode=passes.prefix_outputs,
            advance=bench.watcher.advance,
        )  # fmt: skip
    return KeptFeed(bench.examples.train, views, pixels=pixels, augmentation=settings.augment)


def _taught(bench: _Bench) -> Taught | None:
    """The teacher's rows of every training picture and caption, made once."""
    objective, pairs = bench.settings.objective, bench.examples.train
    if not objective.teacher:
        return None
    teacher = Encoder.load(None if objective.teacher == "bundled" else objective.teacher)
    bench.watcher.note(f"encoding {len(pairs)} pictures with the teacher {teacher.identity.name}")
    bench.watcher.start(len(pairs))
    images = np.zeros((len(pairs), teacher.dim), np.float32)
    images[:, 0] = 1.0  # of a picture that cannot be read: it is never drawn
    for where, pixels in plain_pixels(
        [pair.image for pair in pairs], preprocessing=teacher.source.preprocessing, batch_size=_FILL_BATCH,
        workers=bench.settings.data.workers, on_skip=lambda skipped: None,
    ):  # fmt: skip
        rows, ok = teacher.encode_pixels(pixels)
        images[where[ok]] = rows[ok]
        bench.watcher.advance(len(where))
    texts = teacher.encode_texts([caption for pair in pairs for caption in pair.captions])
    starts = np.cumsum([0, *(len(pair.captions) for pair in pairs)])[:-1]
    loss = Distillation(objective.teacher_weight, objective.teacher_scale)
    return Taught(loss, torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(starts))


def _about(settings: TrainSettings, examples: Examples) -> list[str]:
    """What is allowed and likely to disappoint."""
    notes = []
    if len(examples.train) < settings.run.batch_size:
        notes.append(
            f"a batch of {settings.run.batch_size} is more than the {len(examples.train)} training pairs: "
            "each epoch is one smaller batch"
        )
    return notes


# Ending


def _wise(bench: _Bench, trainer: Trainer, shop: Workshop, initial: Mapping[str, Tensor]) -> float:
    """Leave the model at the best point between before and after; 1 where there is nothing to choose with."""
    if not bench.settings.run.wise or not bench.start.known or shop.validation is None:
        return 1.0
    validation = shop.validation
    after = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    bench.watcher.note("weighing the weights before and after (WiSE-FT)")
    share, scores = choose_share(
        trainer.model, initial, after, shares=WISE_SHARES, refresh=shop.anchors.refresh,
        evaluate=lambda: score_of(validation.evaluate(name="mixed")),
    )  # fmt: skip
    told = ", ".join(f"{one:g}: {100 * score:.1f}" for one, score in scores)
    bench.watcher.note(f"share of the new weights {share:g} (mean hit@1/5/10 by share: {told})")
    return share


def _finished(
    bench: _Bench, trainer: Trainer, shop: Workshop, *, before: Evaluation | None, share: float, started: float
) -> TrainReport:
    progress, warnings = trainer.progress, bench.warnings
    checkpoint, comparison = bench.out / BEST, None
    if bench.ranks.is_main:
        if bench.settings.text.lora or bench.settings.image.lora:
            from mmsearch.train.lora import merge_lora

            merge_lora(trainer.model)
        shop.anchors.refresh()
        bench.watcher.note("writing the checkpoint")
        _keep(bench, f"epoch-{progress.best_epoch + 1:04d}-final", graphs=True, card="")
        if shop.validation is not None and before is not None:
            after = _stored(bench, shop.validation)
            comparison = compare(before, after)
            if share == 0.0:
                bench.warn("no share of the new weights was better than the model before: it was kept as it was")
        card = card_of(bench.settings, bench.examples, comparison, start=bench.start.name, share=share)
        (bench.out / BEST / "README.md").write_text(card, "utf-8")
        draw_curves(bench.out / "metrics.jsonl", bench.out / "curves.png")
    report = TrainReport(
        checkpoint, pairs=len(bench.examples.train), held_out=len(bench.examples.val), steps=progress.step,
        epochs=progress.epoch, best_epoch=progress.best_epoch + 1, share=share, comparison=comparison,
        warnings=tuple(warnings), skipped=tuple(bench.skipped), seconds=time.monotonic() - started,
    )  # fmt: skip
    if bench.ranks.is_main:
        _write_json(bench.out / REPORT, report.to_json())
        shutil.rmtree(bench.folder, ignore_errors=True)
    return report


def _stored(bench: _Bench, validation: Validation) -> Evaluation:
    """The checkpoint as it lies on disk, measured: its weights are put into the model that was trained."""
    stored = load_dual_encoder(bench.out / BEST)
    bench.start.model.load_state_dict(stored.state_dict())
    return validation.evaluate(name="after")


def _keep(bench: _Bench, name: str, *, graphs: bool, card: str) -> None:
    """Store the model as it is now in OUT/`name` and let OUT/best be that, in one rename; older ones are removed."""
    model = bench.start.model
    plain = _without_adapters(bench, model)
    save_checkpoint(
        plain, bench.out / name, tokenizer_json=bench.start.tokenizer_json, name=bench.out.resolve().name,
        card=card or "A checkpoint of a run that has not ended.\n", graphs=graphs,
    )  # fmt: skip
    draft = bench.out / f".{BEST}.draft"
    draft.unlink(missing_ok=True)
    draft.symlink_to(name, target_is_directory=True)
    draft.replace(bench.out / BEST)
    for old in bench.out.glob("epoch-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def _without_adapters(bench: _Bench, model: Any) -> Any:  # noqa: ANN401 - a dual encoder, with adapters or without
    if not (bench.settings.text.lora or bench.settings.image.lora) or bench.start.model is not model:
        return model
    import copy

    from mmsearch.train.lora import merge_lora

    copied = copy.deepcopy(model)
    merge_lora(copied)
    return copied


def _claimed(folder: Path, *, force: bool) -> Any:  # noqa: ANN401 - a lock that is a context manager
    """The folder, made and held by this run alone; `UsageError` when a run has ended in it already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(folder), expected="a folder to write to", got=error.strerror or str(error)) from error
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(str(folder), expected="a folder of its own", got="one that another run writes to") from error
    ended = (folder / REPORT).exists() and not (folder / RUN / STATE).exists()
    if ended and not force:
        lock.release()
        raise UsageError(
            str(folder), expected="an empty folder, or a run to go on with", got="a run that has ended",
            do="Choose another --out, or add --force.",
        )  # fmt: skip
    if force:
        shutil.rmtree(folder / RUN, ignore_errors=True)
        (folder / REPORT).unlink(missing_ok=True)
    return lock


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    draft.replace(path)

