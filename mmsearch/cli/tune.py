"""`mmsearch tune`: choose how an index is laid out for searching, and how hard it looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from mmsearch.cli import options
from mmsearch.cli.places import chosen_index
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import as_json, emit, guarded, say

RESUME = "interrupted: the index answers as before. Run the same command again to go on where it stopped."


@guarded(interrupted=RESUME)
def tune(
    ctx: typer.Context,
    index: options.Index = None,
    kind: options.Kind = None,
    memory: options.Memory = None,
    overlap: options.Overlap = None,
    queries: options.Queries = None,
    anew: Annotated[bool, typer.Option("--anew", help="Train and tune again although nothing asks for it.")] = False,
    device: options.OnDevice = options.Device.AUTO,
    json: options.Json = False,
) -> None:
    """Choose how an index is searched, and measure what that finds of the exact answers."""
    target = chosen_index(index, ctx.obj)
    with Bar("tuning", unit="rows") as bar:
        facts = ctx.obj.tune(
            target, kind=kind, memory=memory, overlap=overlap, queries=queries, anew=anew, device=device.value,
            progress=bar,
        )  # fmt: skip
    for modality, one in facts.items():
        for line in summary(modality, one):
            say(line)
    if json:
        emit(as_json(facts, indent=2))


def summary(modality: str, facts: Mapping[str, Any]) -> Iterable[str]:
    """What a person wants to know of the index of one modality, line by line."""
    size = f", {facts['bytes'] / 1e6:,.0f} MB" if facts["bytes"] else ""
    yield f"{modality}: {facts['rows']:,} rows, {facts['kind']}{size}"
    tuned = facts.get("tuned")
    if not tuned:
        yield "  searched exactly"
        return
    took = f": {tuned['microseconds'] / 1000:.2f} ms a query on one thread" if tuned["microseconds"] else ""
    yield f"  {facts['factory']}, {_looks(tuned['parameters'])}{took}"
    for sort, overlap in tuned["overlap"].items():
        asked = tuned["queries"][sort]
        yield f"  overlap@10 with exact search, {sort} queries: {overlap:.3f} ({asked['count']}, {asked['source']})"


def _looks(parameters: Mapping[str, int]) -> str:
    names = {"probes": "lists", "effort": "nodes in view", "factor": "candidates an answer"}
    return ", ".join(f"{value} {names[name]}" for name, value in parameters.items() if value > (name == "factor"))
