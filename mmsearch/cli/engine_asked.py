"""What commands ask of an engine, or of an index directory under conditions; and which options go with neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import IndexMismatchError, UsageError

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.scale.engine_searcher import EngineSearcher


def open_engine_searcher(
    path: Path | str | Sequence[Path],
    encoder: Encodes | None,
    *,
    device: str,
    model: str | None,
    partial: bool,
    reranker: Path | None,
) -> EngineSearcher:
    """`EngineSearcher.open`. `model`: what `encoder` was named as, None where that is the index's own.

    Raises `UsageError` for the options that are not heeded here, `partial` and `reranker`, and for a directory whose
    model is another one.
    """
    from mmsearch.scale.engine_searcher import EngineSearcher, address_of

    if partial or reranker is not None:
        option = "--partial" if partial else "--reranker"
        do = "Leave it out; a second stage and partial answers of several directories are there without both."
        raise UsageError(option, expected="no --where and no address beside it", got="one", do=do)
    try:
        return EngineSearcher.open(address_of(path), encoder=encoder, device=device)
    except IndexMismatchError as error:
        if model is None or isinstance(path, str):
            raise
        do = "Conditions are not searched over a bridge: leave out --model or --where, or give the index that model."
        raise UsageError("--model", expected="the model of the index beside --where", got=model, do=do) from error


def check_no_cluster(**options: str | None) -> None:
    """Options of a cluster mean nothing without one."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise UsageError(f"--{given}", expected="--engine ray beside it", got="--engine local")
