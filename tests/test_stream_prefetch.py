"""Proves that work done ahead comes out in order, that its errors reach the caller, and that every wait ends."""

import threading
import time

import pytest

from data.errors import InputError
from data.stream.prefetch import TimeLimit, Workers, prefetched


def limit(seconds=5.0, reading=()):
    return TimeLimit(seconds, lambda: list(reading))


@pytest.fixture
def workers(request):
    made = Workers(request.param, limit(0.5, ["log.parquet: row group 3"]))
    yield made
    made.close()


@pytest.mark.parametrize("workers", [0, 1, 3], indirect=True)
def test_each_task_has_its_own_result_whatever_the_order_of_asking(workers):
    results = [workers.begin(lambda number=number: number * number) for number in range(20)]
    order = [3, 0, 19, *range(4, 19), 1, 2]
    assert [results[number]() for number in order] == [number * number for number in order]


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_threads_work_before_anyone_asks_and_side_by_side(workers):
    both = threading.Barrier(2)
    results = [workers.begin(lambda: both.wait(5)) for _ in range(2)]
    assert sorted(result() for result in results) == [0, 1]  # neither could pass alone


@pytest.mark.parametrize("workers", [1], indirect=True)
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (InputError("bad"), InputError),
        (TimeoutError("of the task itself"), TimeoutError),
        # as themselves they would end the process as if all were well
        (SystemExit(3), RuntimeError),
        (KeyboardInterrupt(), RuntimeError),
    ],
    ids=repr,
)
def test_any_error_reaches_the_caller_and_the_thread_lives_on(workers, error, raised):
    def fails():
        raise error

    bad, good = workers.begin(fails), workers.begin(lambda: 1)
    with pytest.raises(raised):
        bad()
    assert good() == 1


@pytest.mark.parametrize("workers", [1], indirect=True)
def test_a_stuck_task_is_named_in_time(workers):
    release = threading.Event()
    result, start = workers.begin(release.wait), time.monotonic()
    said = r"^log.parquet: row group 3: no rows for 0.5 s \(data.timeout_seconds\); check the disk"
    with pytest.raises(InputError, match=said):
        result()
    assert time.monotonic() - start < 3
    release.set()


def test_prefetched_items_keep_their_order_and_only_so_many_are_made_ahead():
    made = []
    iterator = prefetched((made.append(number) or number for number in range(10)), 2, limit())
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

    iterator = prefetched(items(), 1, limit())
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(InputError, match="bad row"):
        next(iterator)
    closed.clear()
    iterator = prefetched(items(), 1, limit())
    next(iterator)
    iterator.close()
    assert closed.wait(5)
