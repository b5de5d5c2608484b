"""Options that several verbs share, defined once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Target(StrEnum):
    """What a query looks through."""

    IMAGE = "image"
    TEXT = "text"
    ANY = "any"


class ItemVectors(StrEnum):
    """What stands for an item with a picture and texts."""

    SEPARATE = "separate"
    FUSED = "fused"


Index = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="The index [default: $MMSEARCH_INDEX, else the last updated]."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="A model directory or hub name [default: the bundled model]."),
]
OnDevice = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, metavar="N", help="Pictures a model step [default: chosen].")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="Decoding processes [default: chosen].")
]
