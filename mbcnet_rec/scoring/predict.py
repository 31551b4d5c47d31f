"""`mbcnet predict`: Parquet in, Parquet out, with the probabilities of a run's best checkpoint; at any world size, and resumable.

    OUT/<file of the input>      kept columns, then probability, probability_efgc, ...; rows in the input's order
                                 of tasks probability_click, probability_click_efgc, ..., probability_buy, ...
    OUT/_predict.json            {"format": 3, "weights": ..., "columns": [...]}
    OUT/_pieces/                 finished chunks of files that are not finished; gone at the end

A chunk (chunks.py) is written beside its place and renamed when it is whole; a file appears, by one rename, when all its chunks are there
and their rows add up to its own. So a run that dies at any point leaves whole files and whole chunks, and the same command continues there:
every input row has exactly one output row. What --overwrite replaces stays until then, too: the footer of a file of scores says by which
weights, with which columns and of which source it was made, and only one that says what is asked for counts as done, so a mixture of two
predictions is never taken for one.
"""

import itertools
import json
import os
import shutil
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.reading import storage
from data.reading.decode import RowReader
from data.reading.encode import Encoder
from data.reading.files import files_in_words, resolve_files
from data.reading.fingerprint import mark_files
from data.schema import Schema
from data.whole_folder import write_whole
from mbcnet_rec.model.models import tasks_of
from mbcnet_rec.runtime.lock import LOCK, locked_together, names_in
from mbcnet_rec.runtime.process import answer_of_first, any_rank
from mbcnet_rec.scoring.chunks import CHUNK_ROWS, Chunk, ScoredRows, chunks_of, deal, score_chunks, unlabelled_rows
from mbcnet_rec.scoring.tasks import output_names
from mbcnet_rec.scoring.trained_run import TrainedRun, opened_run

REQUEST, CHUNKS = "_predict.json", "_pieces"
MARK = b"mbcnet_prediction"  # in the footer of each file
WAY_OUT = "choose another --out, or replace the whole prediction with --overwrite"
Facts = dict[str, Any]  # that fix the content of a file of scores


def relative_names(files: Sequence[storage.DataFile], asked: Sequence[str] = ()) -> list[str]:
    """Where each file's rows go in the output folder: its path below the folder that all files and all `asked` paths share.

    So a folder that grows by a day gives yesterday's files the names of yesterday. InputError if two files would go to one place.
    """
    paths = [_parts(file) for file in files]
    bases = [_parts(storage.local_path(text) or storage.RemoteFile(text)) for text in asked]
    bases = [tuple(itertools.takewhile(lambda part: not has_magic(part), base)) for base in bases]
    above = [base for base in bases if any(parts[: len(base)] == base for parts in paths)]
    folders = [*above, *(parts[:-1] for parts in paths)]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    shared = sum(1 for _ in levels)
    names: dict[str, storage.DataFile] = {}
    for file, parts in zip(files, paths, strict=True):
        kept = [part for part in parts[shared:] if part != os.sep]
        name = "/".join(kept)
        if kept[0] in (REQUEST, CHUNKS, LOCK) or {"", ".", ".."} & set(kept):
            raise InputError(f"{file}: scores cannot be written to a file {name!r}; rename it, or name a folder above")
        if name in names:
            raise InputError(
                f"{file} and {names[name]}: the scores of both would be {name!r} in --out; predict each into an --out of its own"
            )
        names[name] = file
    return list(names)


def _parts(file: storage.DataFile) -> tuple[str, ...]:
    return Path(os.path.abspath(file)).parts if isinstance(file, Path) else storage.path_parts(file)


