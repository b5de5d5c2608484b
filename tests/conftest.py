"""Fixtures that several folders of tests share, and how a whole run is spread over the cores.

A run of everything takes a process a core (pytest-xdist); a run of named tests is one process, as a debugger wants it.
`-n N` says otherwise. A file's tests stay together, for its fixtures are made once; so do all that start clusters and
databases, which are too large to run beside each other, and all that use a GPU.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything reads it: a process has one core to itself
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from mmsearch.testing import tiny_checkpoint


def pytest_xdist_auto_num_workers(config):
    """0 is one process, the debugger's; None is a process a core."""
    return None if config.args_source is config.ArgsSource.TESTPATHS else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is to stay in one process, for `--dist loadgroup`."""
    for item in items:
        heavy = any(item.get_closest_marker(name) for name in ("ray", "engines", "gpu"))
        item.add_marker(pytest.mark.xdist_group("heavy" if heavy else item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory):
    """A tiny checkpoint directory without graphs. Read only: copy it before you change it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def graph_checkpoint(tmp_path_factory):
    """A tiny checkpoint directory with ONNX graphs. Read only: copy it before you change it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "graphs", graphs=True)
