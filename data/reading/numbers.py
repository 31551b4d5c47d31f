"""Columns of numbers, vectors and labels -> NumPy, checked: one that float32 does not hold after its transform is named, or missing.

Shapes: n rows, W width of a vector.
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from ..errors import InputError  # relative: an exported artifact carries this file
from ..schema import Feature
from ..schema.transforms import Entries, transform_of
from .columns import Place
from .ids import as_lists, decoded, is_valid, list_offsets

LARGEST = float(np.finfo(np.float32).max)  # what the model takes
LARGEST_DOUBLE, LEAST_NORMAL = float(np.finfo(np.float64).max), float(np.finfo(np.float32).tiny)


def write_numbers(
    column: pa.Array, feature: Feature, place: Place, repaired: Counter[str], out: np.ndarray, others: Entries
) -> None:
    """Write the transformed numbers of a field, (n,); 0 where they are missing. `others`: the schema's transforms."""
    numbers, valid = read_numbers(column, feature, place, repaired)
    if (transform := transform_of(others, feature)) is None:
        numbers = transformed(numbers, feature)
    else:
        made = np.asarray(transform(numbers.astype(np.float64)), np.float64)
        if made.shape != numbers.shape:
            raise InputError(
                f"transform {feature.transform!r}: wanted {numbers.shape} numbers, got {made.shape}; fix it"
            )
        bad = ~(np.abs(made) <= LARGEST) & (True if valid is None else valid)
        if bad.any():
            wanted = f"one that transform {feature.transform!r} makes a finite float32 of; fix the file or transform"
            raise place.fault(f"field {feature.name!r}", numbers, bad, wanted, None)
        numbers = made
    out[:] = numbers if valid is None else np.where(valid, numbers, 0.0)


def transformed(numbers: np.ndarray, feature: Feature) -> np.ndarray:
    """Numbers after a transform that every schema knows."""
    if feature.transform == "log1p":
        return signed_log(numbers)
    if feature.transform == "standardise":
        return (_wide_enough(numbers, feature) - float(feature.mean)) / float(feature.std)
    return numbers


def signed_log(numbers: np.ndarray) -> np.ndarray:
    """log(1 + |x|) with the sign of x. In float64 it differs from log1p by less than 2^-52, and is vectorised."""
    negative = numbers.size > 0 and numbers.min() < 0
    logs = np.add(1.0, np.abs(numbers, dtype=np.float64) if negative else numbers, dtype=np.float64)
    np.log(logs, out=logs)
    return np.copysign(logs, numbers) if negative else logs


def write_vectors(column: pa.Array, feature: Feature, place: Place, repaired: Counter[str], out: np.ndarray) -> None:
    """Write the vectors of a field, (n, W); missing ones are left as they are."""
    lists = as_lists(column)
    present = is_valid(lists) if lists.null_count else slice(None)
    offsets = list_offsets(lists)
    lengths = np.diff(offsets)[present]
    if (lengths != feature.width).any():
        wrong = int(np.flatnonzero(lengths != feature.width)[0])
        row = int(np.arange(len(lists))[present][wrong])
        raise InputError(
            f"{place.row(row)}, field {feature.name!r}: a vector of length {lengths[wrong]}: wanted width = {feature.width}; "
            "fix the file or the schema's width"
        )
    numbers, _ = read_numbers(lists.flatten(), feature, place, repaired, offsets)
    out[present] = numbers.reshape(-1, feature.width)


