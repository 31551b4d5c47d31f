"""Memory of `mbcnet predict` and `mbcnet evaluate` at two sizes of the log: it must not depend on the rows.

    python benchmarks/scoring.py [--rows 240000] [--times 3] [--quick] [--json]

A demo-sized MBCnet (192 fields of every kind) is trained for a few steps. Then each command scores a log of `rows` rows and
one of `times` as many, alone on the machine, in a process of its own whose largest resident memory the kernel reports.

Below about 200,000 rows memory still fills: buffers of the reader and of a row group of the output.

predict_memory_growth    largest memory of the large log over that of the small one, less 1; pass: under 0.05
evaluate_memory_growth   the same of evaluate, which keeps 12 bytes a row and output for its exact AUC: up to a stated size, then none
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data.synthetic.pailitao import pailitao_schema
from data.synthetic.write import write_synthetic

LARGEST_GROWTH = 0.05
MBCNET = Path(sys.executable).parent / "mbcnet"
CONFIG = Path(__file__).parents[1] / "mbcnet_rec/configs/demo.toml"


def peak_bytes(folder: Path, *words: str) -> int:
    """Largest resident memory of an `mbcnet` command, which must end well."""
    command = [str(MBCNET), *words]
    with (folder / "said").open("w+") as said:
        child = subprocess.Popen(
            command, cwd=folder, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(
            f"{' '.join(command)} ended with {child.returncode}:\n{(folder / 'said').read_text()[-2000:]}"
        )
    return usage.ru_maxrss * 1024


def write_log(folder: Path, name: str, rows: int) -> Path:
    """Write a synthetic log; return its folder."""
    write_synthetic(pailitao_schema("demo"), folder / name, rows=rows, days=3)
    return folder / name


def measure(folder: Path, rows: int, times: int) -> dict[str, Any]:
    """Train, score both logs with both commands, print a line for each."""
    small, large = write_log(folder, "small", rows), write_log(folder, "large", rows * times)
    settings = {
        "schema": small / "schema.toml",
        "train.out": "run",
        "train.max_steps": 5,
        "train.device": "cpu",
    }
    settings |= {f"data.{split}": json.dumps([f"{small}/ds=*"]) for split in ("train", "valid", "test")}
    peak_bytes(
        folder, "train", "--config", str(CONFIG), *[f"--set={key}={value}" for key, value in settings.items()]
    )
    result: dict[str, Any] = {"rows": rows, "times": times}
    print(f"{'':10}{'rows':>10}{'largest MB':>12}")
    for command in ("predict", "evaluate"):
        peaks = []
        for name, log in (("small", small), ("large", large)):
            out = ("--out", f"scores_{name}") if command == "predict" else ()
            peaks.append(peak_bytes(folder, command, "run", "--data", f"{log}/ds=*", *out))
            print(f"{command:10}{rows * (times if name == 'large' else 1):>10,}{peaks[-1] / 1e6:>12.1f}")
        result |= {
            f"{command}_mb": round(peaks[0] / 1e6, 1),
            f"{command}_memory_growth": round(peaks[1] / peaks[0] - 1, 4),
        }
    result["ok"] = result["predict_memory_growth"] < LARGEST_GROWTH
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scoring-"))
    try:
        result = measure(folder, args.rows // 10 if args.quick else args.rows, args.times)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(result))
    sys.exit(0 if result["ok"] or args.quick else 1)


if __name__ == "__main__":
    main()
