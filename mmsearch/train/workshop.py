"""From settings and data to everything that a run works with.

Decisions:
- Pictures are kept as outputs of frozen stages where that is wanted, possible and worth it: on a CPU by default, and
  only while one process trains and nothing in front of the cut can change.
- A teacher's rows are made once, of plain pictures: it may be any model that can encode.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmsearch.encoder import Encoder
from mmsearch.towers.image import ImageTower
from mmsearch.towers.stages import stages
from mmsearch.train.anchor_rows import AnchorRows
from mmsearch.train.bench import Bench, keep
from mmsearch.train.encoding import Texts, TowerPass, checkpoint_activations, pick_precision
from mmsearch.train.feed import PixelFeed, plain_pixels
from mmsearch.train.keeping import KeptClasses
from mmsearch.train.losses import Distillation, build_objective
from mmsearch.train.parameters import first_trained_stage
from mmsearch.train.pictures import Feed, KeptFeed, joined_captions
from mmsearch.train.prefix import FrozenBackbone, FrozenPrefix, KeptViews
from mmsearch.train.prefix_graph import compiled_prefix
from mmsearch.train.settings import TrainSettings
from mmsearch.train.step import BatchGradient, StepParts, Taught
from mmsearch.train.trainer import Workshop
from mmsearch.train.validation import Validation

_AUTO_VIEWS = 4
_FILL_BATCH = 64


def workshop_of(bench: Bench, stack: ExitStack) -> Workshop:
    """All of it, ready to run; what has to be closed is left to `stack`. Views that are kept are filled here."""
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
            keep_texts=settings.text.train in ("head", "none"),
        )  # fmt: skip
    gradient = BatchGradient(
        StepParts(
            passes, objective, bench.ranks, bench.examples.train, pixels.tokens, chunk=settings.run.chunk,
            taught=_taught(bench), modality_dropout=settings.objective.modality_dropout,
            kept=_kept_classes(settings, passes),
        )
    )  # fmt: skip
    anchors = AnchorRows(
        passes, prompts=settings.start.anchor_prompts, tokens=pixels.tokens,
        keep_texts=settings.text.train in ("head", "none"),
    )  # fmt: skip
    bench.folder.mkdir(parents=True, exist_ok=True)
    return Workshop(
        passes, feed, gradient, objective, anchors, validation, pixels.tokens, bench.ranks, bench.folder,
        bench.watcher, keep_best=lambda epoch: keep(bench, f"epoch-{epoch + 1:04d}", graphs=False, card=""),
    )  # fmt: skip


def _kept_feed(bench: Bench, passes: TowerPass, pixels: PixelFeed) -> KeptFeed | None:
    """Views kept as outputs of frozen stages, where that is wanted, possible and worth it."""
    settings, model, run = bench.settings, bench.start.model, bench.settings.run
    wanted = run.views if run.views >= 0 else (_AUTO_VIEWS if bench.ranks.device.type == "cpu" else 0)
    count = first_trained_stage(model.image, settings.image)
    if not wanted or not count or settings.image.batch_norm or bench.ranks.world > 1:
        return None
    prefix = _prefix_of(model.image, count)
    size = model.config.preprocessing.size
    model.eval()
    example = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if not prefix.fits(passes.normalised(example).float()):
        bench.warn("views are decoded anew at each step: the image backbone cannot be cut behind its frozen stages")
        return None
    passes.prefix = prefix
    if bench.ranks.device.type == "cpu":
        passes.compiled = compiled_prefix(
            prefix, normalise=model.normalise_pixels, size=size, threads=torch.get_num_threads()
        )
    wanted = 1 if settings.augment is None else wanted
    folder = Path(run.views_folder) if run.views_folder else bench.folder / "views"
    views = KeptViews(
        folder, bench.examples.train, views=wanted,
        made_by=(
            f"{prefix.digest()} {count} {'onnx' if passes.compiled else passes.dtype}",
            model.config.preprocessing,
            settings.augment,
        ),
    )  # fmt: skip
    bench.watcher.note(f"keeping {wanted} views of {len(bench.examples.train)} pictures behind {count} frozen stages")
    bench.watcher.start(wanted * len(bench.examples.train), what="frozen stages", unit="images")
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
    texts = None
    if _keeps_texts(settings):
        captions = [caption for pair in bench.examples.train for caption in pair.captions]
        bench.watcher.note(f"keeping {len(captions)} captions behind the frozen text backbone")
        texts = Texts(captions, passes, pixels.tokens, keep=True)
        texts.pooled()
    return KeptFeed(bench.examples.train, views, pixels=pixels, augmentation=settings.augment, texts=texts)


def _prefix_of(tower: ImageTower, count: int) -> FrozenPrefix:
    whole = count == len(stages(tower.backbone)) and not any(True for _ in tower.pooling.parameters())
    return FrozenBackbone(tower.backbone, tower.pooling) if whole else FrozenPrefix(tower.backbone, count)


def _keeps_texts(settings: TrainSettings) -> bool:
    """The text backbone does not learn and captions come as they are: its features need to be made once only."""
    drops = settings.augment is not None and settings.augment.word_drop > 0
    return settings.text.train in ("head", "none") and not drops


def _kept_classes(settings: TrainSettings, passes: TowerPass) -> KeptClasses | None:
    """Only where there are verdicts to keep and something under them learns."""
    tower, weight = passes.model.image, settings.objective.keep_classes
    learns = first_trained_stage(tower, settings.image) < len(stages(tower.backbone))
    return KeptClasses(passes, weight=weight) if weight and learns and tower.anchors is not None else None


def _taught(bench: Bench) -> Taught | None:
    """The teacher's rows of every training picture and caption, made once."""
    objective, pairs = bench.settings.objective, bench.examples.train
    if not objective.teacher:
        return None
    teacher = Encoder.load(objective.teacher)
    bench.watcher.note(f"encoding {len(pairs)} pictures with the teacher {teacher.identity.name}")
    bench.watcher.start(len(pairs), what="teacher", unit="images")
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
