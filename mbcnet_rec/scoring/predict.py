"""`mbcnet predict`: Parquet in, Parquet out, with the probabilities of a run's best checkpoint; at any world size, and resumable.

    OUT/<file of the input>      kept columns, then probability, probability_efgc, ...; rows in the input's order
    OUT/_predict.json            what was asked: run, weights, columns, files
    OUT/_pieces/                 finished pieces of files that are not finished; gone at the end

A piece (pieces.py) is written beside its place and renamed when it is whole; a file appears, by one rename, when all its pieces are there
and their rows add up to its own. So a run that dies at any point leaves whole files and whole pieces, and the same command goes on there:
every input row has exactly one output row.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.errors import InputError
from data.reading.encode import Encoder
from data.reading.files import resolve_files
from data.reading.storage import DataFile, is_uri, open_parquet, path_parts
from data.schema import load_schema
from mbcnet_rec.runtime.exits import CannotWriteError
from mbcnet_rec.runtime.process import Process, any_rank, broadcast_value, joined_process
from mbcnet_rec.scoring.scorer import Piece, Reader, Scored, Scorer, deal, unlabelled_pieces
from mbcnet_rec.scoring.trained_run import (
    branch_names,
    find_step,
    load_built,
    load_run,
    scoring_options,
    weights_digest,
)
from mbcnet_rec.train import refuse_together

REQUEST, PIECES = "_predict.json", "_pieces"
PROBABILITY = "probability"
WRITTEN_ROWS = 65_536  # of a row group of the output


@dataclass(frozen=True)
class Job:
    """One prediction.

    Attributes:
        files: of the input.
        names: of the files in OUT, one for each.
        out: the output folder.
        columns: kept columns, and their Arrow fields.
        outputs: names of the probability columns.
    """

    files: Sequence[DataFile]
    names: Sequence[str]
    out: Path
    columns: tuple[pa.Field, ...]
    outputs: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        """Of every output file."""
        return pa.schema([*self.columns, *(pa.field(name, pa.float32()) for name in self.outputs)])

    @property
    def problem(self) -> str:
        """Why the input cannot be scored into this folder, or an empty string."""
        inside = [
            file
            for file in self.files
            if isinstance(file, Path) and self.out.resolve() in file.resolve().parents
        ]
        return f"{inside[0]}: lies in --out {self.out}; choose another output folder" if inside else ""

    def target(self, piece: Piece) -> Path:
        """The finished file of a piece's file."""
        return self.out / self.names[piece.file]

    def part(self, piece: Piece) -> Path:
        """The finished piece."""
        return self.out / PIECES / self.names[piece.file] / f"{piece.number:06d}.parquet"


def run_prediction(
    run_folder: str, data: Sequence[str], out: str, *, keep: Sequence[str] = (), overwrite: bool = False
) -> int:
    """Score Parquet files with a run's best checkpoint. One call per rank.

    Args:
        run_folder: that `mbcnet train` wrote.
        data: files, folders, globs or URIs.
        out: folder of the output.
        keep: columns to pass through; none: the schema's group and time columns, where the files have them.
        overwrite: remove what another prediction left in `out`.

    Raises:
        InputError: no such run, faulty files, or `out` holds something else.
    """
    if is_uri(out):
        raise InputError(
            f"--out {out}: wanted a folder of this machine or a mounted one; copy it there afterwards"
        )
    folder = Path(run_folder)
    config = load_run(folder)
    schema = load_schema(config.schema)
    with joined_process(config.train.device) as process:
        step = find_step(config, folder, process)
        files = resolve_files(data)
        pieces = unlabelled_pieces(files, replace(schema, group_column=""))
        kept = kept_fields(files, keep, [schema.group_column, schema.time_column])
        outputs = (PROBABILITY, *(f"{PROBABILITY}_{name}" for name in branch_names(config.model)))
        job = Job(files, relative_names(files), Path(out), kept, outputs)
        refuse_together(job.problem, process)
        request = describe(job, pieces, weights_digest(config, folder, step))
        with _naming_write_faults(job.out):
            refuse_together(prepare(job, request, overwrite) if process.is_first else "", process)
            todo = broadcast_value(unfinished(job, pieces) if process.is_first else None, process)
            if todo:
                built = load_built(config, schema, folder, step, process)
                encoder = Encoder(replace(schema, group_column=""))
                reader = Reader(files, encoder, has_labels=False, extra=tuple(each.name for each in kept))
                scorer = Scorer(built, process, reader, *scoring_options(config, process))
                write_pieces(job, scorer, deal(todo, process.world_size), process)
            join_pieces(job, pieces, process)
            any_rank(False)  # until every rank's files are there
            if process.is_first:
                print(finish(job, pieces, step, scored=sum(piece.num_rows for piece in todo)))
    return 0


