"""From settings and data to everything that a run works with.

Decisions:
- Pictures are kept as outputs of frozen stages where that is wanted, possible and worth it: on a CPU by default, and
  only while one process trains and nothing in front of the cut can change.
- On a GPU all pictures are held in its memory where they fit (`resident`); else they are decoded at each step.
- A teacher's rows are made once, of plain pictures: it may be any model that can encode.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmsearch.encoder import Encoder
from mmsearch.errors import ResourceError, UsageError
from mmsearch.towers.image import ImageTower
from mmsearch.towers.stages import stages
from mmsearch.train.anchor_rows import AnchorRows, spoken
from mmsearch.train.batches import Draw
from mmsearch.train.bench import Bench, keep
from mmsearch.train.encoding import Texts, TowerPass, checkpoint_activations, pick_precision
from mmsearch.train.feed import PixelFeed, plain_pixels
from mmsearch.train.keeping import KeptClasses, KeptNames
from mmsearch.train.losses import Distillation, build_objective
from mmsearch.train.objective import Objective
from mmsearch.train.parameters import first_trained_stage
from mmsearch.train.pictures import Feed, KeptFeed, joined_captions
from mmsearch.train.prefix import FrozenBackbone, FrozenPrefix, KeptViews
from mmsearch.train.prefix_graph import compiled_prefix
from mmsearch.train.resident import Canvases, ResidentFeed, canvas_of
from mmsearch.train.settings import TrainSettings
from mmsearch.train.step import BatchGradient, StepParts, Taught, Tokens
from mmsearch.train.trainer import Workshop
from mmsearch.train.validation import Validation

AUTO_VIEWS = 4
_RESIDENT_SHARE = 0.4
"""Of a GPU's memory that pictures may take; the rest is for the step."""
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
        captions=settings.data.captions,
    )  # fmt: skip
    stack.callback(pixels.close)
    objective = _objective(settings, dim=model.config.dim).to(device)
    anchors = AnchorRows(
        passes, prompts=settings.start.anchor_prompts, tokens=pixels.tokens,
        keep_texts=settings.text.train in ("head", "none"),
    )  # fmt: skip
    names = _names(settings, model.image)
    taught = _taught(bench)
    # Last: what is refused is refused before hours of it.
    feed: Feed = _kept_feed(bench, passes, pixels) or resident_feed(bench, pixels) or pixels
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
            taught=taught, modality_dropout=settings.objective.modality_dropout,
            kept=_kept(settings, passes, pixels.tokens, names=names),
        )
    )  # fmt: skip
    bench.folder.mkdir(parents=True, exist_ok=True)
    return Workshop(
        passes, feed, gradient, objective, anchors, validation, pixels.tokens, bench.ranks, bench.folder,
        bench.watcher, keep_best=lambda epoch: keep(bench, f"epoch-{epoch + 1:04d}", graphs=False, card=""),
    )  # fmt: skip


def _objective(settings: TrainSettings, *, dim: int) -> Objective:
    """The loss over rows of `dim` numbers; `UsageError` for a shorter dimension that is none."""
    wanted, dims = settings.objective, tuple(settings.objective.matryoshka)
    if dims and max(dims) > dim:
        raise UsageError("objective.matryoshka", expected=f"dimensions below {dim}", got=str(max(dims)))
    dims = (*(one for one in dims if one != dim), dim) if dims else ()
    return build_objective(wanted.name, smoothing=wanted.smoothing, margin=wanted.margin, matryoshka_dims=dims)


def _kept_feed(bench: Bench, passes: TowerPass, pixels: PixelFeed) -> KeptFeed | None:
    """Views kept as outputs of frozen stages, where that is wanted, possible and worth it."""
    settings, model, pairs = bench.settings, bench.start.model, bench.examples.train
    wanted = settings.run.views if settings.run.views >= 0 else (AUTO_VIEWS if passes.device.type == "cpu" else 0)
    count = first_trained_stage(model.image, settings.image)
    hindrance = (
        "no first stage of the image backbone is frozen" if not count
        else "batch-norm statistics are updated" if settings.image.batch_norm
        else "several processes train" if bench.ranks.world > 1
        else ""
    )  # fmt: skip
    if not wanted or hindrance:
        if settings.run.views > 0:
            bench.warn(f"run.views is not used, pictures are decoded anew at each step: {hindrance}")
        return None
    model.eval()
    if not _cut(bench, passes, count=count):
        return None
    views = filled_views(bench, passes, views=1 if settings.augment is None else wanted, count=count)
    if views is None:
        passes.prefix = passes.compiled = None
        return None
    texts = None
    if _keeps_texts(settings):
        captions = [caption for pair in pairs for caption in pair.captions]
        bench.watcher.note(f"keeping {len(captions)} captions behind the frozen text backbone")
        texts = Texts(captions, passes, pixels.tokens, keep=True)
        texts.pooled()
    return KeptFeed(pairs, views, pixels=pixels, texts=texts)


