"""Draws the progress bar of rank 0 and prints lines. Output that a closed terminal or full disk does not take is dropped."""

import sys
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line to stdout, or to the stream, if it takes one."""
    with suppress(OSError):
        print(line, file=stream or sys.stdout, flush=True)


class RowBar(tqdm):
    """A bar of rows, which counts them also where it is not shown."""

    def __init__(self, title: str, total: int | None = None, *, shown: bool = True) -> None:
        self.rows = 0
        super().__init__(unit="row", unit_scale=True, desc=title, total=total, disable=None if shown else True)

    def reach(self, rows: int) -> None:
        """Say how many rows are done."""
        self.rows = rows
        self.update(rows - self.n)


class _Tolerant:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it if possible."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush it if possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """A bar over steps of `batch_size` samples with rate, loss, AUC and time left; without a terminal, a line now and then."""

    def __init__(self, total_steps: int, start_step: int, batch_size: int, shown: bool) -> None:
        self._stream: Any = _Tolerant(sys.stderr)
        self._shown = shown
        self._batch_size = batch_size
        self._bar = tqdm(
            total=total_steps * batch_size, initial=start_step * batch_size, unit="sample", unit_scale=True, desc="train",
            file=self._stream, dynamic_ncols=True, mininterval=0.3 if self._stream.isatty() else 10.0, disable=not shown,
        )  # fmt: skip

    def step(self, **shown: float | str) -> None:
        """One step done; `shown` replaces what stands behind the bar."""
        if shown:
            texts = {key: value if isinstance(value, str) else f"{value:.4f}" for key, value in shown.items()}
            self._bar.set_postfix(texts, refresh=False)
        self._bar.update(self._batch_size)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._shown:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        """Leave the bar where it is."""
        self._bar.close()
