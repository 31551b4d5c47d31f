"""`mbcnet serve` as a process of its own, and a client of it."""

import contextlib
import http.client
import json
import subprocess
import sys

from asgi_calls import Answer
from tiny_run import REPOSITORY, environment, wait_for


class Client:
    def __init__(self, port):
        self.port = port

    def __call__(self, method, path, body=None, **headers):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers), answer.read())


@contextlib.contextmanager
def started(*argv, python=sys.executable, **env):
    """The process and a client of it, ready. `python`: of another environment."""
    command = [str(python), "-m", "mbcnet_rec.cli", "serve", *map(str, argv), "--port", "0"]
    env = environment(PYTHONPATH=str(REPOSITORY), **env)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stdout.readline()
            client = Client(int(line.partition("127.0.0.1:")[2].partition(",")[0]))
            wait_for(lambda: client("GET", "/health/ready").status == 200, line)
            yield process, client
        finally:
            process.terminate()
            process.wait(60)


def children(process):
    """Processes of the workers."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]
