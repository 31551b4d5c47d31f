"""Proves that every benchmark imports, answers --help with the options that all have, and, in the long lane, that --quick ends in time and gives
its figures; and that no wrong value of a config ends in a traceback."""

import importlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.errors import InputError
from mbcnet_rec.config import RunConfig, load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "def main()" in path.read_text()]
QUICK_SECONDS = 50.0
KEYS = {  # DESIGN.md names them; null where a peer is not installed
    "input": ("read_table_share_single", "read_table_share_mixed", "input_wait_share"),
    "step": ("gemm_share", "bf16_speedup", "cooperation_overhead", "non_model_share", "cpu_fast_path_speedup"),
    "growth": ("fields_exponent", "rows_exponent", "batch_exponent", "groups_exponent", "branches_exponent"),
    "peers": ("cpu_fast_path_speedup/small/dnn",),
}
VALUES = {
    "crash_storm": {"kills": 3, "bitwise_equal": True},
    "config_fuzz": {"failures": 0},
    "peers": {"fuxictr_speedup/small/dnn": None, "dlrm_speedup": None},
    "same_as": {"same": True},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_answers_help(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    words = capsys.readouterr().out
    assert ended.value.code == 0 and "--quick" in words and "--json" in words


def test_the_gpu_script_counts_gaps_and_ends_in_time_also_while_it_compiles(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    # which another test may have imported on a path of its own
    importlib.reload(importlib.import_module("side_by_side"))
    assert str(BENCHMARKS.parent) in sys.path  # so a checkout need not be installed
    assert gpu.gap_share([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0), (9.0, 10.0)]) == 0.5
    assert gpu.gap_share([]) is None
    assert gpu.COMPILED_BY < gpu.LIMIT_SECONDS < 480 and gpu.QUICKLY_BY < QUICK_SECONDS
    swallowed = []

    def compiling(**_):
        while len(swallowed) < 1:
            try:
                time.sleep(60)
            except TimeoutError:  # as a compiler might
                swallowed.append(1)
        time.sleep(60)

    arch = SimpleNamespace(compile=compiling)
    built = SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(dense_arch=arch)))
    monkeypatch.setattr(gpu, "AGAIN_SECONDS", 0.05)
    figures = gpu.compiled_figures(built, SimpleNamespace(), 1.0, 3, time.perf_counter() + 0.05)
    assert figures["compiled_speedup"] is None and "TimeoutError" in figures["not_compiled"]
    assert swallowed and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run_gives_its_figures_in_time(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert not [key for key in KEYS.get(name, ()) if key not in figures]
    wanted = VALUES.get(name, {})
    assert {key: figures[key] for key in wanted} == wanted
    assert not [key for key, value in figures.items() if key.endswith("_added") and value > 0]
    # seconds of two cores, not of the clock, and twice that: a test machine is shared, and may be half as fast as the one of the promise
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 2 * 2 * QUICK_SECONDS


def test_five_hundred_wrong_configs_are_refused_in_one_line_or_read(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fuzz, log = importlib.import_module("config_fuzz"), importlib.import_module("small_log")
    rng, keys, refused = random.Random(0), fuzz.keys_of(RunConfig), 0
    file = tmp_path / "run.toml"
    file.write_text(log.CONFIG.format(folder=tmp_path))
    for _ in range(500):
        try:
            load_config(file, fuzz.mutation(rng, keys))
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert len(keys) > 100 and 200 < refused < 450
