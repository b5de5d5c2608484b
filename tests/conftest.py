"""Fixtures that several folders of tests share: tiny models, made once a run."""

import pytest

from mmsearch.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory):
    """A tiny checkpoint directory without graphs. Read only: copy it before you change it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def graph_checkpoint(tmp_path_factory):
    """A tiny checkpoint directory with ONNX graphs. Read only: copy it before you change it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "graphs", graphs=True)
