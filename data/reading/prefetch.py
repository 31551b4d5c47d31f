"""Work done ahead of its use, in threads, in order, with a time limit on every wait."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from data.errors import InputError

T = TypeVar("T")
LEAST_PAUSE, POLL_SECONDS = 0.0005, 0.02


class TimeLimit(NamedTuple):
    """How long to wait, and what tells then what is being read."""

    seconds: float
    reading: Callable[[], list[str]]

    def exceeded(self) -> InputError:
        """The error of who has waited too long."""
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

    def __init__(self, threads: int, limit: TimeLimit) -> None:
        self.threads, self.limit = threads, limit
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], object]] | None] = queue.SimpleQueue()
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._work, daemon=True, name=f"data-worker-{number}").start()

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
        """Let the threads end after the task they are at."""
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
    """Make items ahead in one thread, at most `depth` of them. Errors are raised in the caller.

    A caller that finds an item ready wakes nobody, which costs a twentieth of a millisecond where the other core sleeps; the maker
    looks again by itself, soon at first and then less often.

    Raises:
        InputError: no item in time.
    """
    ready: deque[tuple[bool, T | BaseException | None]] = deque()
    filled, abandoned = threading.Event(), threading.Event()

    def put(is_item: bool, item: T | BaseException | None) -> bool:
        pause = LEAST_PAUSE
        while len(ready) >= depth:
            if abandoned.wait(pause):
                return False
            pause = min(1.5 * pause, POLL_SECONDS)
        ready.append((is_item, item))
        filled.set()
        return not abandoned.is_set()

    def produce() -> None:
        try:
            for item in items:
                if not put(True, item):
                    break
            else:
                put(False, None)
        except BaseException as error:
            put(False, _as_error(error))
        finally:
            if hasattr(items, "close"):
                items.close()

    threading.Thread(target=produce, daemon=True, name="data-prefetch").start()
    try:
        while True:
            while not ready:
                filled.clear()
                if not ready and not filled.wait(limit.seconds):
                    raise limit.exceeded()
            is_item, item = ready.popleft()
            if is_item:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        abandoned.set()
