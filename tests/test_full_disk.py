"""Proves that a full disk ends every command that writes with code 74 and one line, leaves nothing half-written and keeps what was there."""

import contextlib
import errno
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_data import printed_by

from data.errors import InputError
from mbcnet_rec.runtime.exits import CANNOT_WRITE, no_room

COMMANDS = [
    ["schema", "infer", "logs", "-o", "x.toml", "--force"],
    ["schema", "fit", "s.toml", "logs", "-o", "fitted", "--force"],
    ["data", "synth", "--rows", "4000", "--out", "synth"],
    ["plan", "make", "--schema", "s2.toml", "--cluster", "1x2:cpu", "-o", "plan.json"],
]


@contextlib.contextmanager
def full_disk():
    """No file of this process grows beyond 200 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_command_leaves_half_a_file_on_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    rows = range(4000)
    columns = {
        "label": pa.array([row % 2 for row in rows], pa.int8()),
        "user": [f"user-{row}" for row in rows],
        "hour": [row % 24 for row in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "logs" / "a.parquet")
    head = 'name = "s"\nlabel = "label"\n[fields]\nuser = { kind = "categorical", embedding_dim = 4, encoding = '
    (tmp_path / "s.toml").write_text(head + '"vocabulary", vocabulary = "fit" }\n[groups]\ng = ["user"]\n')
    (tmp_path / "s2.toml").write_text(head + '"hash", num_embeddings = 50 }\n[groups]\ng = ["user"]\n')
    (tmp_path / "x.toml").write_text("of yesterday")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with full_disk():
        ended = [printed_by(*command) for command in COMMANDS]
    assert [code for code, _, _ in ended] == [CANNOT_WRITE] * len(COMMANDS), ended
    said = [line for _, _, words in ended for line in words.splitlines() if line.startswith("mbcnet: ")]
    assert len(said) == len(COMMANDS)
    for place, line in zip(("x.toml", "fitted", "synth", "plan.json"), said, strict=True):
        assert place in line and "cannot be written (File too large); free space or choose another place" in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "x.toml").read_text() == "of yesterday"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.parquet"), "x.parquet: cannot be written (No space"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "standard output, or a file: cannot be written (Disk quota exceeded); free space",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "a file: cannot be written (No space left"),
        (ValueError("database or disk is full"), "a file: cannot be written (No space left on device)"),
        (OSError(errno.ENOENT, "No such file or directory"), ""),
        (InputError("label 'x': wanted 0 and 1"), ""),
    ],
    ids=str,
)
def test_a_full_disk_is_known_in_every_librarys_words(error, line):
    assert no_room(error).startswith(line) and bool(no_room(error)) == bool(line)
    wrapped = RuntimeError("while writing")
    wrapped.__cause__ = error
    assert no_room(wrapped) == no_room(error)
