"""Proves that a scan gives each kept row of a row group once, in the file's order, encoded as training encodes it, with its extra columns."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_rows import make_schema, write_rows

from data.reading.config import StreamOptions
from data.reading.decode import Decoder, RowReader
from data.reading.encode import Encoder
from data.reading.files import read_contents
from data.reading.selection import Selection
from data.stream.order import lane_bounds, plan_windows

SCHEMA = make_schema()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    # a dictionary that is soon full: Arrow reads such a column in several chunks
    small = {"dictionary_pagesize_limit": 512, "data_page_size": 256, "write_batch_size": 16}
    return write_rows(tmp_path_factory.mktemp("log") / "a.parquet", 700, row_group_size=500, **small)


def reader_and_groups(file, options=StreamOptions(), extra=(), labels=True):
    selection = Selection(options, SCHEMA, [file])
    groups = read_contents([file], SCHEMA, selection).row_groups
    return RowReader([file], Encoder(SCHEMA, has_labels=labels), selection, extra=extra), groups


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"keep_negatives": 0.5}], ids=str)
def test_a_scan_is_the_file_in_its_order(file, labels, sampling):
    reader, groups = reader_and_groups(file, StreamOptions(**sampling), ("word", "click"), labels)
    scanned = [(group, list(reader.scan(group, 64))) for group in groups]
    assert [len(batches) for _, batches in scanned] == [8, 4]  # of each 64 stored rows
    batches = [batch for _, batches in scanned for batch in batches]
    rows = np.concatenate([columns.single_ids[0] for columns, _ in batches])
    extra = pa.Table.from_batches([extra for _, extra in batches])
    table = pq.read_table(file)
    assert extra.equals(table.take(rows).select(["word", "click"]))
    assert sampling or rows.tolist() == list(range(700))
    labels_read = np.concatenate([columns.labels for columns, _ in batches])
    assert labels_read.tolist() == [float(labels and row % 3 == 0) for row in rows]
    alone = [rows for group in groups for rows, _ in reader.batches(group, 64, ["word", "click"])]
    assert pa.Table.from_batches(alone).equals(extra)


def test_a_scan_encodes_as_training_does_whatever_the_lengths(file):
    reader, groups = reader_and_groups(file)
    scanned = [columns for group in groups for columns, _ in reader.scan(group, 700)]
    for window_rows in (64, 1000):  # row groups read as a stream, and whole
        options = StreamOptions(4, 1, "partitioned", window_rows)
        decoder = Decoder([file], Encoder(SCHEMA), Selection(options, SCHEMA, [file]))
        windows = plan_windows(groups, lane_bounds(options, 700), window_rows)
        decoded = [decoder.task(window, None)() for window in windows]
        for name in ("single_ids", "labels"):
            want = np.concatenate([getattr(columns, name) for columns in scanned], axis=-1)
            got = np.concatenate([getattr(columns, name) for columns in decoded], axis=-1)
            assert np.array_equal(got, want)
        tags = [np.concatenate([each.lists.values[0] for each in read]) for read in (scanned, decoded)]
        assert np.array_equal(*tags)


def test_row_numbers_are_those_of_the_row_group(file):
    reader, groups = reader_and_groups(file, StreamOptions(keep_negatives=0.5))
    for group in groups:
        for rows, place in reader.batches(group, 64, ["row"]):
            numbers = rows["row"].to_numpy() - 500 * group.index
            assert [place.row(row) for row in range(rows.num_rows)] == [
                f"{file}: row group {group.index}, row {number}" for number in numbers
            ]


def test_a_row_group_in_which_one_lane_ends_and_the_next_begins_is_read_once(tmp_path):
    file = write_rows(tmp_path / "a.parquet", 700, row_group_size=700)
    options = StreamOptions(4, 2, "partitioned")
    selection = Selection(options, SCHEMA, [file])
    groups = read_contents([file], SCHEMA, selection).row_groups
    decoder = Decoder([file], Encoder(SCHEMA), selection)
    windows = plan_windows(groups, lane_bounds(options, 700), options.window_rows)
    first, second = (decoder.task(window, None) for window in windows)
    begun = first().single_ids[0].tolist()
    file.write_bytes(bytes(file.stat().st_size))  # in place: who has it open cannot read it again either
    assert begun + second().single_ids[0].tolist() == list(range(700))
