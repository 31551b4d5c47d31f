"""Proves that compiled loops run where what is compiled cannot be kept, and that what serves and what prints help need no Numba."""

import subprocess
import sys

import numpy as np

from data.compiled import compiled

LOOP = """
def total(numbers):
    sum = 0
    for number in numbers:
        sum += number
    return sum
"""
QUIET = ("data.reading.encode", "data.reading.decode", "mbcnet_rec.cli", "mbcnet_rec.serving.loader")


def test_a_loop_runs_where_nothing_can_be_kept():
    scope = {}
    exec(compile(LOOP, "<no file>", "exec"), scope)  # as in a folder that is read only, without a home
    loop = compiled(scope["total"])
    assert loop(np.arange(5)) == 10 and loop.nopython_signatures


def test_serving_and_help_import_no_numba():
    # the server, whose packages may be missing, is kept from it by its import contract
    code = f"import sys; {'; '.join(f'import {name}' for name in QUIET)}; print('numba' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
