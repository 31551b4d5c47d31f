"""Keys -> table rows: hashes that are equal on every machine, random numbers made of them, and vocabularies.

A hash of an integer is splitmix64 of its 64 bits. A hash of a string starts from its length in bytes and mixes in its
UTF-8 bytes, eight at a time (little-endian, zero-padded): h <- splitmix64(h xor word). Both are written for whole columns at once:
a digest per value in Python is 50 times slower and holds the interpreter's lock.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as pt

from ..errors import InputError, first_line  # relative: an exported artifact carries this file
from ..schema import FIRST_VOCABULARY_ROW, OUT_OF_VOCABULARY_ROW, Feature, Schema
from .ids import as_ids, codes_of, decoded, integers, is_id, is_valid

SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)
LARGEST_UNBOUNDED = np.uint64(2**63 - 1)
SINCE = "since"  # a column of vocabularies that have grown: the growth that gave the row to its value, or to nobody
DIRECT_LOOKUP_SPAN = 2**22  # integer vocabularies up to this span of values are looked up in an array of it


class Vocabulary:
    """A fitted list of values: value i is row FIRST_VOCABULARY_ROW + i, a null is a row that is free, all others are row OUT_OF_VOCABULARY_ROW."""

    def __init__(self, values: pa.Array) -> None:
        self.id_type = "integer" if pt.is_integer(values.type) else "text"
        if pt.is_integer(values.type):
            numbers = values.drop_null().to_numpy(zero_copy_only=False)
            if numbers.dtype != np.uint64:  # in narrower types differences overflow
                numbers = numbers.astype(np.int64)
            order = np.argsort(numbers, kind="stable")
            self._sorted, self._rows = numbers[order], np.flatnonzero(is_valid(values))[order] + FIRST_VOCABULARY_ROW
            self._low, self._high = map(int, self._sorted[[0, -1]]) if len(numbers) else (0, -1)
            span = self._high - self._low + 1
            self._direct: np.ndarray | None = None
            if 0 < span <= max(DIRECT_LOOKUP_SPAN, 4 * len(numbers)):
                self._direct = np.full(span, OUT_OF_VOCABULARY_ROW, np.int64)
                self._direct[(self._sorted - self._sorted[0]).astype(np.int64)] = self._rows
        else:
            self._row_of = {text: row for row, text in enumerate(values.to_pylist(), FIRST_VOCABULARY_ROW)}
            self._row_of.pop(None, None)

    def rows_of(self, column: pa.Array) -> np.ndarray:
        """Return int64 rows, undefined at nulls, of integers or text as the vocabulary holds; the column may be a dictionary's."""
        if self.id_type == "integer":
            return self._integer_rows(integers(column.dictionary_decode() if pt.is_dictionary(column.type) else column))
        encoded = column if pt.is_dictionary(column.type) else column.dictionary_encode()
        rows = [self._row_of.get(text, OUT_OF_VOCABULARY_ROW) for text in encoded.dictionary.to_pylist()]
        return np.asarray(rows or [0], np.int64)[codes_of(encoded)]

    def _integer_rows(self, numbers: np.ndarray) -> np.ndarray:
        rows = np.full(len(numbers), OUT_OF_VOCABULARY_ROW, np.int64)
        # Compared with Python's integers: a pair of int64 and uint64 arrays would be compared as floats.
        inside = (numbers >= self._low) & (numbers <= self._high)
        wanted = numbers[inside].astype(self._sorted.dtype)
        if self._direct is not None:
            rows[inside] = self._direct[(wanted - self._sorted[0]).astype(np.int64)]
        else:
            places = np.searchsorted(self._sorted, wanted)
            found = self._sorted[places] == wanted
            rows[inside] = np.where(found, self._rows[places], OUT_OF_VOCABULARY_ROW)
        return rows


def read_vocabularies(schema: Schema) -> dict[str, pa.Array]:
    """Read every vocabulary file of a schema: its name there -> its values in row order; InputError if a file cannot be read."""
    found: dict[str, pa.Array] = {}
    for feature in _with_vocabulary(schema):
        path = schema.folder / feature.vocabulary
        way_out = (
            "copy the folder of vocabularies along with its schema, or run `mbcnet schema fit` (`mbcnet data prepare` for public data) "
            "again"
        )
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
                values = parquet.read(columns=["value"])["value"].combine_chunks()
                may_have_free = SINCE in parquet.schema_arrow.names
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file: it is the vocabulary of field {feature.name!r} of the schema in {schema.folder}; {way_out}"
            ) from None
        except (OSError, pa.ArrowException, KeyError) as error:
            raise InputError(
                f"{path}: the vocabulary of field {feature.name!r} cannot be read ({first_line(error)}); {way_out}"
            ) from None
        kind = values.type
        # of type null it has no value at all: anything is out of vocabulary
        values = values.cast(pa.string()) if pt.is_null(kind) else decoded(values)
        ids, bad = as_ids(values, "") if is_id(kind) else (values, np.ones(1, bool))
        fault = "" if bad is None else f"holds {kind}: wanted integers or text"
        known = ids.drop_null()
        if not fault and (len(known) < len(ids) * (not may_have_free) or len(known.unique()) < len(known)):
            fault = "holds a null, or one value twice: wanted each value once, for it is one row"
        if fault:
            raise InputError(f"{path}: the vocabulary of field {feature.name!r} {fault}; {way_out}")
        found[feature.vocabulary] = ids
    return found


