"""`mmsearch train`: fine-tune a dual encoder on your own pictures and captions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.train.item_validation import ItemHits
    from mmsearch.train.rerank_report import RerankReport
    from mmsearch.train.run import TrainReport

TOWERS, RERANK = "towers", "rerank"
RESUME = "interrupted: what was done is kept. Run the same command again to go on where it stopped."


Pairs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PAIRS]", help="Pictures with captions: CSV, JSONL, Parquet, JSON, tars or folders."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Where checkpoint and report go.", metavar="DIR")]
Start = Annotated[
    str | None,
    typer.Option("--model", help="The checkpoint to go on from [default: the bundled model].", metavar="MODEL"),
]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="Settings in TOML; options below replace them.", metavar="FILE")
]
Stage = Annotated[
    str, typer.Option("--stage", help="towers, or rerank: a second stage over --model's towers.", metavar="NAME")
]
Fusion = Annotated[
    str | None,
    typer.Option(
        "--fusion",
        help="Of that: concat, weighted, gated, bilinear, late-interaction, cross-attention, single-stream.",
        metavar="NAME",
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="[default: 10]", min=0, metavar="N")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="Pairs in a batch [default: 128].", min=2, metavar="N")]
Rate = Annotated[float | None, typer.Option("--lr", help="Base learning rate [default: 3e-4].", metavar="X")]
Loss = Annotated[
    str | None, typer.Option("--loss", help="info_nce, sigmoid, hinge, max_hinge, or several with +.", metavar="NAME")
]
TuneText = Annotated[
    str | None,
    typer.Option("--tune-text", help="all, head, none, or the last N layers [default: all].", metavar="PART"),
]
TuneImage = Annotated[
    str | None, typer.Option("--tune-image", help="all, head, none, or the last N stages [default: 3].", metavar="PART")
]
Lora = Annotated[
    int | None, typer.Option("--lora", help="Adapters of rank R instead of whole backbones.", min=1, metavar="R")
]
Augment = Annotated[bool | None, typer.Option("--augment/--no-augment", help="Random views of pictures [default: on].")]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Gradient caching, N pairs at a time.", min=1, metavar="N")]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="Imitate this model's similarities as well.", metavar="MODEL")
]
ValShare = Annotated[
    float | None, typer.Option("--val-share", help="Held out where the data has no split [default: 0.1].", metavar="X")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Only so many pictures.", min=2, metavar="N")]
Patience = Annotated[
    int | None, typer.Option("--patience", help="Stop after N epochs without gain [default: 4].", min=0, metavar="N")
]
Seed = Annotated[int | None, typer.Option("--seed", help="[default: 0]", metavar="N")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="auto, fp32, bf16 or fp16 [default: auto].", metavar="NAME")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting of a recipe; may be repeated.", metavar="SECTION.NAME=VALUE"),
]


@guarded(interrupted=RESUME)
def train(
    ctx: typer.Context,
    pairs: Pairs = None,
    out: Out = None,
    model: Start = None,
    recipe: Recipe = None,
    stage: Stage = TOWERS,
    fusion: Fusion = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Rate = None,
    loss: Loss = None,
    tune_text: TuneText = None,
    tune_image: TuneImage = None,
    lora: Lora = None,
    augment: Augment = None,
    chunk: Chunk = None,
    teacher: Teacher = None,
    val_share: ValShare = None,
    limit: Limit = None,
    patience: Patience = None,
    seed: Seed = None,
    precision: Precision = None,
    setting: Setting = None,
    workers: options.Workers = None,
    device: options.OnDevice = options.Device.AUTO,
    force: Annotated[bool, typer.Option("--force", help="Start anew whatever a run left in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fine-tune a model on pictures with captions; interrupted, the same command goes on."""
    if out is None:
        raise UsageError("--out", expected="a folder", got="nothing", do="Add --out checkpoints/NAME.")
    _check_stage(stage, fusion=fusion)
    given = {
        "start.model": model, "rerank.fusion": fusion, "run.epochs": epochs,
        "run.batch_size": batch_size, "run.lr": lr, "run.chunk": chunk,
        "run.patience": patience, "run.seed": seed, "run.precision": precision,
        "run.device": None if device == options.Device.AUTO else device.value,
        "data.val_share": val_share, "data.limit": limit, "data.workers": workers, "objective.name": loss,
        ("objective" if stage == TOWERS else "rerank") + ".teacher": teacher,
        "text.train": _part(tune_text), "image.train": _part(tune_image),
        "augment.enabled": augment, **_adapters(lora, text=tune_text, image=tune_image, plain=recipe is None),
    }  # fmt: skip
    with Bar("training", unit="steps") as bar:
        report: TrainReport | RerankReport = ctx.obj.train(
            pairs or [], out, stage=stage, recipe=recipe, given={k: v for k, v in given.items() if v is not None},
            assignments=setting or [], force=force, watcher=bar, environ=os.environ,
        )  # fmt: skip
    from mmsearch.train.rerank_report import RerankReport  # loaded by now

    if os.environ.get("RANK", "0") != "0":
        return None  # under torchrun the first process speaks for all
    if json:
        return emit(as_json(report.to_json()))
    for line in _rerank_lines(report) if isinstance(report, RerankReport) else _lines(report):
        emit(line)
    return None


