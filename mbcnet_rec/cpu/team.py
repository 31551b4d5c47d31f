"""Compiled loops on the threads that torch's operations run on, those of OpenMP.

Threads of our own would share the cores with them: they spin for the next operation. Half a loop on one took as long as the whole one alone.
"""

import ctypes
from collections.abc import Callable, Sequence

_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_together(parts: Sequence[Callable[[], None]]) -> None:
    """Run the parts, one for each thread of torch's; what one raises is raised here, once all have ended.

    A thread's start costs 0.1 ms, most of it for Python's lock: parts pay if they take longer, and let go of the lock.
    """
    todo, errors = list(parts), list[BaseException]()

    def work(_: int | None = None) -> None:
        while todo:
            try:
                todo.pop()()
            except BaseException as error:  # ctypes would print it and go on
                errors.append(error)

    # what the compiler makes of a parallel region; torch loads it for all
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if len(parts) > 1 else None
    if parallel is None:
        work()
    else:
        # a name keeps the callback alive; 0: all threads, as torch does, for those left out would end and be started anew
        callback = _WORK(work)
        parallel(callback, None, ctypes.c_uint(0), ctypes.c_uint(0))
    if errors:
        raise errors[0]
