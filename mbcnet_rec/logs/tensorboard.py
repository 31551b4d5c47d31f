"""Curves for TensorBoard, written in the caller's thread.

An error comes back to who wrote, where the library's own writer prints a traceback from a thread of its own.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Board:
    """A file of events.

    Args:
        folder: of the files, made if it is not there.
        purge_step: TensorBoard forgets points of earlier files from this step on; 0: none.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Open it.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1_000_000_000}.{socket.gethostname()}.{os.getpid()}"
        self._file: Any = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, split: str, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve SPLIT/KEY.

        Raises:
            OSError: the disk takes no more.
        """
        points = [
            Summary.Value(tag=f"{split}/{key.replace('>', '_to_')}", simple_value=value)
            for key, value in values.items()
        ]
        self._write(Event(step=step, summary=Summary(value=points)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
