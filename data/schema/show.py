"""A schema as tables to read: colours and boxes in a terminal, plain aligned text elsewhere."""

import sys
from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from data.schema import Schema, Table
from data.schema.feature import Feature

BYTES_PER_NUMBER = 4  # float32
PLAIN_WIDTH = 10_000  # lines are never folded where no terminal sets a width
FIELDS = "field, kind, encoding, table, rows#, dim#, pooling, ids a row#, values#, column"
TABLES = "table, rows#, dim#, bytes (fp32)#, fields"
GROUPS = "group, fields#, width#, members"


def print_schema(schema: Schema) -> None:
    """Print a schema's fields, tables and groups."""
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal else PLAIN_WIDTH
    shown = StringIO()  # rich itself would end the process where the reader of a pipe is gone
    console = Console(file=shown, force_terminal=is_terminal, width=width, highlight=False, soft_wrap=not is_terminal)
    largest_first = sorted(schema.tables, key=lambda table: -_bytes(table))
    for title, header, rows in (
        (f"{len(schema.features)} fields", FIELDS, [_field(schema, each) for each in schema.features]),
        (f"{len(schema.tables)} tables, the largest first", TABLES, [_table(each) for each in largest_first]),
        (f"{len(schema.groups)} groups", GROUPS, _groups(schema)),
    ):
        if not rows:
            continue
        lines = box.ROUNDED if is_terminal else None
        table = RichTable(title=title, title_justify="left", box=lines, pad_edge=False)
        for name in header.split(", "):  # "#" marks a column of numbers
            justify = "right" if name.endswith("#") else "left"
            table.add_column(name.removesuffix("#"), justify=justify, no_wrap=not is_terminal)
        for row in rows:
            table.add_row(*map(escape, row))  # a name may look like markup
        console.print(table)
        console.print()
    console.print(summary_line(schema), markup=False)
    print(shown.getvalue(), end="")


def _field(schema: Schema, feature: Feature) -> tuple[str, ...]:
    table = schema.table_of.get(feature.name)
    return (
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


def _encoding(feature: Feature) -> str:
    if feature.kind == "vector":
        return f"{feature.width} numbers" + (f" -> {feature.projection}" if feature.projection else "")
    waits = "" if feature.is_fitted else ' ("fit")'
    if feature.is_unbounded:
        return f"zch, {feature.eviction}"
    return (feature.transform if feature.kind == "numeric" else feature.encoding) + waits


def _table(table: Table) -> tuple[str, ...]:
    rows, dim = f"{table.num_embeddings:,}", str(table.embedding_dim)
    return table.name, rows, dim, size_words(_bytes(table)), ", ".join(table.feature_names)


def _bytes(table: Table) -> int:
    return table.num_embeddings * table.embedding_dim * BYTES_PER_NUMBER


def _groups(schema: Schema) -> list[tuple[str, ...]]:
    widths = {feature.name: feature.model_width for feature in schema.dense}
    widths |= {name: table.embedding_dim for name, table in schema.table_of.items()}
    return [
        (name, str(len(members)), str(sum(widths[member] for member in members)), ", ".join(members))
        for name, members in schema.groups.items()
    ]


def summary_line(schema: Schema) -> str:
    """One line: how much there is in all."""
    num_rows = sum(table.num_embeddings for table in schema.tables)
    num_bytes = sum(map(_bytes, schema.tables))
    roles = [f"label {schema.label}"]
    roles += [f"group {schema.group_column}"] if schema.group_column else []
    roles += [f"time {schema.time_column}"] if schema.time_column else []
    roles += [f"weight {schema.weight_column}"] if schema.weight_column else []
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