def resident_feed(bench: Bench, pixels: PixelFeed) -> ResidentFeed | None:
    """Pictures held by the GPU, where it has the room and can make the views that are wanted; else a note says why not.

    Its whole memory decides, not what is free at the moment: a run that is gone on with must see the same views.
    """
    settings, model, pairs = bench.settings, bench.start.model, bench.examples.train
    if not settings.run.resident or bench.ranks.device.type != "cuda":
        return None
    wanted = canvas_of(model.config.preprocessing, settings.augment)
    total = torch.cuda.get_device_properties(bench.ranks.device).total_memory
    needed = 0 if wanted is None else len(pairs) * wanted.size**2 * 3
    fits = float(wanted is not None and needed <= _RESIDENT_SHARE * total)
    if wanted is None or not bench.ranks.least(fits):
        why = (
            "views of them cannot be made there"
            if wanted is None
            else f"they would take {needed / 2**30:.1f} GiB of it"
        )
        bench.watcher.note(f"pictures are decoded at each step, not held in the GPU's memory: {why}")
        return None
    bench.watcher.note(f"holding {len(pairs)} pictures of {wanted.size} x {wanted.size} in the GPU's memory")
    bench.watcher.start(len(pairs), what="pictures", unit="images")
    filler = PixelFeed(
        pairs, preprocessing=wanted, tokeniser=bench.start.tokeniser(), augmentation=None,
        workers=settings.data.workers, on_skip=bench.skip,
    )  # fmt: skip
    with filler:
        held = Canvases.filled(
            filler.batches, count=len(pairs), size=wanted.size, batch_size=_FILL_BATCH, device=bench.ranks.device,
            advance=bench.watcher.advance,
        )  # fmt: skip
    return ResidentFeed(held, pixels=pixels, augmentation=settings.augment, size=model.config.preprocessing.size)


