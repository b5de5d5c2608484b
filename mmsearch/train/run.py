"""`train`: settings and data in, a checkpoint and a report out.

    OUT/best -> epoch-0007/   a whole checkpoint, at any moment; a model's name may be OUT itself
    OUT/held_out.jsonl        the pairs that were held out, for `mmsearch eval`
    OUT/metrics.jsonl, tensorboard/, curves.png, settings.json, report.json
    OUT/run/                  what the run needs to go on after an interruption; removed when it has ended

Decisions:
- The table at the end is about the checkpoint as it was stored, read back from disk: half precision and the 8-bit
  token table are part of what is shipped.
- Before and after are measured on the same held-out pairs. They chose the epoch and the share of WiSE-FT, so the
  figures are a little kind; `mmsearch eval --split test` on rows that the run never opened is not.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from mmsearch.errors import InputError, ResourceError, UsageError
from mmsearch.evaluate.comparison import Comparison, compare
from mmsearch.evaluate.report import Evaluation
from mmsearch.towers.checkpoint import load_dual_encoder
from mmsearch.towers.locate import BEST
from mmsearch.train.averaging import choose_share
from mmsearch.train.bench import RUN, Bench, Silent, keep_final
from mmsearch.train.card import card_of
from mmsearch.train.curves import CURVES, draw_curves
from mmsearch.train.distributed import ranks_from
from mmsearch.train.encoding import TowerPass, pick_device
from mmsearch.train.examples import Examples, read_examples
from mmsearch.train.item_validation import ItemHits, item_texts
from mmsearch.train.journal import METRICS, Journal
from mmsearch.train.lora import add_lora, merge_lora, plain_state
from mmsearch.train.settings import TrainSettings
from mmsearch.train.setup import Beginning, begin, set_anchors, speaks_of_anchors
from mmsearch.train.state import STATE
from mmsearch.train.trainer import Trainer, Watcher, Workshop, digest_of, standing
from mmsearch.train.validation import Validation, score_of
from mmsearch.train.workshop import workshop_of
from mmsearch.types import Pair, Skipped

REPORT, SETTINGS, HELD_OUT = "report.json", "settings.json", "held_out.jsonl"
ITEM_WEIGHTS = "item."
"""Where the names of an item head's weights begin, in the state of the towers."""
_SHARED = "Let all nodes see one --out folder."


@dataclass(frozen=True, slots=True)
class TrainReport:
    """How a run ended. `checkpoint`: the directory of the best model. `share`: of the new weights (WiSE-FT), in [0, 1].

    `comparison`: before and after on the held-out pairs, None without any. `best_epoch` counts from 1. `items`: how
    texts find the held-out items in each form; None without an item head, or without pairs that say it in two ways.
    """

    checkpoint: Path
    pairs: int
    held_out: int
    steps: int
    epochs: int
    best_epoch: int
    share: float
    comparison: Comparison[Evaluation] | None
    items: ItemHits | None = None
    warnings: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "checkpoint": str(self.checkpoint), "pairs": self.pairs, "held_out": self.held_out, "steps": self.steps,
            "epochs": self.epochs, "best_epoch": self.best_epoch, "share": self.share,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "items": None if self.items is None else {form: dict(shares) for form, shares in self.items.items()},
            "warnings": list(self.warnings), "skipped": len(self.skipped), "seconds": round(self.seconds, 1),
        }  # fmt: skip


def train(
    settings: TrainSettings,
    out: str | os.PathLike[str],
    *,
    watcher: Watcher | None = None,
    force: bool = False,
    environ: Mapping[str, str] | None = None,
) -> TrainReport:
    """Train as `settings` say; the best checkpoint ends in `out`. An interrupted run with the same settings goes on.

    `force` starts anew whatever is in `out`. `environ`: where torchrun's variables are looked up; none by default.
    Raises `InputError` and `UsageError` for data and settings that cannot mean anything (before any training),
    `ModelError` when the loss stops being a number, `ResourceError` when disk or memory run out.
    """
    if not settings.run.epochs:
        raise UsageError("run.epochs", expected="1 or more", got="0", do="0 only fits the scores of --stage rerank.")
    started = time.monotonic()
    folder = Path(out)
    device = pick_device(settings.run.device)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    with ExitStack() as stack:
        stack.enter_context(resources(folder))
        ranks = stack.enter_context(ranks_from(environ or {}, device=str(device)))
        if ranks.is_main:
            stack.enter_context(claimed(folder, force=force))
        else:
            watcher = None  # one rank talks
        ranks.from_main(0.0)  # nobody reads the folder before it is claimed and, with `force`, emptied
        examples = read_examples(
            settings.sources, val_share=settings.data.val_share, seed=settings.run.seed, limit=settings.data.limit
        )
        start = begin(settings.start, seed=settings.run.seed)
        _check_ranks(settings, examples, world=ranks.world)
        bench = Bench(settings, folder, watcher or Silent(), ranks, examples, start, skipped=list(examples.skipped))
        standing(bench.folder, digest_of(settings, examples, world=ranks.world))  # refused before anything is changed
        for warning in (*examples.warnings, *_about(settings, examples, start)):
            bench.warn(warning)
        if ranks.is_main:
            write_pairs(folder / HELD_OUT, examples.val)
            write_json(folder / SETTINGS, settings.to_json())
        return _trained(bench, stack, started=started)


