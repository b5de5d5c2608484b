"""Values made in advance by a thread: the same ones, its errors, and no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from mmsearch.train.prefetch import prefetched


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mmsearch-prefetch"]


@pytest.mark.parametrize("depth", [1, 3])
def test_all_values_come_in_order_and_the_thread_ends(depth):
    """Whatever the depth."""
    assert list(prefetched(lambda: (i for i in range(20)), depth=depth)) == list(range(20))
    assert alive() == []


def test_an_error_comes_after_the_values_before_it():
    """In the thread that takes the values, and as the error it is."""

    def broken():
        yield 1
        raise KeyError("two")

    values = prefetched(broken, depth=4)
    assert next(values) == 1
    with pytest.raises(KeyError, match="two"):
        next(values)
    assert alive() == []


def test_stopping_early_closes_the_source_in_its_own_thread():
    """A step that raises leaves nothing running."""
    closed: list[str] = []

    def endless():
        try:
            while True:
                yield threading.current_thread().name
        finally:
            closed.append(threading.current_thread().name)

    values = prefetched(endless, depth=1)
    assert next(values) == "mmsearch-prefetch"
    values.close()
    assert closed == ["mmsearch-prefetch"]
    assert alive() == []


def test_no_more_is_made_than_asked_for():
    """`depth` wait and one is in the making: memory stays bounded."""
    made: list[int] = []

    def counted():
        for i in range(100):
            made.append(i)
            yield i

    values = prefetched(counted, depth=2)
    next(values)
    time.sleep(0.1)
    assert len(made) <= 1 + 2 + 1
    values.close()
