"""The course of a second-stage run: epochs of steps, measuring, the best state, going on after an interruption.

Decisions:
- As in the first stage, a step depends on the settings, the data and its number, or on what the state file holds.
- A batch is drawn by the same plan as in the first stage (groups apart, one source each where asked for), and rivals
  are looked for inside it. Mined neighbours, by the first stage, are pulled into one batch.
- The score that chooses the epoch is that of the fused ranking, with weights fitted anew each time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmsearch.errors import InputError, ModelError
from mmsearch.rerank.base import ImageSide, TextSide
from mmsearch.rerank.model import RerankModel
from mmsearch.train.averaging import Average
from mmsearch.train.batches import Ints, batches_in_epoch, plan_epoch
from mmsearch.train.curves import LiveCurves
from mmsearch.train.examples import Examples
from mmsearch.train.feed import Batch, captions_of
from mmsearch.train.journal import Journal
from mmsearch.train.pictures import Feed, closing_feed
from mmsearch.train.rerank_losses import (
    Drawn,
    draw_hard,
    drawn_pairs,
    imitation_loss,
    list_loss,
    match_loss,
    matrix_loss,
)
from mmsearch.train.rerank_pictures import PictureReader
from mmsearch.train.rerank_validation import Found, RerankValidation
from mmsearch.train.schedule import Schedule
from mmsearch.train.settings import TrainSettings
from mmsearch.train.state import STATE, Progress, load_state, save_state, save_tensors
from mmsearch.train.trainer import BEST_STATE, Watcher, standing
from mmsearch.train.validation import score_of

_MOST_SEEDS = 2**31
_FEW = 3
"""Rivals for each text and picture where every pair costs layers of its own."""


@dataclass(slots=True)
class RerankParts:
    """What a run works with. `text_rows`: unit rows of all captions in order, `starts`: where each pair's begin.

    `keep_best(epoch)` stores a whole checkpoint; `teacher` imitates, `neighbours` are mined rows of each pair.
    """

    model: RerankModel
    reader: PictureReader
    feed: Feed
    text_rows: Tensor
    starts: Sequence[int]
    validation: RerankValidation | None
    folder: Path
    watcher: Watcher
    keep_best: Callable[[int], None]
    digest: str
    teacher: RerankModel | None = None
    neighbours: Ints | None = None


class RerankTrainer:
    """One run. After `run` the model holds the best state, and `progress` says how it went."""

    def __init__(self, settings: TrainSettings, examples: Examples, parts: RerankParts) -> None:
        self.settings, self.examples, self.parts, self.model = settings, examples, parts, parts.model
        run = settings.run
        groups = parameter_groups_of(parts, settings)
        self._learning = [parameter for group in groups for parameter in group["params"]]
        self._named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self._moving: dict[str, Tensor] = dict(self._named)
        self._optimiser = torch.optim.AdamW(groups, betas=run.betas)
        self._average = Average(self.model, decay=run.ema) if run.ema else None
        self._origins = None if settings.data.mixed else examples.origins
        per_epoch = batches_in_epoch(examples.repeats, run.batch_size, origins=self._origins)
        self.steps = min(run.max_steps or _MOST_SEEDS, per_epoch * run.epochs)
        warmup = round(run.warmup * self.steps)
        self._schedule = Schedule(max(1, self.steps), warmup=warmup, kind=run.schedule, floor=run.floor)
        self.progress = Progress(digest=parts.digest)

    def resume(self) -> bool:
        """Take up the state in the folder, if there is one; `InputError` when it is of another run."""
        if standing(self.parts.folder, self.progress.digest) is None:
            return False
        path = self.parts.folder / STATE
        self.progress, average = load_state(path, model=self._moving, named=self._named, optimiser=self._optimiser)
        if average is not None and self._average is not None:
            self._average.load(average)
        return True

    def run(self, journal: Journal) -> None:
        """From where `progress` stands to the end."""
        if self.settings.rerank.start and self.settings.run.epochs and self.progress.best_score < 0:
            self._judge(journal, epoch=-1)  # what is gone on with may be better than all that comes
        self.parts.watcher.start(self.steps, what="training", unit="steps")
        self.parts.watcher.advance(self.progress.step)
        curves = LiveCurves(journal.path)
        while not self._ended():
            self._epoch(journal)
            self._close_epoch(journal)
            curves.draw()
        self.progress.done = True
        self._save()
        path = self.parts.folder / BEST_STATE
        if path.exists():
            with torch.no_grad():
                for name, value in load_file(str(path)).items():
                    self._moving[name].copy_(value)

    def _ended(self) -> bool:
        run, progress = self.settings.run, self.progress
        tired = bool(
            run.patience and progress.best_score >= 0 and progress.epoch - 1 - progress.best_epoch >= run.patience
        )
        return tired or progress.epoch >= run.epochs or progress.step >= self.steps

    def _epoch(self, journal: Journal) -> None:
        run, progress = self.settings.run, self.progress
        plan = plan_epoch(
            self.examples.train, self.examples.repeats, batch_size=run.batch_size, seed=run.seed, epoch=progress.epoch,
            neighbours=self.parts.neighbours, hard_share=self.settings.rerank.mined_share, origins=self._origins,
        )[progress.batch :]  # fmt: skip
        saved = clock = time.monotonic()
        seen = 0
        with closing_feed(self.parts.feed.batches(plan)) as batches:
            for number, batch in enumerate(batches, start=1):
                losses = self._step(batch)
                seen += len(batch.draws)
                progress.batch, progress.step = progress.batch + 1, progress.step + 1
                now = time.monotonic()
                speed = number * run.batch_size / max(now - clock, 1e-9)
                self.parts.watcher.advance(1, note=f"loss {losses['loss']:.3f}  {speed:.0f} pairs/s")
                rate = self._optimiser.param_groups[0]["lr"]
                journal.log(
                    progress.step, {**losses, "learning_rate": rate, "pairs_per_s": speed, "epoch": progress.epoch}
                )
                if progress.step >= self.steps:
                    break
                if now - saved >= run.save_seconds and number < len(plan):
                    self._save()
                    saved = time.monotonic()
        if plan and not seen:
            raise InputError(
                "training pictures", expected="some that can be read", got=f"none of {sum(map(len, plan))} in an epoch",
                do="See what was said of the skipped ones.",
            )  # fmt: skip

    def _step(self, batch: Batch) -> dict[str, float]:
        run, step = self.settings.run, self.progress.step
        torch.manual_seed((run.seed * 1_000_003 + step * 1_009) % _MOST_SEEDS)
        self._schedule.apply(self._optimiser.param_groups, step=step)
        set_training(self.model)
        self._optimiser.zero_grad(set_to_none=True)
        if len(batch.draws) < 2:  # nothing to tell apart: the pictures of this step cannot be read
            return {"loss": 0.0}
        losses = self.losses(batch)
        loss = losses["loss"]
        self._require_finite("loss", loss.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        self._require_finite("gradient", nn.utils.clip_grad_norm_(self._learning, run.clip or math.inf))
        self._optimiser.step()
        if self._average is not None:
            self._average.update(self.model)
        return {name: float(value.detach()) for name, value in losses.items()}

    def _require_finite(self, what: str, value: Tensor) -> None:
        if not bool(value.isfinite()):
            raise ModelError(
                f"training, step {self.progress.step + 1}", expected=f"a finite {what}", got=str(float(value)),
                do="Lower run.lr, or try --precision fp32; the best checkpoint so far is kept.",
            )  # fmt: skip

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and its parts for one batch: "contrast" over lists, "match" over yes and no, perhaps "teacher"."""
        wanted, passes = self.settings.rerank, self.parts.reader.passes
        texts, images, maps = self._sides(batch)
        owners = batch.owners.to(passes.device)  # (n,) the picture of each text
        groups = batch.groups.to(passes.device)[owners]  # a picture counts once beside each of its texts
        first = torch.ones_like(owners, dtype=torch.bool)
        first[1:] = owners[1:] != owners[:-1]
        few = wanted.negatives if wanted.negatives >= 0 else 0 if self.model.fusion.cheap_pairs else _FEW
        known = bool(images.rows.any())
        cosines = texts.rows @ (images.rows[owners] if known else texts.rows).T
        found: dict[str, Tensor] = {}
        drawn: Drawn | None = None
        if few:
            drawn = drawn_pairs(*draw_hard(cosines, groups, count=few, hardness=wanted.hardness, first=first))
            with passes.autocast():
                logits = self.model(texts.take(drawn.texts), images.take(owners[drawn.images])).float()
            lists = torch.where(drawn.lists >= 0, logits[drawn.lists.clamp(min=0)], -torch.inf)
            found["contrast"] = list_loss(lists)
            found["match"] = match_loss(logits[: len(groups)], logits[len(groups) :])
        else:
            with passes.autocast():
                matrix = self.model.fusion.pairwise(texts, images).float()[:, owners]
            found["contrast"] = matrix_loss(matrix, groups)
            hard = cosines if known else matrix.detach() / max(wanted.hardness, 1e-6)
            of_texts, of_images = draw_hard(hard, groups, count=_FEW, hardness=wanted.hardness, first=first)
            false = torch.cat([_taken(matrix, of_texts), _taken(matrix.T, of_images)])
            found["match"] = match_loss(matrix.diagonal(), false)
            lists = matrix
        total = wanted.contrast * found["contrast"] + wanted.match * found["match"]
        if self.parts.teacher is not None:
            found["teacher"] = self._imitation(texts, maps, images.rows, owners, drawn=drawn, lists=lists)
            total = total + wanted.teacher_weight * found["teacher"]
        return {"loss": total, **found}

    def _sides(self, batch: Batch) -> tuple[TextSide, ImageSide, Tensor]:
        model, passes = self.model, self.parts.reader.passes
        with torch.no_grad(), passes.autocast():
            tokens = model.words(batch.ids.to(passes.device), batch.mask.to(passes.device)).float()
        count = self.settings.data.captions
        places = [
            self.parts.starts[draw.row] + number
            for draw in batch.draws
            for number in captions_of(self.examples.train[draw.row], draw, count=count)
        ]
        texts = TextSide(self.parts.text_rows[places].to(passes.device), tokens, batch.mask.to(passes.device))
        maps, rows = self.parts.reader.read(batch.images)
        with passes.autocast():
            patches = model.patch_projection(maps)
        unknown = texts.rows.new_zeros(len(patches), texts.rows.shape[1])
        return texts, ImageSide(unknown if rows is None else rows, patches), maps

    def _imitation(
        self, texts: TextSide, maps: Tensor, rows: Tensor, owners: Tensor, *, drawn: Drawn | None, lists: Tensor
    ) -> Tensor:
        teacher, passes = self.parts.teacher, self.parts.reader.passes
        assert teacher is not None  # for the type checker
        with torch.no_grad(), passes.autocast():
            images = ImageSide(rows, teacher.patch_projection(maps.detach()))
            if drawn is None:
                said = teacher.fusion.pairwise(texts, images).float()[:, owners]
                return (imitation_loss(lists, said) + imitation_loss(lists.T, said.T)) / 2
            logits = teacher(texts.take(drawn.texts), images.take(owners[drawn.images])).float()
        return imitation_loss(lists, torch.where(drawn.lists >= 0, logits[drawn.lists.clamp(min=0)], -torch.inf))

    # Between epochs

    def _close_epoch(self, journal: Journal) -> None:
        progress = self.progress
        progress.history.append(self._judge(journal, epoch=progress.epoch))
        progress.epoch, progress.batch = progress.epoch + 1, 0
        self._save()

    def _judge(self, journal: Journal, *, epoch: int) -> float:
        """The score after an epoch (-1: before the first), which is kept when it is the best so far."""
        progress, found = self.progress, self.measure()
        score = float(epoch) if found is None else score_of(found.second)
        if score > progress.best_score:
            progress.best_score, progress.best_epoch = score, epoch
            with self._averaged():
                kept = {name: value.detach().cpu().contiguous().clone() for name, value in self._moving.items()}
                self.parts.keep_best(epoch)
            save_tensors(self.parts.folder / BEST_STATE, kept)
        if found is not None:
            ways = {"text_to_image": found.second.text_to_image, "image_to_text": found.second.image_to_text}
            values = {f"val/{way}/hit@{k}": one.values[f"hit@{k}"] for way, one in ways.items() for k in (1, 5, 10)}
            journal.log(progress.step, {**values, "val/score": score})
            star = "  (best so far)" if progress.best_epoch == epoch else ""
            cells = [" / ".join(f"{100 * one.values[f'hit@{k}']:.1f}" for k in (1, 5, 10)) for one in ways.values()]
            told = f"text -> image hit@1/5/10 {cells[0]}, image -> text {cells[1]}"
            when = f"epoch {epoch + 1}" if epoch >= 0 else "as it starts"
            self.parts.watcher.note(f"{when}: re-ranked {told}{star}")
        return score

    def measure(self) -> Found | None:
        """The averaged model on the held-out pairs; None without any."""
        if self.parts.validation is None:
            return None
        with self._averaged():
            return self.parts.validation.measure(name="re-ranked")

    def _averaged(self) -> Any:  # noqa: ANN401 - a context manager
        return torch.no_grad() if self._average is None else self._average.applied(self.model)

    def _save(self) -> None:
        average = None if self._average is None else self._average.state()
        save_state(
            self.parts.folder / STATE, self.progress, model=self._moving, named=self._named,
            optimiser=self._optimiser, average=average,
        )  # fmt: skip


