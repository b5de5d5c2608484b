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


class Engine(StrEnum):
    """What decodes and encodes the pictures of a build."""

    LOCAL = "local"
    RAY = "ray"


class ItemVectors(StrEnum):
    """What stands for an item with a picture and texts."""

    SEPARATE = "separate"
    FUSED = "fused"


class VectorsOf(StrEnum):
    """What imported vectors were made of."""

    IMAGE = "image"
    TEXT = "text"


class ExportOf(StrEnum):
    """Which vectors of an index are exported."""

    IMAGE = "image"
    TEXT = "text"
    BOTH = "both"


class ExportFormat(StrEnum):
    """Files that an export writes."""

    CLIP_RETRIEVAL = "clip-retrieval"
    NPY = "npy"
    PARQUET = "parquet"
    ARROW = "arrow"
    FAISS = "faiss"


Index = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="The index [default: $MMSEARCH_INDEX, else the last updated]."),
]
Indexes = Annotated[
    list[str] | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="The index; repeated, several as one [default: $MMSEARCH_INDEX, else the last updated].",
    ),
]
Partial = Annotated[
    bool, typer.Option("--partial", help="Of several indexes, go on without those that are missing or damaged.")
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help='Only items whose metadata fulfil it: year>=2020, city=Bern, city in ["A", "B"]; repeated, all of them.',
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="How rows are laid out for searching: auto, exact, flat, sq8, ivf-flat, ivf-sq8, ivf-pq, ivf-pq-fs, opq,"
        " hnsw, hnsw-sq8, rabitq, or a FAISS factory string [default: the index's, else auto].",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="What the index may hold in memory: 4G, 500M, none [default: none]."),
]
Overlap = Annotated[
    float | None,
    typer.Option("--overlap", metavar="X", help="Share of the exact top 10 to find, 0.5 to 1 [default: 0.95]."),
]
Queries = Annotated[
    str | None,
    typer.Option(
        "--queries", metavar="FILE", help="Texts to tune on, one a line [default: captions of the collection]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="A model directory or hub name [default: the bundled model]."),
]
NewModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The new model: a directory or hub name, or 'bundled'. Required."),
]
OnDevice = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, metavar="N", help="Pictures a model step [default: chosen].")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="Decoding processes [default: chosen].")
]
