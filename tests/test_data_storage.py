"""Proves that s3:// is read like a folder, through a throttled service and dropped connections, and that giving up names file and cause."""

import http.client
import io
import os
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.reading.storage
from data.errors import InputError
from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.reading.storage import RemoteFile, is_uri, retried
from data.schema import parse_schema
from data.stream import ParquetStream

boto3 = pytest.importorskip("boto3", reason="needs the S3 client and server of the pinned requirements")
pytest.importorskip("moto.server", reason="needs the S3 client and server of the pinned requirements")

SCHEMA = parse_schema(
    {
        "name": "t",
        "label": "click",
        "fields": {
            "row": {"kind": "categorical", "num_embeddings": 1000, "embedding_dim": 4},
            "tags": {"kind": "multi_valued", "num_embeddings": 9, "embedding_dim": 4},
        },
    },
    "schema.toml",
    Path(),
)


class Proxy(socketserver.ThreadingTCPServer):
    """Stands before the S3 server and fails as told: `script(method, path, range)` is None, "throttle", "drop" or "stall" for each request."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.script, self.requests = upstream, lambda *_: None, []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failure = self.server.script(self.command, self.path, self.headers.get("Range"))
        self.server.requests.append((self.command, self.path, failure))
        if failure == "throttle":
            answer = (
                b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            )
            self.send_response(503)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else answer)
            return
        if failure == "stall":
            time.sleep(30)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=20)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if failure == "drop":  # half of the body, and then nobody
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(content)
        upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one


@pytest.fixture(scope="module")
def server():
    code = (
        "import sys; from moto.server import ThreadedMotoServer as Server; server = Server('127.0.0.1', 0, verbose=False); "
        "server.start(); print('port', server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = next(int(line.split()[1]) for line in process.stdout if line.startswith("port "))
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="logs")
    for number in range(3):
        rows = range(40 * number, 40 * number + 40)
        table = pa.table(
            {
                "click": pa.array([row % 2 for row in rows], pa.int8()),
                "row": list(rows),
                "tags": [list(range(row % 4)) for row in rows],
            }
        )
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=20, write_page_checksum=True)
        client.put_object(
            Bucket="logs", Key=f"shop/ds=2024-05-0{number + 1}/part-0.parquet", Body=file.getvalue()
        )
    client.put_object(Bucket="logs", Key="shop/README.txt", Body=b"no data")
    yield port
    process.kill()
    process.wait()


@pytest.fixture
def proxy(server, monkeypatch):
    proxy = Proxy(server)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(data.reading.storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(data.reading.storage, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(data.reading.storage, "CONNECT_SECONDS", 1.0)
    data.reading.storage._s3.cache_clear()
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    data.reading.storage._s3.cache_clear()


FILES = [f"s3://logs/shop/ds=2024-05-0{day}/part-0.parquet" for day in (1, 2, 3)]


def rows_read(**options):
    stream = ParquetStream(resolve_files(["s3://logs/shop"]), SCHEMA, StreamOptions(16, 4, **options))
    return sorted(row for batch in stream for row in batch.sparse_features["row"].values().tolist())


def test_a_bucket_is_read_like_a_folder(proxy):
    assert (
        resolve_files(["s3://logs/shop"])
        == resolve_files(["s3://logs/shop/"])
        == [RemoteFile(uri) for uri in FILES]
    )
    assert resolve_files([FILES[1]]) == [RemoteFile(FILES[1])]
    assert rows_read(workers=2) == list(range(120))
    assert rows_read(where=("ds >= last 2",), order="chronological") == list(range(40, 120))


def test_files_on_disk_and_remote_ones_can_be_mixed(proxy, tmp_path):
    local = tmp_path / "a.parquet"
    pq.write_table(pa.table({"click": [0], "row": [999], "tags": [[1]]}), local, write_page_checksum=True)
    files = resolve_files([FILES[0], str(local)])
    assert files == [local, RemoteFile(FILES[0])]
    stream = ParquetStream(files, SCHEMA, StreamOptions(16, 4))
    assert stream.num_rows == sum(int((batch.weights > 0).sum()) for batch in stream) == 41


@pytest.mark.parametrize("failure", ["throttle", "drop"])
def test_every_request_failing_once_costs_time_and_no_row(proxy, failure):
    seen = set()

    def once(method, path, span):
        key = (method, path, span)
        if ".parquet" not in path or key in seen:
            return None
        seen.add(key)
        return failure

    proxy.script = once
    assert rows_read(workers=1) == list(range(120))
    assert sum(request[2] is not None for request in proxy.requests) >= 12


@pytest.mark.parametrize("failure", ["throttle", "drop", "stall"])
def test_a_file_that_stays_out_of_reach_is_named_with_the_cause(proxy, failure):
    stream = ParquetStream(
        resolve_files(["s3://logs/shop"]),
        SCHEMA,
        StreamOptions(16, 4, "chronological", workers=1, attempts=2),
    )
    proxy.script = lambda method, path, _: failure if "05-02" in path and method == "GET" else None
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        list(stream)
    message = str(error.value)
    assert message.startswith(f"{FILES[1]}: row group 0: gave up after 2 attempts (") and "\n" not in message
    assert message.endswith("check the storage service and the network, or raise data.attempts")
    assert time.monotonic() - start < 20
    if failure == "throttle":
        assert "SLOW_DOWN" in message or "SERVICE_UNAVAILABLE" in message


def test_what_no_retry_mends_is_not_tried_again(proxy):
    with pytest.raises(InputError, match="s3://logs/nothing: no Parquet file there"):
        resolve_files(["s3://logs/nothing"])
    asked = len(proxy.requests)
    with pytest.raises(InputError, match=r"s3://logs/gone.parquet: .*check the path and the permissions"):
        ParquetStream([RemoteFile("s3://logs/gone.parquet")], SCHEMA, StreamOptions(16, 4))
    assert len(proxy.requests) - asked <= 2


def test_no_server_at_all(monkeypatch):
    monkeypatch.setattr(data.reading.storage, "FIRST_PAUSE_SECONDS", 0.01)
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "x",
    }.items():
        monkeypatch.setenv(name, value)
    data.reading.storage._s3.cache_clear()
    with pytest.raises(
        InputError, match=r"s3://logs/shop: gave up after 5 attempts \(.+\); check the storage service"
    ):
        resolve_files(["s3://logs/shop"])
    data.reading.storage._s3.cache_clear()


def test_pauses_double_and_attempts_are_counted(monkeypatch):
    pauses, tries = [], []
    monkeypatch.setattr(data.reading.storage.time, "sleep", pauses.append)

    def fails():
        tries.append(1)
        raise OSError("busy\nwith details")

    with pytest.raises(InputError, match=r"^it: gave up after 4 attempts \(busy\); check the storage"):
        retried(fails, "it", 4)
    assert len(tries) == 4 and pauses == [0.2, 0.4, 0.8]


def test_a_windows_like_or_plain_path_is_no_uri():
    assert is_uri("s3://a/b") and not is_uri("/data/a=b/*.parquet") and not is_uri("data")