def _check_stage(stage: str, *, fusion: str | None) -> None:
    if stage not in (TOWERS, RERANK):
        raise UsageError("--stage", expected=f"{TOWERS} or {RERANK}", got=repr(stage))
    if fusion is not None and stage != RERANK:
        raise UsageError("--fusion", expected="--stage rerank beside it", got=f"--stage {stage}")


def _adapters(rank: int | None, *, text: str | None, image: str | None, plain: bool) -> dict[str, int | float]:
    """`--lora` for each tower whose backbone learns. `plain`: no recipe says how fast; adapters learn as heads do."""
    if rank is None:
        return {}
    sides = [side for side, part in (("text", text), ("image", image)) if part not in ("head", "none")]
    if not sides:
        raise UsageError("--lora", expected="a backbone that learns", got="heads alone", do="Leave out --tune-...")
    rates = {f"{side}.rate": 1.0 for side in sides} if plain else {}
    return {**{f"{side}.lora": rank for side in sides}, **rates}


def _part(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text


def _lines(report: TrainReport) -> Iterator[str]:
    yield (
        f"{plural(report.pairs, 'picture')} trained on, {report.held_out} held out, {plural(report.steps, 'step')} in "
        f"{plural(report.epochs, 'epoch')} (best: {report.best_epoch}), {report.seconds:.0f} s"
    )
    if report.comparison is not None:
        yield from report.comparison.lines()
    if report.items is not None:
        yield from _item_lines(report.items)
    if report.share < 1.0:
        yield f"The model holds {100 * report.share:.0f} % of the new weights and the rest of the old (WiSE-FT)."
    folder = report.checkpoint.parent
    yield f"checkpoint: {folder}  (curves: {folder / 'curves.png'}, settings: {folder / 'settings.json'})"


def _rerank_lines(report: RerankReport) -> Iterator[str]:
    yield (
        f"{report.fusion}, {report.parameters / 1e6:.1f} M parameters: {plural(report.pairs, 'picture')} trained on, "
        f"{report.held_out} held out, {plural(report.steps, 'step')} (best epoch: {report.best_epoch}), "
        f"{report.seconds:.0f} s"
    )
    if report.comparison is not None:
        yield from report.comparison.lines()
    if report.matching is not None:
        yield from report.matching.lines()
    if (cutoff := report.scoring.cutoff) is not None:
        yield (
            f"nothing found: {100 * cutoff.kept:.0f} % of the held-out captions are answered with their picture there, "
            f"{100 * cutoff.rejected:.0f} % are turned away without it"
        )
    folder = report.checkpoint.parent
    yield f"checkpoint: {folder}  (curves: {folder / 'curves.png'}, probabilities: {folder / 'reliability.png'})"


def _item_lines(items: ItemHits) -> Iterator[str]:
    names = list(next(iter(items.values())))
    yield f"{'text -> item':<14} " + " ".join(f"{name:>7}" for name in names)
    for form, shares in items.items():
        yield f"{form:<14} " + " ".join(f"{100 * shares[name]:>7.1f}" for name in names)
    yield "In per cent. An item's text never has its query's words; mixed: pictures, texts and both in one gallery."
