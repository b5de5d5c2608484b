"""`mmsearch models`: the bundled model, and what `--model` accepts."""

from __future__ import annotations

import typer

from mmsearch.cli import options
from mmsearch.cli.terminal import as_json, emit, guarded

ACCEPTED = (
    ("nothing", "the bundled model; never needs a network"),
    ("a directory", "a checkpoint of mmsearch (config.json, model.safetensors, tokenizer.json)"),
    ("a directory", "CLIP, SigLIP or VisionTextDualEncoder as transformers saves them (safetensors only)"),
    ("a hub name", "the same families, as OWNER/NAME; needs a network the first time"),
)


@guarded()
def models(ctx: typer.Context, json: options.Json = False) -> None:
    """Show the bundled model and what --model accepts."""
    bundled = ctx.obj.bundled_model()
    accepted = [{"what": what, "meaning": meaning} for what, meaning in ACCEPTED]
    if json:
        emit(as_json({"bundled": bundled, "accepted": accepted}, indent=2))
        return
    emit("bundled model")
    for name, value in bundled.items():
        if name != "figures":
            emit(f"  {name:<14} {value}")
    for line in bundled["figures"]:  # a Markdown table; its ruler is for Markdown
        if set(line) - set("|-: "):
            emit("  " + "  ".join(f"{cell.strip():<22}" for cell in line.strip("|").split("|")).rstrip())
    emit("\n--model accepts")
    for what, meaning in ACCEPTED:
        emit(f"  {what:<14} {meaning}")
