"""A folder for tests of what may not be read, also where they run as root, who may read everything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NOBODY = 65534


@pytest.fixture
def shared_path() -> Iterator[Path]:
    """As `tmp_path`, but everyone may enter it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Nobody may read `paths` within the block."""
    root = os.geteuid() == 0
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0)
    try:
        if root:
            os.seteuid(_NOBODY)
        if any(os.access(path, os.R_OK, effective_ids=True) for path in paths):
            pytest.skip("this user may read everything")
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
