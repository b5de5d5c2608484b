"""`mmsearch tune`: what it hands on, what it says, how it ends."""

import json
from pathlib import Path

from cli_fakes import FakeLibrary

from mmsearch.errors import IndexLockedError, UsageError

FACTS = {
    "image": {
        "kind": "ivf-pq-fs",
        "rows": 1_000_000,
        "bytes": 110_000_000,
        "factory": "IVF4096_HNSW32,PQ192x4fsr",
        "tuned": {
            "parameters": {"probes": 24, "effort": 0, "factor": 4},
            "overlap": {"text": 0.9512, "image": 0.97},
            "microseconds": 310.0,
            "queries": {"text": {"count": 512, "source": "captions"}, "image": {"count": 512, "source": "pictures"}},
        },
    },
    "text": {"kind": "faiss-flat", "rows": 900, "bytes": 0},
}


def test_every_option_reaches_the_library(mmsearch):
    """What the user asked for is what is tuned."""
    library = FakeLibrary(facts=FACTS)
    line = "tune --index i --kind ivf-flat --memory 4G --overlap 0.9 --queries q.txt --anew --device cpu"
    assert mmsearch(*line.split(), library=library).code == 0
    name, told = library.calls[0]
    told.pop("progress")
    assert (name, told) == (
        "tune",
        {
            "path": Path("i"), "kind": "ivf-flat", "memory": "4G", "overlap": 0.9, "queries": "q.txt", "anew": True,
            "device": "cpu",
        },
    )  # fmt: skip


def test_it_says_what_is_found_of_the_exact_answers(mmsearch):
    """Kind, size, how hard it looks, and the overlap for each sort of query; stdout stays empty."""
    ended = mmsearch("tune", "--index", "i", library=FakeLibrary(facts=FACTS))
    assert ended.out == ""
    assert "image: 1,000,000 rows, ivf-pq-fs, 110 MB" in ended.err
    assert "24 lists, 4 candidates an answer: 0.31 ms a query on one thread" in ended.err
    assert "text queries: 0.951 (512, captions)" in ended.err
    assert "text: 900 rows, faiss-flat\n  searched exactly" in ended.err


def test_json_is_all_of_it(mmsearch):
    """For scripts."""
    ended = mmsearch("tune", "--index", "i", "--json", library=FakeLibrary(facts=FACTS))
    assert json.loads(ended.out) == FACTS


def test_errors_have_their_exit_codes(mmsearch):
    """An unknown kind is a usage error; another writer is 6."""
    for error, code in [(UsageError("index kind", got="fast"), 2), (IndexLockedError("i", got="pid 3"), 6)]:
        assert mmsearch("tune", "--index", "i", library=FakeLibrary(fails=error)).code == code
