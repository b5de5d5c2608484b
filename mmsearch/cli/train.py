"""`mmsearch train`: fine-tune a dual encoder on your own pictures and captions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, plural
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.train.run import TrainReport

RESUME = "interrupted: the best checkpoint is kept. Run the same command again to go on where it stopped."


@guarded(interrupted=RESUME)
def train(
    ctx: typer.Context,
    pairs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PAIRS]", help="Pictures with captions: CSV, JSONL, Parquet, JSON, tars or folders."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where checkpoint and report go.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The checkpoint to go on from [default: the bundled model]."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Settings in TOML; options below replace them.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, metavar="N", help="[default: 10]")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, metavar="N", help="Pairs in a batch [default: 128].")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Base learning rate [default: 3e-4].")] = None,
    loss: Annotated[
        str | None,
        typer.Option("--loss", metavar="NAME", help="info_nce, sigmoid, hinge, max_hinge, or several with +."),
    ] = None,
    tune_text: Annotated[
        str | None,
        typer.Option("--tune-text", metavar="PART", help="all, head, none, or the last N layers [default: all]."),
    ] = None,
    tune_image: Annotated[
        str | None,
        typer.Option("--tune-image", metavar="PART", help="all, head, none, or the last N stages [default: 3]."),
    ] = None,
    lora: Annotated[
        int | None, typer.Option("--lora", min=1, metavar="R", help="Adapters of rank R instead of whole backbones.")
    ] = None,
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="Random views of pictures [default: on].")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option("--chunk", min=1, metavar="N", help="Gradient caching, N pairs at a time.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="Imitate this model's similarities as well.")
    ] = None,
    val_share: Annotated[
        float | None, typer.Option("--val-share", metavar="X", help="Held out where the data has no split [0.1].")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, metavar="N", help="Only so many pairs.")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", min=0, metavar="N", help="Stop after N epochs without gain [4].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="[default: 0]")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="NAME", help="auto, fp32, bf16 or fp16 [default: auto].")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.NAME=VALUE", help="Any setting of a recipe; may be repeated."),
    ] = None,
    workers: options.Workers = None,
    device: options.OnDevice = options.Device.AUTO,
    force: Annotated[bool, typer.Option("--force", help="Start anew whatever is in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fine-tune a model on pictures with captions; interrupted, the same command goes on."""
    if out is None:
        raise UsageError(
            "--out", expected="a folder for the checkpoint", got="nothing", do="Add --out checkpoints/NAME."
        )
    given: dict[str, Any] = {
        "start.model": model,
        "run.epochs": epochs,
        "run.batch_size": batch_size,
        "run.lr": lr,
        "run.chunk": chunk,
        "run.patience": patience,
        "run.seed": seed,
        "run.precision": precision,
        "run.device": None if device == options.Device.AUTO else device.value,
        "data.val_share": val_share,
        "data.limit": limit,
        "data.workers": workers,
        "objective.name": loss,
        "objective.teacher": teacher,
        "text.train": _part(tune_text),
        "image.train": _part(tune_image),
        "text.lora": lora,
        "image.lora": lora,
        "augment.enabled": augment,
    }
    with Bar("training", unit="steps") as bar:
        report: TrainReport = ctx.obj.train(
            pairs or [], out, recipe=recipe, given={k: v for k, v in given.items() if v is not None},
            assignments=setting or [], force=force, watcher=bar, environ=os.environ,
        )  # fmt: skip
    if json:
        emit(as_json(report.to_json()))
        return
    for line in _lines(report):
        emit(line)


def _part(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text


def _lines(report: TrainReport) -> Iterator[str]:
    yield (
        f"{plural(report.pairs, 'picture')} trained on, {report.held_out} held out, {plural(report.steps, 'step')} in "
        f"{plural(report.epochs, 'epoch')} (best: {report.best_epoch}), {report.seconds:.0f} s"
    )
    if report.comparison is not None:
        yield from report.comparison.lines()
    if report.share < 1.0:
        yield f"The model holds {100 * report.share:.0f} % of the new weights and the rest of the old (WiSE-FT)."
    folder = report.checkpoint.parent
    yield f"checkpoint: {folder}  (curves: {folder / 'curves.png'}, settings: {folder / 'settings.json'})"
