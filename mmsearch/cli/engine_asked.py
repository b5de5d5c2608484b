"""What commands ask of an engine, and which options do not go with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.scale.engine_searcher import EngineSearcher


def open_engine_searcher(
    address: str,
    encoder: Encodes | None,
    *,
    device: str,
    partial: bool,
    reranker: Path | None,
) -> EngineSearcher:
    """`EngineSearcher.open`; `UsageError` for the options that are not heeded here, `partial` and `reranker`."""
    from mmsearch.scale.engine_searcher import EngineSearcher

    if partial or reranker is not None:
        option = "--partial" if partial else "--reranker"
        do = "Leave it out; a second stage and partial answers of several directories are there without both."
        raise UsageError(option, expected="no address beside it", got="one", do=do)
    return EngineSearcher.open(address, encoder=encoder, device=device)


def check_no_cluster(**options: str | None) -> None:
    """Options of a cluster mean nothing without one."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise UsageError(f"--{given}", expected="--engine ray beside it", got="--engine local")
