"""The data set of one case of pipeline_fuzz.py, drawn from its seed and written by pyarrow alone; what of it a command should read is known."""

import datetime
import json
import operator
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pipeline_columns import Column, Columns, as_arrow, is_text
from pipeline_faults import DAMAGES, FAULTY_IDS, Fault, damage_file, field_fault, label_fault
from pyarrow import types as pt

BATCH = 16
CONFIG = """name = "fuzz"
schema = "fitted/schema.toml"
[data]
{data}
batch_size = 16
lanes = 1
[model]
kind = "{model}"
[model.dnn]
hidden = [16]
[model.mbcnet]
branch_dim = 32
top = [32]
[model.mbcnet.efgc]
hidden = [32]
[model.mbcnet.deep]
hidden = [32]
[optim]
dense_lr = 0.001
[optim.embedding]
lr = 0.2
[train]
device = "cpu"
out = "run"
"""
# fmt: off
LABELS = [pa.int8(), pa.int64(), pa.uint8(), pa.int32(), pa.bool_(), pa.float32(), pa.float64(), pa.decimal128(1, 0)]
TIMES = [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.date32(), pa.date64(), "s", "ms", "us", "day number", "day text"]
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "!=": operator.ne}
PLACES = ["part-0000{}.parquet", "{}.snappy.parquet", "x.parquet/part-{}.parquet", "h=0{}/part.parquet"]
NOISE = ["_SUCCESS", ".part.parquet.crc", "_temporary/0/part.parquet", ".hidden/part.parquet", ".copy.parquet", "_old.parquet", "notes.txt", "part.parquet.tmp"]
SPELLINGS = ["{date:%Y-%m-%d}", "{date:%Y-%m-%d}", "{date:%Y%m%d}", "{date.year}-{date.month}-{date.day}", "{number}"]
TRANSFORMS = [{}, {"transform": "log1p"}, {"transform": "standardise", "mean": "fit", "std": "fit"},
              {"transform": "bucketise", "boundaries": "fit", "num_buckets": 8, "embedding_dim": 4}]
ENCODINGS = [{"encoding": "vocabulary", "vocabulary": "fit"}, {"encoding": "hash", "num_embeddings": 4999}, {"encoding": "zch", "num_embeddings": 160}]
# fmt: on


@dataclass
class Part:
    """One file, and the day of each row."""

    path: Path
    columns: dict[str, list[Any]]
    types: dict[str, pa.DataType]
    days: list[int | None]
    nan: frozenset[str]  # columns with Column.nan

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.days)

    def table(self) -> pa.Table:
        """The rows as Arrow."""
        kinds = self.types.items()
        return pa.table({name: as_arrow(self.columns[name], kind, name in self.nan) for name, kind in kinds})


