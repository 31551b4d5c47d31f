"""Proves that the stream gives every row once, in an order that neither world size, workers nor a stop change, and names what is wrong."""

import os
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_rows import FIELDS, IDS, make_schema, rows_of, rows_table, write_log

from data.errors import InputError
from data.reading.config import StreamOptions
from data.stream import ParquetStream
from data.stream.order import Cursor

LANES = 12  # every world size from 1 to 4 divides it


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> list[Path]:
    return write_log(tmp_path_factory.mktemp("log"), [40, 1, 0, 63, 29])  # an empty file among them


def stream_of(files, rank=0, world_size=1, schema=None, order="shuffled", **options):
    """A stream of two rows of each lane a batch."""
    options = StreamOptions(2 * LANES, LANES, order, **options)
    return ParquetStream(files, schema or make_schema(), options, rank, world_size)


def global_batches(files, options, world_size, cursor=Cursor()):
    """What all ranks read together, step by step, and the cursors."""
    ranks = []
    for rank in range(world_size):
        stream = ParquetStream(files, make_schema(), options, rank, world_size)
        stream.load_state_dict({"epoch": cursor.epoch, "step": cursor.step, "fingerprint": stream.fingerprint()})
        batches = list(stream)
        assert len(batches) == stream.steps_per_epoch - cursor.step
        assert stream.cursor == Cursor(cursor.epoch + 1, 0)
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1
    steps = list(zip(*ranks, strict=True))
    for step in steps:
        assert len({len(batch.labels) for batch in step}) == 1  # every rank trains equally many rows
    rows = [[row for batch in step for row in rows_of(batch)] for step in steps]
    return rows, [step[0].cursor for step in steps]


ORDERS = st.sampled_from(["shuffled", "partitioned", "chronological"])


