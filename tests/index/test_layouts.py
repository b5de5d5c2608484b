"""Which layout is chosen, and what is refused."""

from __future__ import annotations

import pytest

from mmsearch.errors import UsageError
from mmsearch.index.estimate import estimate
from mmsearch.index.layouts import FLAT, kind_names, layout_of, lists_for


def test_few_rows_are_searched_exactly():
    """Below 50,000 nothing is trained; above, something is."""
    assert layout_of("auto", n=49_999, d=384).kind == FLAT
    assert layout_of("auto", n=50_000, d=384).kind == "ivf-pq-fs"


def test_auto_keeps_to_the_memory_it_was_given():
    """Coarser codes for less memory, and a clear refusal when none is coarse enough."""
    n, sizes = 10_000_000, []
    for budget in (None, 600 << 20, 400 << 20, 250 << 20):
        layout = layout_of("auto", n=n, d=384, memory=budget)
        sizes.append(layout.row_bytes)
        assert budget is None or n * layout.row_bytes <= budget
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    with pytest.raises(UsageError, match="at least"):
        layout_of("auto", n=n, d=384, memory=1 << 20)


def test_a_named_kind_that_does_not_fit_is_refused_with_what_it_needs():
    """The number of bytes is in the message."""
    with pytest.raises(UsageError, match="bytes for 1,000,000 rows as hnsw"):
        layout_of("hnsw", n=1_000_000, d=384, memory=100 << 20)


def test_too_few_rows_to_learn_from_are_searched_exactly():
    """Whatever kind was asked for."""
    for kind in kind_names():
        assert layout_of(kind, n=100, d=8).kind in (FLAT, "exact")


@pytest.mark.parametrize("d", [1, 7, 13, 384, 768])
def test_codes_divide_the_dimension(d):
    """FAISS wants sub-quantisers of equal width."""
    import faiss

    for kind in ("ivf-pq", "ivf-pq-fs"):
        layout = layout_of(kind, n=100_000, d=d)
        assert faiss.index_factory(d, layout.factory, faiss.METRIC_INNER_PRODUCT).d == d


def test_raw_factory_strings_are_taken_and_nonsense_is_not():
    """A misspelt kind is not handed to FAISS."""
    assert layout_of("IVF128,SQ8", n=9999, d=16).lists == 128
    with pytest.raises(UsageError, match="ivf-pq-fs"):
        layout_of("fast", n=9999, d=16)


@pytest.mark.parametrize(
    "factory", ["Hello", "PQ7", "IVF16,PQ8,RFlat", "IVF16,Flat,Refine(SQfp16)", "IDMap,Flat", "NSG16,Flat", "PQ8x4fs"]
)
def test_strings_that_cannot_be_searched_as_others_are_refused(factory):
    """Before a row is encoded or added, in one line with the string."""
    with pytest.raises(UsageError, match=factory.split(",")[0]):
        layout_of(factory, n=99_999, d=32)
    assert layout_of("IVF4k,SQ8", n=99_999, d=32).lists == 4096
    assert layout_of("PCA16,IVF64,Flat", n=99_999, d=32).lists == 64


def test_lists_grow_with_the_square_root():
    """Known values."""
    assert (lists_for(1), lists_for(1_000_000), lists_for(10**12)) == (16, 4096, 1 << 18)


def test_what_a_build_takes_grows_with_its_rows():
    """At a given speed: memory and time of ten times the rows are about ten times as large."""
    small = estimate(layout_of("auto", n=1_000_000, d=384), n=1_000_000, d=384, flops=1e11)
    large = estimate(layout_of("auto", n=10_000_000, d=384), n=10_000_000, d=384, flops=1e11)
    assert 9 < large.resident / small.resident < 11
    assert 5 < large.seconds / small.seconds < 40
    assert "MB in memory" in str(small)