def make_vocabularies(schema: Schema, values: Mapping[str, pa.Array]) -> dict[str, Vocabulary]:
    """Make the vocabulary of every field that has one, by the field's name; InputError if its table has too few rows."""
    vocabularies = {}
    for feature in _with_vocabulary(schema):
        known, num_embeddings = values[feature.vocabulary], schema.table_of[feature.name].num_embeddings
        rows = len(known) + FIRST_VOCABULARY_ROW
        if rows > num_embeddings:
            raise InputError(
                f"{schema.folder / feature.vocabulary}: {len(known)} values need {rows} rows, but the table of field "
                f"{feature.name!r} has num_embeddings = {num_embeddings}; set it to {rows}"
            )
        vocabulary = vocabularies[feature.name] = Vocabulary(known)
        if feature.type and len(known) and feature.type != vocabulary.id_type:
            raise InputError(
                f"{schema.folder / feature.vocabulary}: field {feature.name!r} says type = {feature.type!r}, but its vocabulary holds "
                f"{known.type}; remove type there, or run `mbcnet schema fit` again"
            )
    return vocabularies


def _with_vocabulary(schema: Schema) -> list[Feature]:
    return [feature for feature in schema.features if feature.is_keyed and feature.encoding == "vocabulary"]


def hash_values(column: pa.Array) -> np.ndarray:
    """64-bit hashes, uint64, equal on every machine; of null, 0."""
    if pt.is_dictionary(column.type):
        hashes = hash_values(column.dictionary)
        hashed = (hashes if len(hashes) else np.zeros(1, np.uint64))[codes_of(column)]
    elif pt.is_integer(column.type):
        numbers = integers(column)
        if numbers.dtype != np.uint64:
            numbers = numbers.astype(np.int64).view(np.uint64)
        hashed = splitmix64(numbers)
    else:
        tests = (pt.is_string, pt.is_large_string, pt.is_binary, pt.is_large_binary)
        if not any(test(column.type) for test in tests):
            is_bytes = pt.is_fixed_size_binary(column.type) or pt.is_binary_view(column.type)
            column = column.cast(pa.binary() if is_bytes else pa.string())
        hashed = _hash_strings(column)
    if column.null_count:
        hashed = np.where(is_valid(column), hashed, np.uint64(0))
    return hashed


def unbounded_ids(column: pa.Array) -> np.ndarray:
    """What a field of encoding zch gives the model: int64 hashes in [0, 2^63 - 1), undefined at nulls.

    The 64-bit hash of an integer is one to one; here it loses a bit, so that 10^9 values meet with probability 0.05 once, and as a rule
    never. Sharding cuts the ids by ranges: the hash spreads them.
    """
    ids = hash_values(column) & LARGEST_UNBOUNDED
    # TorchRec marks free rows by the largest
    return np.minimum(ids, LARGEST_UNBOUNDED - np.uint64(1)).view(np.int64)


def _hash_strings(column: pa.Array) -> np.ndarray:
    width = np.int64 if pt.is_large_string(column.type) or pt.is_large_binary(column.type) else np.int32
    _, offset_buffer, data = column.buffers()
    if len(column) == 0 or offset_buffer is None:
        return np.zeros(len(column), np.uint64)
    offsets = np.frombuffer(offset_buffer, width, len(column) + 1, column.offset * np.dtype(width).itemsize)
    offsets = offsets.astype(np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    # eight bytes more, so that the last word can be read whole
    data_bytes = np.zeros(last - first + 8, np.uint8)
    if data is not None and last > first:
        data_bytes[:-8] = np.frombuffer(data, np.uint8, last - first, first)
    words = np.lib.stride_tricks.as_strided(data_bytes[:8].view("<u8"), (last - first + 1,), (1,))
    starts, lengths = offsets[:-1] - first, np.diff(offsets)
    hashed = splitmix64(lengths.view(np.uint64))
    active = np.flatnonzero(lengths > 0)
    word = 0
    while len(active):
        left = lengths[active] - 8 * word
        bits = 8 * np.minimum(left, 8).astype(np.uint64)
        mask = np.where(left >= 8, np.uint64(2**64 - 1), (np.uint64(1) << (bits % np.uint64(64))) - np.uint64(1))
        hashed[active] = splitmix64(hashed[active] ^ (words[starts[active] + 8 * word] & mask))
        active = active[left > 8]
        word += 1
    return hashed


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Mix uint64 numbers so that each input bit changes half of the output bits (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + SPLITMIX_GAMMA
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def remainder(numbers: np.ndarray, divisor: int) -> np.ndarray:
    """uint64 numbers modulo `divisor`. NumPy divides by a constant without a division, but takes remainders with one."""
    quotients = numbers // np.uint64(divisor)
    quotients *= np.uint64(divisor)
    return np.subtract(numbers, quotients, out=quotients)


def counter_keys(seed: int, tag: str, *counters: np.ndarray) -> np.ndarray:
    """Hash (seed, tag, counters...) to uint64 (n,). Counters are integer arrays of one shape."""
    digest = hashlib.blake2b(f"{seed}:{tag}".encode(), digest_size=8).digest()
    state: np.ndarray = np.asarray(int.from_bytes(digest, "little"), np.uint64)
    for counter in counters:
        state = splitmix64(state ^ splitmix64(counter.astype(np.uint64)))
    return state


def uniforms(key: np.ndarray) -> np.ndarray:
    """Turn keys into float64 in [0, 1)."""
    return (key >> np.uint64(11)) * 2.0**-53
