"""Memory of `mbcnet predict` and `mbcnet evaluate` at two sizes of the log: it must not depend on the rows.

    python benchmarks/scoring.py [--rows 240000] [--times 3] [--quick] [--json]

A demo-sized MBCnet (192 fields of every kind) is trained for a few steps. Then each command scores a log of `rows` rows and
one of `times` as many, alone on the machine, in a process of its own whose largest resident memory the kernel reports.

Below about 200,000 rows memory still fills: buffers of the reader and of a row group of the output.

predict_memory_growth    largest memory of the large log over that of the small one, less 1; pass: under 0.05
evaluate_memory_growth   the same of evaluate, which keeps 12 bytes a row and output for its exact AUC: up to a stated size, then none
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import ROOT, environment, parser_of, print_figures, settings

from data.synthetic.planted import pailitao_schema
from data.synthetic.write import write_synthetic

LARGEST_GROWTH = 0.05
CONFIG = ROOT / "mbcnet_rec/configs/demo.toml"


def peak_bytes(folder: Path, *words: str) -> int:
    """Largest resident memory of an `mbcnet` command.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "mbcnet_rec.cli", *words]
    with (folder / "said").open("w+") as said:
        child = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, env=environment())
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        words_said = (folder / "said").read_text()[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{words_said}")
    return usage.ru_maxrss * 1024


def measure(folder: Path, rows: int, times: int) -> dict[str, Any]:
    """Train, score both logs with both commands."""
    sizes = {"small": rows, "large": rows * times}
    for name, size in sizes.items():
        write_synthetic(pailitao_schema("demo"), folder / name, rows=size, days=3)
    small = folder / "small"
    common = [f"data.{split}={json.dumps([f'{small}/ds=*'])}" for split in ("train", "valid", "test")]
    common += [f"schema={small}/schema.toml", "train.out=run", "train.max_steps=5", "train.device=cpu"]
    peak_bytes(folder, "train", "--config", str(CONFIG), *settings(*common))
    result: dict[str, Any] = {"rows": rows, "times": times}
    for command in ("predict", "evaluate"):
        peaks = []
        for name in sizes:
            out = ("--out", f"scores_{name}") if command == "predict" else ()
            peaks.append(peak_bytes(folder, command, "run", "--data", f"{folder / name}/ds=*", *out))
        result[f"{command}_mb"], result[f"{command}_large_mb"] = (round(peak / 1e6, 1) for peak in peaks)
        result[f"{command}_memory_growth"] = round(peaks[1] / peaks[0] - 1, 4)
    return result | {"ok": result["predict_memory_growth"] < LARGEST_GROWTH}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=240_000, help="a thirtieth with --quick")
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scoring-") as name:
        result = measure(Path(name), args.rows // 30 if args.quick else args.rows, args.times)
    print_figures(result, args.json)
    return 0 if result["ok"] or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
