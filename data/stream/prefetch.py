"""Work done ahead of its use, in threads, in order, with a time limit on every wait."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import NamedTuple, TypeVar

from data.errors import InputError

T = TypeVar("T")
_END = object()


class TimeLimit(NamedTuple):
    """How long to wait, and a function that names what is being read when the time is up."""

    seconds: float
    reading: Callable[[], list[str]]

    def exceeded(self) -> InputError:
        """The error of a wait that took too long."""
        return InputError(
            f"{'; '.join(self.reading()) or 'the data stream'}: no rows for {self.seconds:g} s (data.timeout_seconds); "
            "check the disk or network that holds the file, or raise the limit"
        )


def _as_error(error: BaseException) -> Exception:
    """What ends a thread, as the caller raises it: a SystemExit would end the process there as if all were well."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{threading.current_thread().name} ended by {error!r}")


class Workers:
    """Threads that run tasks in the order in which they are begun. With no threads each runs when its result is asked for.

    A ThreadPoolExecutor's threads are joined before the process ends; these are daemons, so that one stuck in a read keeps none alive.
    """

    def __init__(self, threads: int, limit: TimeLimit, name: str = "data-worker") -> None:
        self.threads, self.limit = threads, limit
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], object]] | None] = queue.SimpleQueue()
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._work, daemon=True, name=f"{name}-{number}").start()

    def begin(self, task: Callable[[], T]) -> Callable[[], T]:
        """Queue a task; return what waits for its result, and raises its error, or InputError if there is none in time."""
        if not self.threads:
            return task
        future: Future[T] = Future()
        self._tasks.put((future, task))

        def result() -> T:
            try:
                return future.result(self.limit.seconds)
            except TimeoutError:
                if future.done():  # the task's own error
                    raise
                raise self.limit.exceeded() from None

        return result

    def close(self) -> None:
        """Let the threads end after their current task."""
        self._closed = True
        for _ in range(self.threads):
            self._tasks.put(None)

    def _work(self) -> None:
        while (begun := self._tasks.get()) is not None and not self._closed:
            future, task = begun
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(_as_error(error))
            del begun, future, task


def prefetched(items: Iterator[T], depth: int, limit: TimeLimit) -> Iterator[T]:
    """Make items ahead in one thread, at most `depth` of them. Errors are raised in the caller; InputError if one takes too long."""
    with closing(Workers(1, limit, "data-prefetch")) as maker:
        make = partial(next, items, _END)
        results = deque(maker.begin(make) for _ in range(depth))
        del items  # the thread alone holds it, and closes it
        while (item := results.popleft()()) is not _END:
            results.append(maker.begin(make))
            yield item  # type: ignore[misc]
