"""Trains on a CUDA device that is a stub, on one and two ranks, and compares each training with the CPU's. See README.md beside it.

    python tests/gpu/prove.py --python VENV/bin/python [--only WORDS] [--json] [--folder FOLDER]

Prints a line for each case: ok, differs or failed, and how much; and what is left out, and why. The exit code is 1 unless all are ok.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cases import LEFT_OUT, all_cases
from stub import build

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with requirements/gpu.txt")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose names contain these words")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="keep runs and what they said in this new folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by which the worker ends too
    chosen = [number for number, case in enumerate(all_cases()) if args.only in case.name]
    if not chosen:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        try:
            stub = build(args.python, Path(temporary))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
        results = run(args.python, stub, args.folder or Path(temporary) / "runs", chosen)
    if not args.only:
        for name, reason in LEFT_OUT.items():
            print(f"{'left out':<9}{name}: {reason}")
    counts = Counter(each["outcome"] for each in results)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ok", "differs", "failed")))
    if args.json:
        print(json.dumps({"cases": results, "left_out": LEFT_OUT}))
    return 0 if counts["ok"] == len(chosen) else 1


def run(python: Path, stub: dict[str, str], folder: Path, chosen: list[int]) -> list[dict[str, Any]]:
    """Run cases in processes that end with this one, and print each result as it comes."""
    folder.mkdir(parents=True)
    paths = [str(each) for each in (HERE, HERE.parent, HERE.parents[1])]
    env = os.environ | stub | {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "STUB_GPUS": "2",
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    with (folder / "worker.log").open("w+") as log:
        worker = subprocess.Popen(
            [str(python), str(HERE / "worker.py"), str(folder), *map(str, chosen)],
            env=env, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            for line in worker.stdout or ():
                if line.startswith("{"):
                    results.append(json.loads(line))
                    print(shown(results[-1]), flush=True)
            worker.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        if len(results) < len(chosen):
            log.seek(0)
            print(f"the worker ended early:\n{log.read()[-2000:]}", file=sys.stderr)
    return results


def shown(found: dict[str, Any]) -> str:
    """One line of a result."""
    apart = f"{found['difference']:.1e} of at most {found['within']:.0e}" if "difference" in found else ""
    words = ", ".join(filter(None, (apart, found["where"])))
    return f"{found['outcome']:<9}{found['case']}: {words} ({found['seconds']:.1f} s)"


if __name__ == "__main__":
    sys.exit(main())
