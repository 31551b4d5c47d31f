"""Proves that the scorer answers JSON and Arrow with the probabilities of `mbcnet predict`, shared features looked up once, branches beside;
that a bad value is named by field and row as in training; and that limits, tokens and deadlines hold.
"""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asgi_calls import serving
from tiny_run import wait_for

from mbcnet_rec.server.models import write_json
from mbcnet_rec.server.requests import ARROW, unpacked_bytes

ROWS = 40


@pytest.fixture(scope="module")
def ask(artifact, tmp_path_factory):
    with serving(artifact, tmp_path_factory.mktemp("state"), max_rows=ROWS, max_body_mb=1) as call:
        yield call


@pytest.fixture(scope="module")
def table(runs, artifact):
    found = pq.read_table(runs / "test.parquet").slice(0, ROWS)
    return found.drop_columns(["click", "unread"])


@pytest.fixture(scope="module")
def expected(runs):
    return pq.read_table(runs / "row_wise_predicted_1" / "test.parquet").slice(0, ROWS)


def close(found, expected, column="probability"):
    assert np.abs(np.asarray(found) - expected[column].to_numpy()).max() < 1e-6
    return True


def stream(table, options=None):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_scores_are_those_of_predict(ask, table, expected):
    rows = table.to_pylist()
    answer = ask("POST", "/score", {"rows": rows})
    assert (
        answer.status == 200
        and close(answer.json["probability"], expected)
        and answer.json.keys() == {"model", "probability"}
    )
    assert answer.json["model"] == ask("GET", "/health/ready").json["model"]
    answer = ask("POST", "/score?branches=1", {"rows": rows})
    assert answer.json["branches"].keys() == {"efgc", "cross", "deep"} and close(answer.json["probability"], expected)
    assert all(close(own, expected, f"probability_{name}") for name, own in answer.json["branches"].items())
    # by a field's name where its column has another; and what the log has besides
    for row in rows:
        row["shop"], row["click"] = row.pop("shop_name"), 1
    assert close(ask("POST", "/score", {"rows": rows}).json["probability"], expected)


def test_arrow_both_ways(ask, table, expected):
    answer = ask("POST", "/score?branches=1", stream(table), {"content-type": ARROW})
    assert answer.status == 200 and answer.headers["content-type"] == ARROW, answer
    found = pa.ipc.open_stream(answer.body).read_all()
    assert all(close(found[name].to_numpy(), expected, name) for name in found.column_names) and found.num_columns == 4
    assert found.schema.metadata[b"model"].decode() == ask("GET", "/health/ready").json["model"]
    answer = ask("POST", "/score", stream(table), {"content-type": ARROW, "accept": "application/json"})
    assert close(answer.json["probability"], expected)
    wanted = {"content-type": ARROW}
    assert ask("POST", "/score", stream(table)[:-400], wanted).status == 400
    assert "stream" in ask("POST", "/score", b"", wanted).json["error"]
    assert ask("POST", "/score", stream(table.append_column("odd", table["user"])), wanted).json["field"] == "odd"


@pytest.mark.parametrize(
    "shared", [["user"], ["user", "history", "price", "likes", "like_weights", "image", "city", "hour"]]
)
def test_shared_features_stand_once(ask, table, shared):
    """One user's features with many candidates score as the same rows in full, for every kind of field; in Arrow, two streams."""
    first = table.slice(0, 1)
    whole = table.drop_columns(shared)
    for name in shared:
        whole = whole.append_column(name, pa.concat_arrays([first[name].combine_chunks()] * ROWS))
    own = table.drop_columns(shared)
    expected = ask("POST", "/score?branches=1", {"rows": whole.to_pylist()}).json
    body = {"shared": first.select(shared).to_pylist()[0], "rows": own.to_pylist()}
    found = ask("POST", "/score?branches=1", body).json
    assert np.abs(np.subtract(found["probability"], expected["probability"])).max() < 1e-6
    assert np.ptp(found["probability"]) > 0.1
    two = stream(first.select(shared)) + stream(own)
    answer = ask("POST", "/score", two, {"content-type": ARROW, "accept": "application/json"}).json
    assert np.abs(np.subtract(answer["probability"], expected["probability"])).max() < 1e-6