def example_pixels(size: int) -> Tensor:
    """(2, size, size, 3) uint8, the same each time: to look at shapes with."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=draw)


def _cut(bench: Bench, passes: TowerPass, *, count: int) -> bool:
    """Let `passes` take up behind the first `count` stages, if the backbone allows it; else a warning says why not."""
    model = passes.model
    prefix, size = _prefix_of(model.image, count), model.config.preprocessing.size
    # What is computed again in the backward pass would be computed in one piece, from outputs taken for pictures.
    again = bench.settings.run.checkpointing and not prefix.pools
    if again or not prefix.fits(passes.normalised(example_pixels(size)).float()):
        why = "activation checkpointing is on" if again else "the image backbone cannot be cut behind its frozen stages"
        bench.warn(f"views are decoded anew at each step: {why}")
        return False
    passes.prefix = prefix
    if passes.device.type == "cpu":
        threads = torch.get_num_threads()
        passes.compiled = compiled_prefix(prefix, normalise=model.normalise_pixels, size=size, threads=threads)
    return True


def filled_views(bench: Bench, passes: TowerPass, *, views: int, count: int) -> KeptViews | None:
    """The views, all made; None, with a warning, where nobody asked for them and the disk is too small."""
    settings, pairs, preprocessing = bench.settings, bench.examples.train, passes.model.config.preprocessing
    assert passes.prefix is not None  # for the type checker
    made_by = f"{passes.prefix.digest()} {count} {'onnx' if passes.compiled else passes.dtype}"
    folder = Path(settings.run.views_folder) if settings.run.views_folder else bench.folder / "views"
    kept = KeptViews(folder, pairs, views=views, made_by=(made_by, preprocessing, settings.augment))
    bench.watcher.note(f"keeping {views} views of {len(pairs)} pictures behind {count} frozen stages")
    bench.watcher.start(views * len(pairs), what="frozen stages", unit="images")
    filler = PixelFeed(
        joined_captions(pairs), preprocessing=preprocessing, tokeniser=bench.start.tokeniser(),
        augmentation=settings.augment, workers=settings.data.workers, on_skip=bench.skip,
    )  # fmt: skip
    shape = tuple(passes.prefix_outputs(example_pixels(preprocessing.size)).shape[1:])
    with filler:
        try:
            kept.fill(
                filler.batches, shape=shape, batch_size=_FILL_BATCH, encode=passes.prefix_outputs,
                advance=bench.watcher.advance,
            )  # fmt: skip
        except ResourceError as error:
            if settings.run.views > 0:
                raise
            bench.warn(f"views are decoded anew at each step: {error}")
            return None
        # Pictures that an interrupted run, or one before, found unfit are told of again.
        for _ in filler.batches([[Draw(row, 0, 0) for row in sorted(kept.unfit)]]):
            pass
    return kept


def _prefix_of(tower: ImageTower, count: int) -> FrozenPrefix:
    whole = count == len(stages(tower.backbone)) and not any(True for _ in tower.pooling.parameters())
    return FrozenBackbone(tower.backbone, tower.pooling) if whole else FrozenPrefix(tower.backbone, count)


def _keeps_texts(settings: TrainSettings) -> bool:
    """The text backbone does not learn and captions come as they are: its features need to be made once only."""
    drops = settings.augment is not None and settings.augment.word_drop > 0
    return settings.text.train in ("head", "none") and not drops


def _names(settings: TrainSettings, tower: ImageTower) -> list[str]:
    """The usual name of each class where names are to be kept; `UsageError` where there are none to keep."""
    if not settings.objective.keep_names:
        return []
    classes = 0 if tower.anchors is None else len(tower.anchors.names)
    names, _ = (
        spoken(settings.start.anchor_prompts, classes=classes, synonyms=1, template="{}") if classes else ([], [])
    )
    if not names:
        got = f"{classes} classes without names" if classes else "a model without anchors"
        raise UsageError(
            "objective.keep_names", expected="0, or class-name anchors whose names are known", got=got,
            do="Name them with start.anchor_prompts." if classes else "",
        )  # fmt: skip
    return names


def _kept(
    settings: TrainSettings, passes: TowerPass, tokens: Tokens, *, names: Sequence[str]
) -> list[KeptClasses | KeptNames]:  # fmt: skip
    """Verdicts, where there are any and something under them learns, and `names`."""
    tower, objective, chunk = passes.model.image, settings.objective, settings.run.chunk
    learns = first_trained_stage(tower, settings.image) < len(stages(tower.backbone))
    kept: list[KeptClasses | KeptNames] = []
    if objective.keep_classes and learns and tower.anchors is not None:
        kept.append(KeptClasses(passes, weight=objective.keep_classes, chunk=chunk))
    if names:
        kept.append(
            KeptNames(
                passes, names=names, tokens=tokens, weight=objective.keep_names, chunk=chunk, whole=not learns,
                heads_only=settings.text.train in ("head", "none"),
            )
        )  # fmt: skip
    return kept


def _taught(bench: Bench) -> Taught | None:
    """The teacher's rows of every training picture and caption, made once."""
    objective, pairs = bench.settings.objective, bench.examples.train
    if not objective.teacher:
        return None
    teacher = Encoder.load(objective.teacher, device=str(bench.ranks.device))
    bench.watcher.note(f"encoding {len(pairs)} pictures with the teacher {teacher.identity.name}")
    bench.watcher.start(len(pairs), what="teacher", unit="images")
    images = np.zeros((len(pairs), teacher.dim), np.float32)
    images[:, 0] = 1.0  # of a picture that cannot be read: it is never drawn
    for where, pixels in plain_pixels(
        [pair.image for pair in pairs], preprocessing=teacher.preprocessing, batch_size=_FILL_BATCH,
        workers=bench.settings.data.workers, on_skip=lambda skipped: None,
    ):  # fmt: skip
        rows, ok = teacher.encode_pixels(pixels)
        images[where[ok]] = rows[ok]
        bench.watcher.advance(len(where))
    texts = teacher.encode_texts([caption for pair in pairs for caption in pair.captions])
    starts = np.cumsum([0, *(len(pair.captions) for pair in pairs)])[:-1]
    loss = Distillation(objective.teacher_weight, objective.teacher_scale)
    return Taught(loss, torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(starts))
