"""Proves that windows and lanes cover each row once, and that options that cannot be met are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.reading.config import StreamOptions
from data.stream.order import RowGroup, lane_bounds, plan_windows

ROW_GROUPS = st.lists(st.integers(1, 60), min_size=1, max_size=12)
ORDERS = st.sampled_from(["shuffled", "partitioned", "chronological"])


def groups_of(sizes):
    return [RowGroup(0, index, rows, rows) for index, rows in enumerate(sizes)]


@given(sizes=ROW_GROUPS, lanes=st.integers(1, 8), window_rows=st.integers(1, 100), order=ORDERS)
def test_windows_cover_every_row_once_and_keep_to_their_lane(sizes, lanes, window_rows, order):
    options, total = StreamOptions(lanes, lanes, order), sum(sizes)
    bounds = lane_bounds(options, total)
    windows = plan_windows(groups_of(sizes), bounds, window_rows)
    segments = [segment for window in windows for segment in window.segments]
    rows = [(group.index, row) for group, start, stop in segments for row in range(start, stop)]
    assert rows == [(index, row) for index, size in enumerate(sizes) for row in range(size)]
    position, longest = 0, max((size for size in sizes if size <= window_rows), default=1)
    for window in windows:
        assert window.first_row == position
        assert window.num_rows == sum(stop - start for _, start, stop in window.segments) > 0
        position += window.num_rows
        assert bounds[window.lane] <= window.first_row < position <= bounds[window.lane + 1]
        assert window.num_rows < window_rows + longest
        # row groups that fit a window are cut by lanes only
        for row_group, _, stop in window.segments:
            if row_group.num_rows <= window_rows and stop < row_group.num_rows:
                assert position in bounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: wanted 1 or more"),
        ({"batch_size": 10, "lanes": 4}, "batch_size = 10: wanted a multiple of lanes = 4; use 8"),
        ({"workers": -1}, "workers = -1: wanted 0 or more"),
        ({"keep_negatives": 0.0}, r"keep_negatives = 0.0: wanted a share in \(0, 1\]"),
        ({"drop_positives": 1.0}, r"drop_positives = 1.0: wanted a share in \[0, 1\)"),
        ({"negative_weights": "importance"}, "negative_weights = 'importance': keep_negatives = 1 drops no"),
        ({"timeout_seconds": 0.0}, "timeout_seconds = 0.0: wanted more than 0"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        StreamOptions(**options)
