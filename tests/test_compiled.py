"""Proves that compiled loops run where what is compiled cannot be kept, that what serves, prints help or reads a config needs no Numba, and a config
no TorchRec."""

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
QUIET = ("mbcnet_rec.config", "mbcnet_rec.model.models", "data.reading.encode", "data.reading.decode", "mbcnet_rec.cli")


def test_a_loop_runs_where_nothing_can_be_kept():
    scope = {}
    exec(compile(LOOP, "<no file>", "exec"), scope)  # as in a folder that is read only, without a home
    loop = compiled(scope["total"])
    assert loop(np.arange(5)) == 10 and loop.nopython_signatures


def test_serving_help_and_configs_import_no_numba_and_a_config_no_torchrec():
    # the server, whose packages may be missing, is kept from it by its import contract
    heavy = "print({'numba', 'torchrec', 'fbgemm_gpu'} & set(sys.modules))"
    code = f"import sys; {'; '.join(f'import {name}' for name in QUIET)}; {heavy}; import mbcnet_rec.serving.loader; {heavy}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["set()", "{'fbgemm_gpu'}"]