def set_training(model: RerankModel) -> None:
    """Dropout on; batch norms of an own backbone as they are in use."""
    model.train()
    if model.backbone is not None:
        model.backbone.eval()


def parameter_groups_of(parts: RerankParts, settings: TrainSettings) -> list[dict[str, Any]]:
    """Groups with `rate` for `Schedule`: the text tower's layers, an own backbone's last stages, the rest.

    Everything else of the model is frozen. Vectors (norms, biases, scales) do not decay.
    """
    rates, run = settings.rerank, settings.run
    backbone = {id(p) for stage in parts.reader.learning_stages() for p in stage.parameters()}
    sorted_out: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parts.model.named_parameters():
        if name.startswith("backbone."):
            factor = rates.image_rate if id(parameter) in backbone else 0.0
        else:
            factor = rates.layers_rate if name.startswith("fusion.layers.") else 1.0
        parameter.requires_grad_(factor > 0)
        if factor:
            sorted_out.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": found, "rate": run.lr * factor, "lr": run.lr * factor, "part": "head",
         "weight_decay": run.weight_decay if decays else 0.0}
        for (factor, decays), found in sorted(sorted_out.items(), key=lambda one: one[0], reverse=True)
    ]  # fmt: skip


def _taken(matrix: Tensor, places: Tensor) -> Tensor:
    """(b, b) and (b, k) columns of each row, -1 for none -> the values there are, flat."""
    return matrix.gather(1, places.clamp(min=0))[places >= 0]
