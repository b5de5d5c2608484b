"""The course of a run: epochs of steps, validation, the best state, and going on after an interruption.

Decisions:
- Everything a step depends on is a function of the settings, the data and the step's number, or is in the state file.
  A run that was killed and one that was not take the same steps and end at the same numbers.
- The best state is kept in float32 beside the run and, as a whole checkpoint that can be used at once, behind the
  link `best`, which is swapped in one rename.
- The model that is measured and kept is the average of the weights over the steps, where there is one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmsearch.errors import InputError, ModelError
from mmsearch.evaluate.report import Evaluation
from mmsearch.towers.dual_encoder import MAX_LOGIT_SCALE
from mmsearch.train.anchor_rows import AnchorRows
from mmsearch.train.averaging import Average
from mmsearch.train.batches import Draw, Ints, batches_in_epoch, plan_epoch
from mmsearch.train.curves import LiveCurves
from mmsearch.train.distributed import Ranks
from mmsearch.train.encoding import Texts, TowerPass
from mmsearch.train.examples import Examples
from mmsearch.train.feed import Batch
from mmsearch.train.journal import Journal
from mmsearch.train.losses import soften
from mmsearch.train.negatives import mine
from mmsearch.train.parameters import parameter_groups, set_mode
from mmsearch.train.pictures import Feed, closing_feed
from mmsearch.train.schedule import Schedule
from mmsearch.train.settings import TrainSettings
from mmsearch.train.state import STATE, Progress, load_state, moving, read_progress, save_state, save_tensors
from mmsearch.train.step import BatchGradient
from mmsearch.train.validation import Validation, score_of

BEST_STATE, NEIGHBOURS = "best.safetensors", "neighbours.npy"
_MOST_SEEDS = 2**31


class Watcher(Protocol):
    """Who follows a run: a progress bar, or nothing."""

    def start(self, total: int | None, *, what: str = "", unit: str = "") -> None:
        """A part of the work, `what`, begins: so many `unit` (steps, images) are to come."""
        ...

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more are done."""
        ...

    def note(self, text: str) -> None:
        """A line that stays."""
        ...


@dataclass(slots=True)
class Workshop:
    """What a run works with, ready made. `folder`: where its state is; `keep_best` stores a checkpoint of the model."""

    passes: TowerPass
    feed: Feed
    gradient: BatchGradient
    objective: nn.Module
    anchors: AnchorRows
    validation: Validation | None
    tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    ranks: Ranks
    folder: Path
    watcher: Watcher
    keep_best: Callable[[int], None]


