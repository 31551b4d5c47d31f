"""Work done ahead of its use, in threads, in order, with a time limit: nothing waits for ever. Imports no torch."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from data.errors import InputError

T = TypeVar("T")
LEAST_PAUSE, POLL_SECONDS = 0.0005, 0.02


class Patience:
    """How long to wait, and what to say when it is over. `reading` tells what is being read right now."""

    def __init__(self, seconds: float, reading: Callable[[], list[str]]) -> None:
        self.seconds, self.reading = seconds, reading

    def lost(self) -> InputError:
        """The error of a reader that waited too long."""
        places = self.reading()
        return InputError(
            f"{'; '.join(places) or 'the data stream'}: no rows for {self.seconds:g} s (data.timeout_seconds); "
            "check the disk or network that holds the file, or raise the limit"
        )


def _as_error(error: BaseException) -> Exception:
    """What ends a thread, as the taker raises it: a SystemExit would end the process there as if all were well."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{threading.current_thread().name} ended by {error!r}")


class Ahead(Generic[T]):
    """Tasks that threads work on in the order they were given. With no threads each runs when its result is taken.

    A thread that fails hands its error to the taker. A thread that is stuck costs the taker `patience`; threads are daemons, so that
    a stuck one does not keep the process alive.
    """

    def __init__(self, threads: int, patience: Patience) -> None:
        self.threads, self.patience = threads, patience
        self._given: queue.SimpleQueue[tuple[Hashable, Callable[[], T]] | None] = queue.SimpleQueue()
        self._tasks: dict[Hashable, Callable[[], T]] = {}  # without threads
        self._done: dict[Hashable, T | BaseException] = {}
        self._changed = threading.Condition()
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._work, daemon=True, name=f"data-worker-{number}").start()

    def give(self, key: Hashable, task: Callable[[], T]) -> None:
        """Queue a task."""
        if self.threads:
            self._given.put((key, task))
        else:
            self._tasks[key] = task

    def take(self, key: Hashable) -> T:
        """Return a task's result, once.

        Raises:
            InputError: no result in time. Whatever the task raised.
        """
        if not self.threads:
            return self._tasks.pop(key)()
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._done, self.patience.seconds):
                raise self.patience.lost()
            result = self._done.pop(key)
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Let the threads end after what they are at."""
        self._closed = True
        for _ in range(self.threads):
            self._given.put(None)

    def _work(self) -> None:
        while (given := self._given.get()) is not None and not self._closed:
            key, task = given
            result: T | BaseException
            try:
                result = task()
            except BaseException as error:  # the taker raises it
                result = _as_error(error)
            with self._changed:
                self._done[key] = result
                self._changed.notify_all()
            del given, task, result


def prefetched(items: Iterator[T], depth: int, patience: Patience) -> Iterator[T]:
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
                if not ready and not filled.wait(patience.seconds):
                    raise patience.lost()
            is_item, item = ready.popleft()
            if is_item:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        abandoned.set()
