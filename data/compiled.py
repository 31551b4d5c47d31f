"""The one decorator of loops that Numba compiles: what NumPy would pass over several times, in one pass and without Python's lock.

A loop is compiled for the types of its first call, in about half a second. What is compiled is kept for the next process: beside the
loop's file, or where that cannot be written in the user's cache folder (NUMBA_CACHE_DIR).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Compile a function of arrays and numbers, with Python's results: of integers without overflow checks, of floats to the last bit."""
    compile: Any = numba.njit  # whose result is called as the function is
    try:
        return compile(loop, nogil=True, cache=True)
    except RuntimeError:  # no folder to keep it in: compiled anew in each process
        return compile(loop, nogil=True)