class Trainer:
    """One run over `examples`. After `run` the model holds the best state, and `progress` says how it went."""

    def __init__(self, settings: TrainSettings, examples: Examples, workshop: Workshop) -> None:
        self.settings, self.examples, self.shop = settings, examples, workshop
        self.model = workshop.passes.model
        run = settings.run
        self._modes = {"text": settings.text, "image": settings.image}
        self._groups = parameter_groups(
            self.model, **self._modes, rate=run.lr, weight_decay=run.weight_decay,
            extra=workshop.objective.parameters(),
        )  # fmt: skip
        self._learning = [parameter for group in self._groups for parameter in group["params"]]
        self._moving = {f"model/{name}": value for name, value in moving(self.model).items()}
        self._moving |= {f"objective/{name}": value for name, value in workshop.objective.state_dict().items()}
        owners = {"model": self.model, "objective": workshop.objective}
        self._named = {f"{o}/{n}": p for o, module in owners.items() for n, p in module.named_parameters()}
        self._optimiser = torch.optim.AdamW(self._groups, betas=run.betas, fused=True)
        self._average = Average(self.model, decay=run.ema) if run.ema else None
        self._scaler = torch.amp.GradScaler(workshop.passes.device.type, enabled=workshop.passes.dtype == torch.float16)
        self._origins = None if settings.data.mixed else examples.origins
        planned = batches_in_epoch(examples.repeats, run.batch_size, origins=self._origins)
        per_epoch = math.ceil(planned / run.accumulate)
        self.steps = min(run.max_steps or _MOST_SEEDS, per_epoch * run.epochs)
        self._schedule = Schedule(
            self.steps, warmup=round(run.warmup * self.steps), kind=run.schedule, floor=run.floor,
            backbone_start=round(run.backbone_start * self.steps),
        )  # fmt: skip
        self.progress = Progress(digest=digest_of(settings, examples, world=workshop.ranks.world))
        self.best: Evaluation | None = None

    # Going on

    def resume(self) -> bool:
        """Take up the state in the folder, if there is one; `InputError` when it is of another run."""
        if standing(self.shop.folder, self.progress.digest) is None:
            return False
        path = self.shop.folder / STATE
        self.progress, average = load_state(path, model=self._moving, named=self._named, optimiser=self._optimiser)
        if average is not None and self._average is not None:
            self._average.load(average)
        self._scaler.load_state_dict(self.progress.scaler)
        return True

    def _save(self) -> None:
        if self.shop.ranks.is_main:
            self.progress.scaler = self._scaler.state_dict()
            average = None if self._average is None else self._average.state()
            save_state(
                self.shop.folder / STATE, self.progress, model=self._moving, named=self._named,
                optimiser=self._optimiser, average=average,
            )  # fmt: skip

    # The course

    def run(self, journal: Journal | None) -> None:
        """From where `progress` stands to the end; the journal is the main rank's."""
        self.shop.watcher.start(self.steps, what="training", unit="steps")
        self.shop.watcher.advance(self.progress.step)
        curves = None if journal is None else LiveCurves(journal.path)
        with self.shop.passes.running():
            while not self._ended():
                self._epoch(journal)
                self._close_epoch(journal)
                if curves is not None:
                    curves.draw()
        self.progress.done = True
        self._save()
        self._take_best()

    def _ended(self) -> bool:
        run, progress = self.settings.run, self.progress
        late = progress.epoch - 1 - progress.best_epoch
        tired = bool(run.patience and progress.best_epoch >= 0 and late >= run.patience)
        return tired or progress.epoch >= run.epochs or progress.step >= self.steps

    def _epoch(self, journal: Journal | None) -> None:
        run, progress = self.settings.run, self.progress
        soften(self.shop.objective, progress.epoch < self.settings.objective.soften_epochs)
        plan = plan_epoch(
            self.examples.train, self.examples.repeats, batch_size=run.batch_size, seed=run.seed,
            epoch=progress.epoch, neighbours=self._neighbours(), hard_share=self.settings.objective.hard_share,
            origins=self._origins,
        )[progress.batch :]  # fmt: skip
        own = [self.shop.ranks.share(draws) for draws in plan]
        saved = clock = time.monotonic()
        waiting: list[Batch] = []
        pairs = seen = 0
        with closing_feed(self.shop.feed.batches(own)) as batches:
            for number, batch in enumerate(batches, start=1):
                waiting.append(batch)
                seen += len(batch.draws)
                if len(waiting) < run.accumulate and number < len(own):
                    continue
                pairs += sum(len(planned) for planned in plan[number - len(waiting) : number])
                loss = self._step(waiting)
                progress.batch += len(waiting)
                waiting = []
                now = time.monotonic()
                self._tell(journal, loss=loss, speed=pairs / max(now - clock, 1e-9))
                if number == len(own) or progress.step >= self.steps:
                    break  # the end of the epoch is saved when it has been measured
                if now - saved >= run.save_seconds:
                    self._save()
                    saved = time.monotonic()
        if plan and not int(self.shop.ranks.gather_rows(torch.tensor([seen], device=self.shop.ranks.device)).sum()):
            raise InputError(
                "training pictures", expected="some that can be read", got=f"none of {sum(map(len, plan))} in an epoch",
                do="See what was said of the skipped ones.",
            )  # fmt: skip

    def _step(self, batches: Sequence[Batch]) -> float:
        """One optimiser step over these batches; their mean loss."""
        run, step = self.settings.run, self.progress.step
        if step % run.anchor_refresh == 0:
            self.shop.anchors.refresh()
        torch.manual_seed((run.seed * 1_000_003 + step * 1_009 + self.shop.ranks.rank) % _MOST_SEEDS)
        self._schedule.apply(self._optimiser.param_groups, step=step)
        set_mode(self.model, **self._modes)
        self._optimiser.zero_grad(set_to_none=True)
        usable = [batch for batch in batches if self.shop.ranks.least(len(batch.draws)) > 0]
        losses = [
            self.shop.gradient.backward(batch, scale=lambda value: self._scaler.scale(value / len(usable)))
            for batch in usable
        ]
        if not losses:  # none of the step's pictures can be read
            self.progress.step += 1
            return 0.0
        loss = float(np.mean(losses))
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss)
        self._update()
        self.progress.step += 1
        return loss

    def _not_finite(self, what: str, value: float) -> ModelError:
        return ModelError(
            f"training, step {self.progress.step + 1}", expected=f"a finite {what}", got=str(value),
            do="Lower run.lr, or try --precision fp32; the best checkpoint so far is kept.",
        )  # fmt: skip

    def _update(self) -> None:
        self.shop.ranks.average_gradients(self._learning)
        self._scaler.unscale_(self._optimiser) if self._scaler.is_enabled() else None
        norm = nn.utils.clip_grad_norm_(self._learning, self.settings.run.clip or math.inf)
        if not self._scaler.is_enabled() and not bool(norm.isfinite()):  # a scaler leaves such a step out by itself
            raise self._not_finite("gradient", float(norm))
        self._scaler.step(self._optimiser)
        self._scaler.update()
        with torch.no_grad():  # past its bound it would have no gradient to come back with
            self.model.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if self._average is not None:
            self._average.update(self.model)

    def _tell(self, journal: Journal | None, *, loss: float, speed: float) -> None:
        scale = float(self.model.logit_scale.detach())
        rate = self._optimiser.param_groups[-1]["lr"]
        self.shop.watcher.advance(1, note=f"loss {loss:.3f}  scale {scale:.1f}  {speed:.0f} pairs/s")
        if journal is not None:
            values = {"loss": loss, "logit_scale": scale, "learning_rate": rate, "pairs_per_s": speed}
            journal.log(self.progress.step, {**values, "epoch": self.progress.epoch})

    # Between epochs

    def _close_epoch(self, journal: Journal | None) -> None:
        if self.shop.ranks.world > 1 and self._average is None:
            self.shop.anchors.refresh()  # as measuring does, on the main rank alone
        found = self.measure()
        score = self.shop.ranks.from_main(score_of(found) if found is not None else float(self.progress.epoch))
        progress = self.progress
        progress.history.append(score)
        if score > progress.best_score:
            progress.best_score, progress.best_epoch = score, progress.epoch
            self.best = found
            if self.shop.ranks.is_main:
                self._keep_best()
        if found is not None and journal is not None:
            journal.log(progress.step, _validation_values(found, score))
            self.shop.watcher.note(f"epoch {progress.epoch + 1}: {_short(found)}{_star(progress)}")
        progress.epoch, progress.batch = progress.epoch + 1, 0
        self._save()

    def measure(self) -> Evaluation | None:
        """The averaged model on the held-out pairs, on the main rank; None without pairs, or on another rank."""
        if self.shop.validation is None or not self.shop.ranks.is_main:
            return None
        with self._averaged():
            self.shop.anchors.refresh()
            return self.shop.validation.evaluate(name="after")

    def _averaged(self) -> Any:  # noqa: ANN401 - a context manager
        return torch.no_grad() if self._average is None else self._average.applied(self.model)

    def _keep_best(self) -> None:
        with self._averaged():
            self.shop.anchors.refresh()
            kept = {name: value.detach().cpu().contiguous().clone() for name, value in self._moving.items()}
            self.shop.keep_best(self.progress.epoch)
        save_tensors(self.shop.folder / BEST_STATE, kept)

    def _take_best(self) -> None:
        path = self.shop.folder / BEST_STATE
        if path.exists():
            with torch.no_grad():
                for name, value in load_file(str(path)).items():
                    self._moving[name].copy_(value)

    def _neighbours(self) -> Ints | None:
        """Hard negatives for this epoch, from the model as it stands at its start; kept for a resumed run."""
        objective, path = self.settings.objective, self.shop.folder / NEIGHBOURS
        if not objective.hard_negatives or self.progress.epoch < objective.mine_from:
            return None
        if self.progress.batch and path.exists():
            return np.load(path)  # type: ignore[no-any-return]
        self.shop.watcher.note(f"epoch {self.progress.epoch + 1}: mining hard negatives")
        found = torch.zeros(len(self.examples.train), objective.hard_negatives, dtype=torch.int64)
        if self.shop.ranks.is_main:
            found = torch.from_numpy(self._mined(objective.hard_negatives))
            np.save(path, found.numpy())
        mined = nn.Module()
        mined.register_buffer("rows", found)
        self.shop.ranks.broadcast_state(mined)  # every rank must plan the same batches
        return found.numpy()

    def _mined(self, count: int) -> Ints:
        pairs = self.examples.train
        with torch.no_grad(), self._averaged():
            self.model.eval()
            images = self._image_rows()
            texts = Texts([pair.captions[0] for pair in pairs], self.shop.passes, self.shop.tokens).rows()
        return mine(texts, images, groups=[pair.group for pair in pairs], count=count)

    def _image_rows(self) -> np.ndarray:
        """(n, d) rows of all training pictures; one that cannot be read is random, and near to nothing."""
        pairs, size = self.examples.train, self.settings.run.batch_size
        rows = np.random.default_rng(0).normal(size=(len(pairs), self.model.config.dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        plan = [[Draw(i, 0, 0) for i in range(s, min(s + size, len(pairs)))] for s in range(0, len(pairs), size)]
        for batch in self.shop.feed.batches(plan):
            if batch.draws:
                rows[[draw.row for draw in batch.draws]] = self.shop.passes.images(batch.images).cpu().numpy()
        return rows


def digest_of(settings: TrainSettings, examples: Examples, *, world: int) -> str:
    """Equal for runs that take the same steps: the same settings, the same data and as many processes."""
    data = [(pair.image, pair.captions, pair.group) for pair in (*examples.train, *examples.val)]
    return f"{settings.digest()}-{np.uint64(hash_of([*data, examples.repeats])):016x}-{world}"


def standing(folder: Path, digest: str) -> Progress | None:
    """Where the run in `folder` stands, None without one; `InputError` when it is not the run of this digest."""
    found = read_progress(folder / STATE)
    if found is not None and found.digest != digest:
        raise InputError(
            str(folder), expected="a run with these settings and this data", got="another run",
            do="Choose another --out, or add --force to start anew.",
        )  # fmt: skip
    return found


def hash_of(data: Sequence[Any]) -> int:
    """A number that changes with any of it, the same in every process."""
    import xxhash

    found = xxhash.xxh3_64()
    for entry in data:
        found.update(repr(entry).encode("utf-8", "surrogateescape"))
    return int(found.intdigest())


def _validation_values(found: Evaluation, score: float) -> Mapping[str, float]:
    ways = {"text_to_image": found.text_to_image.values, "image_to_text": found.image_to_text.values}
    return {f"val/{way}/hit@{k}": values[f"hit@{k}"] for way, values in ways.items() for k in (1, 5, 10)} | {
        "val/score": score
    }


def _short(found: Evaluation) -> str:
    cells = [
        " / ".join(f"{100 * way.values[f'hit@{k}']:.1f}" for k in (1, 5, 10))
        for way in (found.text_to_image, found.image_to_text)
    ]
    return f"text -> image hit@1/5/10 {cells[0]}, image -> text {cells[1]}"


def _star(progress: Progress) -> str:
    return "  (best so far)" if progress.best_epoch == progress.epoch else ""