def _trained(bench: Bench, stack: ExitStack, *, started: float) -> TrainReport:
    settings, model = bench.settings, bench.start.model
    for side in ("text", "image"):
        if rank := getattr(settings, side).lora:
            last = getattr(settings, side).train
            add_lora(model, side=side, rank=rank, last=last if isinstance(last, int) else None)
    shop = workshop_of(bench, stack)
    before = _first(bench, shop)
    set_anchors(model, settings.start)
    trainer = Trainer(settings, bench.examples, shop)  # its average begins with what the model is now
    initial = {name: value.clone() for name, value in plain_state(model).items()}
    bench.ranks.broadcast_state(model)
    resumed = trainer.resume()
    if trainer.progress.step != bench.ranks.from_main(trainer.progress.step):
        raise InputError(str(bench.folder), expected="the same state on every rank", got="another step", do=_SHARED)
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
    merge_lora(model)  # from here on weights are plain, before and after alike
    share = _wise(bench, trainer, shop, initial) if bench.ranks.is_main else 1.0
    return _finished(bench, trainer, shop, before=before, share=share, started=started)


def _first(bench: Bench, shop: Workshop) -> Evaluation | None:
    """The model as it was given, its anchors' rows too; of one that is built anew they are said first."""
    if shop.validation is None or not bench.ranks.is_main:
        return None
    if not bench.start.known:
        shop.anchors.refresh()
    bench.watcher.note(f"measuring {bench.start.name} on {len(shop.validation)} held-out pictures")
    return shop.validation.evaluate(name=bench.start.name if bench.start.known else "before")


def _ways(found: Evaluation) -> list[tuple[str, Mapping[str, float]]]:
    return [("text_to_image", found.text_to_image.values), ("image_to_text", found.image_to_text.values)]


def _check_ranks(settings: TrainSettings, examples: Examples, *, world: int) -> None:
    """Each process needs a picture of every batch: a batch that one has none of teaches nothing."""
    draws = Counter[int]()
    for origin, repeat in zip(examples.origins, examples.repeats, strict=True):
        draws[0 if settings.data.mixed else origin] += repeat
    most = min(settings.run.batch_size, *draws.values())
    if world > most:
        raise UsageError(
            "torchrun", expected=f"at most {most} processes for batches of {most}", got=str(world), do="Start fewer."
        )


def _about(settings: TrainSettings, examples: Examples, start: Beginning) -> list[str]:
    """What is allowed and likely to disappoint."""
    notes = []
    if len(examples.train) < settings.run.batch_size:
        notes.append(
            f"a batch of {settings.run.batch_size} is more than the {len(examples.train)} training pairs: "
            "each epoch is one smaller batch"
        )
    if start.model.item is not None and not item_texts(examples.train):
        notes.append(
            "no training picture has a second caption in other words, and an item's text is never its own query: "
            "the item head learns from pictures alone"
        )
    if not settings.start.model and not settings.start.image_weights and settings.image.train != "all":
        notes.append(
            "the image backbone begins with random numbers, and some of it stays so: "
            "set image.train=all and image.rate=1"
        )
    return notes


# Ending


def _wise(bench: Bench, trainer: Trainer, shop: Workshop, initial: Mapping[str, Tensor]) -> float:
    """Leave the model at the best point between before and after; 1 where there is nothing to choose with."""
    if not bench.settings.run.wise or not bench.start.known or shop.validation is None:
        return 1.0
    validation = shop.validation
    after = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    # Text -> image and image -> text say nothing of how a picture and a text are joined: that stays as it was learnt.
    before = {name: after[name] if name.startswith(ITEM_WEIGHTS) else value for name, value in initial.items()}
    bench.watcher.note("weighing the weights before and after (WiSE-FT)")
    share, scores = choose_share(
        trainer.model, before, after, refresh=shop.anchors.refresh,
        evaluate=lambda: score_of(validation.evaluate(name="mixed")),
    )  # fmt: skip
    told = ", ".join(f"{one:g}: {100 * score:.1f}" for one, score in scores)
    bench.watcher.note(f"share of the new weights {share:g} (mean hit@1/5/10 by share: {told})")
    return share


