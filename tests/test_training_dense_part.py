"""Gradients of several batches move the dense part as one batch of all their rows does; its average serves; both survive a resume
bit for bit, with a schedule; and rows weigh what their column says."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import SCHEMA, small_table
from tiny_run import lines_of, make_run, train

from data.errors import InputError
from data.reading.config import StreamOptions
from data.schema import load_schema
from data.stream import ParquetStream
from mbcnet_rec.cli import main
from mbcnet_rec.scoring.trained_run import TrainedRun, load_run
from mbcnet_rec.serving.artifact import load_weights

STILL = "optim.embedding.lr=1e-30"  # tables that do not move


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path))
    return tmp_path


def weights_of(run, step):
    arch = load_weights(TrainedRun(load_run(run), run, step)).arch
    return np.concatenate([value.detach().numpy().ravel() for value in arch.state_dict().values()])


def test_two_batches_are_one_of_twice_the_rows(folder):
    assert train("tiny.toml", STILL, "data.batch_size=96", "train.out=wide") == 0
    assert train("tiny.toml", STILL, "optim.accumulate=2", "train.out=halves") == 0
    assert train("tiny.toml", STILL, "train.out=apart") == 0
    wide, halves, apart = (
        weights_of(folder / name, step) for name, step in (("wide", 10), ("halves", 20), ("apart", 20))
    )
    np.testing.assert_allclose(halves, wide, rtol=1e-4, atol=1e-6)
    assert np.abs(apart - wide).max() > 1e-3


def test_schedules_gradients_and_average_survive_a_resume(folder, capfd):
    """Stopped after the first of three batches: the gradient in hand, the average and the place on the curves are the checkpoint's."""
    settings = [
        "optim.accumulate=3", "optim.dense_average=0.8", "optim.dense_schedule.warmup_steps=4", "train.log_every=1",
        "optim.dense_schedule.decay=cosine", "optim.dense_schedule.decay_steps=12", "optim.embedding.schedule.warmup_steps=9",
    ]  # fmt: skip
    assert train("tiny.toml", *settings, "train.out=whole") == 0
    assert train("tiny.toml", *settings, "train.out=parts", "train.max_steps=7") == 0
    assert train("tiny.toml", *settings, "train.out=parts", resume=True) == 0
    whole, parts = folder / "whole", folder / "parts"
    assert lines_of(whole, "train")[7:] == lines_of(parts, "train")[7:]
    assert lines_of(whole, "test") == lines_of(parts, "test")
    np.testing.assert_array_equal(weights_of(whole, 20), weights_of(parts, 20))
    assert train("tiny.toml", *settings, "optim.dense_average=0", "train.out=raw") == 0
    assert lines_of(folder / "raw", "train") == lines_of(whole, "train"), "the average changes no training step"
    (averaged,), (raw,) = lines_of(whole, "test"), lines_of(folder / "raw", "test")
    assert averaged["log_loss"] != raw["log_loss"]
    capfd.readouterr()
    assert main(["evaluate", "whole", "--json"]) == 0
    assert f"{averaged['log_loss']:.6f}"[:7] in capfd.readouterr().out, (
        "the average is what a run is judged and served by"
    )


def test_rows_weigh_what_their_column_says(tmp_path):
    table = small_table(90, 1)
    weights = np.linspace(0.5, 2.0, 90)
    (tmp_path / "schema.toml").write_text(SCHEMA.replace('name = "small"', 'name = "small"\nweight_column = "w"'))
    schema = load_schema(tmp_path / "schema.toml")
    file, options = tmp_path / "rows.parquet", StreamOptions(batch_size=60, order="chronological")
    pq.write_table(table.append_column("w", pa.array(weights)), file)
    first, last = ParquetStream([file], schema, options)
    np.testing.assert_allclose(first.weights.numpy(), weights[:60], rtol=1e-6)
    np.testing.assert_allclose(last.weights.numpy(), weights[60:], rtol=1e-6)
    for bad, words in ((0.0, "weight 'w' = 0.0: wanted a finite number above 0"), (None, "row 3, weight 'w' is null")):
        pq.write_table(table.append_column("w", pa.array([1.0] * 3 + [bad] + [1.0] * 86)), file)
        with pytest.raises(InputError, match=words):
            list(ParquetStream([file], schema, options))
