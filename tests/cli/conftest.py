"""A command line without a model, in a folder of its own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fakes import Ended, FakeLibrary

from mmsearch.cli.app import main
from mmsearch.cli.library import Library


@pytest.fixture
def mmsearch(capsysbinary, monkeypatch, tmp_path) -> Callable[..., Ended]:
    """Run `mmsearch ARGS...` in an empty folder without any of its environment variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("MMSEARCH_INDEX", "MMSEARCH_HOME"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: str | Path, library: Library | None = None) -> Ended:
        code = main([str(arg) for arg in args], library=library or FakeLibrary())
        out, err = capsysbinary.readouterr()
        return Ended(code, os.fsdecode(out), err.decode())  # stderr is valid UTF-8 whatever is said

    return run
