"""Writes checkpoints while training continues: a copy in memory, a thread that writes it, no collective in the thread.

Ranks report their files to rank 0 through the rendezvous store. Rank 0 writes the manifest when all files are there.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mbcnet_rec.checkpoints.manifest import Copies, file_name, manifest_bytes
from mbcnet_rec.checkpoints.shards import Snapshot, TensorShard, take_snapshot, write_tensors
from mbcnet_rec.checkpoints.storage import BEST, CheckpointStorage
from mbcnet_rec.runtime.exits import CannotWriteError
from mbcnet_rec.runtime.process import Process, broadcast_value, side_store, vote, wait_for_device

POLL_SECONDS = 0.02
Best = Sequence[tuple[float | None, int]]  # (validation AUC, step), best first


class Keep(NamedTuple):
    """Which checkpoints are kept: the newest `last`, those of the steps in `best`, and that of `step`."""

    last: int
    best: Best = ()
    step: int = 0


class Saver:
    """Writes checkpoints of all ranks in the background, one at a time; rank 0 waits `timeout_seconds` for the others' files.

    `on_write` is called in the writing thread first. The files of the run's `folder` in extra["run"]["files"] are in every checkpoint, too.
    """

    def __init__(
        self,
        storage: CheckpointStorage,
        process: Process,
        timeout_seconds: float,
        on_write: Callable[[], None] = lambda: None,
        folder: Path = Path(),
    ) -> None:
        self.storage = storage
        self.saved_step: int | None = None
        self.stalled_seconds = 0.0
        self.written_seconds = 0.0
        self.held: dict[str, str] = {}  # SHA-256 -> where the checkpoint before this one has that file
        self._process, self._on_write, self._folder = process, on_write, folder
        self._timeout = timeout_seconds
        self._run = broadcast_value(f"{time.time_ns():x}", process)
        self._count = 0
        self._store = side_store(process, "checkpoint")
        self._thread: threading.Thread | None = None
        self._error: str = ""
        self._committed = False  # the last save has its manifest: whatever fails after that, its files stay
        self._snapshot: Snapshot = []
        self._cancelled = threading.Event()

    @property
    def _token(self) -> str:
        """Names the files of the last save, equal on all ranks."""
        return f"{self._run}-{self._count:x}"

    @property
    def failed(self) -> bool:
        """Whether this rank's last checkpoint could not be written."""
        return bool(self._error)

    def save(self, step: int, shards: list[TensorShard], extra: dict[str, Any], keep: Keep) -> None:
        """Copy the shards and begin to write them; CannotWriteError if the one before failed on some rank. Every rank calls it."""
        start = time.perf_counter()
        self.finish()
        self._count += 1
        self._committed = False
        self._snapshot = take_snapshot(shards, self._process.rank, self._snapshot)
        wait_for_device(self._process)
        args = (step, self._snapshot, extra, keep)
        self._thread = threading.Thread(target=self._write, args=args, name="checkpoint-writer", daemon=True)
        self._thread.start()
        self.saved_step = step
        self.stalled_seconds += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until the last checkpoint is whole; CannotWriteError if some rank could not write it. Every rank calls it."""
        if self._thread is not None:
            self._thread.join(self._timeout)
            if self._thread.is_alive():
                self._error = (
                    f"rank {self._process.rank}: the checkpoint of step {self.saved_step} is still being written after {self._timeout:g} s "
                    "of waiting for it; its storage is stuck or too slow: repair it or raise train.timeout_seconds, then continue with --resume"
                )
            self._thread = None
        (guilty,) = vote([self.failed])
        if guilty is None:
            return
        self.cancel()
        if self._process.is_first and self.saved_step is not None and not self._committed:
            with suppress(Exception):  # what the other ranks wrote after this one gave up
                self.storage.discard(self.saved_step, self._token)
        own = self._error or f"rank {guilty} could not write its part of a checkpoint"
        raise CannotWriteError(own, reported=self.failed)

    def hold(self, step: int, copies: Copies) -> None:
        """Take these copies of a checkpoint for those of the next one, where they are the same."""
        self.held = {sha256: f"step_{step}/{file}" for file, sha256 in copies.values()}

    def note_best(self, best: Best) -> None:
        """On rank 0, write which checkpoint is the best, if one is."""
        if best:
            note = {"step": best[0][1], "auc": best[0][0]}
            self.storage.write_note(BEST, (json.dumps(note) + "\n").encode())

    def cancel(self) -> None:
        """Stop waiting for other ranks: the run ends."""
        self._cancelled.set()

    def _write(self, step: int, snapshot: Snapshot, extra: dict[str, Any], keep: Keep) -> None:
        start = time.perf_counter()
        rank = self._process.rank
        try:
            name = file_name(rank, self._token)
            with self.storage.write(f"step_{step}/{name}") as file:
                self._on_write()
                sha256 = write_tensors({str(index): tensor for index, (_, tensor) in enumerate(snapshot)}, file)
            record = {"file": name, "sha256": sha256, "pieces": [entry for entry, _ in snapshot]}
            if rank != 0:
                assert self._store is not None
                self._store.set(self._key(step, rank), json.dumps(record))
                return
            copies: Copies = {}
            for name, sha256 in extra.get("run", {}).get("files", {}).items():
                copies[name] = (f"copy_{len(copies):05d}.{self._token}{Path(name).suffix}", sha256)
                place, before = f"step_{step}/{copies[name][0]}", self.held.get(sha256, "")
                self.storage.copy(place, self._folder / name, sha256, before)
            records = [record, *self._await_others(step)]
            manifest = manifest_bytes(self._process.world_size, extra, records, copies)
            names = [each["file"] for each in records] + [file for file, _ in copies.values()]
            self.storage.commit(step, manifest, names)
            self._committed = True
            self.storage.settle(step, names)
            self.hold(step, copies)
            self.note_best(keep.best)
            self._tidy(step, keep)
            self.written_seconds = time.perf_counter() - start
        except Exception as error:  # `finish` raises it, on every rank
            self._error = self._describe(step, error)
            if self._store is not None and rank != 0:
                with suppress(Exception):
                    self._store.set(self._key(step, rank), json.dumps({"error": self._error}))
            if rank == 0 and not self._committed:  # alone: another rank may still be writing
                with suppress(Exception):
                    self.storage.discard(step, self._token)

    def _describe(self, step: int, error: Exception) -> str:
        if isinstance(error, CannotWriteError):
            return str(error)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if self._committed:
            return (
                f"rank 0: checkpoint of step {step} is whole, but what follows it, best.json and the removal of older ones, failed "
                f"({reason.splitlines()[0]}): free space or repair the storage, then continue with --resume"
            )
        return (
            f"rank {self._process.rank}: checkpoint of step {step} could not be written ({reason.splitlines()[0]}); "
            "earlier checkpoints are intact: free space or repair the storage, then continue with --resume"
        )

    def _await_others(self, step: int) -> list[dict[str, Any]]:
        records, deadline = [], time.monotonic() + self._timeout
        for rank in range(1, self._process.world_size):
            assert self._store is not None
            key = self._key(step, rank)
            while not self._store.check([key]):
                if self._cancelled.is_set():
                    raise CannotWriteError(f"checkpoint of step {step} was abandoned: the run ends")
                if time.monotonic() > deadline:
                    raise CannotWriteError(
                        f"rank 0: rank {rank} wrote no part of the checkpoint of step {step} within {self._timeout:g} s; it is "
                        "stopped or its storage is stuck"
                    )
                time.sleep(POLL_SECONDS)
            record = json.loads(self._store.get(key))
            self._store.delete_key(key)
            if "error" in record:
                raise CannotWriteError(f"checkpoint of step {step} was abandoned: {record['error']}")
            records.append(record)
        return records

    def _key(self, step: int, rank: int) -> str:
        return f"{self._token}/{step}/{rank}"

    def _tidy(self, step: int, keep: Keep) -> None:
        """On rank 0, remove checkpoints neither recent nor good; steps later than `step` did not verify and are left alone."""
        steps = [each for each in self.storage.steps() if each <= step]
        kept = {keep.step, *(step for _, step in keep.best)}
        for each in steps[: -keep.last]:
            if each not in kept:
                self.storage.remove(each)
