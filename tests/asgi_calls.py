"""The scorer's application called without a socket: `with serving(artifact) as call: call("POST", "/score", {...})`."""

import asyncio
import contextlib
import json

import pytest

for name in ("uvicorn", "starlette", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed: it comes with the optional extra `serve`")

from mbcnet_rec.server.app import build  # noqa: E402
from mbcnet_rec.server.models import SEEN, marks_in, write_json  # noqa: E402
from mbcnet_rec.server.options import Options  # noqa: E402


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"{self.status} {self.body[:300]!r}"


async def call(app, method, path, body=None, headers=None):
    path, _, query = path.partition("?")
    body = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http", "root_path": "",
    }  # fmt: skip
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return Answer(sent[0]["status"], headers, b"".join(each.get("body", b"") for each in sent[1:]))


async def _ready(app):
    while (await call(app, "GET", "/health/ready")).status != 200:
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def serving(artifact, state, wait=True, named=True, **options):
    """Yields a function: call(method, path, body, headers), or call([(method, ...), ...]) all at once."""
    state.mkdir(exist_ok=True)
    if options.get("watch"):
        write_json(state / SEEN, marks_in(options["models"]))
    if named:
        write_json(state / "wanted.json", {"number": 0, "chain": [str(artifact)], "before": []})
    with asyncio.Runner() as runner:
        app = build(Options(artifact, state, threads=1, **options))
        context = app.router.lifespan_context(app)
        runner.run(context.__aenter__())
        try:
            if wait:
                runner.run(asyncio.wait_for(_ready(app), 60))

            async def together(calls):
                return await asyncio.gather(*(call(app, *each) for each in calls))

            def ask(*request):
                if isinstance(request[0], list):
                    return runner.run(together(request[0]))
                return runner.run(call(app, *request))

            yield ask
        finally:
            runner.run(context.__aexit__(None, None, None))
