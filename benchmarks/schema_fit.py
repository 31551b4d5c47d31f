"""How fast `mbcnet schema fit` counts: ratios to a bare Arrow read of the same columns, and to other libraries' value_counts, in turns.

    python benchmarks/schema_fit.py [--quick] [--json]

fit_share            processor seconds of pyarrow.parquet.read_table(use_threads=False) over those of a fit in one process, of a log whose
                     columns of ids have 100, 20,000 and up to 200,000 values
stream_share         the same of ParquetFile.iter_batches, which reads in fit's pieces and keeps none
two_workers          seconds of `mbcnet schema fit --workers 1` over those of `--workers 2`, starts included, on two cores; of 67 million rows
pandas_, polars_     their reading and value_counts of the same columns, processor seconds over fit's; null where they are not installed
rows, columns, distinct   fitted exponents of the seconds' growth
peak_mib             of `mbcnet schema fit` in one process of a column of 20 million different values (--quick: one million), resident

Prediction, written first: 1.5 (.4 with --quick, where reading a schema weighs most); .5; 1.8 (1 with --quick); 2; .5; 1, 1 and below 1; 700.
"""

import importlib
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from input import one_core
from side_by_side import parser_of, print_figures, ratio

from data.profile import units
from data.profile.fit import write_fitted
from data.schema import Schema, format_schema, parse_schema
from data.synthetic.write import open_writer

ROW_GROUP_ROWS = 65_536
VALUES = (100, 20_000, 200_000)


def main() -> int:
    args = parser_of(__doc__).parse_args()
    pa.set_cpu_count(1)
    rows, files, columns, rounds = (65_536, 4, 24, 2) if args.quick else (1_048_576, 8, 24, 3)
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), rows, files, columns, rounds)
        figures["two_workers"] = two_workers(Path(name), 2 if args.quick else 64, columns)
        figures["peak_mib"] = peak_mib(Path(name), 1_000_000 if args.quick else 20_000_000)
        print_figures(figures, args.json)
    return 0