@settings(max_examples=15)
@given(
    order=ORDERS,
    share=st.integers(1, 4),
    window_rows=st.sampled_from([1, 5, 16, 1000]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
    stop=st.integers(0, 20),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    workers=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    prefetch=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_same_rows_in_the_same_order_after_any_stop_in_any_world(
    log, order, share, window_rows, seed, epoch, stop, worlds, workers, prefetch
):
    def options(which):
        return StreamOptions(
            share * LANES, LANES, order, window_rows, seed, prefetch=prefetch[which], workers=workers[which]
        )

    whole, cursors = global_batches(log, options(0), worlds[0], Cursor(epoch))
    assert sorted(row for batch in whole for row in batch) == list(range(133))  # each row once
    step = min(stop, len(whole))
    cursor = cursors[step - 1] if step else Cursor(epoch)
    assert cursor == Cursor(epoch, step)
    resumed, _ = global_batches(log, options(1), worlds[1], cursor)
    assert resumed == whole[step:]


def test_order_follows_seed_and_epoch(log):
    def order(seed, epoch, order="shuffled"):
        return global_batches(log, StreamOptions(24, LANES, order, 32, seed), 1, Cursor(epoch))[0]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    first = order(0, 0)[0]
    assert max(first) - min(first) > 66  # the first batch draws on the whole log
    assert [row for batch in order(0, 0, "chronological") for row in batch] == list(range(133))


@pytest.mark.parametrize("rows", [[48], [49], [71], [1], [5, 0, 1], [2] * 30], ids=str)
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("order", ["shuffled", "chronological"])
def test_uneven_data_gives_each_rank_equally_many_batches(tmp_path, rows, world_size, order):
    """Rows modulo the batch 0, 1 and B - 1; fewer rows, files and row groups than ranks; an empty file; row groups of one row."""
    files = write_log(tmp_path, rows, row_group_rows=1)
    batches, _ = global_batches(files, StreamOptions(24, LANES, order, 8), world_size)
    assert sorted(row for batch in batches for row in batch) == list(range(sum(rows)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("order", ["shuffled", "partitioned", "chronological"])
def test_row_groups_longer_than_a_window_are_read_as_a_stream(tmp_path, workers, order):
    files = write_log(tmp_path, [500, 300], row_group_rows=250)
    options = StreamOptions(40, 4, order, 32, workers=workers)
    batches, _ = global_batches(files, options, 1)
    assert sorted(row for batch in batches for row in batch) == list(range(800))
    for world_size in (2, 4):
        assert global_batches(files, options, world_size)[0] == batches


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weighted_mean_over_ranks_is_the_exact_mean_over_rows(log, world_size):
    streams = [stream_of(log, rank, world_size) for rank in range(world_size)]
    for step in zip(*streams, strict=True):
        prices = torch.cat([batch.dense_features[batch.weights > 0, 0] for batch in step])
        over_ranks = sum((batch.weights * batch.dense_features[:, 0]).mean() for batch in step) / world_size
        assert over_ranks.item() == pytest.approx(prices.mean().item(), rel=1e-5)


def test_state_is_refused_by_other_files_or_options(log):
    stream = stream_of(log)
    state = stream.state_dict(Cursor(1, 2))
    assert set(state) == {"epoch", "step", "fingerprint"}
    stream.load_state_dict(state)
    assert stream.cursor == Cursor(1, 2)
    for other in (stream_of(log[:-1]), stream_of(log, seed=1), stream_of(log, keep_negatives=0.5)):
        with pytest.raises(InputError, match="resume with the same files"):
            other.load_state_dict(state)
    # neither workers nor prefetch nor the world size are part of the order
    stream_of(log, 1, 2, prefetch=0, workers=2).load_state_dict(state)


def test_lanes_must_be_a_multiple_of_the_world_size(log):
    said = "data.lanes = 12: wanted a multiple of world_size = 5; set data.lanes to 10"
    with pytest.raises(InputError, match=said):
        stream_of(log, 0, 5)


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("row", pa.array([3, -1, 5, 6], pa.int64()), "field 'row' = -1: wanted an id in [0, 10000)"),
        ("price", pa.array([3, np.nan, 5, 6], pa.float32()), "field 'price' = nan: wanted a finite number"),
        ("click", pa.array([0, 2, 1, 0], pa.int8()), "label 'click' = 2: wanted 0 or 1"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_value_in_one_file_of_many_is_named(tmp_path, column, values, found, workers):
    files = write_log(tmp_path, [20, 20, 20])
    table = rows_table(0, 4)
    table = table.set_column(table.schema.names.index(column), column, values)
    files.insert(2, tmp_path / "part-1-bad.parquet")
    with pq.ParquetWriter(files[2], table.schema, write_page_checksum=True) as writer:
        writer.write_table(rows_table(0, 4).cast(table.schema))
        writer.write_table(table)
    for order in ("shuffled", "chronological"):
        with pytest.raises(InputError) as error:
            list(stream_of(files, order=order, workers=workers))
        assert f"{files[2]}: row group 1, row 1, {found}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "other", "found"),
    [
        ("price", None, "column 'price' is missing, which is the schema's field 'price'"),
        ("click", None, "column 'click' is missing, which is the schema's label"),
        ("liked_weights", None, "column 'liked_weights' is missing"),
        ("row", pa.array(["a"] * 20), "column 'row' is string: categorical field 'row' wants integers"),
        ("tags", pa.array([1] * 20), "column 'tags' is int64: multi_valued field 'tags' wants lists"),
    ],
)
def test_a_wrong_column_in_one_file_of_many_is_named_before_any_batch(tmp_path, column, other, found):
    files = write_log(tmp_path, [20] * 5)
    table = rows_table(60, 20).drop_columns(column)
    pq.write_table(table if other is None else table.append_column(column, other), files[3])
    with pytest.raises(InputError) as error:
        stream_of(files)
    assert f"{files[3]}: {found}" in str(error.value) and "\n" not in str(error.value)


def test_repaired_values_are_counted_by_field(tmp_path):
    files = write_log(tmp_path, [20, 20])
    table = rows_table(0, 20)
    bad_rows = pa.array([-1, IDS] + [7] * 18, pa.int64())
    bad_price = pa.array([float("nan")] + [1.0] * 19)
    table = table.drop_columns(["row", "price"]).append_column("row", bad_rows)
    pq.write_table(table.append_column("price", bad_price), files[1], write_page_checksum=True)
    row, price = FIELDS["row"] | {"on_invalid": "modulo"}, {"kind": "numeric", "on_invalid": "null"}
    for world_size, workers in ((1, 0), (1, 2), (4, 1)):
        total = Counter()
        for rank in range(world_size):
            stream = stream_of(files, rank, world_size, make_schema(row=row, price=price), workers=workers)
            assert not stream.counters
            for _ in stream:
                pass
            total += stream.counters
        assert total == {"row": 2, "price": 1}


def test_a_reader_that_is_stuck_is_named_in_time(tmp_path):
    for workers, prefetch in ((1, 0), (0, 1), (2, 2)):
        (file,) = write_log(tmp_path / f"{workers}", [40])
        stream = stream_of([file], workers=workers, prefetch=prefetch, timeout_seconds=0.3)
        file.unlink()
        os.mkfifo(file)  # whoever opens it waits for a writer
        start = time.monotonic()
        with pytest.raises(InputError, match=r"part-0.parquet: row group \d+.*: no rows for 0.3 s"):
            next(iter(stream))
        assert time.monotonic() - start < 3
        while any(thread.name.startswith("data-") for thread in threading.enumerate()):
            assert time.monotonic() - start < 10
            with suppress(OSError), open(os.open(file, os.O_WRONLY | os.O_NONBLOCK), "wb"):
                time.sleep(0.02)


def test_threads_end_when_the_reader_stops_early(log):
    """What holds for every test finds one that does not end."""
    stream = stream_of(log, window_rows=8, workers=2, prefetch=2)
    for _ in range(3):
        iterator = iter(stream)
        next(iterator)
        iterator.close()


def test_a_file_that_shrinks_after_opening_is_named(log, tmp_path):
    files = write_log(tmp_path, [40, 40])
    stream = stream_of(files, order="chronological")
    pq.write_table(rows_table(0, 30), files[1], row_group_size=6)
    with pytest.raises(InputError, match=r"part-1.parquet: row group 0 has 6 rows to read, but had 7"):
        list(stream)


def test_importance_weights_make_up_for_dropped_negatives(tmp_path):
    files = write_log(tmp_path, [600, 600])
    options = StreamOptions(60, LANES, keep_negatives=0.25, negative_weights="importance")
    batches = [batch for rank in range(2) for batch in ParquetStream(files, make_schema(), options, rank, 2)]
    labels = torch.cat([batch.labels[batch.weights > 0] for batch in batches])
    full = [batch for batch in batches if len(batch.labels) == 30 and (batch.weights > 0).all()]
    weights = torch.cat([batch.weights for batch in full])
    positive = torch.cat([batch.labels for batch in full]) == 1
    assert 150 < (labels == 0).sum() < 250 and (labels == 1).sum() == 400  # of 800 and 400
    ratio = weights[~positive].unique() / weights[positive].unique()
    assert ratio.tolist() == pytest.approx([4.0])
    kept_negatives, kept_positives = int((labels == 0).sum()), int((labels == 1).sum())
    mean = (weights[~positive][0] * kept_negatives + weights[positive][0] * kept_positives) / len(labels)
    assert mean.item() == pytest.approx(1.0, rel=1e-5)
    assert options.logit_correction == 0
    assert StreamOptions(keep_negatives=0.25).logit_correction == pytest.approx(np.log(0.25))


@pytest.mark.parametrize(
    "sampling", [{"keep_negatives": 0.4}, {"drop_positives": 0.5}, {"keep_negatives": 0.3, "drop_positives": 0.2}]
)
def test_sampled_rows_do_not_depend_on_world_workers_or_other_files(log, sampling):
    def kept(files, world_size, workers, order="shuffled", epoch=0):
        options = StreamOptions(24, LANES, order, 16, 0, workers=workers, **sampling)
        batches, _ = global_batches(files, options, world_size, Cursor(epoch))
        return batches

    reference = kept(log, 1, 0)
    rows = sorted(row for batch in reference for row in batch)
    assert kept(log, 3, 1) == reference and kept(log, 4, 2) == reference
    assert sorted(row for batch in kept(log, 2, 0, "chronological", 3) for row in batch) == rows
    assert [row for batch in kept(log[3:], 1, 0, "chronological") for row in batch] == [
        row for row in rows if row >= 41
    ]
    positives, negatives = sum(row % 3 == 0 for row in rows), sum(row % 3 != 0 for row in rows)
    assert (positives == 45) == ("drop_positives" not in sampling)
    assert (negatives == 88) == ("keep_negatives" not in sampling)
    assert abs(negatives - 88 * sampling.get("keep_negatives", 1)) < 15
    assert abs(positives - 45 * (1 - sampling.get("drop_positives", 0))) < 12
