"""`mbcnet serve` under load, by an HTTP client of its own, beside a bare starlette echo and the loader called directly.

    python benchmarks/serve.py [--quick] [--json] [--models mbcnet,...] [--clients 1,8,32,128] [--candidates 1,64,512] [--workers 1]
    python benchmarks/serve.py --soak 30      minutes of light load with a swap of models every ten seconds and kill -9 of a worker each minute
    python benchmarks/serve.py --swaps 1000   under load: a whole artifact, a delta, a rollback, another model, in turn; no kills

Artifacts of the paper's size with drawn weights, rows int8, tables cut to --max-rows rows. A request is one user and query with so many
candidates: from two on, the fields user_* and query_* stand in "shared". Clients send the next request when the last is answered; the
client shares the cores with the server.

MODEL_CLIENTSxCANDIDATES_per_second, _p50_ms, _p95_ms, _p99_ms    of requests
echo_CLIENTS_..., direct_MODEL_CANDIDATES_per_second             what HTTP costs; predict in this process, one thread
coalescing_speedup                                               requests a second at 32 clients and one candidate, over --window-us 0
coalescing_p99_ratio                                             p99 at one client, over --window-us 0; the two take turns
soak and swaps: requests, lost (but those of killed workers: cut_off), mixed, swaps, failed_swaps, kills, growth_mb (of all workers' own memory, last fifth over second)
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency import write_drawn
from paper_size import MBCNET, PER_BRANCH, cut_schema
from safetensors.torch import save_file
from side_by_side import parser_of, print_figures

from mbcnet_rec.model.models import fit_widths
from mbcnet_rec.serving import loader
from mbcnet_rec.serving.delta import write_delta
from mbcnet_rec.serving.latency import draw_requests

MODELS = {
    "mbcnet": MBCNET,
    "mbcnet_per_branch": PER_BRANCH,
    "dcnv2": replace(fit_widths(MBCNET), kind="dcnv2"),
    "dnn": replace(fit_widths(MBCNET), kind="dnn"),
}
SHARED = ("user_", "query_")
ECHO = """
import socket, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
async def echo(request):
    return Response(await request.body(), media_type="application/json")
listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
print(f"echo at http://127.0.0.1:{listener.getsockname()[1]}, 1 worker", flush=True)
app = Starlette(routes=[Route("/score", echo, methods=["POST"])])
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])
"""


@dataclass
class Load:
    """What clients saw: seconds of each request, answers that were no 200, requests whose connection was cut."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    cut_off: int = 0
    mixed: int = 0
    wall: float = 0.0
    until: float = 0.0  # of time.monotonic
    pause_seconds: float = 0.0  # of a client before its next request

    def figures(self, name: str) -> dict[str, float]:
        """Requests a second and milliseconds."""
        p50, p95, p99 = (1e3 * np.percentile(self.seconds, (50, 95, 99))).tolist()
        rate = len(self.seconds) / self.wall
        return {f"{name}_per_second": rate, f"{name}_p50_ms": p50, f"{name}_p95_ms": p95, f"{name}_p99_ms": p99}


def request_bytes(body: bytes, path: str = "/score", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head[9:12]), await reader.readexactly(length)


async def client(port: int, requests: Sequence[bytes], load: Load, known: dict[str, list[Any]]) -> None:
    """Send one request after the other. `known`: of each model version the probabilities of each request."""
    turn = 0
    while time.monotonic() < load.until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                while (start := time.monotonic()) < load.until:
                    turn = (turn + 1) % len(requests)
                    writer.write(requests[turn])
                    status, body = await answer_of(reader)
                    load.seconds.append(time.monotonic() - start)
                    await asyncio.sleep(load.pause_seconds)
                    load.refused += status != 200
                    if known and status == 200:
                        found = json.loads(body)
                        expected = known[found["model"]][turn]
                        load.mixed += bool(np.abs(np.asarray(found["probability"]) - expected).max() > 1e-6)
        except (OSError, asyncio.IncompleteReadError):
            load.cut_off += 1


async def run_clients(
    port: int,
    requests: Sequence[bytes],
    clients: int,
    seconds: float,
    known: dict | None = None,
    load: Load | None = None,
) -> Load:
    load, start = load or Load(), time.monotonic()
    load.until = start + seconds
    each = (client(port, [*requests[n % 4 :], *requests[: n % 4]], load, {}) for n in range(clients))
    if known is not None:  # turns are looked up by number, so all clients start alike
        each = (client(port, requests, load, known) for _ in range(clients))
    await asyncio.gather(*each)
    load.wall = time.monotonic() - start
    return load


