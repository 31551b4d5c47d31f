"""A body -> the columns of a request, and scores -> a body: JSON, or Arrow IPC streams.

{"rows": [{field: value}, ...]}, and "shared": {field: value} for what all have in common; or one Arrow stream, of rows, or two: shared, rows.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import InputError, first_line
from data.schema import Schema
from mbcnet_rec.serving.loader import ServingModel

ARROW, JSON = "application/vnd.apache.arrow.stream", "application/json"
NAMED = re.compile(r"field (['\"])(.+?)\1")
Columns = Any  # dict of lists, or a pa.Table


class Refused(InputError):
    """A request that gets no scores: HTTP status, reason in one word, and for a bad value its field and row."""

    def __init__(
        self, message: str, status: int = 400, reason: str = "body", field: str = "", row: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.field, self.row = status, reason, field, row


@dataclass(frozen=True)
class Request:
    """Columns to score. Requests of one `kind`, media type and shared columns among it, can share a pass."""

    rows: Columns
    shared: Columns | None  # of one row
    num_rows: int
    kind: tuple[Any, ...]
    branches: bool
    arrived: float  # of time.monotonic, as the deadline
    deadline: float
    arm: str = ""  # of a split: a or b


def names_of(schema: Schema) -> dict[str, str]:
    """What a request may call its values: fields and columns -> column; what else the log has, such as the label -> empty."""
    besides = dict.fromkeys((*schema.labels, schema.group_column, schema.time_column), "")
    fields = {each.name: each.source_column for each in schema.features}
    return besides | fields | {column: column for column in schema.field_columns}


def parse_json(body: bytes, names: Mapping[str, str], _: int) -> list[tuple[Columns, int]]:
    """The columns of the rows and their number, and before them those of the shared row if there is one. Raises Refused."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({first_line(error)})") from None
    is_known = isinstance(given, dict) and given.keys() <= {"rows", "shared"}
    if not is_known or not isinstance(rows := given.get("rows"), list) or not rows:
        raise Refused('wanted {"rows": [{field: value}, ...]} of a row or more, and perhaps "shared": {field: value}')
    parts = [("shared", [given["shared"]])] if "shared" in given else []
    return [(_columns(each, names, where), len(each)) for where, each in [*parts, ("rows", rows)]]


