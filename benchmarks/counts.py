"""What one training step of the small model costs in counted work: FLOPs, calls into ATen, bytes they write, calls of Python functions.

    python benchmarks/counts.py [--quick] [--json] [--store FILE]

Counts do not depend on the machine's load, so a test (tests/test_benchmarks_counts.py) compares them with stored ones and a step cannot
grow unnoticed. The model is MBCnet on the 192 fields of the demo schema with narrow layers, one process, float32.

flops           of matrix products, forward and backward
aten_calls      operators that reach a kernel: on a GPU each is a launch or more
bytes_written   of their outputs: the memory traffic that no fusion saves
python_calls    of Python functions, all libraries'
fbgemm_calls    of FBGEMM operators among the calls: one set for each kind of table, not each table
"""

import cProfile
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paper_size import cut_schema, read_batches, run_config, training_step, written_log
from side_by_side import print_figures, timing_parser_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from mbcnet_rec.build import build
from mbcnet_rec.model.branches import DeepConfig, EFGCConfig
from mbcnet_rec.model.mbcnet import MBCNetConfig
from mbcnet_rec.plugins import model_config
from mbcnet_rec.runtime.process import joined_process

ROWS = 64
NARROW = MBCNetConfig(efgc=EFGCConfig(hidden=(64, 32)), deep=DeepConfig(hidden=(128, 64)), branch_dim=64, top=(64, 32))


def main() -> int:
    parser = timing_parser_of(__doc__)
    words = "write the counts as the ones to compare with"
    parser.add_argument("--store", type=Path, metavar="FILE", help=words)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("prediction: a few hundred ATen calls; of the counts only the regroup's grow with the 192 fields")
    figures = counted()
    print_figures(figures, args.json)
    if args.store:
        args.store.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def counted() -> dict[str, Any]:
    """Counts of one step, after two that fill caches."""
    with tempfile.TemporaryDirectory() as name, joined_process("cpu") as process:
        folder, model = Path(name), model_config(mbcnet=NARROW)
        schema = written_log(folder, cut_schema(1_000, "demo"), 4 * ROWS)
        batch = read_batches(folder, schema, ROWS)[0]
        step = training_step(build(run_config(folder, model, ROWS), schema, process), batch)
        step()
        step()
        calls = CallCounter()
        with calls:
            step()
        # what the fast path calls; torch's counter knows its public products only
        linear = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: mm_flop(x, weight[::-1])}
        with FlopCounterMode(display=False, custom_mapping=linear) as flops:
            step()
        return {
            "flops": flops.get_total_flops(),
            "aten_calls": sum(calls.calls.values()),
            "bytes_written": calls.bytes_written,
            "fbgemm_calls": sum(count for call, count in calls.calls.items() if call.startswith("fbgemm")),
            "python_calls": python_calls(step),
            "rows": ROWS,
            "torch": torch.__version__,
            "by_call": dict(calls.calls.most_common(30)),
        }


class CallCounter(TorchDispatchMode):
    """Counts operators that are no mere views, and the bytes of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes_written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls[func.name()] += 1
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.bytes_written += sum(each.nbytes for each in outputs if isinstance(each, Tensor))
        return result


def python_calls(step: Callable[[], object]) -> int:
    """Calls of Python functions in one step."""
    profiler = cProfile.Profile(builtins=False)
    profiler.runcall(step)
    return sum(each.callcount for each in profiler.getstats())  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
