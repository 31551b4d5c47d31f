"""Counts a log as Table 2 of the paper does: users, items, samples, clicks, and how densely users and items meet; in one pass and flat memory."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data.errors import InputError
from data.profile.scan import Distinct
from data.profile.units import Progress, batches_of, unheard, units_of
from data.reading.column_types import check_columns, id_type
from data.reading.files import column_sets
from data.reading.ids import is_id, read_ids
from data.reading.keys import hash_values
from data.reading.numbers import read_labels
from data.reading.storage import LIST_ATTEMPTS, DataFile
from data.schema import Schema

# ids counted one by one, 128 MiB; of more the number is estimated, with a standard error of EXACT^-1/2, 0.02 %
EXACT = 2**24
ITEM_NAMES = ("item_id", "item", "movie_id", "adgroup_id", "ad_id", "product_id", "goods_id", "sku_id", "video_id", "news_id")  # fmt: skip


def table_2(
    files: Sequence[DataFile], schema: Schema, user: str = "", item: str = "", progress: Progress = unheard
) -> list[str]:
    """Read the label and ids of all rows; a line for each figure of Table 2. InputError if a file is damaged, or lacks a column.

    Users and items are the values of `user` and `item`, else of the group column and of a field that is called as items are. A null is no id.
    """
    column_of = {each.name: each.source_column for each in schema.features}
    item = item or next((name for name in ITEM_NAMES if name in column_of), "")
    names = {"users": user or schema.group_column, "items": item}
    columns = {what: column_of.get(name, name) for what, name in names.items() if name}
    text = set()  # columns that hold text in some file, and so text in all
    for arrow_schema, file in column_sets(files, LIST_ATTEMPTS).items():
        check_columns(arrow_schema, schema, str(file))
        for what, column in columns.items():
            if arrow_schema.names.count(column) != 1 or pa.types.is_nested(arrow_schema.field(column).type):
                raise InputError(
                    f"{file}: --{what[:-1]} {names[what]}: wanted one column with one value a row; choose another"
                )
            text |= {column} if id_type(arrow_schema.field(column).type) == "text" else set()
    found = {what: Distinct(EXACT) for what in columns}
    samples, clicks = 0, dict.fromkeys(schema.labels, 0)
    for unit in units_of(files):
        for place, _, rows in batches_of(unit, [*schema.labels, *columns.values()]):
            for what, column in columns.items():
                ids = rows.column(column)
                if is_id(ids.type):
                    ids = read_ids(ids, f"column {column!r}", "text" if column in text else "", place)
                found[what].add(hash_values(ids.drop_null()))
            for label in clicks:
                labels = read_labels(rows.column(label), label, place, nulls=bool(schema.tasks))
                clicks[label] += int(np.nansum(labels))
            samples += rows.num_rows
            progress(samples)
    counts = {what: distinct.estimate() for what, distinct in found.items()}
    shown = {what: f"not known: name their column with --{what[:-1]}" for what in names}
    shown |= {what: f"{'' if found[what].is_exact else 'about '}{n:,} ({names[what]})" for what, n in counts.items()}
    shown |= {
        "feature fields": f"{len(schema.features):,}",
        "feature dims": f"{schema.width:,}",
        "samples": f"{samples:,}",
    } | {
        label if schema.tasks else "clicks": f"{count:,} ({count / max(1, samples):.2%} of the samples)"
        for label, count in clicks.items()
    }
    if len(counts) == 2 and all(counts.values()):
        shown["density"] = f"{100 * samples / (counts['users'] * counts['items']):.3g} % (samples / (users x items))"
    return [f"{name:<16}{words}" for name, words in shown.items()]