def read_numbers(
    column: pa.Array, feature: Feature, place: Place, repaired: Counter[str], offsets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers, 0 where invalid, and their validity (None: all). NaN and infinity are errors, or missing if on_invalid = 'null'.

    Integers of up to 32 bits stay what they are where none of their type is out of range; float64 holds all of them.

    `offsets`: of the lists that hold the numbers.
    """
    numbers, valid = as_numpy(column)
    low, high = limits_of(feature)
    if numbers.dtype.kind in "iu":
        ends = np.iinfo(numbers.dtype)
        if numbers.itemsize <= 4 and low <= ends.min and ends.max <= high:
            return numbers, valid
        # as float32, integers beyond 2^24 would lose digits before the transform
        numbers = numbers.astype(np.float64)
    # a NaN is the least and the largest, and in no range
    if not numbers.size or (float(numbers.min()) >= low and float(numbers.max()) <= high):
        return numbers, valid
    wide = numbers.astype(np.float64)
    good = (wide >= low) & (wide <= high)
    if feature.on_invalid != "null":
        bad = ~good
        wanted = "a finite number or null"
        fix = "set on_invalid = 'null' to read it as missing"
        if feature.is_sequence:  # which keeps a place for each event
            fix = "write null where it is not known"
        if np.isfinite(numbers[bad][0]):
            wanted = f"a number up to {LARGEST:.1e}, the largest of float32"
            wanted += ", after (x - mean) / std" if feature.transform == "standardise" else ""
            fix = f"set transform = 'log1p', or {fix}" if feature.kind == "numeric" else fix
            fix = f"write null where it marks a missing value, {fix}"
        raise place.fault(f"field {feature.name!r}", numbers, bad, f"{wanted}; fix the file, or {fix}", offsets)
    repaired[feature.name] += int((~good).sum())
    return np.where(good, numbers, 0.0), good if valid is None else valid & good


def as_numpy(column: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Any column of numbers, 0 for nulls, and where they are not null (None: all)."""
    column = decoded(column)
    valid = is_valid(column) if column.null_count else None
    if not (pt.is_floating(column.type) or pt.is_integer(column.type)) or pt.is_float16(column.type):
        column = column.cast(pa.float64())
    column = column if valid is None else pc.fill_null(column, pa.scalar(0, column.type))
    return column.to_numpy(zero_copy_only=False), valid


def limits_of(feature: Feature) -> tuple[float, float]:
    """The least and the largest number of a field that are finite in float32 after the transform; buckets are found in float64."""
    if feature.transform == "identity":
        return -LARGEST, LARGEST
    if feature.transform != "standardise":
        return -LARGEST_DOUBLE, LARGEST_DOUBLE
    mean, reach = float(feature.mean), LARGEST * float(feature.std)
    return max(-LARGEST_DOUBLE, mean - reach), min(LARGEST_DOUBLE, mean + reach)


def _wide_enough(numbers: np.ndarray, feature: Feature) -> np.ndarray:
    """Numbers to standardise: as float64 where float32 could not hold the mean, std or a difference."""
    if numbers.dtype != np.float32 or not numbers.size:
        return numbers
    mean, std = float(feature.mean), float(feature.std)
    largest = max(float(numbers.max()) - mean, mean - float(numbers.min()))
    fits = max(abs(mean), std, largest) <= LARGEST and std >= LEAST_NORMAL
    return numbers if fits else numbers.astype(np.float64)


def buckets_of(numbers: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """1 + the number of boundaries <= x."""
    return np.searchsorted(boundaries, numbers.astype(np.float64), side="right") + 1


def read_weights(column: pa.Array, name: str, place: Place) -> np.ndarray:
    """Weights of rows, (n,) float32; InputError if one is null, or not a finite number above 0."""
    weights, valid = as_numpy(column)
    weights = weights.astype(np.float32)
    bad = ~((weights > 0) & (weights <= LARGEST))
    if valid is not None:
        raise InputError(f"{place.row(int(valid.argmin()))}, weight {name!r} is null: wanted a number; fix the file")
    if bad.any():
        wanted = "a finite number above 0; fix the file, or leave such rows out of it"
        raise place.fault(f"weight {name!r}", weights, bad, wanted)
    return weights


def read_labels(column: pa.Array, name: str, place: Place, *, nulls: bool = False) -> np.ndarray:
    """Labels as a NumPy array of 0 and 1; InputError if a label is another number, or null. With `nulls` a null is NaN instead."""
    labels, valid = as_numpy(column)
    if valid is not None and not nulls:
        raise InputError(
            f"{place.row(int(valid.argmin()))}, label {name!r} is null: wanted 0 or 1; drop the row or fix the file"
        )
    bad = (labels != 0) & (labels != 1)
    if bad.any():
        raise place.fault(f"label {name!r}", labels, bad, "0 or 1; fix the file or choose another label")
    return labels if valid is None else np.where(valid, labels, np.nan)
