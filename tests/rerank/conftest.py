"""Tiny re-rankers on disk, made once a run. Read only: copy them before you change them."""

import pytest

from mmsearch.rerank.checkpoint import load_rerank_model, save_reranker
from mmsearch.testing import tiny_reranker


@pytest.fixture(scope="session")
def plain_reranker(tmp_path_factory):
    """Cross-attention without graphs, with a bank of four rows a side."""
    return tiny_reranker(tmp_path_factory.mktemp("rerankers") / "plain", bank=4)


@pytest.fixture(scope="session")
def graph_reranker(tmp_path_factory):
    """Cross-attention with all graphs (the towers have none: nothing here reads them)."""
    folder = tmp_path_factory.mktemp("rerankers") / "graphs"
    plain = tiny_reranker(folder)
    return save_reranker(load_rerank_model(plain), folder, name="tiny", scoring_json=plain.scoring_json)