@contextmanager
def _naming_write_faults(out: Path) -> Iterator[None]:
    """Say what a full disk or a folder without permission means here. Faults of reading are InputErrors already."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"{out}: cannot be written ({error.strerror or error}); mend it and start the same command again: it goes on "
            "where it stopped"
        ) from None


def relative_names(files: Sequence[DataFile]) -> list[str]:
    """Where each file's rows go in the output folder: its path below the folder that all files share."""
    folders = [path_parts(file)[:-1] for file in files]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    shared = sum(1 for _ in levels)
    return ["/".join(path_parts(file)[shared:]) for file in files]


def kept_fields(
    files: Sequence[DataFile], keep: Sequence[str], default: Sequence[str]
) -> tuple[pa.Field, ...]:
    """Names and types of the columns to pass through.

    Args:
        files: of the input.
        keep: named by the user; none: `default`, as far as all files have them.
        default: names; empty ones are left out.

    Raises:
        InputError: a column is missing in a file, has another type there, or has the name of an output.
    """
    kept: dict[str, pa.Field] = {}
    for number, file in enumerate(files):
        with open_parquet(file) as parquet:
            found = parquet.schema_arrow
        wanted = list(dict.fromkeys(keep or [name for name in default if name and name in found.names]))
        if number and not keep:
            wanted = [name for name in wanted if name in kept]
            kept = {name: kept[name] for name in wanted}
        for name in wanted:
            if name not in found.names:
                raise InputError(
                    f"{file}: --keep {name}: no such column; it has {', '.join(found.names[:8])}, ..."
                )
            field = pa.field(name, found.field(name).type)
            if kept.setdefault(name, field) != field:
                raise InputError(
                    f"{file}: --keep {name}: {field.type} here, but {kept[name].type} in {files[0]}; cast one of the two"
                )
            if name.partition("_")[0] == PROBABILITY:
                raise InputError(
                    f"{file}: --keep {name}: the output has a column of this name; rename it first"
                )
    return tuple(kept.values())


def describe(job: Job, pieces: Sequence[Piece], weights: str) -> dict[str, Any]:
    """What fixes the output; written beside it, and compared when a prediction goes on."""
    rows = [0] * len(job.files)
    for piece in pieces:
        rows[piece.file] += piece.num_rows
    files = {}
    for name, file, count in zip(job.names, job.files, rows, strict=True):
        entry: dict[str, Any] = {"from": str(file), "rows": count}
        if isinstance(file, Path):
            entry |= {"bytes": file.stat().st_size, "changed": file.stat().st_mtime_ns}
        files[name] = entry
    columns = [f"{field.name}: {field.type}" for field in job.schema]
    return {"format": 1, "weights": weights, "columns": columns, "files": files}


def prepare(job: Job, request: dict[str, Any], overwrite: bool) -> str:
    """Make the output folder, or go on in it. Returns why not, or an empty string.

    Output of files that have changed since is removed before the note is renewed, so that it is made again whatever happens in between.
    """
    note = job.out / REQUEST
    if job.out.exists() and not job.out.is_dir():
        return f"{job.out}: is a file; choose a folder for --out"
    if job.out.is_dir() and any(job.out.iterdir()):
        before = _read_request(note)
        if before is None:
            return f"{job.out}: holds something that is no prediction; choose another --out"
        if overwrite:
            shutil.rmtree(job.out)
        else:
            for key, words in (("weights", "other weights"), ("columns", "other columns")):
                if before[key] != request[key]:
                    return (
                        f"{job.out}: holds a prediction with {words}; choose another --out, or replace it with "
                        "--overwrite"
                    )
            for name, entry in request["files"].items():
                if before["files"].get(name, entry) != entry:
                    print(f"{entry['from']} has changed since its rows were scored: scored again")
                    (job.out / name).unlink(missing_ok=True)
                    shutil.rmtree(job.out / PIECES / name, ignore_errors=True)
            request["files"] = before["files"] | request["files"]
    job.out.mkdir(parents=True, exist_ok=True)
    draft = job.out / f"{REQUEST}.partial"
    draft.write_text(json.dumps(request, indent=1))
    put_in_place(draft, note)
    return ""