def footer_of(path: Path) -> tuple[int, Facts]:
    """How many rows a file of scores has, and what its footer says of them; (-1, {}) if it is incomplete or no Parquet file."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):  # it is untrusted input
        footer = pq.read_metadata(path)
        facts = json.loads(footer.metadata[MARK])
        return footer.num_rows, facts | {"from": str(facts["from"])}
    return -1, {}


def what_is_replaced(job: "Job", overwrite: bool) -> tuple[list[str], list[str]]:
    """Names of scores in the folder that the asked ones leave no room for; and sources that have changed since they were scored.

    InputError if the folder holds something else, other weights or columns, or scores of other files in the same places.
    """
    held, pieces, out = {}, {}, job.out
    asked = {each.name: each.facts for each in job.outputs}
    ours = {key: job.note[key] for key in ("weights", "columns")}
    if set(names_in(out)) - {f".{REQUEST}.partial"}:
        note = _read_note(out)
        if note["weights"] != ours["weights"] and not overwrite:
            raise InputError(f"{out}: holds a prediction with other weights; {WAY_OUT}")
        if note["columns"] != ours["columns"] and not overwrite:
            shown, wanted = (", ".join(each["columns"]) for each in (note, ours))
            raise InputError(f"{out}: holds a prediction with other columns ({shown}; wanted {wanted}); {WAY_OUT}")
        for path in out.rglob("*"):
            facts, place = footer_of(path)[1], path.relative_to(out)
            if facts and place.parts[0] == CHUNKS:
                pieces[place.parent.relative_to(CHUNKS).as_posix()] = facts
            elif facts:
                held[place.as_posix()] = facts
    replaced = {name for name, facts in held.items() if overwrite or not ours.items() <= facts.items()}
    _refuse_other_sources(out, {name: held[name]["from"] for name in held.keys() - replaced}, asked)
    changed = []
    for name, facts in asked.items():
        before = held.get(name) or pieces.get(name) or facts
        if before != facts and before.items() >= (ours | {"from": facts["from"]}).items():
            changed.append(facts["from"])
    return sorted(replaced - asked.keys()), changed


def _read_note(out: Path) -> Facts:
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        note = json.loads((out / REQUEST).read_text(encoding="utf-8"))
        if note["format"] == 3 and note["weights"] and all(isinstance(each, str) for each in note["columns"]):
            return note
    raise InputError(f"{out}: holds something that is not a prediction of this version; choose another --out")


def _refuse_other_sources(out: Path, before: Mapping[str, str], asked: Mapping[str, Facts]) -> None:
    """Raise InputError where scores would replace those of another file, or stand there twice. `before`: name -> source."""
    folded = str.casefold if (out / LOCK.lower()).exists() else str  # a disk may take two names for one
    sources = {folded(name): source for name, source in before.items()}
    places = {source: name for name, source in before.items()}
    for name, facts in asked.items():
        source = facts["from"]
        other = sources.setdefault(folded(name), source)
        if other != source:
            raise InputError(f"{out / name}: holds the scores of {other}, not of {source}; {WAY_OUT}")
        if places.get(source, name) != name:
            raise InputError(
                f"{source}: its scores are in {out / places[source]} already, and would be in {out / name} too, since --data names other "
                f"folders now; {WAY_OUT}"
            )


PROBABILITY = "probability"
WRITTEN_ROWS = 65_536  # of a row group of the output


class ColumnLeftOutWarning(UserWarning):
    """A group or time column is not passed through, since some files lack it."""


def put_in_place(draft: Path, place: Path) -> None:
    """Rename a whole file to where readers look, once its bytes are on the disk."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(place)


class Output(NamedTuple):
    """The scores of one input file."""

    source: storage.DataFile
    name: str  # path below the output folder
    schema: pa.Schema  # kept columns with the types of their source, then probabilities
    facts: Facts  # what its footer says


@dataclass(frozen=True)
class Job:
    """One prediction into the folder `out`."""

    out: Path
    outputs: Sequence[Output]  # a chunk's `file` is an index of it
    chunks: Sequence[Chunk]
    put: Callable[[Path, Path], None] = put_in_place  # puts a draft where readers look

    @property
    def note(self) -> Facts:
        """What REQUEST says."""
        return {key: self.outputs[0].facts[key] for key in ("format", "weights", "columns")}

    @property
    def num_rows(self) -> int:
        """Of all files."""
        return sum(chunk.num_rows for chunk in self.chunks)

    def target(self, file: int) -> Path:
        """The finished file of an input file."""
        return self.out / self.outputs[file].name

    def part(self, chunk: Chunk) -> Path:
        """The finished chunk."""
        return self.out / CHUNKS / self.outputs[chunk.file].name / f"{chunk.number:06d}.parquet"

    def open(self, path: Path, file: int) -> pq.ParquetWriter:
        """Open a Parquet file to write, with page checksums and the mark of this prediction."""
        schema = self.outputs[file].schema.with_metadata({MARK: json.dumps(self.outputs[file].facts)})
        return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)

    def of(self, file: int) -> "Job":
        """The part of one input file, as a single chunk."""
        groups = (group._replace(file=0) for chunk in self.chunks if chunk.file == file for group in chunk.row_groups)
        return replace(self, outputs=(self.outputs[file],), chunks=(Chunk(0, 0, tuple(groups)),))

    def is_done(self, file: int) -> bool:
        """Whether this prediction has written the file, and it is whole."""
        facts = self.outputs[file].facts
        return footer_of(self.target(file)) == (facts["rows"], facts)

    def unfinished(self) -> list[Chunk]:
        """The chunks that have no output yet; one of the wrong length (a disk that lied), or of another prediction, is none."""
        done = {file for file in range(len(self.outputs)) if self.is_done(file)}
        return [
            chunk
            for chunk in self.chunks
            if chunk.num_rows
            and chunk.file not in done
            and footer_of(self.part(chunk)) != (chunk.num_rows, self.outputs[chunk.file].facts)
        ]


