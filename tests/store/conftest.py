"""Places for tests that sync a lot: in memory where the system has such a folder."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

_COUNT = itertools.count()


@pytest.fixture(scope="session")
def quick_base():
    shared = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="mmsearch-test-", dir=shared if os.access(shared, os.W_OK) else None))
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def quick_path(quick_base):
    """As tmp_path, where syncing costs little."""
    path = quick_base / str(next(_COUNT))
    path.mkdir()
    return path
