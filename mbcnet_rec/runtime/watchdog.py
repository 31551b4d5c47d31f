"""Which ranks are alive, which one stalls the others, and where each rank is when a step stalls.

A thread of each rank leaves heartbeats in the rendezvous store; a stopped or dead process leaves none, so the others can name it.
A timer of the interpreter that needs no lock writes the stacks, also those of a rank that is stuck inside a library.
"""

import faulthandler
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from mbcnet_rec.logs.progress import tell
from mbcnet_rec.runtime.exits import LostRankError, RunStoppedError
from mbcnet_rec.runtime.process import Process, side_store

STACKS = "stacks"
SILENT, NO_ANSWER = "gives no sign of life", "meeting point does not answer"
SLOWEST_BEAT_SECONDS, FASTEST_BEAT_SECONDS = 0.5, 0.1
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|recv|broken pipe|timed? ?out|socket", re.IGNORECASE)


class Watchdog:
    """Watches this rank's steps while entered: one that takes longer than `stall_seconds` has its stacks in FOLDER/stacks/rank_N.txt, once.

    `on_place` is called with each place before it is noted.
    """

    def __init__(
        self, process: Process, folder: Path, stall_seconds: float, on_place: Callable[[str], None] = lambda place: None
    ) -> None:
        self._process, self._on_place = process, on_place
        self._path = folder / STACKS / f"rank_{process.rank}.txt"
        self._stall = stall_seconds
        self._period = min(SLOWEST_BEAT_SECONDS, max(FASTEST_BEAT_SECONDS, stall_seconds / 10))
        self._store = side_store(process, "heartbeat")
        self._place = "start"
        self._since = time.monotonic()
        self._armed = float("-inf")
        self._ended = threading.Event()
        self._file: Any = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        lost, line = isinstance(error, RuntimeError) and is_collective_error(error), ""
        # what NCCL has ended leaves numbers of no meaning, over which any function may stumble
        unclear = (
            isinstance(error, RuntimeError)
            and not isinstance(error, RunStoppedError)
            and self._process.device.type == "cuda"
        )
        if lost or unclear:
            line = f"rank {self._process.rank}: at {self._place}: {self.suspects()}"
            lost = lost or any(sign in line for sign in (SILENT, NO_ANSWER))
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR2)
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
        self._thread.join(timeout=5.0)
        if lost:
            raise LostRankError(
                f"{line} ({_first_line(error)}); the last checkpoint stands: start again with --resume"
            ) from None

    def open_stacks(self) -> None:
        """Open the file of stacks, in the run folder, which exists now; SIGUSR2 writes them too from now on."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)

    def beat(self, place: str) -> None:
        """Say where this rank is, such as `step 12`; the stall clock begins anew."""
        self._on_place(place)
        now = time.monotonic()
        self._place, self._since = place, now
        # arming starts a native thread and waits for the last one's end: too expensive for every step of a small model
        if self._file is not None and now - self._armed >= self._period:
            self._armed = now
            faulthandler.dump_traceback_later(self._stall + self._period, file=self._file)

    def suspects(self) -> str:
        """Say which ranks give no sign of life, or else which is furthest behind. Takes a few heartbeats."""
        if self._store is None:
            return "no other rank is involved"
        before = self._beats()
        self._ended.wait(3 * self._period)
        after = self._beats()
        if before is None or after is None:
            return f"the ranks' {NO_ANSWER}, so the launcher or the rank that holds it (rank 0 without one) is gone"
        others = [rank for rank in range(self._process.world_size) if rank != self._process.rank]
        silent = [rank for rank in others if before.get(rank, "") == after.get(rank, "")]
        if silent:
            names = ", ".join(str(rank) for rank in silent)
            where = "; ".join(f"rank {rank} last seen at {_place_of(after, rank)}" for rank in silent)
            return f"rank {names} {SILENT}, it is stopped or dead ({where})"
        return "; ".join(f"rank {rank} is at {_place_of(after, rank)}" for rank in others)

    def _beats(self) -> dict[int, str] | None:
        """The last heartbeat of each rank, NUMBER@PLACE; None if the store is gone, which says nothing about any rank."""
        assert self._store is not None
        try:
            ranks = [rank for rank in range(self._process.world_size) if self._store.check([str(rank)])]
            return {rank: self._store.get(str(rank)).decode() for rank in ranks}
        except Exception:
            return None

    def _watch(self) -> None:
        number, told = 0, 0.0
        while not self._ended.wait(self._period):
            number += 1
            if self._store is not None:
                with suppress(Exception):
                    self._store.set(str(self._process.rank), f"{number}@{self._place}")
            since = self._since
            stalled = time.monotonic() - since
            if stalled > self._stall and told != since and self._file is not None:
                told = since
                tell(
                    f"mbcnet: rank {self._process.rank}: {self._place} has taken {stalled:.0f} s so far; {self.suspects()}; "
                    f"stacks in {self._path}",
                    sys.stderr,
                )


def is_collective_error(error: BaseException) -> bool:
    """Whether an error says that another rank could not be reached."""
    if isinstance(error, RunStoppedError):
        return False
    kinds = (dist.DistError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or bool(_COLLECTIVE.search(str(error)))


def _place_of(beats: dict[int, str], rank: int) -> str:
    return beats.get(rank, "@the start").partition("@")[2]


def _first_line(error: BaseException | None) -> str:
    """A library's message without paths of its sources and general advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S*/", "[", line).split(". This is typically")[0] or type(error).__name__
