"""Proves that a transform of one's own, a function in a file, is used in training, scoring and serving alike, and that its faults are named."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from forked_ranks import run_code
from small_data import write_small
from tiny_run import train

from data.errors import InputError
from data.plugins import ALSO
from data.schema import format_schema, load_schema
from mbcnet_rec.cli import main
from mbcnet_rec.serving import loader

# `python FOLDER/mbcnet_serving.py FOLDER ROWS`
PROGRAM = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(f'{sys.argv[1]}/mbcnet_serving.py')"
FILE = """
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RootConfig:
    power: float = 2.0


def root(config, numbers):
    return np.abs(numbers) ** (1 / config.power)


root.config = RootConfig
"""
ENTRY = '[transforms]\nroot = { file = "mine.py", power = 3.0 }\n[tables]'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transforms")
    write_small(folder)
    (folder / "mine.py").write_text(FILE)
    return folder


@pytest.fixture
def schema(home):
    plain = (home / "schema.toml").read_text()
    mine = plain.replace("[tables]", ENTRY).replace('transform = "log1p"', 'transform = "root"')
    (home / "mine.toml").write_text(mine)
    return home / "mine.toml"


def test_the_schema_keeps_what_it_says_and_its_text(schema, home, tmp_path):
    found = load_schema(schema)
    assert found.transforms["root"]["power"] == 3.0 and "#sha256=" in found.transforms["root"]["file"]
    (tmp_path / "again.toml").write_text(format_schema(found))
    assert (
        load_schema(tmp_path / "again.toml").fingerprint()
        == found.fingerprint()
        != load_schema(home / "schema.toml").fingerprint()
    )


def test_training_scoring_and_serving_use_it(schema, home, tmp_path, monkeypatch, capfd):
    run, test = tmp_path / "run", str(home / "test.parquet")
    words = (f"schema={schema}", f"train.out={run}", "model.kind=dnn", "train.max_steps=4", "train.eval_every=4")
    assert train(home / "run.toml", *words) == 0
    assert (run / "plugins" / "mine.py").read_text() == FILE
    assert main(["predict", str(run), "--data", test, "--out", str(tmp_path / "scores")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "artifact"), "--rows", "fp32", "--no-aot"]) == 0
    model, rows = loader.load(tmp_path / "artifact"), pq.read_table(test)
    served, wanted = model.predict(rows), pq.read_table(tmp_path / "scores")["probability"].to_numpy()
    np.testing.assert_allclose(served, wanted, atol=2e-6)
    prices = rows["price"].to_numpy(zero_copy_only=False).astype(np.float64)
    column = [feature.name for feature in model.preprocess.schema.dense].index("price")
    dense = model.preprocess(rows).dense.numpy()[:, column]
    np.testing.assert_allclose(dense, np.where(np.isnan(prices), 0, np.abs(prices) ** (1 / 3)), rtol=1e-6)
    try:
        (home / "mine.py").write_text(FILE + "# other\n")
        monkeypatch.setenv(ALSO, str(tmp_path / "artifact" / "plugins" / "mine.py"))
        code, said = run_code(PROGRAM, str(tmp_path / "artifact"), test)
        assert code == 0, said[-2000:]
        monkeypatch.delenv(ALSO)
        capfd.readouterr()
        assert main(["evaluate", str(run)]) == 2
        assert "another version" in (said := capfd.readouterr().err) and f"MBCNET_PLUGINS={run}/plugins/mine.py" in said
    finally:
        (home / "mine.py").write_text(FILE)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("power = 3.0", "pover = 3.0", "transforms.root.pover is not a known key; did you mean 'power'?"),
        ("root = {", "other = {", "transform = 'other': wanted 'identity'"),
        ('transform = "root"', 'transform = "log2p"', "transform = 'log2p': wanted 'identity', 'log1p'"),
        ('"mine.py"', '"none.py"', "none.py: cannot be read"),
    ],
)
def test_faults_are_named(schema, before, after, said):
    schema.write_text(schema.read_text().replace(before, after))
    with pytest.raises(InputError, match=r"mine\.toml|none") as error:
        load_schema(schema)
    assert said in str(error.value)
