"""Runs scripts of this folder in processes forked from one that has torch, torchrec and our modules imported: to import them takes longer than
most scripts do. A test asks by `forked_ranks.run_script`; a worker of pytest has one server, from its first script to its end.

A line of JSON on stdin is a script with its arguments, variables and folder; the answer on stdout is its exit code.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import forked_ranks


def run(request: dict[str, Any]) -> int:
    """Run a script as `python SCRIPT ARGS` would; return its exit code."""
    words = os.open(request["words"], os.O_WRONLY)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (words, 1), (words, 2)):
        os.dup2(descriptor, target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ |= request["variables"]
    os.chdir(request["folder"])
    sys.argv = [request["script"], *request["args"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Answer requests until stdin ends, which it does with the worker of pytest."""
    forked_ranks.before_fork()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    assert Path(__file__).parent == Path(sys.path[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker of pytest ends it
    serve()
