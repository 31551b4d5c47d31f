"""`mbcnet predict`: Parquet in, Parquet out, with the probabilities of a run's best checkpoint; at any world size, and resumable.

    OUT/<file of the input>      kept columns, then probability, probability_efgc, ...; rows in the input's order
    OUT/_predict.json            what was asked: run, weights, columns, files
    OUT/_pieces/                 finished chunks of files that are not finished; gone at the end

A chunk (chunks.py) is written beside its place and renamed when it is whole; a file appears, by one rename, when all its chunks are there
and their rows add up to its own. So a run that dies at any point leaves whole files and whole chunks, and the same command continues there:
every input row has exactly one output row.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.reading.decode import RowReader
from data.reading.encode import Encoder
from data.reading.files import resolve_files
from data.reading.storage import DataFile, is_uri, path_parts
from data.schema import load_schema
from mbcnet_rec.runtime.exits import CannotWriteError
from mbcnet_rec.runtime.lock import clear, locked_together, names_in
from mbcnet_rec.runtime.process import Process, any_rank, broadcast_value, joined_process, refuse_together
from mbcnet_rec.scoring.chunks import (
    CHUNK_ROWS,
    Chunk,
    ScoredRows,
    chunks_of,
    deal,
    score_chunks,
    unlabelled_row_groups,
)
from mbcnet_rec.scoring.trained_run import (
    branch_names,
    find_step,
    load_built,
    load_run,
    scorer_of,
    weights_digest,
)

REQUEST, CHUNKS = "_predict.json", "_pieces"
PROBABILITY = "probability"
WRITTEN_ROWS = 65_536  # of a row group of the output


@dataclass(frozen=True)
class Job:
    """One prediction: the input's files, the name of each in the folder `out`, and the columns that are written."""

    files: Sequence[DataFile]
    names: Sequence[str]
    out: Path
    schema: pa.Schema
    put: Callable[[Path, Path], None]  # renames a draft to where readers look

    def target(self, chunk: Chunk) -> Path:
        """The finished file of a chunk's file."""
        return self.out / self.names[chunk.file]

    def part(self, chunk: Chunk) -> Path:
        """The finished chunk."""
        return self.out / CHUNKS / self.names[chunk.file] / f"{chunk.number:06d}.parquet"

    def open(self, path: Path) -> pq.ParquetWriter:
        """Open a Parquet file to write, with page checksums."""
        return pq.ParquetWriter(path, self.schema, compression="zstd", write_page_checksum=True)


def put_in_place(draft: Path, place: Path) -> None:
    """Rename a whole file to where readers look, once its bytes are on the disk."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(place)


def run_prediction(
    run_folder: str,
    data: Sequence[str],
    out: str,
    *,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    chunk_rows: int = CHUNK_ROWS,
    put: Callable[[Path, Path], None] = put_in_place,
) -> int:
    """Score Parquet files with a run's best checkpoint into the folder `out`. One call per rank.

    Passed through are the columns of `keep`, else the schema's group and time columns where the files have them. A resumable chunk ends
    with the row group that reaches `chunk_rows`; `put` puts a finished file in its place.

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
        row_groups, columns = unlabelled_row_groups(files, schema)
        chunks = chunks_of(row_groups, chunk_rows)
        kept = kept_fields(files, columns, keep, [schema.group_column, schema.time_column])
        outputs = [PROBABILITY, *(f"{PROBABILITY}_{name}" for name in branch_names(config.model))]
        written = pa.schema([*kept, *(pa.field(name, pa.float32()) for name in outputs)])
        job = Job(files, relative_names(files), Path(out), written, put)
        request = describe(job, chunks, weights_digest(config, folder, step))
        if job.out.exists() and not job.out.is_dir():
            raise InputError(f"{job.out}: is a file; choose a folder for --out")
        with _naming_write_faults(job.out), locked_together(process, "predict", job.out):
            refuse_together(prepare(job, request, overwrite) if process.is_first else "", process)
            todo = broadcast_value(unfinished(job, chunks) if process.is_first else None, process)
            if todo:
                encoder = Encoder(schema, has_labels=False)
                reader = RowReader(files, encoder, extra=[field.name for field in kept])
                built = load_built(config, schema, folder, step, process)
                scorer, batch_rows = scorer_of(config, built, process)
                dealt = deal(todo, process.world_size)
                scored = score_chunks(scorer, reader, dealt, process, batch_rows, title="predict")
                write_chunks(job, dealt[process.rank], scored)
            join_chunks(job, chunks, process)
            any_rank(False)  # until every rank's files are there
            if process.is_first:
                print(finish(job, chunks, step, scored=sum(chunk.num_rows for chunk in todo)))
    return 0


