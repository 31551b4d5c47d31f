"""Proves that `export --triton` writes a model repository whose model.py scores as the artifact does, with requests joined, and names what is wrong;
the config is parsed by Triton's own message where its client is installed."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from serving_data import printed_by

from mbcnet_rec.serving import loader


@pytest.fixture(scope="module")
def version(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "ctr" / "1"
    code, _, err = printed_by("export", runs / "row_wise", "--out", folder, "--no-aot", "--triton")
    assert code == 0, err
    code, _, err = printed_by("export", runs / "row_wise", "--out", folder.parent / "one", "--no-aot", "--triton")
    assert code == 2 and "wanted REPOSITORY/MODEL/VERSION" in err
    return folder


@pytest.fixture
def backend(version, monkeypatch):
    """model.py with what Triton's stub gives it."""
    fake = ModuleType("triton_python_backend_utils")
    fake.get_input_tensor_by_name = lambda request, name: SimpleNamespace(as_numpy=lambda: request[name])
    fake.Tensor = lambda name, values: {name: values}
    fake.TritonError = str
    fake.InferenceResponse = lambda tensors, error=None: error or tensors[0]["PROBABILITY"]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("model", version / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    yield model
    for name in [name for name in sys.modules if name.partition(".")[0] == "mbcnet_serving"]:
        del sys.modules[name]


def test_scores(backend, version, runs):
    rows = pq.read_table(runs / "test.parquet").slice(0, 6).drop_columns(["click", "unread"])
    texts = np.asarray([json.dumps(row).encode() for row in rows.to_pylist()], object)[:, None]
    expected = loader.load(version).predict(rows)
    answers = backend.execute([{"ROW": texts[:2]}, {"ROW": texts[2:]}])
    assert [each.shape for each in answers] == [(2, 1), (4, 1)] and answers[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(answers)[:, 0], expected, atol=1e-6)
    bad = np.asarray([[json.dumps(rows.to_pylist()[0] | {"user": 999}).encode()], [b"[]"]], object)
    good, wrong, odd, broken = backend.execute(
        [
            {"ROW": texts[:2]},
            {"ROW": bad[:1]},
            {"ROW": np.concatenate([texts[:1], bad[1:]])},
            {"ROW": np.asarray([[b"{"]], object)},
        ]
    )
    np.testing.assert_allclose(good[:, 0], expected[:2], atol=1e-6)
    assert "'user'" in wrong and "wanted an object of the same columns" in odd and "Expecting" in broken


def test_config(version):
    text = (version.parent / "config.pbtxt").read_text()
    assert text.startswith('name: "ctr"\n')
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = text_format.Parse(text, messages.ModelConfig())
    assert (config.name, config.backend, config.input[0].name, config.output[0].name) == (
        "ctr",
        "python",
        "ROW",
        "PROBABILITY",
    )
