"""Write the synthetic log: day-partitioned Parquet with a known best AUC and log-loss, in flat memory.

    OUT/schema.toml  OUT/synthetic.json  OUT/ds=2024-05-01/part-00000.parquet ...

The last day is the test split, the one before it validation, all others training. Row i of day d depends on
(schema, seed, days, d, i) only, so blocks may be made in any order, by any number of threads.
"""

import datetime
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.schema import Schema, format_schema
from data.synthetic import planted
from data.synthetic.impressions import to_record_batch
from data.whole_folder import earlier_summary, whole_folder

T = TypeVar("T")
R = TypeVar("R")
FIRST_DAY = datetime.date(2024, 5, 1)
ROW_GROUP_ROWS = 8_192
BLOCK_ROWS = 2 * ROW_GROUP_ROWS
SUMMARY = "synthetic.json"
METADATA_KEY = "mbcnet.synthetic"
Block = tuple[int, int, int, int]  # day, file, first row of the day, rows
GENERATOR_VERSION = 1  # raise it whenever the same arguments give other rows


@dataclass
class Tally:
    """Counts of labels by true probability. It has 65,536 steps, so what follows from the counts is exact."""

    # [label, step]
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, planted.PROBABILITY_STEPS), np.int64))

    def add(self, probability: np.ndarray, labels: np.ndarray) -> None:
        """Count rows: true probability in steps (n,) int64, labels (n,) of 0 and 1."""
        both = labels.astype(np.int64) * planted.PROBABILITY_STEPS + probability
        self.counts += np.bincount(both, minlength=2 * planted.PROBABILITY_STEPS).reshape(2, -1)

    def summary(self) -> dict[str, Any]:
        """Rows, label rate, and what the true probability scores: nothing can be expected to do better."""
        negatives, positives = self.counts
        rows, clicks = int(self.counts.sum()), int(positives.sum())
        found = {"rows": rows, "label_rate": clicks / rows if rows else None}
        if not 0 < clicks < rows:  # one class only: no AUC
            return found | {"best_auc": None, "best_log_loss": None}
        below = np.cumsum(negatives) - negatives
        auc = float((positives * (below + 0.5 * negatives)).sum()) / (clicks * (rows - clicks))
        step = np.arange(1, planted.PROBABILITY_STEPS) / planted.PROBABILITY_STEPS  # step 0 never occurs
        loss = -float(positives[1:] @ np.log(step) + negatives[1:] @ np.log1p(-step)) / rows
        rate = clicks / rows
        prior = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return found | {"best_auc": auc, "best_log_loss": loss, "prior_log_loss": float(prior)}


