"""The HTTP side of one worker: routes, tokens, limits."""

# pyright: reportMissingImports=false

import asyncio
import hmac
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from data.errors import first_line
from mbcnet_rec.server.metrics import Metrics
from mbcnet_rec.server.models import Loaded, Models
from mbcnet_rec.server.options import Options
from mbcnet_rec.server.requests import ARROW, JSON, Refused, answer, parse
from mbcnet_rec.server.scorer import Scorer

FOLLOW_SECONDS = 0.1
START_SECONDS = 10.0  # for which a request waits for the model of a worker that starts
PAGE = Path(__file__).with_name("page.html")


class Worker:
    """The handlers of one worker. What they refuse is answered by `refused`."""

    def __init__(self, options: Options) -> None:
        self.options, self.metrics = options, Metrics()
        self.models = Models(options)
        self.scorer = Scorer(self.models, self.metrics, options)
        # else requests that wait for their turn would hold the threads in which others' changes are followed
        self.switching = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Load while requests are taken: /health/live answers at once."""
        following = asyncio.create_task(self.keep_up())
        if parent := multiprocessing.parent_process():
            threading.Thread(target=self.end_with, args=(parent,), daemon=True).start()
        yield
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        self.scorer.thread.shutdown()

    def end_with(self, parent: BaseProcess) -> None:
        """Drain when the process that started this one is gone, however it went: nobody would start a worker again."""
        parent.join()
        shutil.rmtree(self.options.state, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    async def keep_up(self) -> None:
        """Load the model, then follow what all workers shall serve."""
        step = self.models.start
        while True:
            try:
                await asyncio.to_thread(step)
                step = self.models.follow
            except Exception as error:  # a folder that is not there for a moment must not end it
                print(f"mbcnet serve: {first_line(error)}", flush=True)
            await asyncio.sleep(FOLLOW_SECONDS if self.models.current else 10 * FOLLOW_SECONDS)

    async def ready(self, _: Http) -> Response:
        """Whether a model is loaded and has scored a row."""
        loaded = self.models.current
        return JSONResponse({"ready": bool(loaded), "model": loaded and loaded.version}, 200 if loaded else 503)

    async def score(self, http: Http) -> Response:
        """Score rows."""
        arrived, headers, most = time.monotonic(), http.headers, self.options.max_rows
        _authorise(http, self.options.score_token)
        deadline = arrived + _seconds(headers.get("x-deadline-ms"))
        await self.wait_for_start(deadline)
        loaded = self._loaded()
        branches = http.query_params.get("branches", "0")
        if branches not in ("0", "1") or (branches == "1" and loaded.model.branch_graph is None):
            why = "wanted 0 or 1" if branches != "1" else "its artifact has no branches, or is of an earlier version"
            raise Refused(f"branches={branches[:9]}: {why}; leave it out", reason="branches")
        names, arms = loaded.names, self.options.arms
        if arms:
            key = names.get(arms[0]) or arms[0]  # a column that no field reads, too
            names, arms = names | {arms[0]: key, key: key}, (key, arms[1], self.options.split_seed)
        more = {"arms": arms, "branches": branches == "1", "arrived": arrived, "deadline": deadline}
        body = await self.read_body(http)
        with self.metrics.seconds.labels("parse").time():
            request = parse(body, headers.get("content-type", ""), names, self.options.max_body_mb << 20, **more)
        if request.num_rows > most:
            raise Refused(f"{request.num_rows} rows: wanted {most} at most; send several requests", 413, "rows")
        scores, loaded = await self.scorer.score(request)
        accepts = headers.get("accept", "")
        kind = ARROW if ARROW in accepts or (JSON not in accepts and request.kind[0] == ARROW) else JSON
        found = answer(kind, loaded.version, loaded.model, scores, request.arm)
        self.metrics.answers.labels(200).inc()
        self.metrics.seconds.labels("whole").observe(time.monotonic() - arrived)
        return Response(found, media_type=kind)

    async def read_body(self, http: Http) -> bytes:
        """The whole body. Raises Refused where it is too long."""
        most, parts, size = self.options.max_body_mb << 20, [], 0
        async for part in http.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                raise Refused(f"a body of more than {most} bytes; send fewer rows at a time", 413, "body")
        return b"".join(parts)

    async def choose_model(self, http: Http) -> Response:
        """Tell what serves; swap to another artifact, or back."""
        _authorise(http, self.options.models_token)
        faults: list[str] = []
        if http.method == "POST":
            if http.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
                raise Refused(f"wanted Content-Type {JSON}", 415)  # which no page of another site can send unasked
            given = None
            with suppress(ValueError, RecursionError):
                given = json.loads(await self.read_body(http))
            name = given.get("folder") if isinstance(given, dict) else None
            if given != {"rollback": True} and (not isinstance(name, str) or given != {"folder": name}):
                raise Refused('wanted {"folder": NAME}, of an artifact below --models, or {"rollback": true}')
            await self.wait_for_start()
            async with self.switching:
                faults = await asyncio.to_thread(self.models.switch, name)
        loaded = self.models.current
        found = {"model": loaded and loaded.version, "folder": loaded and str(loaded.folder), "faults": faults}
        return JSONResponse(found, 500 if faults else 200)

    async def model(self, http: Http) -> Response:
        """What the page shows: schema, how the artifact was checked, and a row."""
        _authorise(http, self.options.score_token)
        return JSONResponse(self._loaded().description())

    async def wait_for_start(self, deadline: float = math.inf) -> None:
        """Wait a while: a worker that is new, since another was killed, takes requests before it has loaded what the others serve."""
        end = min(deadline, time.monotonic() + START_SECONDS)
        while self.models.current is None and time.monotonic() < end:
            await asyncio.sleep(FOLLOW_SECONDS)

    def _loaded(self) -> Loaded:
        if self.models.current is None:
            raise Refused("the model is not loaded yet; ask /health/ready", 503, "start")
        return self.models.current

    async def text(self, _: Http) -> Response:
        """Prometheus' exposition."""
        found = await asyncio.to_thread(self.metrics.text, self.models.current)
        return Response(found, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def refused(self, http: Http, error: Exception) -> Response:
        """One line, and field and row where a value is bad."""
        assert isinstance(error, Refused)
        if http.url.path == "/score":
            self.metrics.refuse(error, self.models.current.names if self.models.current else ())
        place = {"field": error.field, "row": error.row} if error.field or error.row is not None else {}
        more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
        return JSONResponse({"error": str(error), **place}, error.status, more.get(error.status))


def _authorise(http: Http, token: str) -> None:
    given = http.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refused("wanted the header Authorization: Bearer TOKEN, with the token of this path", 401, "token")


def _seconds(milliseconds: str | None) -> float:
    with suppress(ValueError):
        found = math.inf if milliseconds is None else float(milliseconds) / 1e3
        if found >= 0:
            return found
    raise Refused(f"X-Deadline-Ms {str(milliseconds)[:40]!r}: wanted milliseconds from now, such as 50")


async def live(_: Http) -> Response:
    """The process answers."""
    return JSONResponse({"live": True})


def build(options: Options) -> Starlette:
    """The application of one worker."""
    worker = Worker(options)
    routes = [
        Route("/", lambda _: FileResponse(PAGE)),
        Route("/model", worker.model),
        Route("/health/live", live),
        Route("/health/ready", worker.ready),
        Route("/score", worker.score, methods=["POST"]),
        Route("/models", worker.choose_model, methods=["GET", "POST"]),
        Route("/metrics", worker.text),
    ]
    faults = {Refused: worker.refused, ClientDisconnect: lambda *_: Response(status_code=499)}  # nobody reads it
    return Starlette(routes=routes, lifespan=worker.lifespan, exception_handlers=faults)
