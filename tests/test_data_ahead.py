"""Proves that work done ahead comes out in order, that its errors reach the taker, and that nobody waits for ever."""

import threading
import time

import pytest

from data.errors import InputError
from data.reading.prefetch import Ahead, Patience, prefetched


def patience(seconds=5.0, reading=()):
    return Patience(seconds, lambda: list(reading))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_each_result_belongs_to_its_key_whatever_the_order_of_taking(threads):
    ahead = Ahead(threads, patience())
    for key in range(20):
        ahead.give(key, lambda key=key: key * key)
    assert [ahead.take(key) for key in (3, 0, 19, *range(4, 19), 1, 2)] == [
        9,
        0,
        361,
        *(k * k for k in range(4, 19)),
        1,
        4,
    ]
    ahead.close()


def test_threads_work_before_anyone_asks_and_side_by_side():
    ahead, both = Ahead(2, patience()), threading.Barrier(2)
    for key in range(2):
        ahead.give(key, lambda: both.wait(5))
    assert sorted(ahead.take(key) for key in range(2)) == [0, 1]  # neither could pass alone
    ahead.close()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (InputError("bad"), InputError),
        # as themselves they would end the process as if all were well
        (SystemExit(3), RuntimeError),
        (KeyboardInterrupt(), RuntimeError),
    ],
    ids=repr,
)
def test_any_error_reaches_the_taker_and_the_thread_lives_on(error, raised):
    def fails():
        raise error

    ahead = Ahead(1, patience())
    ahead.give("bad", fails)
    ahead.give("good", lambda: 1)
    with pytest.raises(raised):
        ahead.take("bad")
    assert ahead.take("good") == 1
    ahead.close()


def test_a_stuck_task_is_named_in_time():
    ahead, release = Ahead(1, patience(0.2, ["log.parquet: row group 3"])), threading.Event()
    ahead.give("stuck", release.wait)
    start = time.monotonic()
    with pytest.raises(
        InputError,
        match=r"^log.parquet: row group 3: no rows for 0.2 s \(data.timeout_seconds\); check the disk",
    ):
        ahead.take("stuck")
    assert time.monotonic() - start < 2
    release.set()
    ahead.close()


def test_prefetched_items_keep_their_order_and_only_so_many_are_made_ahead():
    made = []

    def items():
        for number in range(10):
            made.append(number)
            yield number

    iterator = prefetched(items(), 2, patience())
    assert next(iterator) == 0
    time.sleep(0.3)
    assert len(made) <= 4  # the one taken, two in the queue, one in the maker's hand
    assert list(iterator) == list(range(1, 10))


def test_prefetch_hands_on_errors_and_closes_what_it_leaves():
    closed = threading.Event()

    def items():
        try:
            yield 1
            yield 2
            raise InputError("bad row")
        finally:
            closed.set()

    iterator = prefetched(items(), 1, patience())
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(InputError, match="bad row"):
        next(iterator)
    closed.clear()
    iterator = prefetched(items(), 1, patience())
    next(iterator)
    iterator.close()
    assert closed.wait(5)


def test_prefetch_does_not_wait_for_ever():
    release = threading.Event()

    def items():
        release.wait(10)
        yield 1

    with pytest.raises(InputError, match=r"the data stream: no rows for 0.2 s"):
        next(prefetched(items(), 1, patience(0.2)))
    release.set()