class Weights(NamedTuple):
    """What a prediction must know of the model before anyone has loaded it."""

    schema: Schema
    outputs: Sequence[str]  # of the model, as `output_names` gives them
    digest: str
    attempts: int  # at reading a remote file
    words: str  # that name it


def plan_prediction(
    weights: Weights, data: Sequence[str], out: str, keep: Sequence[str], chunk_rows: int
) -> tuple[Job, storage.FileList]:
    """Find the files, and what is to be written of each; InputError if a file is faulty, or `out` is no place for scores."""
    place, schema, files = Path(out), weights.schema, resolve_files(data)
    names = relative_names(files, data)
    for file in files:
        if isinstance(file, Path) and place.resolve() in file.resolve().parents:
            raise InputError(f"{file}: lies in --out {out}; choose another output folder")
    if place.exists() and not place.is_dir():
        raise InputError(f"{place}: is a file; choose a folder for --out")
    row_groups, columns = unlabelled_rows(files, schema, weights.attempts)
    rows = Counter[int]()
    for group in row_groups:
        rows[group.file] += group.num_rows
    probabilities = ["_".join(filter(None, [PROBABILITY, *each.split("/")])) for each in weights.outputs]
    kept = kept_columns(files, columns, keep, [schema.group_column, schema.time_column])
    note = {"format": 3, "weights": weights.digest, "columns": [*kept, *probabilities]}
    floats, outputs = [pa.field(name, pa.float32()) for name in probabilities], []
    for number, (file, name, found, mark) in enumerate(zip(files, names, columns, mark_files(files), strict=True)):
        facts = note | _source_of(file) | {"rows": rows[number], "bytes": mark.size, "end": mark.sha256}
        types = [(each, found.field(each).type) for each in kept]
        outputs.append(Output(file, name, pa.schema([*types, *floats]), facts))
    return Job(place, outputs, chunks_of(row_groups, chunk_rows)), files


def _source_of(file: storage.DataFile) -> dict[str, Any]:
    """Which file it is, and when it was last changed, in nanoseconds."""
    if isinstance(file, Path):
        return {"from": os.path.realpath(file), "changed": file.stat().st_mtime_ns}
    system, path = storage.file_system(file)
    info = storage.retried(lambda: system.get_file_info(path), file, storage.LIST_ATTEMPTS)
    return {"from": file, "changed": info.mtime_ns}


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
    with the row group that reaches `chunk_rows`; `put` puts a finished file in its place. InputError if there is no such run, a file is
    faulty, or `out` holds something else.
    """
    refuse_remote(out)
    with opened_run(Path(run_folder)) as (run, process):
        weights = weights_of(run)
        job, files = answer_of_first(process, lambda: plan_prediction(weights, data, out, keep, chunk_rows))
        job = replace(job, put=put)
        with locked_together(process, "predict", {"--out": job.out}):
            left, changed = answer_of_first(process, lambda: what_is_replaced(job, overwrite))
            todo = answer_of_first(process, job.unfinished)
            scorer, batch_rows = run.scorer(process) if todo else (None, 0)
            if process.is_first:
                begin(job, changed)
            if scorer is not None:
                reader = RowReader(files, Encoder(run.schema, has_labels=False), extra=kept_of(job))
                dealt = deal(todo, process.world_size)
                scored = score_chunks(scorer, reader, dealt, process, batch_rows, title="predict")
                write_chunks(job, scored, job.part)
            join_chunks(job, range(process.rank, len(job.outputs), process.world_size))
            any_rank(False)  # until every rank's files are there
            if process.is_first:
                print(finish(job, left, weights.words, files, scored=sum(chunk.num_rows for chunk in todo)))
    return 0


def refuse_remote(out: str) -> None:
    """Raise InputError where scores would go to a URI."""
    if storage.is_uri(out):
        raise InputError(f"--out {out}: wanted a folder of this machine or a mounted one; copy it there afterwards")


def weights_of(run: TrainedRun) -> Weights:
    """What a prediction by a run's checkpoint must know."""
    config = run.config
    outputs = output_names(tuple(tasks_of(config.model, run.schema)), config.model.branch_names)
    return Weights(run.schema, outputs, run.digest(), config.data.attempts, f"weights of step {run.step}")


def begin(job: Job, changed: Sequence[str]) -> None:
    """Say whose scores are of an earlier state of their file, and note what the folder is for."""
    for source in changed:
        print(f"{source} has changed since its rows were scored: scored again")
    write_whole(job.out / REQUEST, json.dumps(job.note, indent=1))


