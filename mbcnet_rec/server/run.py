"""Start: check the artifact, open the port, let uvicorn keep the workers up until a signal ends it. A large one is checked while they are up."""

# pyright: reportMissingImports=false

import functools
import os
import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from data.errors import InputError
from mbcnet_rec.server.app import build
from mbcnet_rec.server.models import SEEN, load_model, marks_in, write_json
from mbcnet_rec.server.options import Options

QUICK_SECONDS = 2.0  # a check that takes longer does not keep the port closed
STUCK_SECONDS = 60  # a worker that does not answer its parent for so long is started again


def run_server(options: Options) -> int:
    """Serve until SIGTERM or Ctrl-C. InputError, before a row was scored, if an artifact cannot be served or the port cannot be had."""
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.workers)
    with tempfile.TemporaryDirectory(prefix="mbcnet_serve_") as name:
        state, stop = Path(name), threading.Event()
        versions: list[str] = []
        faults: list[Exception] = []

        def check() -> None:
            try:
                versions[:] = [load_model(each).version for each in (options.artifact, options.shadow) if each]
                chain = [str(options.artifact.resolve())]
                write_json(state / "wanted.json", {"number": 0, "chain": chain, "before": []})  # workers wait for it
            except Exception as error:
                faults.append(error)
                stop.set()

        if options.models and options.watch:
            write_json(state / SEEN, marks_in(options.models))  # what comes during the check is taken after it
        checking = threading.Thread(target=check, daemon=True)
        checking.start()
        checking.join(QUICK_SECONDS)
        if not faults:
            with _listener(options) as listener:
                (state / "metrics").mkdir()
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(state / "metrics")  # the workers read it when they start
                config = uvicorn.Config(
                    functools.partial(build, replace(options, state=state, threads=threads)),
                    factory=True,
                    workers=options.workers,
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=options.drain_seconds,
                    timeout_worker_healthcheck=STUCK_SECONDS,
                )
                host = f"[{options.host}]" if ":" in options.host else options.host
                what = " and ".join(versions) or f"{options.artifact}, which is being checked,"
                where = f"http://{host}:{listener.getsockname()[1]}"
                print(f"{what} at {where}, {options.workers} workers; SIGTERM drains and ends", flush=True)
                supervisor = Multiprocess(config, [listener])
                supervisor.should_exit = stop
                supervisor.run()
        if faults:
            raise faults[0]
    return 0


def _listener(options: Options) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        words = f"--host {options.host} --port {options.port}: cannot listen there ({str(error.strerror or error).partition(' (')[0]})"
        raise InputError(f"{words}; choose another --port, or an address of this machine") from None
