"""A schema as tables to read: colours and boxes in a terminal, plain aligned text elsewhere. Imports no torch."""

import sys
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from data.schema import Schema
from data.schema.feature import Feature

BYTES_PER_NUMBER = 4  # float32
PLAIN_WIDTH = 10_000  # lines are never folded where no terminal sets a width


def print_schema(schema: Schema, file: TextIO | None = None) -> None:
    """Print a schema's fields, tables and groups.

    Args:
        schema: what to print.
        file: default: standard output.
    """
    out = file or sys.stdout
    is_terminal = out.isatty()
    console = Console(
        file=out, width=None if is_terminal else PLAIN_WIDTH, highlight=False, soft_wrap=not is_terminal
    )
    for title, header, rows in (_fields(schema), _tables(schema), _groups(schema)):
        if not rows:
            continue
        table = RichTable(
            title=title, title_justify="left", box=box.ROUNDED if is_terminal else None, pad_edge=False
        )
        for name, is_number in header:
            table.add_column(name, justify="right" if is_number else "left", no_wrap=not is_terminal)
        for row in rows:
            table.add_row(*map(escape, row))  # a name may look like markup
        console.print(table)
        console.print()
    console.print(summary_line(schema), markup=False)


Sheet = tuple[str, list[tuple[str, bool]], list[tuple[str, ...]]]


def _fields(schema: Schema) -> Sheet:
    header = [
        ("field", False),
        ("kind", False),
        ("encoding", False),
        ("table", False),
        ("rows", True),
        ("dim", True),
    ]
    header += [("pooling", False), ("ids a row", True), ("values", True), ("column", False)]
    rows = []
    for feature in schema.features:
        table = schema.table_of.get(feature.name)
        rows.append(
            (
                feature.name,
                feature.kind,
                _encoding(feature),
                table.name if table and table.name != feature.name else "",
                f"{table.num_embeddings:,}" if table else "",
                str(table.embedding_dim if table else feature.model_width),
                table.pooling if table and not feature.is_single else "",
                f"{feature.pooling_factor:g}" if feature.pooling_factor else "",
                f"{feature.cardinality:,}" if feature.cardinality else "",
                feature.column,
            )
        )
    return f"{len(rows)} fields", header, rows


def _encoding(feature: Feature) -> str:
    if feature.kind == "vector":
        return f"{feature.width} numbers" + (f" -> {feature.projection}" if feature.projection else "")
    waits = "" if feature.is_fitted else ' ("fit")'
    if feature.is_unbounded:
        return f"zch, {feature.eviction}"
    return (feature.transform if feature.kind == "numeric" else feature.encoding) + waits


def _tables(schema: Schema) -> Sheet:
    header = [("table", False), ("rows", True), ("dim", True), ("bytes (fp32)", True), ("fields", False)]
    by_size = sorted(schema.tables, key=lambda table: -table.num_embeddings * table.embedding_dim)
    rows = [
        (
            table.name,
            f"{table.num_embeddings:,}",
            str(table.embedding_dim),
            size_words(table.num_embeddings * table.embedding_dim * BYTES_PER_NUMBER),
            ", ".join(table.feature_names),
        )
        for table in by_size
    ]
    return f"{len(rows)} tables, the largest first", header, rows


def _groups(schema: Schema) -> Sheet:
    widths = {feature.name: feature.model_width for feature in schema.dense}
    widths |= {name: table.embedding_dim for name, table in schema.table_of.items()}
    rows = [
        (name, str(len(members)), str(sum(widths[member] for member in members)), ", ".join(members))
        for name, members in schema.groups.items()
    ]
    header = [("group", False), ("fields", True), ("width", True), ("members", False)]
    return f"{len(rows)} groups", header, rows


def summary_line(schema: Schema) -> str:
    """One line: how much there is in all."""
    num_rows = sum(table.num_embeddings for table in schema.tables)
    num_bytes = sum(table.num_embeddings * table.embedding_dim * BYTES_PER_NUMBER for table in schema.tables)
    roles = [f"label {schema.label}"]
    roles += [f"group {schema.group_column}"] if schema.group_column else []
    roles += [f"time {schema.time_column}"] if schema.time_column else []
    waiting = sum(not feature.is_fitted for feature in schema.features)
    fit = f"; {waiting} field(s) wait for `mbcnet schema fit`" if waiting else ""
    return (
        f"{schema.name}: {len(schema.features)} fields, {schema.width:,} dims, {len(schema.tables)} tables, {num_rows:,} rows, "
        f"{size_words(num_bytes)} (fp32); {', '.join(roles)}{fit}"
    )


def size_words(num_bytes: int) -> str:
    """Bytes in binary units."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