class Case:
    """Draws a data set; `write` puts it into the working directory."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        rng = self.rng
        self.is_inferred, self.model = rng.random() < 0.6, rng.choice(["dnn", "dnn", "mbcnet"])
        self.keeps_rid, self.num_days, self.has_valid = (
            rng.random() < 0.5,
            rng.choice([2, 2, 3, 4, 11]),
            rng.random() < 0.4,
        )
        self.mode = rng.choice(["folders", "partitions", "partitions", "time"])
        self.first = datetime.date(*rng.choice([(2024, 2, 27), (2023, 12, 30), (2024, 5, 6), (2024, 9, 8)]))
        is_time = self.mode == "time"
        self.time_column = rng.choice(["timestamp", "day", "event_time"]) if is_time else ""
        self.time_kind: Any = rng.choice(TIMES)
        self.columns = Columns(rng, self.num_days, self.is_inferred).drawn
        self.of_name = {column.name: column for column in self.columns}
        pools = [each.pool for each in self.columns if each.family == "numbers"]
        self.has_large = any(max(pool) > 1e5 for pool in pools)  # beside which nothing else counts
        self.twice = rng.choice(self.columns).name if rng.random() < 0.04 else ""  # a name that two columns have
        mixed = [column.name for column in self.columns if column.is_mixed and self.is_inferred]
        self.may_refuse = self.twice or "".join(mixed[:1])  # the first command may refuse this column
        labels = [rng.choice(LABELS)] if rng.random() < 0.8 else LABELS[:3]
        self.label_types, self.one_class = ([rng.choice(labels) for _ in range(self.num_days)], rng.random() < 0.06)
        self.options: dict[str, Any] = {
            "row_group_size": rng.choice([1, 7, 20, 1000]), "compression": rng.choice(["none", "snappy", "zstd", "gzip"]),
            "use_dictionary": rng.random() < 0.7, "data_page_version": rng.choice(["1.0", "2.0"]), "data_page_size": rng.choice([64, 2**20]),
            "write_page_checksum": rng.random() < 0.8, "store_schema": rng.random() < 0.8,
        }  # fmt: skip
        if any(column.is_list or column.of for column in self.columns):
            # Arrow cuts lists at smaller pages, or writes pages of no value, and cannot read them back
            self.options["data_page_size"] = 2**20
        self.key, self.spelling = rng.choice(["ds", "dt", "day_of"]), rng.choice(SPELLINGS)
        suffix = rng.choice(["", "", ".parquet"])
        names = (
            f"{self.key}={self.spelled(day)}" if self.mode == "partitions" else f"day{day}{suffix}"
            for day in range(self.num_days)
        )
        self.folders = list(names)
        self.base: list[dict[str, Any]] = []
        self.files = sorted(self._parts(), key=lambda part: part.path)
        self._splits()
        kind, rows = ("inferred" if self.is_inferred else "own schema", sum(part.num_rows for part in self.files))
        self.words = f"{self.mode} {self.where} {kind}, {len(self.files)} files, {rows} rows"

    def _parts(self) -> list[Part]:
        rng, parts, number = self.rng, [], 0
        for day, folder in enumerate(self.folders):
            for index in range(rng.choice([1, 1, 2])):
                rows = rng.choice([0, 1, 20] if index else [9, 30, 60])
                parts.append(self._part(Path("logs", folder, rng.choice(PLACES).format(index)), day, rows, number))
                number += rows
        if self.mode == "partitions" and rng.random() < 0.25:
            parts.append(
                self._part(Path("logs", f"{self.key}=__HIVE_DEFAULT_PARTITION__", "part.parquet"), 0, 7, number)
            )
            parts[-1].days = [None] * 7
        return parts

    def _part(self, path: Path, day: int, rows: int, number: int) -> Part:
        drawn = [self._row(index, day) for index in range(rows)]
        self.base = self.base or drawn[:6]
        days: list[int | None] = [
            self.rng.randrange(self.num_days) if self.mode == "time" else day for _ in range(rows)
        ]
        columns = {column.name: [row[column.name] for row in drawn] for column in self.columns}
        types = {column.name: column.types[day] for column in self.columns}
        columns["label"] = [0 if self.one_class else int(self.rng.random() < 0.4) for _ in range(rows)]
        columns["rid"] = [f"row {number + index}" for index in range(rows)]
        types |= {"label": self.label_types[day], "rid": pa.string()}
        if self.time_column:
            columns[self.time_column], types[self.time_column] = self._instants(days)
        return Part(path, columns, types, days, frozenset(each.name for each in self.columns if each.nan))

    def _row(self, index: int, day: int) -> dict[str, Any]:
        """Values of one row; the first rows of a day are those of the first day again."""
        rng, row, known = self.rng, {}, self.base[index] if index < len(self.base) else {}
        for column in self.columns:
            kind, value = column.types[day], rng.choice(column.pool)
            item = kind.value_type if column.is_list and not pt.is_null(kind) else kind
            if column.of:
                lengths = len(row[column.of] or [])
                value = known[column.name] if known else [rng.choice(column.pool) for _ in range(lengths)]
                value = None if row[column.of] is None else value
            elif pt.is_null(item):
                value = None if item == kind else [None] * rng.choice([0, 1])
            elif known:
                value = known[column.name]
            elif rng.random() < column.nulls:
                value = None
            elif column.is_list and column.family != "vector":
                pool = (
                    [*column.pool, None]
                    if column.nulls and f"{column.name}_weights" not in self.of_name
                    else column.pool
                )
                value = [rng.choice(pool) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
            row[column.name] = value
        return row

    def date(self, day: int) -> datetime.date:
        """The date of a day."""
        return self.first + datetime.timedelta(day)

    def spelled(self, day: int) -> str:
        """A day as its folder has it."""
        date = self.date(day)
        return self.spelling.format(date=date, number=8 + day)

    def _instants(self, days: list[int | None]) -> tuple[list[Any], pa.DataType]:
        dates, kind = [self.date(day or 0) for day in days], self.time_kind
        if kind == "day number":
            return [int(f"{date:%Y%m%d}") for date in dates], pa.int32()
        if kind == "day text":
            return [date.isoformat() for date in dates], pa.string()
        if not isinstance(kind, str) and pt.is_date(kind):
            return list(dates), kind
        midnights = (datetime.datetime.combine(date, datetime.time(), datetime.UTC) for date in dates)
        instants = [each + datetime.timedelta(seconds=self.rng.choice([0, 1, 86_399, 40_000])) for each in midnights]
        if isinstance(kind, str):
            return [int(each.timestamp()) * {"s": 1, "ms": 10**3, "us": 10**6}[kind] for each in instants], pa.int64()
        return [each if kind.tz else each.replace(tzinfo=None) for each in instants], kind

    def _splits(self) -> None:
        """Choose each split's paths and conditions, and count its rows by hand."""
        rng, last = self.rng, self.num_days - 1
        self.where: dict[str, list[str]] = {"train": [], "test": []}
        self.paths = self.train_paths = self.train_data = self.test_data = ["logs"]
        if rng.random() < 0.1:  # each file still counts once
            self.paths = ["logs", f"logs/{self.folders[0]}", f"logs/../logs/{self.folders[-1]}"]
        conditions = {"train": [("!=", last)], "test": [("=", last)]}
        if self.mode == "folders":
            self.train_data, self.test_data = (
                [f"logs/{name}" for name in self.folders[:-1]],
                [f"logs/{self.folders[-1]}"],
            )
            self.train_paths = self.train_data
        else:
            cut = rng.randint(1, last)
            conditions = {"train": [("<", cut)], "test": [(">=", cut)]}
            if rng.random() < 0.4:
                conditions["train"] = rng.choice(
                    [[(">=", 0), ("<=", last - 1)], [("!=", last)], [("=", 0)], [(">", 0)]]
                )
                conditions["test"] = [(">", 0), ("<", last + 3)]
            elif rng.random() < 0.3:
                shown = {day for part in self.files for day in part.days if day is not None}
                self.where = {
                    split: [f"{self.time_column or self.key} {sign} last {{}}"]
                    for split, ((sign, _),) in conditions.items()
                }
                number = last - cut + 1 if self.mode == "partitions" else max(shown) - cut + 1
                self.where = {split: [text.format(number)] for split, (text,) in self.where.items()}
            for split, own in conditions.items() if not self.where["train"] else ():
                texts = [f"{self.time_column or self.key} {sign} {self._bound(day)}" for sign, day in own]
                self.where[split] = [" and ".join(texts)] if rng.random() < 0.3 else texts
        days = [day for part in self.files for day in part.days if day is not None]
        if self.mode == "folders":
            days = [self.folders.index(part.path.parts[1]) for part in self.files for _ in part.days]
        self.num_train, self.num_test = (
            sum(all(OPERATORS[sign](day, bound) for sign, bound in conditions[split]) for day in days)
            for split in ("train", "test")
        )

    def _bound(self, day: int) -> str:
        date, chance = self.date(day), self.rng.random()
        if self.mode == "partitions" and (chance < 0.7 or self.spelling in ("{number}", "{date:%Y%m%d}")):
            return self.spelled(day)
        if self.time_column and self.time_kind == "day number" and chance < 0.5:
            return f"{date:%Y%m%d}"
        return date.isoformat() if chance < 0.8 else f"{date.year}-{date.month}-{date.day}"

    def data_text(self) -> str:
        """The splits, as [data] has them."""
        test = ("valid", "test") if self.has_valid else ("test",)
        lists = {"train": self.train_data, "train_where": self.where["train"]}
        lists |= dict.fromkeys(test, self.test_data) | {f"{split}_where": self.where["test"] for split in test}
        return "\n".join(f"{key} = {json.dumps(value)}" for key, value in lists.items())

    def write(self) -> None:
        """Write the files, and others beside them that are no data."""
        rng = random.Random(self.seed)
        for part in self.files:
            part.path.parent.mkdir(parents=True, exist_ok=True)
            table = part.table()
            if self.twice:
                table = table.append_column(self.twice, table.column(self.twice))
            pq.write_table(table, part.path, **self.options)
        for name in rng.sample(NOISE, rng.choice([0, 0, 2, 4])):
            path = Path("logs", rng.choice(self.folders), name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[0].path.read_bytes() if rng.random() < 0.7 else b"")

    def schema_text(self) -> str:
        """A schema by hand, with every kind of field and encoding."""
        rng, fields = random.Random(self.seed), {}
        for index, column in enumerate(each for each in self.columns if not each.of and each.family != "odd"):
            plain = column.name.isprintable() and not column.name.startswith(".") and not set(column.name) & set("/\\")
            name = (
                column.name if plain and rng.random() < 0.3 else f"f{index}"
            )  # a schema may refuse the others as names
            fields[name] = self._entry(rng, column) | ({"column": column.name} if name != column.name else {})
        top = {"name": "own", "label": "label", "group_column": "user_id"}
        top |= {"time_column": self.time_column} if self.time_column else {}
        text = [f"{key} = {quoted(value)}" for key, value in top.items()] + ["[fields]"]
        for name, entry in fields.items():
            text.append(
                f"{quoted(name)} = {{ {', '.join(f'{key} = {quoted(value)}' for key, value in entry.items())} }}"
            )
        return "\n".join([*text, "[groups]", f"g = [{quoted(next(iter(fields)))}]\n"])

    def _entry(self, rng: random.Random, column: Column) -> dict[str, Any]:
        if column.family == "vector":
            return {"kind": "vector", "width": 3} | ({"projection": 4} if rng.random() < 0.3 else {})
        if column.family == "numbers":
            return {"kind": "numeric"} | rng.choice(TRANSFORMS)
        encodings = ENCODINGS
        if column.family == "integers" and not any(map(is_text, column.types)):
            is_small = 0 <= min(column.pool) <= max(column.pool) < 30
            encodings = [
                *ENCODINGS,
                *([{"num_embeddings": 30}] * 3 if is_small else [{"num_embeddings": 997, "on_invalid": "modulo"}]),
            ]
        weights = f"{column.name}_weights"
        kind = (
            {"kind": "weighted_multi_valued", "weights": weights}
            if weights in self.of_name
            else {"kind": "multi_valued"}
        )
        return (kind if column.is_list else {"kind": "categorical"}) | rng.choice(encodings) | {"embedding_dim": 8}

    def canonical(self, name: str, value: Any) -> Any:
        """A value as every type and form of it means: an empty list for none, no missing values in lists, numbers as floats."""
        column = self.of_name.get(name)
        if column and (column.of or (column.is_list and column.family != "vector")):
            return [each for each in value or [] if each is not None]
        return float(value) + 0.0 if column and column.family == "numbers" and value is not None else value

    def two_values(self, name: str, entry: dict[str, Any]) -> tuple[Any, Any] | None:
        """Two values that are often trained on, or None."""
        column = self.of_name.get(name)
        if column is None or column.of or column.family == "odd" or self.mode != "folders":
            return None
        parts = (part for part in self.files if part.path.parts[1] != self.folders[-1])
        found = [value for part in parts for value in part.columns[name] if value is not None]
        if column.is_list and column.family != "vector":
            found = [[value] for values in found for value in values if value is not None]
        counts = Counter(map(json.dumps, found)).most_common(2)
        often = [json.loads(value) for value, count in counts if count >= 2]
        if entry["kind"] == "numeric" and found:
            often = [each for each in (min(found), max(found)) if min(found) < max(found)]
        return (often[0], often[1]) if len(often) == 2 else None

    def types_of(self, name: str) -> list[str]:
        """Types of a column by day."""
        return [str(kind) for kind in self.of_name[name].types] if name in self.of_name else []

    def write_bad(self, fields: dict[str, dict[str, Any]]) -> Fault | None:
        """Write bad/, a day of right rows and one fault in something that a field reads, or in the label; None: this case has none."""
        rng = random.Random(self.seed)
        good = next(part for part in self.files if part.num_rows)
        read = [(name, entry, entry.get("column", name)) for name, entry in sorted(fields.items())]
        read = [each for each in read if each[2] in self.of_name]
        if self.twice or rng.random() < 0.2 or not read:
            return None
        name, entry, source = rng.choice(read)
        table, chance, path = (
            good.table(),
            rng.random(),
            Path("bad", f"{self.key}={self.spelled(self.num_days)}", "part-7.parquet"),
        )
        damage = rng.choice(DAMAGES) if chance < 0.2 else ""
        if chance > 0.8:
            name = source = "label"
        at = table.column_names.index(source)
        words, column = (
            label_fault(rng, len(table))
            if chance > 0.8
            else field_fault(rng, entry, self._faulty_ids(entry, source), len(table))
        )
        if not damage:
            table = table.remove_column(at) if column is None else table.set_column(at, source, column)
        path.parent.mkdir(parents=True)
        pq.write_table(table, path, **{**self.options, "write_page_checksum": True})
        if damage:
            damage_file(path, source, damage)
        is_plain = name.isprintable() and not set(name) & set("'\"\\") and not damage
        types = f"{good.types[source]}, {entry}"
        return Fault(
            f"{damage or words} ({source!r})", (path.name, name)[: 1 + is_plain], types, chance > 0.8, bool(damage)
        )

    def _faulty_ids(self, entry: dict[str, Any], source: str) -> list[tuple[str, Any, pa.DataType]]:
        """Ids that this field refuses: words, value and type."""
        found, column = [*FAULTY_IDS], self.of_name[source]
        if column.family == "integers" and not any(map(is_text, column.types)):
            found += [
                (f"{text!r} for an integer id", text, pa.string()) for text in ("07", "x7", "7.0", " 7", "+7", "")
            ]
            if entry.get("encoding", "ids") == "ids" and "on_invalid" not in entry:
                size = entry.get("num_embeddings", 0)
                found += [
                    ("an id too large", size, pa.int64()),
                    ("a negative id", -1, pa.int8()),
                    ("an id of 2^64 - 1", 2**64 - 1, pa.uint64()),
                ] * 2
        return found


def quoted(value: Any) -> str:
    """A value as TOML."""
    return json.dumps(value, ensure_ascii=False)
