"""A schema as aligned tables to read; columns of text and bytes in words, for reports of plans too."""

from collections.abc import Iterable, Sequence

from data.schema import Schema, Table
from data.schema.feature import Feature

BYTES_PER_NUMBER = 4  # float32
FIELDS = ("<field", "<kind", "<encoding", "<table", "rows", "dim", "<pooling", "ids a row", "values", "<column")
TABLES = ("<table", "rows", "dim", "bytes (fp32)", "<fields")
GROUPS = ("<group", "fields", "width", "<members")


def columns(head: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "") -> list[str]:
    """Lines of a table, each column as wide as its widest cell; to the left where its head begins with "<"."""
    cells = [[name.lstrip("<") for name in head], *(list(map(str, row)) for row in rows)]
    sides = [("<" if name.startswith("<") else ">") for name in head]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    forms = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    return [(indent + "  ".join(forms).format(*row)).rstrip() for row in cells]


def print_schema(schema: Schema) -> None:
    """Print a schema's fields, tables and groups."""
    largest_first = sorted(schema.tables, key=lambda table: -_bytes(table))
    for title, head, rows in (
        (f"{len(schema.features)} fields", FIELDS, [_field(schema, each) for each in schema.features]),
        (f"{len(schema.tables)} tables, the largest first", TABLES, [_table(each) for each in largest_first]),
        (f"{len(schema.groups)} groups", GROUPS, _groups(schema)),
    ):
        if rows:
            print("\n".join([title, *columns(head, rows)]), end="\n\n")
    print(summary_line(schema))


def _field(schema: Schema, feature: Feature) -> tuple[object, ...]:
    table = schema.table_of.get(feature.name)
    if feature.kind == "vector":
        encoding = f"{feature.width} numbers" + (f" -> {feature.projection}" if feature.projection else "")
    elif feature.is_cross:
        most = f", {feature.max_length} at most" if feature.max_length else ""
        encoding = f"hash of {' x '.join(feature.of)}{most}"
    elif feature.is_unbounded:
        encoding = f"zch, {feature.eviction}"
    else:
        encoding = feature.transform if feature.kind == "numeric" else feature.encoding
        encoding += "" if feature.is_fitted else ' ("fit")'
    return (
        feature.name,
        feature.kind,
        encoding,
        table.name if table and table.name != feature.name else "",
        f"{table.num_embeddings:,}" if table else "",
        table.embedding_dim if table else feature.model_width,
        "" if not table or feature.is_single else feature.pooling if feature.is_sequence else table.pooling,
        f"{feature.pooling_factor:g}" if feature.pooling_factor else "",
        f"{feature.cardinality:,}" if feature.cardinality else "",
        feature.column,
    )


def _table(table: Table) -> tuple[object, ...]:
    names = ", ".join(table.feature_names)
    return table.name, f"{table.num_embeddings:,}", table.embedding_dim, bytes_in_words(_bytes(table)), names


def _bytes(table: Table) -> int:
    return table.num_embeddings * table.embedding_dim * BYTES_PER_NUMBER


def _groups(schema: Schema) -> list[tuple[object, ...]]:
    widths = {feature.name: feature.model_width for feature in schema.dense}
    widths |= {name: table.embedding_dim for name, table in schema.table_of.items()}
    groups = schema.groups.items()
    return [(name, len(each), sum(widths[member] for member in each), ", ".join(each)) for name, each in groups]


def summary_line(schema: Schema) -> str:
    """One line: how much there is in all."""
    num_rows = sum(table.num_embeddings for table in schema.tables)
    num_bytes = sum(map(_bytes, schema.tables))
    columns = {"group": schema.group_column, "time": schema.time_column, "weight": schema.weight_column}
    roles = [f"label {each}" for each in schema.labels]
    roles += [f"{role} {column}" for role, column in columns.items() if column]
    waiting = sum(not feature.is_fitted for feature in schema.features)
    fit = f"; {waiting} field(s) wait for `mbcnet schema fit`" if waiting else ""
    return (
        f"{schema.name}: {len(schema.features)} fields, {schema.width:,} dims, {len(schema.tables)} tables, {num_rows:,} rows, "
        f"{bytes_in_words(num_bytes)} (fp32); {', '.join(roles)}{fit}"
    )


def bytes_in_words(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1024:,.1f} KiB" if size else "0"