@contextmanager
def _naming_write_faults(out: Path) -> Iterator[None]:
    """Say what a full disk or a folder without permission means here. Faults of reading are InputErrors already."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"{out}: cannot be written ({error.strerror or error}); repair it and start the same command again: it continues "
            "where it stopped"
        ) from None


def relative_names(files: Sequence[DataFile]) -> list[str]:
    """Where each file's rows go in the output folder: its path below the folder that all files share."""
    folders = [path_parts(file)[:-1] for file in files]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    shared = sum(1 for _ in levels)
    return ["/".join(path_parts(file)[shared:]) for file in files]


def kept_fields(
    files: Sequence[DataFile], columns: Sequence[pa.Schema], keep: Sequence[str], default: Sequence[str]
) -> list[pa.Field]:
    """Names and types of the columns to pass through: those of `keep`, or of `default` those that all files have.

    Raises:
        InputError: a column is missing in a file, has another type there, or has the name of an output.
    """
    names = keep or [name for name in default if name and all(name in found.names for found in columns)]
    kept: dict[str, pa.Field] = {}
    for file, found in zip(files, columns, strict=True):
        for name in names:
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
    return list(kept.values())


def describe(job: Job, chunks: Sequence[Chunk], weights: str) -> dict[str, Any]:
    """What fixes the output; written beside it, and compared when a prediction continues."""
    rows: Counter[int] = Counter()
    for chunk in chunks:
        rows[chunk.file] += chunk.num_rows
    files = {}
    for number, (name, file) in enumerate(zip(job.names, job.files, strict=True)):
        entry: dict[str, Any] = {"from": str(file), "rows": rows[number]}
        if isinstance(file, Path):
            entry |= {"bytes": file.stat().st_size, "changed": file.stat().st_mtime_ns}
        files[name] = entry
    columns = [f"{field.name}: {field.type}" for field in job.schema]
    return {"format": 1, "weights": weights, "columns": columns, "files": files}


def prepare(job: Job, request: dict[str, Any], overwrite: bool) -> str:
    """Make the output folder, or continue in it. Returns why not, or an empty string.

    Output of files that have changed since is removed before the note is renewed, so that it is made again whatever happens in between.
    """
    note = job.out / REQUEST
    for file in job.files:
        if isinstance(file, Path) and job.out.resolve() in file.resolve().parents:
            return f"{file}: lies in --out {job.out}; choose another output folder"
    if names_in(job.out):
        before = _read_request(note)
        if before is None:
            return f"{job.out}: holds something that is not a prediction; choose another --out"
        if overwrite:
            clear(job.out)
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
                    shutil.rmtree(job.out / CHUNKS / name, ignore_errors=True)
            request["files"] = before["files"] | request["files"]
    job.out.mkdir(parents=True, exist_ok=True)
    draft = job.out / f"{REQUEST}.partial"
    draft.write_text(json.dumps(request, indent=1))
    job.put(draft, note)
    return ""