def measure(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    asyncio.run(run_clients(port, requests, min(clients, 4), min(0.5, seconds / 4)))  # warm
    load = asyncio.run(run_clients(port, requests, clients, seconds))
    if load.refused or load.cut_off:
        sys.exit(f"{load.refused} requests were refused and {load.cut_off} cut off")
    return load


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server and its port, once it is ready."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().partition("127.0.0.1:")[2].partition(",")[0])
            if "-c" not in command:
                while asyncio.run(once(port, "/health/ready", method="GET"))[0] != 200:
                    time.sleep(0.1)
            yield process, port
        finally:
            process.terminate()
            process.wait()


async def once(port: int, path: str, body: bytes = b"", method: str = "POST") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(request_bytes(body, path, method))
        return await answer_of(reader)


def serve(artifact: Path, *more: str) -> contextlib.AbstractContextManager[tuple[subprocess.Popen[str], int]]:
    return started("-m", "mbcnet_rec.cli", "serve", str(artifact), "--port", "0", *more)


def bodies(requests: Sequence[dict[str, list[Any]]], candidates: int) -> list[bytes]:
    """Requests of columns as JSON; with more than one candidate what belongs to user and query once."""
    found = []
    for columns in requests:
        shared = {name: each[0] for name, each in columns.items() if candidates > 1 and name.startswith(SHARED)}
        own = [name for name in columns if name not in shared]
        rows = [{name: columns[name][row] for name in own} for row in range(candidates)]
        found.append(json.dumps({"rows": rows} | ({"shared": shared} if shared else {})).encode())
    return found


def own_memory(pids: Sequence[int]) -> float:
    """Megabytes that processes do not share with files: anonymous pages."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total / 1e3


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "spawn_main" in line]


def write_next_day(parent: Path, child: Path, delta: Path) -> None:
    """An artifact in which every hundredth row is another one, and the delta that leads there."""
    shutil.copytree(parent, child)
    model = loader.load(child)
    for pooling, tables in model.tables.items():
        for rows in loader.rows_of(tables, model.spec["tables"][pooling]).values():
            rows[::100] = 0  # on private pages
    (child / loader.TABLES).unlink()
    save_file({pooling: tables.weights_host for pooling, tables in model.tables.items()}, child / loader.TABLES)
    model.spec["files"][loader.TABLES] = loader.sha256_of(child / loader.TABLES)
    (child / loader.MODEL).write_text(json.dumps(model.spec | {"step": 1}))
    write_delta(loader.load(parent), parent, child, delta)


def soak(
    folder: Path, names: Sequence[str], requests: Sequence[dict[str, list[Any]]], minutes: float, most: int
) -> dict[str, float]:
    """Load for minutes with a swap every ten seconds and each minute a worker that is killed; or for `most` swaps, one after the other, without kills."""
    sent = [request_bytes(body) for body in bodies(requests, 8)]
    known: dict[str, list[Any]] = {}
    load, memory, kills, failed = Load(pause_seconds=0.0 if most else 0.2), [0.0], 0, 0
    write_next_day(folder / names[0], folder / "next_day", folder / "delta")
    turns = [{"folder": names[0]}, {"folder": "delta"}, {"rollback": True}, *({"folder": name} for name in names[1:])]

    async def swap(port: int, change: dict[str, Any]) -> str:
        status, body = await once(port, "/models", json.dumps(change).encode())
        return json.loads(body)["model"] if status == 200 else ""

    async def run(process: subprocess.Popen[str], port: int) -> int:
        nonlocal kills, failed
        swaps = turn = 0
        for name in [*names, "next_day"]:  # what each version says
            version = await swap(port, {"folder": name})
            model = loader.load(folder / name)
            known[version] = [model.predict({c: v[:8] for c, v in as_shared(each).items()}) for each in requests]
        task = asyncio.create_task(run_clients(port, sent, 4 if most else 2, 60 * minutes or 1e9, known, load))
        await asyncio.sleep(1)
        next_kill = time.monotonic() + min(60, 20 * minutes)
        while time.monotonic() < load.until - 2 and not 0 < most <= swaps:
            await asyncio.sleep(0 if most else 10)
            if not most and time.monotonic() > next_kill:
                os.kill(workers_of(process)[0], signal.SIGKILL)
                kills, next_kill = kills + 1, next_kill + 60
                await asyncio.sleep(5)
            try:
                done = bool(await swap(port, turns[turn]))
            except (OSError, asyncio.IncompleteReadError):
                done = False
            swaps, failed, turn = swaps + done, failed + (not done), (turn + 1) % len(turns) if done else 0
            memory.append(own_memory(workers_of(process)))
        load.until = 0.0
        await task
        return swaps

    with serve(folder / names[0], "--workers", "2", "--models", str(folder)) as (process, port):
        swaps = asyncio.run(run(process, port))
    fifth = max(1, len(memory) // 5)
    growth = statistics.median(memory[-fifth:]) - statistics.median(memory[fifth : 2 * fifth] or memory)
    figures = {"requests": len(load.seconds), "lost": load.refused, "cut_off": load.cut_off, "mixed": load.mixed}
    figures |= {"swaps": swaps, "failed_swaps": failed, "kills": kills, "growth_mb": growth, "memory_mb": memory[-1]}
    return figures | load.figures("soak")


def as_shared(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """All rows have the first one's user and query."""
    return {name: [each[0]] * len(each) if name.startswith(SHARED) else each for name, each in columns.items()}


def direct(model: loader.ServingModel, requests: Sequence[dict[str, list[Any]]], seconds: float) -> float:
    """Requests a second of `predict` in this process."""
    torch.set_num_threads(1)
    count, end, start = 0, time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < end:
        model.predict(requests[count % len(requests)])
        count += 1
    return count / (time.monotonic() - start)


def coalescing(artifact: Path, sent: Sequence[bytes], seconds: float, rounds: int) -> dict[str, float]:
    """With and without, which take turns: medians of the rounds' ratios."""
    speedups, tails = [], []
    with serve(artifact) as (_, port), serve(artifact, "--window-us", "0") as (_, alone):
        for _ in range(rounds):
            many = [measure(each, sent, 32, seconds) for each in (port, alone)]
            few = [measure(each, sent, 1, seconds) for each in (port, alone)]
            speedups.append((len(many[0].seconds) / many[0].wall) / (len(many[1].seconds) / many[1].wall))
            p99 = [np.percentile(each.seconds, 99) for each in few]
            tails.append(float(p99[0] / p99[1]))
    return {"coalescing_speedup": statistics.median(speedups), "coalescing_p99_ratio": statistics.median(tails)}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default="", help=f"default {','.join(MODELS)}; quick mbcnet")
    parser.add_argument("--clients", default="", help="default 1,8,32,128; quick 1,32")
    parser.add_argument("--candidates", default="", help="default 1,64,512; quick 1,64")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=10_000, help="of a table")
    parser.add_argument("--seconds", type=float, help="of each cell; default 5, quick 1")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--swaps", type=int, default=0)
    args = parser.parse_args()
    names = (args.models or ("mbcnet" if args.quick else ",".join(MODELS))).split(",")
    clients = numbers(args.clients or ("1,32" if args.quick else "1,8,32,128"))
    candidates = numbers(args.candidates or ("1,64" if args.quick else "1,64,512"))
    seconds = args.seconds or (1.0 if args.quick else 5.0)
    schema = cut_schema(args.max_rows)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.soak or args.swaps:
            names = ["mbcnet", "dnn"]
        for name in names:
            write_drawn(schema, Path(folder) / name, "int8", compiled=False, model=MODELS[name])
        if args.soak or args.swaps:
            figures = soak(Path(folder).resolve(), names, draw_requests(schema, {}, 8), args.soak, args.swaps)
            print_figures(figures, args.json)
            return 0
        requests = {count: draw_requests(schema, {}, count) for count in candidates}
        sent = {count: [request_bytes(body) for body in bodies(each, count)] for count, each in requests.items()}
        for name in names:
            model = loader.load(Path(folder) / name)
            for count in candidates:
                figures[f"direct_{name}_{count}_per_second"] = direct(model, requests[count], seconds)
            with serve(Path(folder) / name, "--workers", str(args.workers)) as (_, port):
                for count in candidates:
                    for some in clients:
                        figures |= measure(port, sent[count], some, seconds).figures(f"{name}_{some}x{count}")
        with started("-c", ECHO) as (_, port):
            for some in clients:
                figures |= measure(port, sent[candidates[0]], some, seconds).figures(f"echo_{some}")
        figures |= coalescing(Path(folder) / names[0], sent[candidates[0]], seconds, 2 if args.quick else 7)
    for key in [key for key in figures if key.endswith("_per_second") and not key.startswith("direct")]:
        name = key.removesuffix("_per_second")
        tails = "  ".join(f"{figures[f'{name}_{each}_ms']:8.2f}" for each in ("p50", "p95", "p99"))
        print(f"{name:<28}{figures[key]:>9.1f} requests/s   p50, p95, p99 ms {tails}")
    print_figures(figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