def _columns(rows: list[Any], names: Mapping[str, str], where: str) -> dict[str, list[Any]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise Refused(f"{where}: row {number} is a {type(row).__name__}: wanted {{field: value}}", row=number)
        if odd := row.keys() ^ rows[0].keys():
            words = "some rows have it and others not; write null where a value is missing"
            message = f"{where}: row {number}, field {min(odd)!r}: {words}"
            raise Refused(message, reason="missing field", field=min(odd), row=number)
    return {column: [row[name] for row in rows] for column, name in _known(rows[0], names, where).items()}


def _known(given: Iterable[str], names: Mapping[str, str], where: str) -> dict[str, str]:
    """Column -> what the request calls it."""
    found: dict[str, str] = {}
    for name in given:
        column = names.get(name)
        if column is None or column in found:
            fault = f"the same as {found[column]!r}" if column else "unknown"
            message = f"{where}: row 0, field {name!r} is {fault}; the model reads {', '.join(sorted({*names.values()} - {''}))}"
            raise Refused(message, reason="unknown field", field=name, row=0)
        if column:
            found[column] = name
    return found


def unpacked_bytes(body: bytes) -> int:
    """The size of all buffers of Arrow IPC streams once they are decompressed, without doing it.

    A compressed buffer begins with its size, or with -1 where it is stored as it is. Where buffers lie tells each message's header, a
    flatbuffer: a table begins with the distance to its list of fields, whose k-th entry is the place of field k, or 0.
    """

    def field(data: pa.Buffer, table: int, number: int) -> int:
        fields = table - struct.unpack_from("<i", data, table)[0]
        size = struct.unpack_from("<H", data, fields)[0]
        place = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + place if place else 0

    def follow(data: pa.Buffer, place: int) -> int:
        return place + struct.unpack_from("<I", data, place)[0]

    source, total = pa.BufferReader(body), 0
    while source.tell() < source.size():
        for message in pa.ipc.MessageReader.open_stream(source):
            header = message.metadata
            root = follow(header, 0)
            kind, batch = message.type, follow(header, field(header, root, 2))
            if kind == "dictionary":
                batch = follow(header, field(header, batch, 1))
            if kind in ("dictionary", "record batch") and field(header, batch, 3):  # compressed
                buffers = follow(header, field(header, batch, 2))
                for number in range(struct.unpack_from("<I", header, buffers)[0]):
                    start, size = struct.unpack_from("<qq", header, buffers + 4 + 16 * number)
                    total += max(0, struct.unpack_from("<q", message.body, start)[0]) if size else 0
    return total


def parse_arrow(body: bytes, names: Mapping[str, str], most: int) -> list[tuple[Columns, int]]:
    """The same of one or two Arrow IPC streams, one after the other; `most` bytes once decompressed."""
    source, tables = pa.BufferReader(body), []
    try:
        if unpacked_bytes(body) > most:
            raise Refused(f"a body of more than {most} bytes once decompressed; send fewer rows at a time", 413, "body")
        while source.tell() < source.size() and len(tables) < 3:
            tables.append(pa.ipc.open_stream(source).read_all())
            tables[-1].validate(full=True)  # offsets of untrusted input may point anywhere
    except Refused:
        raise
    except (pa.ArrowException, ValueError, OSError, struct.error) as error:
        raise Refused(f"the body is not an Arrow IPC stream ({first_line(error)})") from None
    if [len(table) for table in tables[:-1]] not in ([], [1]) or not tables or not len(tables[-1]):
        raise Refused("wanted an Arrow IPC stream of rows, or two: one row of shared fields, then the rows")
    parts = []
    for table, where in zip(tables, ("shared", "rows")[-len(tables) :], strict=True):
        found = _known(table.column_names, names, where)
        parts.append((table.select(list(found.values())).rename_columns(list(found)).combine_chunks(), len(table)))
    return parts


def arm_of(columns: Columns, key: str, share: float, seed: int) -> str:
    """The arm of a request: the same for each value of the key, on every machine. Raises Refused where its rows have several."""
    values = columns[key].to_pylist() if isinstance(columns, pa.Table) else columns[key]
    # ids may be whole floats, where the column has had a null
    whole = (int(each) if isinstance(each, float) and each.is_integer() else each for each in values)
    if len(found := {str(each) for each in whole}) > 1:
        raise Refused(f"field {key!r}: the split is by it; wanted one value in a request", field=key, row=0)
    digest = hashlib.sha256(f"{seed}:{found.pop()}".encode()).digest()
    return "b" if int.from_bytes(digest[:8], "big") < share * 2**64 else "a"


def parse(
    body: bytes,
    content_type: str,
    names: Mapping[str, str],
    most: int,
    arms: tuple[str, float, int] | None,
    **more: Any,
) -> Request:
    """Read a body by its content type, of `most` bytes once decompressed. `arms` are the split's key, share and seed; `more` goes into the Request.

    Refused if it cannot be read, or its fields are not the model's.
    """
    readers = {JSON: parse_json, ARROW: parse_arrow}
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in readers:
        raise Refused(f"Content-Type {content_type[:99]!r}: wanted {JSON} or {ARROW}", 415)
    *before, (rows, num_rows) = readers[kind](body, names, most)
    shared = before[0][0] if before else None
    is_table = kind == ARROW
    ours, theirs = (set() if each is None else set(each.column_names if is_table else each) for each in (shared, rows))
    missing, both = set(names.values()) - {""} - ours - theirs, ours & theirs
    if missing or both or not theirs:
        name = min(missing or both, default="")
        fault = "is missing; add it, null where it has no value" if missing else "is shared and stands in the rows too"
        fault = f"field {name!r} {fault}" if name else "all fields are shared; put one of them into the rows"
        raise Refused(f"rows: row 0, {fault}", reason="missing field" if missing else "body", field=name, row=0)
    types = (rows.schema, shared and shared.schema) if is_table else ()
    arm = arm_of(shared if arms[0] in ours else rows, *arms) if arms else ""
    return Request(rows, shared, num_rows, (kind, frozenset(ours), arm, *types), arm=arm, **more)


def unshared(request: Request) -> Request:
    """The same with what its rows share in each of them."""
    if request.shared is None:
        return request
    if isinstance(request.rows, pa.Table):
        rows = request.rows
        for name, column in zip(request.shared.column_names, request.shared.columns, strict=True):
            rows = rows.append_column(name, column.take([0] * request.num_rows))
    else:
        rows = request.rows | {name: values * request.num_rows for name, values in request.shared.items()}
    return replace(request, rows=rows, shared=None)


def merged(parts: list[Columns]) -> Columns:
    """The columns of several requests of one kind, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], pa.Table):
        return pa.concat_tables(parts)
    return {name: list(chain.from_iterable(part[name] for part in parts)) for name in parts[0]}


def explained(error: InputError, encode: Callable[[Columns], Any], request: Request, is_shared: bool) -> Refused:
    """The encoder's refusal with field and row. One of a column's type names no row: it is the first that fails with those before it."""
    text, columns = str(error), request.rows
    named, told = NAMED.search(text), re.match(r"\w+: row (\d+)", text)
    name = named[2] if named else ""
    if told or is_shared:
        return Refused(text, reason="value", field=name, row=None if is_shared else int(told[1]) if told else 0)
    good, bad = 0, request.num_rows
    while bad - good > 1:
        middle = (good + bad) // 2
        is_table = isinstance(columns, pa.Table)
        try:
            encode(columns.slice(0, middle) if is_table else {key: each[:middle] for key, each in columns.items()})
            good = middle
        except InputError:
            bad = middle
    return Refused(text.replace(":", f": row {bad - 1}:", 1), reason="type", field=name, row=bad - 1)


def answer(kind: str, version: str, model: ServingModel, scores: np.ndarray, arm: str) -> bytes:
    """The body: the fused probability, then each branch's if there, of (rows, 1 + branches); of tasks by `probability_TASK`, one after the other."""
    told = {"model": version} | ({"arm": arm} if arm else {})
    tasks, branches = model.tasks, model.branches if scores.shape[1] > (len(model.tasks) or 1) else []
    outputs = [(task, branch) for task in tasks or [""] for branch in ("", *branches)]
    names = ["_".join(filter(None, ("probability", *each))) for each in outputs]
    if kind == ARROW:
        table = pa.table({name: np.ascontiguousarray(own) for name, own in zip(names, scores.T, strict=True)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.with_metadata(told)) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()
    if tasks:
        return json.dumps(told | {name: own.tolist() for name, own in zip(names, scores.T, strict=True)}).encode()
    found: dict[str, Any] = told | {"probability": scores[:, 0].tolist()}
    if len(names) > 1:
        found["branches"] = {name: own.tolist() for name, own in zip(branches, scores.T[1:], strict=True)}
    return json.dumps(found).encode()