def measure(folder: Path, rows: int, files: int, columns: int, rounds: int) -> dict[str, float | None]:
    """Write the log and take the figures of one core."""
    logs = copies(write_log(folder / "log.parquet", rows, columns, VALUES), files)
    schema = schema_of(columns)
    times: dict[str, list[float]] = {"read": [], "stream": [], "fit": [], "pandas": [], "polars": []}
    read = partial(pq.read_table, columns=names(columns), use_threads=False)
    with one_core():
        for _ in range(rounds):
            times["read"].append(seconds_of(lambda: deque(map(read, logs), maxlen=0)))
            times["stream"].append(seconds_of(lambda: deque(map(by_batches, logs), maxlen=0)))
            times["fit"].append(seconds_of(lambda: fit(schema, logs, folder / "fit")))
            for library in ("pandas", "polars"):
                if importlib.util.find_spec(library):
                    times[library].append(seconds_of(lambda library=library: by_library(library, logs, columns)))
    figures: dict[str, float | None] = {
        "fit_share": round(ratio(times["read"], times["fit"]), 3),
        "stream_share": round(ratio(times["stream"], times["fit"]), 3),
        "fit_rows_per_second": round(rows * files / statistics.median(times["fit"])),
    }
    for library in ("pandas", "polars"):
        figures[f"{library}_over_fit"] = round(ratio(times[library], times["fit"]), 3) if times[library] else None
    with one_core():
        for what in ("rows", "columns", "distinct"):
            figures[what] = growth(folder, rows, columns // 4, what)
    return figures


def copies(log: Path, files: int) -> list[Path]:
    """So many files, as large as a log of that many times its rows; not links, which are one file to `schema fit`."""
    return [log, *(Path(shutil.copyfile(log, log.with_stem(f"{log.stem}-{number}"))) for number in range(1, files))]


def two_workers(folder: Path, files: int, columns: int) -> float:
    """What a second worker is worth to a user of the command."""
    logs = copies(folder / "log.parquet", files)
    (folder / "many.toml").write_text(format_schema(schema_of(columns), "A benchmark."), encoding="utf-8")
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        for workers in (1, 2):
            words = ["schema", "fit", str(folder / "many.toml"), *map(str, logs), "-o", str(folder / "many"), "--force"]
            code = "import sys; from mbcnet_rec.cli import main; sys.exit(main(sys.argv[1:]))"
            call = [sys.executable, "-c", code, *words, "--workers", str(workers)]
            run = partial(subprocess.run, call, check=True, stdout=subprocess.DEVNULL)
            taken[workers - 1].append(seconds_of(run, time.perf_counter))
    for log in logs[1:]:
        log.unlink()
    return round(ratio(*taken), 3)


def growth(folder: Path, rows: int, columns: int, what: str) -> float:
    """The exponent with which the time of a fit grows with rows, columns or different values, over a factor of four."""
    taken = []
    for factor in (1, 2, 4):
        size = {"rows": rows, "columns": columns, "distinct": 10_000}
        size[what] *= factor
        log = write_log(folder / f"{what}.parquet", size["rows"], size["columns"], (size["distinct"],))
        schema = schema_of(size["columns"])
        taken.append(min(seconds_of(lambda s=schema, log=log: fit(s, [log], folder / "fit")) for _ in range(4)))
    return round(float(np.polyfit(np.log([1, 2, 4]), np.log(taken), 1)[0]), 2)


def names(columns: int) -> list[str]:
    return [f"f{number}" for number in range(columns)]


def schema_of(columns: int) -> Schema:
    field = {"kind": "categorical", "encoding": "vocabulary", "vocabulary": "fit", "min_count": 2, "embedding_dim": 8}
    return parse_schema(
        {"name": "s", "label": "y", "groups": {}, "fields": dict.fromkeys(names(columns), field)}, "s.toml", Path()
    )


def write_log(path: Path, rows: int, columns: int, values: tuple[int, ...]) -> Path:
    """Write columns of power-law ids."""
    draw = np.random.default_rng(0)
    with open_writer(path, pa.schema([(name, pa.int64()) for name in names(columns)])) as writer:
        for start in range(0, rows, ROW_GROUP_ROWS):
            count = min(ROW_GROUP_ROWS, rows - start)
            ids = [(values[i % len(values)] * draw.random(count) ** 3).astype(np.int64) for i in range(columns)]
            writer.write_table(pa.table(ids, names=names(columns)), row_group_size=ROW_GROUP_ROWS)
    return path


def fit(schema: Schema, logs: list[Path], out: Path) -> None:
    write_fitted(schema, logs, out, force=True)


def by_batches(log: Path) -> None:
    """Read in fit's pieces, and keep none."""
    deque(pq.ParquetFile(log).iter_batches(units.BATCH_ROWS), maxlen=0)


def by_library(library: str, logs: list[Path], columns: int) -> None:
    """Count the values of each column of what pandas or polars reads."""
    frame = importlib.import_module(library).read_parquet(logs)
    for name in names(columns):
        frame[name].value_counts()


def seconds_of(action: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    action()
    return clock() - start


def peak_mib(folder: Path, distinct: int) -> int:
    """The largest resident memory of a fit of so many different ids, each of which occurs once or twice."""
    log, step = folder / "ids.parquet", 2**20
    with open_writer(log, pa.schema([("f0", pa.int64())])) as writer:
        for start in range(0, distinct * 6 // 5, step):
            ids = (
                np.arange(start, start + step) % distinct * np.int64(0x9E3779B97F4A7C15 - 2**64)
            )  # spread over all integers
            writer.write_table(pa.table({"f0": ids}), row_group_size=ROW_GROUP_ROWS)
    (folder / "s.toml").write_text(format_schema(schema_of(1), "One field."), encoding="utf-8")
    words = ["schema", "fit", str(folder / "s.toml"), str(log), "-o", str(folder / "ids"), "--workers", "1"]
    # the child's own mark: ru_maxrss would begin with this process's
    code = "import re, sys; from mbcnet_rec.cli import main; assert main(sys.argv[1:]) == 0; print('HWM', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    told = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return int(told.stdout.split()[-1]) // 1024


if __name__ == "__main__":
    sys.exit(main())
