"""Proves that the input benchmark measures what it says: both sides read the same rows, and a consumer's waiting is counted."""

import importlib.util
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.reading.checksums import column_without_checksum

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "input.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_input", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def log(bench, tmp_path_factory):
    return bench.write_single(tmp_path_factory.mktemp("log") / "single.parquet", 6, 20_000)


def test_the_file_is_what_the_legend_says(bench, log):
    metadata = pq.read_metadata(log)
    assert metadata.num_rows == 20_000 and metadata.num_row_groups == 3
    assert not column_without_checksum(log, metadata, frozenset(metadata.schema.names))
    assert metadata.row_group(0).column(1).compression == "SNAPPY"


def test_the_stream_reads_every_id_of_the_file(bench, log):
    assert bench.drain([log], bench.single_schema_of(6), workers=0, prefetch=0) == 20_000 * 6 * 8


def test_rates_are_of_the_same_rows(bench, log, monkeypatch):
    taken = iter([4.0, 8.0, 2.0, 10.0])  # read_table, stream, read_table, stream
    monkeypatch.setattr(bench, "seconds_of", lambda action: (action(), next(taken))[1])
    assert bench.compare([log], bench.single_schema_of(6), 2) == pytest.approx(
        (20_000 / 9.0, 20_000 / 3.0, (4 / 8 + 2 / 10) / 2)
    )


def test_waiting_is_counted_and_only_waiting(bench, log, monkeypatch):
    class Slow:
        """A stream whose batches take 20 ms each, made when asked for: a consumer waits for every one."""

        num_rows, steps_per_epoch = 10, 10

        def __init__(self, *_):
            pass

        def __iter__(self):
            for number in range(10):
                time.sleep(0.02)
                yield number

    monkeypatch.setattr(bench, "ParquetStream", Slow)
    figures = bench.wait_of_consumer([log], None, 1)
    # a step of 20 / 0.8 = 25 ms after a wait of 20 ms
    assert figures["input_wait_share"] == pytest.approx(20 / 45, abs=0.1)


def test_a_python_without_the_peer_gives_null(bench, log):
    assert bench.fuxictr_rate(log, "/no/such/python") is None