def _read_request(note: Path) -> dict[str, Any] | None:
    """The note that an earlier prediction left, or None."""
    try:
        before = json.loads(note.read_text())
        whole = before["format"] == 1 and {"weights", "columns"} <= before.keys()
        return before if whole and isinstance(before["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def unfinished(job: Job, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that have no output yet. Output of the wrong length (a disk that lied) is removed."""
    todo = []
    for _, of_file in itertools.groupby(chunks, lambda chunk: chunk.file):
        own = list(of_file)
        if not _holds(job.target(own[0]), sum(chunk.num_rows for chunk in own)):
            todo += [chunk for chunk in own if not _holds(job.part(chunk), chunk.num_rows)]
    return todo


def _holds(path: Path, num_rows: int) -> bool:
    """Whether a Parquet file is there with that many rows; a wrong one is removed."""
    if not path.exists():
        return False
    with suppress(OSError, pa.ArrowException):
        if pq.read_metadata(path).num_rows == num_rows:
            return True
    path.unlink()
    return False


def write_chunks(job: Job, own: Sequence[Chunk], scored: Iterator[ScoredRows]) -> None:
    """Write the scored rows of this rank's chunks.

    Raises:
        InputError: on every rank, when all chunks without a faulty row are written.
    """
    for chunk in own:
        if not chunk.num_rows:
            _write_chunk(job, chunk, [])
    for chunk, batches in itertools.groupby(scored, lambda batch: batch.chunk):
        _write_chunk(job, chunk, batches)


def _write_chunk(job: Job, chunk: Chunk, batches: Iterable[ScoredRows]) -> None:
    """Write a chunk beside its place, and put it there with its last row. Nothing is left of one that a faulty row cut short."""
    draft, num_rows = job.part(chunk).with_suffix(".partial"), 0
    draft.parent.mkdir(parents=True, exist_ok=True)
    held: list[pa.RecordBatch] = []
    try:
        with job.open(draft) as writer:
            for batch in batches:
                probabilities = 1.0 / (1.0 + np.exp(-batch.logits.astype(np.float64)))
                columns = [pa.array(column.astype(np.float32)) for column in probabilities.T]
                rows = pa.RecordBatch.from_arrays([*batch.rows.columns, *columns], schema=job.schema)
                held.append(rows)
                num_rows += rows.num_rows
                whole = num_rows == chunk.num_rows
                if whole or sum(each.num_rows for each in held) >= WRITTEN_ROWS:
                    writer.write_table(pa.Table.from_batches(held, job.schema))
                    held = []
                if whole:
                    break
        if num_rows == chunk.num_rows:
            job.put(draft, job.part(chunk))
    finally:
        draft.unlink(missing_ok=True)


def join_chunks(job: Job, chunks: Sequence[Chunk], process: Process) -> None:
    """Make files of chunks; each rank those of some files. A file of one chunk is that chunk, renamed."""
    for number in range(process.rank, len(job.files), process.world_size):
        own = [chunk for chunk in chunks if chunk.file == number]
        target = job.target(own[0])
        if target.is_file():
            continue
        if len(own) == 1:
            job.put(job.part(own[0]), target)
            continue
        draft = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with job.open(draft) as writer:
            for chunk in own:
                with pq.ParquetFile(job.part(chunk)) as parquet:
                    for group in range(parquet.num_row_groups):
                        writer.write_table(parquet.read_row_group(group))
        job.put(draft, target)


def finish(job: Job, chunks: Sequence[Chunk], step: int, scored: int) -> str:
    """Count the output's rows against the input's, and remove the chunks. Returns what to tell the user."""
    wanted = sum(chunk.num_rows for chunk in chunks)
    written = sum(pq.read_metadata(job.out / name).num_rows for name in job.names)
    if written != wanted:
        raise RuntimeError(f"{job.out}: {written} rows for {wanted} of the input")
    shutil.rmtree(job.out / CHUNKS, ignore_errors=True)
    earlier = f" ({wanted - scored:,} of them were there already)" if scored < wanted else ""
    columns = ", ".join(job.schema.names)
    return (
        f"{job.out}: {written:,} rows in {len(job.names)} files{earlier}, weights of step {step}\n"
        f"columns: {columns}\nrows stand in the order of each input file"
    )