def test_bad_values_are_named(ask, table):
    rows = table.to_pylist()

    def refused(change, row=3, shared=None):
        changed = [dict(each) for each in rows]
        changed[row].update(change)
        body = {"rows": changed} if shared is None else {"rows": changed, "shared": shared}
        answer = ask("POST", "/score", body)
        assert answer.status == 400, answer
        return answer.json

    found = refused({"user": 120})  # of [0, 120)
    assert (found["field"], found["row"]) == ("user", 3) and "wanted an id in [0, 120)" in found["error"]
    found = refused({"user": "somebody"})
    assert (found["field"], found["row"]) == ("user", 3), found
    found = refused({"image": [1.0, 2.0]}, 7)
    assert (found["field"], found["row"]) == ("image", 7)
    found = refused({"price": float("inf")}, 0)
    assert (found["field"], found["row"]) == ("price", 0)
    found = refused({"like_weights": [0.5] * 9}, 2)
    assert (found["field"], found["row"]) == ("likes", 2)
    found = refused({"prize": 3}, 5)
    assert (found["field"], found["row"]) == ("prize", 5)
    for each in rows:
        each["prize"] = 3
    found = refused({})
    assert found["field"] == "prize" and "unknown" in found["error"] and "price" in found["error"]
    for each in rows:
        del each["prize"], each["price"]
    assert refused({})["field"] == "price"
    found = refused({}, shared={"price": "dear"})
    assert (found["field"], found["row"]) == ("price", None) and found["error"].startswith("shared")
    assert "shared" in refused({"user": 1}, shared={"user": 2, "price": 1.0})["error"]
    apart = {
        "shared": {"price": 1.0, "likes": rows[0].pop("likes")},
        "rows": rows[:1],
    }  # whose weights stand in the row
    good = {"shared": {"price": 1.0}, "rows": rows[1:2]}
    found = ask([("POST", "/score", apart)] + [("POST", "/score", good)] * 5)
    assert [each.status for each in found] == [400] + [200] * 5 and found[0].json["field"] == "likes"
    for body in (
        b"{",
        b"[]",
        b'{"rows": []}',
        b'{"rows": [1]}',
        b'{"rows": {}}',
        b"[" * 100_000,
        b'{"rows": [{}], "more": 1}',
        b'{"rows": [{}]}',
    ):
        assert ask("POST", "/score", body).status == 400, body
    assert ask("POST", "/score", b"user=1", {"content-type": "text/plain"}).status == 415
    assert ask("POST", "/score?branches=2", {"rows": rows}).status == 400
    text = ask("GET", "/metrics").body.decode()
    assert 'mbcnet_refused_rows_total{field="user",reason="value"} 1.0' in text
    assert 'mbcnet_refused_rows_total{field="user",reason="type"} 1.0' in text
    assert 'field="(unknown)",reason="unknown field"' in text and 'field="prize"' not in text


def test_limits(ask, artifact, table, tmp_path):
    rows = table.to_pylist()
    assert ask("POST", "/score", {"rows": [*rows, rows[0]]}).status == 413
    assert ask("POST", "/score", b" " * (2**20 + 1)).status == 413
    body = {"rows": rows[:1]}
    with serving(artifact, tmp_path / "state", queue=2, window_us=100_000, score_token="s3cret") as call:
        own = {"authorization": "Bearer s3cret"}
        answers = call([("POST", "/score", body, own | ({"x-deadline-ms": "20"} if n == 1 else {})) for n in range(4)])
        assert [each.status for each in answers] == [200, 504, 429, 429] and answers[2].headers["retry-after"] == "1"
        assert call("POST", "/score", body, own | {"x-deadline-ms": "soon"}).status == 400
        assert call("POST", "/score", body, own | {"x-deadline-ms": "60000"}).status == 200
        for wrong in ({}, {"authorization": "Bearer s3cres"}, {"authorization": "s3cret"}):
            assert call("POST", "/score", body, wrong).status == 401
        assert call("GET", "/health/live").status == 200