def _read_request(note: Path) -> dict[str, Any] | None:
    """The note that an earlier prediction left; None where there is none of ours."""
    try:
        before = json.loads(note.read_text())
        whole = before["format"] == 1 and {"weights", "columns"} <= before.keys()
        return before if whole and isinstance(before["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def unfinished(job: Job, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that have no output yet. Output of the wrong length (a disk that lied) is removed."""
    of_file: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_file.setdefault(piece.file, []).append(piece)
    todo = []
    for own in of_file.values():
        if not _holds(job.target(own[0]), sum(piece.num_rows for piece in own)):
            todo += [piece for piece in own if not _holds(job.part(piece), piece.num_rows)]
    return todo


def _holds(path: Path, num_rows: int) -> bool:
    """Whether a Parquet file is there with that many rows; a wrong one is removed."""
    try:
        if pq.read_metadata(path).num_rows == num_rows:
            return True
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException):
        pass
    path.unlink()
    return False


class _PieceWriter:
    """Writes one piece beside its place; `close` puts it there."""

    def __init__(self, job: Job, piece: Piece) -> None:
        self.piece, self.place = piece, job.part(piece)
        self._schema = job.schema
        self._draft = self.place.with_suffix(".partial")
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self._writer = open_writer(self._draft, job.schema)
        self._held: list[pa.RecordBatch] = []
        self._num_held = self.num_rows = 0

    def add(self, scored: Scored) -> None:
        """Take the rows of one batch."""
        probabilities = 1.0 / (1.0 + np.exp(-scored.logits.astype(np.float64)))
        columns = [pa.array(column.astype(np.float32)) for column in probabilities.T]
        self._held.append(pa.RecordBatch.from_arrays([*scored.rows.columns, *columns], schema=self._schema))
        self._num_held += scored.rows.num_rows
        self.num_rows += scored.rows.num_rows
        if self._num_held >= WRITTEN_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_batches(self._held, self._schema))
        self._held, self._num_held = [], 0

    def close(self) -> None:
        """Finish the piece."""
        self._flush()
        self._writer.close()
        if self.num_rows != self.piece.num_rows:
            raise RuntimeError(f"{self._draft}: {self.num_rows} rows written, {self.piece.num_rows} read")
        put_in_place(self._draft, self.place)

    def abandon(self) -> None:
        """Remove what there is of the piece."""
        self._writer.close()
        self._draft.unlink(missing_ok=True)


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a Parquet file to write, with page checksums."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def put_in_place(draft: Path, place: Path) -> None:
    """Rename a whole file to where readers look, once its bytes are on the disk."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(place)


def write_pieces(job: Job, scorer: Scorer, dealt: Sequence[Sequence[Piece]], process: Process) -> None:
    """Score and write the own pieces, with a bar on rank 0.

    Raises:
        InputError: on every rank, when all pieces without a faulty row are written.
    """
    total = sum(piece.num_rows for pieces in dealt for piece in pieces)
    writer: _PieceWriter | None = None
    bar = tqdm(
        total=total, unit="row", unit_scale=True, desc="predict", disable=None if process.is_first else True
    )
    try:
        for item in scorer.score(dealt, lambda rows: bar.update(min(rows * len(dealt), total - bar.n))):
            piece = item if isinstance(item, Piece) else item.piece
            if writer is not None and writer.piece != piece:
                writer.abandon()  # a row of it was faulty
                writer = None
            writer = writer or _PieceWriter(job, piece)
            if isinstance(item, Scored):
                writer.add(item)
            else:
                writer.close()
                writer = None
    finally:
        bar.close()
        if writer is not None:
            writer.abandon()


def join_pieces(job: Job, pieces: Sequence[Piece], process: Process) -> None:
    """Make files of pieces; each rank those of some files. A file of one piece is that piece, renamed."""
    for number in range(process.rank, len(job.files), process.world_size):
        own = [piece for piece in pieces if piece.file == number]
        target = job.target(own[0])
        if target.is_file():
            continue
        if len(own) == 1:
            put_in_place(job.part(own[0]), target)
            continue
        draft = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_writer(draft, job.schema) as writer:
            for piece in own:
                with pq.ParquetFile(job.part(piece)) as parquet:
                    for group in range(parquet.num_row_groups):
                        writer.write_table(parquet.read_row_group(group))
        put_in_place(draft, target)


def finish(job: Job, pieces: Sequence[Piece], step: int, scored: int) -> str:
    """Count the output's rows against the input's, and remove the pieces. Returns what to tell the user."""
    wanted = sum(piece.num_rows for piece in pieces)
    written = sum(pq.read_metadata(job.out / name).num_rows for name in job.names)
    if written != wanted:
        raise RuntimeError(f"{job.out}: {written} rows for {wanted} of the input")
    shutil.rmtree(job.out / PIECES, ignore_errors=True)
    earlier = f" ({wanted - scored:,} of them were there already)" if scored < wanted else ""
    columns = ", ".join(job.schema.names)
    return (
        f"{job.out}: {written:,} rows in {len(job.names)} files{earlier}, weights of step {step}\n"
        f"columns: {columns}\nrows stand in the order of each input file"
    )
