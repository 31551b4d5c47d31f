"""Runs compiled loops on the OpenMP threads that torch's operations use.

Threads of our own would compete with torch's, which spin while they wait for the next operation: a loop split over two threads of our own took as
long as on one.
"""

import ctypes
from collections.abc import Callable, Sequence

_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_together(parts: Sequence[Callable[[], None]]) -> None:
    """Run the parts in parallel on torch's threads; the first error of a part is raised once all parts have ended.

    Each thread costs 0.1 ms to start, mostly waiting for the GIL, so a part should run longer than that and release the GIL.
    """
    todo, errors = list(parts), list[BaseException]()

    def work(_: int | None = None) -> None:
        while todo:
            try:
                todo.pop()()
            except BaseException as error:  # ctypes would print it and go on
                errors.append(error)

    # the OpenMP library's entry point for a parallel region; torch loads that library into the global namespace
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if len(parts) > 1 else None
    if parallel is None:
        work()
    else:
        # The name keeps the callback alive. 0 means all threads, as in torch's own regions: a smaller team would end the others, to be started anew.
        callback = _WORK(work)
        parallel(callback, None, ctypes.c_uint(0), ctypes.c_uint(0))
    if errors:
        raise errors[0]
