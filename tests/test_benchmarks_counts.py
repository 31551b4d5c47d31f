"""Guards a training step by counted work: FLOPs, calls into ATen, bytes they write and Python calls may not grow unnoticed.

After a wanted change: python benchmarks/counts.py --store tests/step_counts.json, and say in the commit what grew and why.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

STORED = json.loads((Path(__file__).parent / "step_counts.json").read_text())
# How much a count may grow: arithmetic not at all, calls by what a release of torch may shift
TOLERANCE = {"flops": 0.001, "aten_calls": 0.03, "bytes_written": 0.03, "fbgemm_calls": 0.0, "python_calls": 0.05}


@pytest.fixture(scope="module")
def counts():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import counts

    sys.path.pop(0)
    return counts.counted()


@pytest.mark.parametrize("key", TOLERANCE)
def test_a_step_does_not_grow(counts, key):
    if key != "flops" and STORED["torch"] != torch.__version__:
        pytest.skip(f"calls were counted under torch {STORED['torch']}, this is {torch.__version__}")
    found, limit = counts[key], STORED[key] * (1 + TOLERANCE[key])
    by_call = {call: (STORED["by_call"].get(call, 0), count) for call, count in counts["by_call"].items()}
    grown = {call: f"{old} -> {new}" for call, (old, new) in by_call.items() if new > old}
    assert 0 < found <= limit, f"{key}: {STORED[key]:,} stored, {found:,} now; calls that grew: {grown}"
