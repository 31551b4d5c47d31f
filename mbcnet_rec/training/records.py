"""What a run writes down while it goes: metrics.jsonl and TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class Records:
    """Appends one JSON object a line to metrics.jsonl, and the same numbers to TensorBoard.

    Args:
        folder: the run folder.
        first_step: lines of later steps are dropped: they belong to steps that a resumed run does again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        path = folder / METRICS
        kept = keep_until(path.read_text().splitlines(), first_step) if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tb"), purge_step=first_step or None)

    def add(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Write one line: step, split, and every value; NaN becomes null, which JSON has."""
        clean = {key: finite_or_none(value) for key, value in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
        self._file.flush()
        for key, value in clean.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{split}/{key.replace('>', '_to_')}", value, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def keep_until(lines: list[str], step: int) -> list[str]:
    """Keep the lines of steps up to `step`; a line cut off by a crash is dropped."""
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
