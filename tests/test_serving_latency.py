"""Proves that `mbcnet bench latency` times what it says: every model, at all rows and threads."""

import itertools
import json
import shlex

import pytest
import torch
from serving_data import artifact_of, printed_by, trained_runs

from mbcnet_rec.serving import latency
from mbcnet_rec.serving.latency import draw_requests


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return artifact_of(trained_runs(tmp_path_factory.getbasetemp()))


def test_side_by_side(artifact):
    before = torch.get_num_threads()
    argv = ("bench", "latency", artifact, *shlex.split("--rows 1,16 --threads 1,2 --seconds 0 --calls 20"))
    code, out, err = printed_by(*argv, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert torch.get_num_threads() == before
    cells = {(each["model"], each["threads"], each["rows"]) for each in found["latency"]}
    assert cells == set(itertools.product(("mbcnet", "dcnv2", "dnn"), (1, 2), (1, 16)))
    assert len(found["latency"]) == 12 and found["artefacts"] == [str(artifact)] and found["cores"] > 0
    for each in found["latency"]:
        assert each["calls"] == 20 and each["p99"] is None and 0 < each["p50"] <= each["p95"]
        assert min(each[part] for part in ("preprocess", "tables", "dense")) > 0
    code, out, _ = printed_by("bench", "latency", artifact, *shlex.split("--rows 16 --threads 1 --seconds 0 --calls 1"))
    assert code == 0 and "mbcnet over dcnv2" in out and "16 rows" in out


def test_rivals_have_the_same_tables_and_the_models_own_widths(artifact):
    own = latency.open_artifact(artifact)
    models = latency.contestants([artifact], ("dcnv2", "dnn"), compiled=False)
    requests = draw_requests(own.preprocess.schema, own.vocabularies, 5)
    for model in models.values():
        assert model.predict(requests[0]).shape == (5,)
        for pooling, tables in models["mbcnet"].tables.items():
            assert model.tables[pooling].weights_host.data_ptr() == tables.weights_host.data_ptr()


def test_alone_and_refusals(artifact, tmp_path_factory):
    runs = trained_runs(tmp_path_factory.getbasetemp())
    argv = ("bench", "latency", artifact, "--rows", "2", "--threads", "1", "--seconds", "0", "--calls", "1")
    code, out, _ = printed_by(*argv, "--beside", "", "--json")
    assert code == 0 and {each["model"] for each in json.loads(out)["latency"]} == {"mbcnet"}
    for more, words in (
        (("--beside", "gpt"), "wanted some of mbcnet"),
        (("--beside", "fm"), "one weight per id"),
        (("--compiled",), "holds no dense_aot.pt2"),
    ):
        code, _, err = printed_by(*argv, *more)
        assert code == 2 and words in err and err.count("\n") == 1, err
    code, _, err = printed_by("bench", "latency", runs)
    assert code == 2 and "not an artifact" in err
    code, _, err = printed_by("bench", "latency", artifact, "--threads", "many")
    assert code == 2 and err.count("\n") == 1, err


def test_drawn_requests_are_valid_rows(artifact):
    """Every kind of field is drawn within its table, at every number of rows."""
    own = latency.open_artifact(artifact)
    for rows in (1, 33):
        for request in draw_requests(own.preprocess.schema, own.vocabularies, rows):
            assert own.predict(request).shape == (rows,)