def test_requests_share_passes(artifact, table, expected, tmp_path):
    """Those of one window have one pass, each kind of body its own; a bad row costs its own request alone; without a window none shares."""
    rows = table.to_pylist()
    bodies = [{"rows": rows[n : n + 2]} for n in range(0, 20, 2)]
    bad = {"rows": [rows[0] | {"user": 999}]}
    for window, passes in ((100_000, 1), (0, 10)):
        with serving(artifact, tmp_path / f"{window}", window_us=window) as call:
            answers = call([("POST", "/score", each) for each in bodies])
            found = [value for each in answers for value in each.json["probability"]]
            assert close(found, expected.slice(0, 20))
            assert f"mbcnet_pass_requests_count {passes}.0" in call("GET", "/metrics").body.decode()
            one, two, three = call(
                [("POST", "/score", bodies[0]), ("POST", "/score", bad), ("POST", "/score", bodies[1])]
            )
            assert (one.status, two.status, three.status) == (200, 400, 200) and two.json["row"] == 0
            assert one.json["probability"] == pytest.approx(answers[0].json["probability"], abs=1e-6)
            assert three.json["probability"] == pytest.approx(answers[1].json["probability"], abs=1e-6)


def test_a_compressed_stream_is_measured_before_it_is_unpacked(ask, table, expected):
    """Zeros of 64 MB in a few kilobytes are refused; a stream within the limit scores, also of dictionaries and with buffers left as they are."""
    wanted = {"content-type": ARROW, "accept": "application/json"}
    for codec in ("lz4", "zstd"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        for own in (
            table,
            table.set_column(table.column_names.index("city"), "city", table["city"].dictionary_encode()),
        ):
            body = stream(own, options)
            assert 0 < unpacked_bytes(body) < 2**20 and unpacked_bytes(stream(own)) == 0
            assert close(ask("POST", "/score", body, wanted).json["probability"], expected)
        large = pa.table({"user": np.zeros(8_000_000, np.int64)})
        small = stream(large, options)
        assert len(small) < 2**20 and 64e6 <= unpacked_bytes(small) < 65e6
        for body in (small, stream(table.slice(0, 1).select(["user"])) + small):
            answer = ask("POST", "/score", body, wanted)
            assert answer.status == 413 and "decompressed" in answer.json["error"]
        for cut in range(1, len(body := stream(table, options)), 997):
            assert ask("POST", "/score", body[:-cut], wanted).status == 400


def test_live_before_the_artifact_is_checked(artifact, tmp_path, monkeypatch):
    """As run.py starts workers: what they shall serve is named when its check has ended."""
    monkeypatch.setattr("mbcnet_rec.server.app.START_SECONDS", 0.5)
    with serving(artifact, tmp_path / "state", wait=False, named=False, models=tmp_path) as call:
        assert call("GET", "/health/live").status == 200 and call("GET", "/health/ready").status == 503
        assert "not loaded yet" in call("POST", "/models", {"folder": "x"}).json["error"]
        write_json(tmp_path / "state" / "wanted.json", {"number": 0, "chain": [str(artifact)], "before": []})
        wait_for(lambda: call("GET", "/health/ready").status == 200, "not loaded")


@pytest.mark.long
def test_a_check_that_takes_long_ends_a_server_that_is_up(artifact, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    tables = max(damaged.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    tables.unlink()
    os.mkfifo(tables)  # the check waits here until the server has said that it is up
    script = "import sys, mbcnet_rec.server.run as r; r.QUICK_SECONDS = 0; from mbcnet_rec.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", script, "serve", str(damaged), "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        assert "being checked" in said
        tables.write_bytes(b"?")
        _, told = server.communicate(timeout=120)
    finally:
        server.kill()
    assert server.returncode == 2 and "damaged" in told, told


def test_live_before_ready(artifact, tmp_path):
    with serving(artifact, tmp_path / "state", wait=False) as call:
        assert call("GET", "/health/live").status == 200
        answer = call("POST", "/score", {"rows": [{}]})
        assert answer.status != 503 and call("GET", "/health/ready").status == 200, "it waits for the model"