def kept_of(job: Job) -> list[str]:
    """Names of the columns that a prediction passes through."""
    return [name for name in job.note["columns"] if name.partition("_")[0] != PROBABILITY]


def kept_columns(
    files: Sequence[storage.DataFile], columns: Sequence[pa.Schema], keep: Sequence[str], default: Sequence[str]
) -> list[str]:
    """Columns to pass through: `keep`, or those of `default` in all files; InputError if one is missing, there twice, or an output's name."""
    names = list(dict.fromkeys(name for name in keep or default if name))
    for name in () if keep else tuple(names):
        without = [file for file, found in zip(files, columns, strict=True) if name not in found.names]
        if without:
            names.remove(name)
        if 0 < len(without) < len(files):
            words = f"{without[0]}: has no column {name!r}, so the scores of no file have it"
            warnings.warn(words, ColumnLeftOutWarning, stacklevel=2)
    for file, found in zip(files, columns, strict=True):
        for name in names:
            count = found.names.count(name)
            if count != 1:
                there = f"it has {', '.join(found.names[:8])}, ..." if not count else "rename one of them"
                problem = "no such column" if not count else f"{count} columns of this name"
                raise InputError(f"{file}: --keep {name}: {problem}; {there}")
            if name.partition("_")[0] == PROBABILITY:
                raise InputError(f"{file}: --keep {name}: the output has a column of this name; rename it first")
    return names


def write_chunks(job: Job, scored: Iterable[ScoredRows], place: Callable[[Chunk], Path]) -> None:
    """Write the probabilities of chunks, each to its place."""
    for chunk, batches in itertools.groupby(scored, lambda batch: batch.chunk):
        rows = ((each.rows, 1.0 / (1.0 + np.exp(-each.logits.astype(np.float64)))) for each in batches)
        write_chunk(job, chunk, rows, place(chunk))


def write_chunk(job: Job, chunk: Chunk, batches: Iterable[tuple[pa.RecordBatch, np.ndarray]], place: Path) -> None:
    """Put a chunk's kept columns and probabilities (n, 1 + K) in place with its last row; a faulty row leaves nothing of it."""
    draft, num_rows = job.part(chunk).with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial"), 0
    draft.parent.mkdir(parents=True, exist_ok=True)
    held: list[pa.RecordBatch] = []
    schema = job.outputs[chunk.file].schema
    try:
        with job.open(draft, chunk.file) as writer:
            for kept, probabilities in batches:
                columns = [pa.array(column.astype(np.float32)) for column in probabilities.T]
                rows = pa.RecordBatch.from_arrays([*kept.columns, *columns], schema=schema)
                held.append(rows)
                num_rows += rows.num_rows
                whole = num_rows == chunk.num_rows
                if whole or sum(each.num_rows for each in held) >= WRITTEN_ROWS:
                    writer.write_table(pa.Table.from_batches(held, schema))
                    held = []
                if whole:
                    break
        if num_rows == chunk.num_rows:
            job.put(draft, place)
    finally:
        draft.unlink(missing_ok=True)


def join_chunks(job: Job, files: Iterable[int]) -> None:
    """Make some files of their chunks. A file of one chunk is that chunk, renamed."""
    for file in files:
        if job.is_done(file):
            continue
        target, own = job.target(file), [chunk for chunk in job.chunks if chunk.file == file]
        parts = [job.part(chunk) for chunk in own if chunk.num_rows]
        if len(parts) == 1:
            job.put(parts[0], target)
            continue
        draft = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with job.open(draft, file) as writer:
            for part in parts:
                with pq.ParquetFile(part) as parquet:
                    for group in range(parquet.num_row_groups):
                        writer.write_table(parquet.read_row_group(group))
        job.put(draft, target)


def finish(job: Job, left: Sequence[str], weights: str, files: storage.FileList, scored: int) -> str:
    """Count the output's rows against the input's, and remove the chunks and what --overwrite leaves out. Returns what to tell the user."""
    wanted = job.num_rows
    written = sum(pq.read_metadata(job.out / each.name).num_rows for each in job.outputs)
    if written != wanted:
        raise RuntimeError(f"{job.out}: {written} rows for {wanted} of the input")
    for name in left:
        (job.out / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for folder in Path(name).parents[:-1]:
                (job.out / folder).rmdir()
    shutil.rmtree(job.out / CHUNKS, ignore_errors=True)
    earlier = f" ({wanted - scored:,} of them were there already)" if scored < wanted else ""
    columns = ", ".join(job.note["columns"])
    return (
        f"{job.out}: {written:,} rows in {files_in_words(files)}{earlier}, {weights}\n"
        f"columns: {columns}\nrows stand in the order of each input file"
    )
