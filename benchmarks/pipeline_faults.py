"""What no command may take: faults of fields, labels and files, for one more day of a case of pipeline_fuzz.py."""

import random
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pipeline_columns import as_type

# fmt: off
FAULTY_IDS = [("a boolean id", True, pa.bool_()), ("a binary id", b"7", pa.binary()), ("an instant as id", 7, pa.timestamp("us")),
              ("a date as id", 7, pa.date32()), ("a struct as id", {"a": 7}, pa.struct([("a", pa.int64())])), ("an id of 1.5", 1.5, pa.float64()),
              ("an infinite id", float("inf"), pa.float64()), ("an id of 2^60 as double", 2.0**60, pa.float64()),
              ("a decimal id of 1.5", Decimal("1.5"), pa.decimal128(5, 1)), ("bytes in a dictionary", b"7", pa.dictionary(pa.int8(), pa.binary()))]
DAMAGES = ["a flipped bit", "a flipped bit", "a cut file", "text in a file", "no bytes"]
# fmt: on


class Fault(NamedTuple):
    """What must be refused; `names`: what a refusal must tell, the field last."""

    words: str
    names: tuple[str, ...]
    types: str
    of_label: bool = False
    is_damage: bool = False


def field_fault(
    rng: random.Random, entry: dict[str, Any], ids: list[tuple[str, Any, pa.DataType]], rows: int
) -> tuple[str, pa.Array | None]:
    """A fault of a field: its words, and the column instead; None: there is none."""
    nan, numbers = float("nan"), pa.list_(pa.float64())
    if rng.random() < 0.08:
        return "no such column", None
    if entry["kind"] == "vector":
        faults = [("a vector too long", [1.0] * (entry["width"] + 1), numbers), ("NaN in a vector", [nan] * entry["width"], numbers),
                  ("infinity in a vector", [float("inf")] * entry["width"], numbers), ("a number for a vector", 1.0, pa.float64())]  # fmt: skip
    elif entry["kind"] == "numeric":
        faults = [
            ("text for a number", "1", pa.string()),
            ("an instant for a number", 1, pa.timestamp("us")),
            ("a list for a number", [1.0], numbers),
        ]
        faults += (
            [] if "on_invalid" in entry else [("NaN", nan, pa.float64()), ("infinity", -float("inf"), pa.float32())] * 2
        )
        faults += (
            []
            if "on_invalid" in entry or "transform" in entry
            else [("DBL_MAX", 1.7976931348623157e308, pa.float64()), ("-1e300", -1e300, pa.float64())]
        )
    elif entry["kind"] == "categorical":
        faults = [
            *ids,
            ("a list for one value", [1], pa.list_(pa.int64())),
            ("a list of text for one value", ["x"], pa.list_(pa.string())),
        ]
    else:
        faults = [(words, [value], pa.list_(kind)) for words, value, kind in ids]
        faults += [("one value for a list", 1, pa.int64()), ("text for a list", "ab", pa.string())]
    words, value, kind = rng.choice(faults)
    return words, pa.array([None] * (rows - 1) + [value], kind)


def label_fault(rng: random.Random, rows: int) -> tuple[str, pa.Array | None]:
    """A fault of the label."""
    faults = [("label 2", 2, pa.int8()), ("label null", None, pa.int8()), ("label 0.5", 0.5, pa.float32()), ("label NaN", float("nan"), pa.float64()),
              ("label -1", -1, pa.int64()), ("label as text", "1", pa.string()), ("a date as label", 1, pa.date32()), ("no label", 1, None)]  # fmt: skip
    words, value, kind = rng.choice(faults)
    return words, None if kind is None else pa.array([as_type(1, kind)] * (rows - 1) + [value], kind)


def damage_file(path: Path, column: str, words: str) -> None:
    """Damage a file: a bit in a page of a column, its end, or all of it."""
    content = bytearray(path.read_bytes())
    if words == "a flipped bit":
        metadata = pq.ParquetFile(path).metadata
        leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.startswith(column))
        chunk = metadata.row_group(0).column(leaf)
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        content[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(
        {"a cut file": content[: len(content) * 2 // 3], "text in a file": b"a,b\n" * 50, "no bytes": b""}.get(
            words, content
        )
    )
