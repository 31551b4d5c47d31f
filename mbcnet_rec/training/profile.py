"""What some training steps ask of the device: a Chrome trace, and launches, host syncs and copies of a step by our own line of code."""

import inspect
import json
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

PROFILE = "profile"
WARM_UP = 5  # steps before those that are profiled, where the run is long enough
SHOWN = 15  # lines
ROOT = Path(__file__).parents[2]
OWN = tuple(f"{ROOT / package}/" for package in ("data", "sharding", "mbcnet_rec"))
AT, STEP, ELSEWHERE = "at ", "training step ", "another thread: the backward pass, or TorchRec's"
# names of the CUDA runtime's and driver's calls, as the profiler gives them
CALLS = {"launches": r"LaunchKernel|GraphLaunch", "syncs": r"Synchronize", "copies": r"Memcpy"}
COLUMNS = ("operators", *CALLS)


class _Lines(TorchFunctionMode):
    """Marks every call into torch with the innermost line of ours that it comes from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(inspect.currentframe()))
        own = ((path, line) for path, line in places if path.startswith(OWN) and path != __file__)
        path, line = next(own, ("", 0))
        with record_function(f"{AT}{Path(path).relative_to(ROOT)}:{line}" if path else AT + "a library"):
            return func(*args, **(kwargs or {}))


class StepProfile:
    """Profiles `count` steps of a run that trains steps [start, stop); none where it is 0. The trace is RUN/profile/rank_R.json."""

    def __init__(self, count: int, folder: Path, rank: int, start: int, stop: int) -> None:
        self._first = start + max(0, min(WARM_UP, stop - start - count))
        self._stop = min(stop, self._first + count)
        self._path = folder / PROFILE / f"rank_{rank}.json"
        self._profile: profile | None = None
        self._marks: Any = None

    def begin(self, step: int) -> None:
        """Begin step `step`, counted from 0; after the last one that is profiled nothing happens."""
        if not self._first <= step < self._stop:
            return
        if self._profile is None:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=kinds)
            self._profile.start()
        self._marks = (record_function(f"{STEP}{step + 1}"), _Lines())
        for mark in self._marks:
            mark.__enter__()

    def end(self, step: int) -> list[str]:
        """End what `begin` has begun; return what there is to say after the last of the steps."""
        for mark in reversed(self._marks or ()):
            mark.__exit__(None, None, None)
        self._marks = None
        if self._profile is None or step + 1 < self._stop:
            return []
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile, steps = None, self._stop - self._first
        events = json.loads(self._path.read_text(encoding="utf-8"))["traceEvents"]
        about = f"profile of steps {self._first + 1} to {self._stop}: {self._path} (open it in chrome://tracing or ui.perfetto.dev)"
        return [about, *table_lines(calls_by_line(events), steps)]

    def close(self, step: int) -> None:
        """Stop, without a trace, where the run ends in the middle."""
        self._stop = step + 2
        self.end(step)
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def calls_by_line(events: Iterable[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Count a trace's calls within training steps by line: `operators` that no other one calls, kernel `launches`, host `syncs`, `copies`."""
    whole = [each for each in events if each.get("ph") == "X"]
    steps = [(each["ts"], each["ts"] + each["dur"]) for each in whole if each["name"].startswith(STEP)]
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for each in whole:
        if any(begin <= each["ts"] < end for begin, end in steps):
            threads[each["pid"], each["tid"]].append(each)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for own in threads.values():
        around: list[dict[str, Any]] = []
        for each in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= each["ts"]:
                around.pop()
            kind = each.get("cat", "")
            marks = [outer["name"] for outer in around if outer["name"].startswith((AT, STEP))]
            line = re.sub(f"^{STEP}.*|^{AT}", "", marks[-1]) or "a library" if marks else ELSEWHERE
            if kind == "cpu_op" and not any(outer.get("cat") == "cpu_op" for outer in around):
                counts[line]["operators"] += 1
            elif kind in ("cuda_runtime", "cuda_driver"):
                counts[line].update(name for name, pattern in CALLS.items() if re.search(pattern, each["name"]))
            around.append(each)
    return counts


def table_lines(counts: dict[str, Counter[str]], steps: int) -> list[str]:
    """The calls of a step as text: all of them, then the lines with most of them."""
    total = sum(counts.values(), Counter())
    lines = ["a step: " + ", ".join(f"{total[name] / steps:.1f} {name}" for name in COLUMNS)]
    lines.append("".join(f"{name:>11}" for name in COLUMNS) + "  line")
    ranked = sorted(
        counts.items(), key=lambda item: [-item[1][name] for name in ("syncs", "copies", "launches", "operators")]
    )
    for line, own in ranked[:SHOWN]:
        lines.append("".join(f"{own[name] / steps:>11.1f}" for name in COLUMNS) + f"  {line}")
    return lines
