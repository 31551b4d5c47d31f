"""How fast Parquet becomes batches: ratios to a bare Arrow read of the same columns, taken in turns in one run on one core.

    python benchmarks/input.py [--quick] [--json]

read_table_share_single   rows/s of ParquetStream (shuffled; no threads) over rows/s of pyarrow.parquet.read_table(use_threads=False) with the
                          same verification of page checksums, both pinned to one core, median of rounds in turns, on 192 single-valued
                          integer columns and a label
read_table_share_mixed    the same on the synthetic log: 192 fields of every kind
read_table_share_ordered  as single, in the files' order
roof_single, _mixed, ...  the same of Arrow's decoding alone, file by file in record batches that are let go: what a stream would reach
                          that checked, shuffled and copied for nothing
input_wait_share          median over epochs of the share of its time that a consumer waits which takes 80 % of the stream's own maximum rate (workers = 1,
                          prefetch = 2; the consumer sleeps through its step, as a host does while a GPU works), after the first batch

The allocator keeps what is freed, as in a training on a CPU: fresh pages cost what the machine's system takes for them, and read_table's allocator
has its own warm. The files are written as this project writes its own: snappy, dictionaries, page checksums, row groups of ROW_GROUP_ROWS.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from paper_size import uniform_schema
from side_by_side import parser_of, print_figures, ratio

from data.reading.config import StreamOptions
from data.schema import Schema
from data.stream import ParquetStream
from data.synthetic.planted import pailitao_schema
from data.synthetic.write import ROW_GROUP_ROWS, open_writer, write_synthetic
from mbcnet_rec.cpu.fast_path import keep_freed_memory

BATCH_SIZE = 2048
CONSUMER_SHARE = 0.8
LARGEST_ID = 2_000_000


def main() -> int:
    args = parser_of(__doc__).parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        print_figures(measure(Path(folder), args.quick), args.json)
    return 0


def measure(folder: Path, quick: bool) -> dict[str, float | None]:
    """Write the files and take every figure."""
    rows, rounds = (65_536, 3) if quick else (262_144, 9)
    single, single_schema = (write_single(folder / "single.parquet", 192, rows), uniform_schema(192, LARGEST_ID, 8))
    mixed_schema = pailitao_schema("demo")
    write_synthetic(mixed_schema, folder / "mixed", rows=rows, days=3)
    mixed = sorted((folder / "mixed").rglob("*.parquet"))
    figures: dict[str, float | None] = {}
    with one_core():
        for name, files, schema, order in (
            ("single", [single], single_schema, "shuffled"),
            ("mixed", mixed, mixed_schema, "shuffled"),
            ("ordered", [single], single_schema, "partitioned"),
        ):
            stream_rate, table_rate, share, roof = compare(files, schema, order, rounds)
            figures[f"read_table_share_{name}"] = round(share, 3)
            figures[f"roof_{name}"] = round(roof, 3)
            figures[f"stream_rows_per_second_{name}"] = round(stream_rate)
            figures[f"read_table_rows_per_second_{name}"] = round(table_rate)
    several = [single] * 4  # long enough an epoch for windows to come and go
    # in a process without what the reads above have left behind
    with multiprocessing.get_context("spawn").Pool(1, initializer=one_thread) as fresh:
        return figures | fresh.apply(wait_of_consumer, (several, single_schema, 2 if quick else 6))


def one_thread() -> None:
    """Of torch and of Arrow; and memory as `mbcnet train` has it on a CPU."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    keep_freed_memory()


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def write_single(path: Path, columns: int, rows: int) -> Path:
    """Write integer columns of power-law ids, as the synthetic log's writer does."""
    draw = np.random.default_rng(0)
    arrow = pa.schema([("label", pa.int8())] + [(f"f{i}", pa.int64()) for i in range(columns)])
    with open_writer(path, arrow) as writer:
        for start in range(0, rows, ROW_GROUP_ROWS):
            count = min(ROW_GROUP_ROWS, rows - start)
            sizes = ((100, 20_000, LARGEST_ID)[i % 3] for i in range(columns))
            ids = [(size * draw.random(count) ** 4).astype(np.int64) for size in sizes]
            label = (draw.random(count) < 0.1).astype(np.int8)
            writer.write_table(pa.table([label, *ids], schema=arrow), row_group_size=ROW_GROUP_ROWS)
    return path


def drain(files: list[Path], schema: Schema, **options) -> int:
    """Read one epoch; return the bytes of ids, so that nothing is left undone."""
    stream = ParquetStream(files, schema, StreamOptions(BATCH_SIZE, **options))
    return sum(batch.sparse_features.values().nbytes for batch in stream)


def seconds_of(action: Callable[[], object]) -> float:
    """Processor seconds of all threads: on one core the same as seconds on the wall, but for the neighbours' share."""
    start = time.process_time()
    action()
    return time.process_time() - start


def read(files: list[Path], columns: list[str]) -> pa.Table:
    """Arrow's own read, with the one check that it can make."""
    return pq.read_table(files, columns=columns, use_threads=False, page_checksum_verification=True)


def decode(files: list[Path], columns: list[str]) -> None:
    """Arrow's decoding alone, with the same check: no record batch is kept."""
    for file in files:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            for _ in parquet.iter_batches(columns=columns, use_threads=False):
                pass


def compare(files: list[Path], schema: Schema, order: str, rounds: int) -> tuple[float, float, float, float]:
    """Rows per second of the stream and of read_table, medians of rounds taken in turns, and the medians of the rounds' ratios.

    The ratios are read_table's time over the stream's, and over that of decoding alone.
    """
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    columns = list(schema.columns)
    stream, table, alone = [], [], []
    for _ in range(rounds):
        table.append(seconds_of(lambda: read(files, columns)))
        stream.append(seconds_of(lambda: drain(files, schema, order=order, workers=0, prefetch=0)))
        alone.append(seconds_of(lambda: decode(files, columns)))
    rates = (rows / statistics.median(times) for times in (stream, table))
    return *rates, ratio(table, stream), ratio(table, alone)


def wait_of_consumer(files: list[Path], schema: Schema, epochs: int) -> dict[str, float | None]:
    """The wait share of a consumer at CONSUMER_SHARE of the stream's maximum rate."""
    options = StreamOptions(BATCH_SIZE, window_rows=16_384, workers=1, prefetch=2)
    stream = ParquetStream(files, schema, options)

    def waits(step_seconds: float) -> tuple[float, float]:
        waited = started = 0.0
        batches = iter(stream)
        next(batches)
        started = last = time.perf_counter()
        for _ in batches:
            now = time.perf_counter()
            waited += now - last
            remaining = now + step_seconds
            while (left := remaining - time.perf_counter()) > 0:
                time.sleep(left)
            last = time.perf_counter()
        return waited, last - started

    free, shares = [], []
    for _ in range(epochs):  # in turns, since the machine is not equally fast all the time
        free.append(waits(0.0)[1])
        waited, total = waits(free[-1] / (stream.steps_per_epoch - 1) / CONSUMER_SHARE)
        shares.append(waited / total)
    return {
        "input_wait_share": round(statistics.median(shares), 4),
        "maximum_rows_per_second": round(stream.num_rows / statistics.median(free)),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.exit(main())
