"""Frappe, an app-usage log with context: lines "label index:1 index:1 ..." of ten fields, split by its publishers.

A line names one index for each field, in this order; indices of all fields count on from field to field.
"""

import pyarrow as pa
import pyarrow.compute as pc

from data.errors import InputError
from data.public.raw_files import Sources, Splits, read_csv, replace_column

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
FILES = (
    "frappe.train.libfm|train.libfm|train.libsvm",
    "frappe.validation.libfm|validation.libfm|valid.libfm|valid.libsvm",
    "frappe.test.libfm|test.libfm|test.libsvm",
)
TYPES = {"label": pa.float64(), **dict.fromkeys(FIELDS, pa.string())}


def rows(sources: Sources) -> Splits:
    """The publishers' own split, 7 : 2 : 1 by file."""
    for split, pattern in zip(("train", "valid", "test"), FILES, strict=True):
        (path,) = sources[pattern][:1]
        for piece in read_csv(path, TYPES, delimiter=" ", has_header=False):
            try:
                for name in FIELDS:
                    index = pc.list_element(pc.split_pattern(piece[name], ":"), 0).cast(pa.int32())
                    piece = replace_column(piece, name, index)
            except pa.ArrowInvalid as error:
                raise InputError(f"{path}: column {name}: wanted INDEX:1 ({error}); fetch it again") from None
            # the files say 1 and -1, or 1 and 0
            yield split, replace_column(piece, "label", pc.greater(piece["label"], 0).cast(pa.int8()))
