"""Permuted: the rows of a window in the epoch's order, read by compiled loops where no value wants a second look.

A field of which a loop says that some value is bad, and every field of another kind, is read as the encoder reads it: that one names values,
repairs them and counts what it repairs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pyarrow import types as pt

from data.reading.columns import Lists, Ragged, join
from data.reading.encode import Assembly, Encoder, Reader
from data.reading.numbers import as_numpy, limits_of, transformed
from data.schema import Feature
from data.stream.loops import copy_checked, count_boundaries, permute, permute_lists, permute_rows, turn

MOST_BOUNDARIES = 64  # more are faster searched than compared


class Permuted(Assembly):
    """Row i of the result is row permutation[i] of the record batches, in their order."""

    def __init__(self, encoder: Encoder, readers: Sequence[Reader], num_rows: int, *others: Any) -> None:
        super().__init__(encoder, readers, num_rows, *others)
        self.ids, self.numbers = np.empty(num_rows, encoder.id_dtype), np.empty(num_rows)  # of one field
        self.order = (np.arange(num_rows) if self.permutation is None else self.permutation).astype(np.uint32)

    def single(self, feature: Feature, out: np.ndarray) -> None:
        """Write the ids of a single-valued field, (n,)."""
        in_order = out if self.permutation is None else self.ids
        if not (self._ids(feature, in_order) or self._buckets(feature, in_order)):
            super().single(feature, in_order)
        if self.permutation is not None:
            permute(in_order, self.order, out)

    def _ids(self, feature: Feature, out: np.ndarray) -> bool:
        if feature.kind != "categorical" or feature.encoding != "ids":
            return False
        last = self.encoder.num_embeddings[feature.name] - 1
        for reader in self.readers:
            column = reader.columns[feature.source_column]
            if column.null_count or not pt.is_integer(column.type):
                return False
            if not copy_checked(column.to_numpy(), 0, last, out[reader.rows]):
                return False
        return True

    def _buckets(self, feature: Feature, out: np.ndarray) -> bool:
        is_short = feature.kind == "numeric" and len(feature.boundaries) <= MOST_BOUNDARIES
        if not (is_short and self._numbers(feature, self.numbers)):
            return False
        count_boundaries(self.numbers, np.asarray(feature.boundaries, np.float64), out)
        return True

    def _numbers(self, feature: Feature, out: np.ndarray) -> bool:
        """Read a field's numbers, (n,), or vectors, (n, W), in their order; False where one wants a second look."""
        limits = limits_of(feature)
        for reader in self.readers:
            column = reader.columns[feature.source_column]
            if feature.width:
                is_wide = pt.is_fixed_size_list(column.type) and column.type.list_size == feature.width
                if column.null_count or not is_wide:
                    return False
                column = column.flatten()
            numbers, valid = as_numpy(column)
            if valid is not None or not copy_checked(numbers, *limits, out[reader.rows].reshape(-1)):
                return False
        return True

    def number(self, feature: Feature, out: np.ndarray) -> None:
        """Write the numbers of a field, (n,)."""
        if feature.transform == "log1p" and self._numbers(feature, self.numbers):
            numbers = transformed(self.numbers, feature)
        else:
            super().number(feature, numbers := self.numbers)
        permute(numbers, self.order, out)

    def vector(self, feature: Feature, out: np.ndarray) -> None:
        """Write the vectors of a field, (n, W)."""
        vectors = np.empty(out.shape, np.float32)
        if not self._numbers(feature, vectors):
            super().vector(feature, vectors)
        permute_rows(vectors, self.order, out)

    def turn(self, columns: np.ndarray, owners: np.ndarray, dense: np.ndarray) -> None:
        """Write numbers to their columns of (n, D)."""
        turn(columns, owners, dense)

    def lists(self, features: Sequence[Feature], read: Mapping[str, Ragged]) -> Lists:
        """Read list fields."""
        if self.permutation is None or not self.readers:
            return super().lists(features, read)
        fields = [self._plain(each) or join([reader.list(each) for reader in self.readers]) for each in features]
        longest = max((len(field.values) for field in fields), default=0)
        offsets = np.empty((len(fields), self.num_rows + 1), np.int32 if longest < 2**31 - 4 else np.int64)
        starts, permuted = np.empty(self.num_rows + 1, offsets.dtype), []
        for field, own in zip(fields, offsets, strict=True):
            for values in (field.values, field.weights):
                if values is not None:
                    permuted.append(np.empty(len(values) + 4, values.dtype))
                    permute_lists(values, field.lengths, self.order, starts, own, permuted[-1])
        found = [each[:-4] for each in permuted]
        every = 2 if features and features[0].is_weighted else 1
        return Lists(tuple(found[::every]), offsets, tuple(found[1::2] if every == 2 else ()))

    def _plain(self, feature: Feature) -> Ragged | None:
        if feature.kind not in ("multi_valued", "weighted_multi_valued") or feature.encoding != "ids":
            return None
        name, last = feature.name, self.encoder.num_embeddings[feature.name] - 1
        ids = self._items(feature.source_column, pt.is_integer, (0, last), self.encoder.list_dtype[name])
        if ids is None or not feature.weights:
            return ids
        weights = self._items(feature.weights, pt.is_floating, limits_of(feature), np.float32)
        is_same = weights is not None and np.array_equal(ids.lengths, weights.lengths)
        return ids._replace(weights=weights.values) if weights and is_same else None

    def _items(
        self, name: str, accepts: Callable[[Any], bool], limits: tuple[float, float], dtype: type
    ) -> Ragged | None:
        """Join a column of lists; None where it has nulls, or values out of the limits."""
        columns = [reader.columns[name] for reader in self.readers]
        if any(each.null_count or not pt.is_list(each.type) or not accepts(each.type.value_type) for each in columns):
            return None
        offsets = [each.offsets.to_numpy() for each in columns]
        values = np.empty(sum(int(own[-1] - own[0]) for own in offsets), dtype)
        lengths, stop = np.empty(self.num_rows, np.int32), 0
        for reader, column, own in zip(self.readers, columns, offsets, strict=True):
            np.subtract(own[1:], own[:-1], out=lengths[reader.rows])
            numbers, valid = as_numpy(column.values[own[0] : own[-1]])
            start, stop = stop, stop + len(numbers)
            if valid is not None or not copy_checked(numbers, *limits, values[start:stop]):
                return None
        return Ragged(values, lengths, None)

    def reordered(self, array: np.ndarray) -> np.ndarray:
        """Rows that were read one after the other, in the order of the result."""
        return array if self.permutation is None else array.take(self.permutation, axis=0, mode="clip")
