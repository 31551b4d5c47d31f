"""Proves that rows with several labels are read with their nulls, checked and counted label by label, and that one label takes no null."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tasks_data import write_tasks

from data.errors import InputError
from data.profile.check import check_files
from data.profile.count import table_2
from data.reading.config import StreamOptions
from data.schema import load_schema
from data.schema.show import summary_line
from data.stream import ParquetStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("labels")
    write_tasks(found, 700, 10)
    return found


def test_null_labels_are_nan_and_stay_with_their_rows(folder):
    schema, rows = load_schema(folder / "schema.toml"), pq.read_table(folder / "train.parquet")
    stream = ParquetStream(
        [folder / "train.parquet"], schema, StreamOptions(batch_size=96, order="chronological", lanes=1)
    )
    batches = list(stream)
    real = np.concatenate([batch.weights.numpy() > 0 for batch in batches])
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    assert labels.shape[1] == 2 and labels.dtype == np.float32
    wanted = np.stack([rows[name].to_numpy().astype(float) for name in ("click", "buy")], 1)
    np.testing.assert_array_equal(labels[real], wanted)
    assert 100 < np.isnan(wanted[:, 1]).sum() < 200 and not labels[~real].any()


def test_one_label_takes_no_null(folder):
    schema = load_schema(folder / "buy.toml")
    with pytest.raises(InputError, match=r"row \d+, label 'buy' is null: wanted 0 or 1"):
        list(ParquetStream([folder / "train.parquet"], schema, StreamOptions(batch_size=96)))


def test_labels_are_checked_and_counted_one_by_one(folder, tmp_path):
    schema = load_schema(folder / "schema.toml")
    good = check_files([folder / "train.parquet"], schema, full=True)
    assert good.num_faults == 0 and good.labels == {0.0, 1.0}
    table = pq.read_table(folder / "train.parquet")
    buy = table["buy"].to_pylist()
    buy[7] = 2
    bad = table.set_column(table.column_names.index("buy"), "buy", pa.array(buy, pa.int8()))
    pq.write_table(bad, tmp_path / "bad.parquet", write_statistics=False)
    (fault,) = check_files([tmp_path / "bad.parquet"], schema, full=True).faults
    assert fault.column == "buy" and "row 7, label 'buy' = 2" in fault.message
    pq.write_table(table.drop_columns(["buy"]), tmp_path / "none.parquet")
    (fault,) = check_files([tmp_path / "none.parquet"], schema).faults
    assert "column 'buy' is missing, which is the schema's label" in fault.message
    lines = table_2([folder / "train.parquet"], schema)
    bought = sum(value == 1 for value in table["buy"].to_pylist())
    assert any(line.startswith("buy ") and f" {bought:,} (" in line for line in lines)
    assert "label click, label buy" in summary_line(schema)
