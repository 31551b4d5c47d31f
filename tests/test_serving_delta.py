"""A day's artifact is the day before's with its delta applied, byte for byte, in every type of rows; deltas chain by SHA-256, readers see the one
day or the other, and a delta is as large as what has changed."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from serving_data import printed_by
from test_lineage import write_days
from tiny_run import train

from mbcnet_rec.scoring.trained_run import TrainedRun, load_run
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.artifact import load_weights, take_apart, with_rows, write_artifact
from mbcnet_rec.serving.delta import changed_rows, write_delta

TYPES = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def week(tmp_path_factory):
    """A run of three days, the artifact of each day in every type, and from day to day the deltas."""
    folder = tmp_path_factory.mktemp("week")
    write_days(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for day in (1, 2, 3):
            files = f'data.train=["log/ds=2024-06-0{day}"]'
            assert train("tiny.toml", files, "train.out=run", "train.keep_last=9", continues=day > 1) == 0
            config = load_run(Path("run"))
            weights = load_weights(TrainedRun(config, Path("run"), 5 * day))
            apart = take_apart(weights)
            apart.spec["step"] = 5 * day
            for rows in TYPES:
                write_artifact(with_rows(apart, weights, rows), config, folder / f"{rows}_{day}")
                if day > 1:
                    before = folder / f"{rows}_{day - 1}"
                    write_delta(serving.load(before), before, folder / f"{rows}_{day}", folder / f"{rows}_delta_{day}")
    return folder


def rows_of(model):
    return {pooling: tables.weights_host for pooling, tables in model.tables.items()} | model.id_rows


@pytest.mark.parametrize("rows", TYPES)
def test_a_day_is_the_day_before_and_its_delta(week, rows):
    model, source = serving.load(week / f"{rows}_1"), pq.read_table(week / "test.parquet")
    for day in (2, 3):
        whole = serving.load(week / f"{rows}_{day}")
        model.apply(week / f"{rows}_delta_{day}")
        ours, theirs = rows_of(model), rows_of(whole)
        assert ours.keys() == theirs.keys() and "zch/user" in ours
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert (model.digest, model.spec, model.vocabularies) == (whole.digest, whole.spec, whole.vocabularies)
        np.testing.assert_array_equal(model.predict(source), whole.predict(source))


def test_deltas_chain_and_refuse_another_parent(week):
    model, later = serving.load(week / "int8_1"), week / "int8_delta_3"
    source = pq.read_table(week / "test.parquet")
    before = model.predict(source)
    with pytest.raises(
        ValueError, match=r"changes the artifact whose model.json has SHA-256 .*: apply deltas in their order"
    ):
        model.apply(later)
    np.testing.assert_array_equal(model.predict(source), before)
    damaged = shutil.copytree(week / "int8_delta_2", week / "damaged")
    data = bytearray((damaged / "changes.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "changes.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"changes\.safetensors: changed since it was written"):
        model.apply(damaged)
    with pytest.raises(ValueError, match="not a delta of `mbcnet export --since`"):
        model.apply(week / "int8_2")


def test_readers_meanwhile_see_one_day_or_the_other(week):
    source = pq.read_table(week / "test.parquet")
    days = [serving.load(week / f"fp32_{day}").predict(source) for day in (1, 2, 3)]
    model, wrong, stop = serving.load(week / "fp32_1"), [], threading.Event()

    def read():
        while not stop.is_set():
            found = model.predict(source)
            if not any(np.array_equal(found, day) for day in days):
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for each in readers:
        each.start()
    for day in (2, 3):
        model.apply(week / f"fp32_delta_{day}")
    stop.set()
    for each in readers:
        each.join()
    assert not wrong and np.array_equal(model.predict(source), days[2])


def test_a_delta_holds_what_has_changed(week, tmp_path):
    """By the command; of 60 things half were not touched; the same model again changes nothing. Then sizes for 1, 10 and 100 % of a table."""
    code, out, err = printed_by("export", week / "run", "--since", week / "int8_2", "--out", tmp_path / "delta")
    assert code == 0 and "from step 10 to 15" in out, err
    sums = [json.loads((each / "delta.json").read_text()) for each in (tmp_path / "delta", week / "int8_delta_3")]
    assert sums[0]["parent"] == sums[1]["parent"]
    same = {name: each["files"]["changes.safetensors"] for name, each in zip("ab", sums, strict=True)}
    assert same["a"] == same["b"], "the command writes the same rows"
    model = serving.load(week / "int8_3")
    report = write_delta(model, week / "int8_3", week / "int8_3", tmp_path / "none")
    assert report["rows"] == 0
    code, _, err = printed_by(
        "export", week / "run", "--since", week / "int8_2", "--rows", "fp16", "--out", tmp_path / "x"
    )
    assert code == 2 and "--since: a delta has the rows, branches and calibration of its artifact" in err
    before = torch.zeros(3_000_000, 4, dtype=torch.uint8)
    for share in (1, 10, 100):
        after = before.clone()
        touched = torch.arange(0, len(after), 100 // share)
        after[touched, 3] = 1
        assert torch.equal(changed_rows(after, before), touched)
    assert len(changed_rows(before, before[:-5])) == 5, "new rows are in it"