def write_synthetic(
    schema: Schema,
    out: str | Path,
    *,
    rows: int,
    days: int = 14,
    seed: int = 0,
    rows_per_file: int = 1_000_000,
    progress: Callable[[int], object] = lambda done: None,
    threads: int = 2,
    force: bool = False,
) -> dict[str, Any]:
    """Write the log and return the content of OUT/synthetic.json.

    If it is there already with the same schema, rows, seed, days and rows_per_file, nothing is written and the summary says
    `"already_there": true`; `force` replaces another synthetic log.

    The schema is pailitao_schema(...), or one with other sizes. Rows are spread evenly over the days, at least 3: one each for test
    and validation. A day of more than `rows_per_file` gets several files. `threads` blocks are made at a time, and `progress` is told
    the number of rows so far. InputError if a number is out of range, the schema is not Pailitao-like, or `out` holds something else.
    """
    least = {"days": (days, 3), "rows": (rows, days), "rows_per_file": (rows_per_file, 1), "threads": (threads, 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise InputError(f"{name} = {value}: wanted {minimum} or more; raise it")
    out = Path(out)
    sizes = {"rows": rows, "days": days, "seed": seed, "rows_per_file": rows_per_file}
    request = {"generator": GENERATOR_VERSION, "schema": schema.fingerprint()} | sizes
    earlier = earlier_summary(out, SUMMARY, "synthetic log")
    if earlier is not None:
        differs = [key for key, value in request.items() if earlier.get(key) != value]
        if not differs:
            return earlier | {"already_there": True}
        if not force:
            key = differs[0]
            raise InputError(
                f"{out}: holds another synthetic log ({key} = {earlier.get(key)} there, {request[key]} wanted); choose another folder, "
                "or pass --force"
            )
    world = planted.make_world(schema, seed, days)
    with whole_folder(out) as folder:
        splits = _write_days(world, folder, request, progress, threads)
        summary = request | {"label": schema.label, "logit_variance_shares": planted.SHARES, "splits": splits}
        header = f"Written by mbcnet data synth beside its rows. Seed {seed}."
        (folder / "schema.toml").write_text(format_schema(schema, header), encoding="utf-8")
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _write_days(
    world: planted.World, folder: Path, request: dict[str, Any], progress: Callable[[int], object], threads: int
) -> dict[str, Any]:
    tallies = {split: Tally() for split in ("train", "valid", "test", "all")}
    split_of_day = {request["days"] - 1: "test", request["days"] - 2: "valid"}
    done = 0

    def make(block: Block) -> tuple[tuple[int, int], pa.RecordBatch, np.ndarray]:
        day, file, first, rows = block
        return (day, file), *make_block(world, day, first, rows)

    with ThreadPoolExecutor(threads) as pool:
        made = in_order(pool, make, _blocks(request), threads + 1)
        for (day, file), blocks in groupby(made, itemgetter(0)):
            first, file_tally = next(blocks), Tally()
            date = FIRST_DAY + datetime.timedelta(days=day)
            path = folder / f"ds={date}" / f"part-{file:05d}.parquet"
            with open_writer(path, first[1].schema) as writer:
                for _, batch, probability in chain([first], blocks):
                    labels = batch.column(world.schema.label).to_numpy()
                    for tally in (file_tally, tallies[split_of_day.get(day, "train")], tallies["all"]):
                        tally.add(probability, labels)
                    writer.write_table(pa.Table.from_batches([batch]), row_group_size=ROW_GROUP_ROWS)
                    done += batch.num_rows
                    progress(done)
                # the file's own best AUC and log-loss
                writer.add_key_value_metadata({METADATA_KEY: json.dumps(request | file_tally.summary())})
    return {split: tally.summary() for split, tally in tallies.items()}


def make_block(world: planted.World, day: int, first: int, rows: int) -> tuple[pa.RecordBatch, np.ndarray]:
    """Make rows [first, first + rows) of a day: its columns, and the true probability (n,) in 65536ths."""
    facts = planted.draw_facts(world, np.full(rows, day), np.arange(first, first + rows))
    probability = planted.true_probability(world, facts)
    return to_record_batch(world, facts, planted.draw_labels(world, facts, probability)), probability


def _blocks(request: dict[str, Any]) -> Iterator[Block]:
    each, extra = divmod(request["rows"], request["days"])
    for day in range(request["days"]):
        rows = each + (day < extra)
        for file, start in enumerate(range(0, rows, request["rows_per_file"])):
            end = min(rows, start + request["rows_per_file"])
            for first in range(start, end, BLOCK_ROWS):
                yield day, file, first, min(BLOCK_ROWS, end - first)


def in_order(pool: Executor, make: Callable[[T], R], jobs: Iterator[T], ahead: int) -> Iterator[R]:
    """Make results in a pool, in order, with at most `ahead` of them waiting, so that memory stays flat."""
    waiting = deque(pool.submit(make, job) for job in islice(jobs, ahead))
    while waiting:
        made = waiting.popleft().result()
        waiting.extend(pool.submit(make, job) for job in islice(jobs, 1))
        yield made


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a Parquet file with page checksums; its dictionaries do most of the compression."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # zstd would save a sixth of the bytes, but these files are read from a local disk, where snappy is faster
    return pq.ParquetWriter(path, schema, compression="snappy", write_page_checksum=True)