def _finished(
    bench: Bench, trainer: Trainer, shop: Workshop, *, before: Evaluation | None, share: float, started: float
) -> TrainReport:
    progress, warnings = trainer.progress, bench.warnings
    checkpoint, comparison, items = bench.out / BEST, None, None
    if bench.ranks.is_main:
        shop.anchors.refresh()
        bench.watcher.note("writing the checkpoint")
        keep_final(bench, f"epoch-{progress.best_epoch + 1:04d}-final")
        if shop.validation is not None and before is not None:
            after, items = _stored(bench, shop.passes, shop.validation)
            comparison = _compared(bench, before, after)
            if share == 0.0:
                anchors = (
                    ", with their anchors as the settings have them" if speaks_of_anchors(bench.settings.start) else ""
                )
                bench.warn(
                    "no share of the new weights was better than the weights before: "
                    f"the towers were kept as they were{anchors}"
                )
        card = card_of(bench.settings, bench.examples, comparison, start=bench.start.name, share=share)
        (bench.out / BEST / "README.md").write_text(card, "utf-8")
        draw_curves(bench.out / METRICS, bench.out / CURVES)
    report = TrainReport(
        checkpoint, pairs=len(bench.examples.train), held_out=len(bench.examples.val), steps=progress.step,
        epochs=progress.epoch, best_epoch=progress.best_epoch + 1, share=share, comparison=comparison,
        items=items, warnings=tuple(warnings), skipped=tuple(bench.skipped), seconds=time.monotonic() - started,
    )  # fmt: skip
    if bench.ranks.is_main:
        write_json(bench.out / REPORT, report.to_json())
        forget(bench.out)
    return report


def _compared(bench: Bench, before: Evaluation, after: Evaluation) -> Comparison[Evaluation] | None:
    try:
        return compare(before, after)
    except UsageError as error:  # a held-out picture went away during the run
        bench.warn(f"before and after cannot be compared: {error}")
        return None


def _stored(bench: Bench, passes: TowerPass, validation: Validation) -> tuple[Evaluation, ItemHits | None]:
    """The checkpoint as it lies on disk, measured: its weights are put into the model that was trained."""
    stored = load_dual_encoder(bench.out / BEST)
    bench.start.model.load_state_dict(stored.state_dict())
    if not bench.start.known:  # what did not learn was not stored before, and is now rounded, too
        passes.compiled = None
        validation.forget()
    return validation.evaluate(name=bench.out.resolve().name), validation.evaluate_items()


@contextmanager
def claimed(folder: Path, *, force: bool) -> Iterator[None]:
    """The folder, made and held by this run alone; `UsageError` when a run has ended in it already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(str(folder), expected="a folder of its own", got="one that another run writes to") from error
    except OSError as error:
        raise InputError(str(folder), expected="a folder to write to", got=error.strerror or str(error)) from error
    with lock:
        _check_ours(folder)
        ended = (folder / REPORT).exists() and not (folder / RUN / STATE).exists()
        if ended and not force:
            raise UsageError(
                str(folder), expected="an empty folder, or a run to go on with", got="a run that has ended",
                do="Choose another --out, or add --force.",
            )  # fmt: skip
        if force:
            forget(folder)
            (folder / REPORT).unlink(missing_ok=True)
        yield


def _check_ours(folder: Path) -> None:
    """`UsageError` for a folder with anything in it that no run left there: a run replaces and removes files."""
    found = {entry.name for entry in folder.iterdir()} - {".lock"}
    if found and not (SETTINGS in found and found & {RUN, REPORT, METRICS, HELD_OUT}):
        raise UsageError(
            str(folder), expected="a new or empty folder, or one of an earlier run", got=f"{sorted(found)[0]} in it",
            do="Choose another --out.",
        )  # fmt: skip


def forget(folder: Path) -> None:
    """Remove the state of a run, what says that there is one first: half of it must not be gone on with."""
    (folder / RUN / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / RUN, ignore_errors=True)


@contextmanager
def resources(folder: Path) -> Iterator[None]:
    """A full disk and a full memory as `ResourceError`, wherever in a run they are met."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            str(error.filename or folder), got=os.strerror(error.errno), do="Free space, then run the same command."
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            "training", expected="memory for a step", got=str(error).splitlines()[0][:160] if str(error) else "none",
            do="Set run.chunk (gradient caching), a smaller run.batch_size, or on a GPU run.resident=false.",
        ) from error  # fmt: skip


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """The held-out pairs as a table that `mmsearch eval` reads."""
    lines = [
        json.dumps({"image": pair.image, "captions": list(pair.captions), "group": pair.group, "split": "val"})
        for pair in pairs
    ]
    draft = path.with_name(path.name + ".draft")
    draft.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    draft.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file in one rename."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    draft.replace(path)
