"""Proves that s3:// is read like a folder, through a throttled service and dropped connections, and that giving up names file and cause."""

import http.client
import io
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler

import pyarrow.parquet as pq
import pytest
from numbered_rows import make_schema, rows_of, rows_table, write_rows

import data.reading.storage
from data.errors import InputError
from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.reading.storage import RemoteFile, file_system, retried
from data.stream import ParquetStream
from mbcnet_rec.scoring.chunks import unlabelled_rows

pytest.importorskip("boto3", reason="needs the S3 client and server of the pinned requirements")
pytest.importorskip("moto.server", reason="needs the S3 client and server of the pinned requirements")
from s3_server import s3_server

SCHEMA = make_schema()


class Proxy(socketserver.ThreadingTCPServer):
    """Stands before the S3 server and fails as told: `script(method, path, range)` is None, "throttle", "drop" or "stall" for each request."""

    daemon_threads = False  # server_close waits for them

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.script, self.requests = upstream, lambda *_: None, []
        self.closing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failure = self.server.script(self.command, self.path, self.headers.get("Range"))
        self.server.requests.append((self.command, self.path, failure))
        self.close_connection = True  # or its thread would wait for a next request
        if failure == "throttle":
            answer = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(answer)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else answer)
            return
        if failure == "stall":
            self.server.closing.wait(30)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=20)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if failure == "drop":  # half of the body, and then the connection ends
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(content)
        upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one


@pytest.fixture(scope="module", autouse=True)
def server():
    with s3_server("logs") as (port, client):
        fill(client)
        yield port


def fill(client):
    for number in range(3):
        file = io.BytesIO()
        pq.write_table(
            rows_table(40 * number, 40), file, row_group_size=40 if number == 2 else 20, write_page_checksum=True
        )
        key = f"shop/ds=2024-05-0{number + 1}/part-0.parquet"
        client.put_object(Bucket="logs", Key=key, Body=file.getvalue())
    client.put_object(Bucket="logs", Key="shop/README.txt", Body=b"no data")


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(data.reading.storage, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(data.reading.storage, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(data.reading.storage, "FIRST_PAUSE_SECONDS", 0.01)
    with Proxy(server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        yield proxy
        proxy.closing.set()
        proxy.shutdown()
        thread.join()


FILES = [f"s3://logs/shop/ds=2024-05-0{day}/part-0.parquet" for day in (1, 2, 3)]


def rows_read(files=None, **options):
    files = files or resolve_files(["s3://logs/shop"])
    stream = ParquetStream(files, SCHEMA, StreamOptions(16, 4, **options))
    return sorted(row for batch in stream for row in rows_of(batch))


def test_a_bucket_is_read_like_a_folder_and_beside_files_on_disk(proxy, tmp_path):
    files = [RemoteFile(uri) for uri in FILES]
    assert resolve_files(["s3://logs/shop"]) == resolve_files(["s3://logs/shop/"]) == files
    assert resolve_files([FILES[1]]) == [RemoteFile(FILES[1])]
    assert rows_read(workers=2) == list(range(120))
    assert rows_read(where=("ds >= last 2",), order="chronological") == list(range(40, 120))
    local = write_rows(tmp_path / "a.parquet", 1, first=999)
    assert rows_read(resolve_files([FILES[0], str(local)])) == [*range(40), 999]


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
    assert rows_read([RemoteFile(FILES[2])], workers=1) == list(range(80, 120))
    assert sum(request[2] is not None for request in proxy.requests) >= 4
    if failure == "drop":
        seen.clear()
        row_groups, _ = unlabelled_rows([RemoteFile(FILES[2])], SCHEMA, 5)  # what `predict` begins with
        assert sum(group.num_rows for group in row_groups) == 40 and seen


@pytest.mark.parametrize(
    ("failure", "attempts"), [("throttle", 2), ("drop", 2), pytest.param("stall", 1, marks=pytest.mark.long)]
)
def test_a_file_that_stays_out_of_reach_is_named_with_the_cause(proxy, failure, attempts):
    options = StreamOptions(16, 4, "chronological", workers=1, attempts=attempts)
    stream = ParquetStream(resolve_files(["s3://logs/shop"]), SCHEMA, options)
    proxy.script = lambda method, path, _: failure if "05-02" in path and method == "GET" else None
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        list(stream)
    message = str(error.value)
    assert message.startswith(f"{FILES[1]}: row group 0: gave up after {attempts} attempts (")
    assert message.endswith("check the storage service and the network, or raise data.attempts")
    assert time.monotonic() - start < 10
    if failure == "throttle":
        assert "SLOW_DOWN" in message or "SERVICE_UNAVAILABLE" in message


def test_what_no_retry_repairs_is_not_tried_again(proxy):
    with pytest.raises(InputError, match="s3://logs/nothing: no Parquet file there"):
        resolve_files(["s3://logs/nothing"])
    asked = len(proxy.requests)
    with pytest.raises(InputError, match=r"s3://logs/gone.parquet: .*check the path and the permissions"):
        ParquetStream([RemoteFile("s3://logs/gone.parquet")], SCHEMA, StreamOptions(16, 4))
    assert len(proxy.requests) - asked <= 2


def test_pauses_double_and_attempts_are_counted(monkeypatch):
    pauses, tries = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def fails():
        tries.append(1)
        raise OSError("busy\nwith details")

    with pytest.raises(InputError, match=r"^it: gave up after 4 attempts \(busy\); check the storage"):
        retried(fails, "it", 4)
    assert len(tries) == 4 and pauses == [0.2, 0.4, 0.8]


def test_what_arrow_has_no_client_for_is_read_through_fsspec(tmp_path):
    uri = f"memory://{tmp_path.name}/rows"
    for day in (1, 2):
        with file_system(uri)[0].open_output_stream(f"/{tmp_path.name}/rows/ds={day}/a.parquet") as file:
            pq.write_table(rows_table(2 * day, 2), file, write_page_checksum=True)
    files = resolve_files([uri])
    assert [str(file) for file in files] == [f"{uri}/ds=1/a.parquet", f"{uri}/ds=2/a.parquet"]
    assert rows_read(files, workers=1) == [2, 3, 4, 5]
