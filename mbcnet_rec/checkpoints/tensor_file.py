"""safetensors files, written with their SHA-256 in one pass, and read without trusting a word of their header.

    8 bytes  length n of the header, little endian
    n bytes  JSON: name -> {dtype, shape, data_offsets}; offsets count from the header's end
    rest     the tensors' bytes, without gaps

The writer is our own because the library's holds the interpreter's lock while it writes, which would stop the training thread.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
CHUNK_BYTES = 8 << 20
ALIGNMENT = 8


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: Any, /) -> Any:
        """Take them."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file: dtype, shape, and bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def write_tensors(tensors: dict[str, Tensor], sink: Sink) -> str:
    """Write tensors that live in CPU memory; return the SHA-256 of what was written."""
    header, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest = hashlib.sha256()
    for data in (len(text).to_bytes(8, "little"), text):
        digest.update(data)
        sink.write(data)
    for tensor in tensors.values():
        if not tensor.numel():
            continue
        values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(values)
        for begin in range(0, len(data), CHUNK_BYTES):
            chunk = data[begin : begin + CHUNK_BYTES]
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List a file's tensors, after checking that the header claims what the file has and nothing else.

    Raises:
        InputError: this is no safetensors file, or its header contradicts its size. Nothing of the claimed size was allocated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise _bad(
                    path, f"its first 8 bytes claim a header of {length:,} bytes in a file of {size:,}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); use another checkpoint") from None
    except InputError:  # which is a ValueError too
        raise
    except (ValueError, RecursionError):
        raise _bad(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is no table")
    header.pop("__metadata__", None)
    blocks, end = {}, 0
    for name, entry in header.items():
        block = _block(path, name, entry, 8 + length)
        blocks[name] = block
    for block in sorted(blocks.values(), key=lambda each: (each.start, each.stop)):
        if block.start != 8 + length + end:
            raise _bad(path, "its tensors overlap or leave gaps")
        end = block.stop - 8 - length
    if 8 + length + end != size:
        raise _bad(path, f"its header accounts for {8 + length + end:,} bytes of {size:,}")
    return blocks


def _block(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError):
        raise _bad(path, f"tensor {name!r} is not described by dtype, shape and data_offsets") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise _bad(path, f"tensor {name!r} has a size that is no natural number")
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise _bad(path, f"tensor {name!r} claims shape {shape} in {stop - start:,} bytes")
    return StoredTensor(dtype, tuple(shape), data_start + start, data_start + stop)


def map_block(path: Path, block: StoredTensor) -> Tensor:
    """Map a tensor of a file into memory: pages are read when they are touched, and writes stay private."""
    if block.start == block.stop:
        return torch.empty(block.shape, dtype=block.dtype)
    raw = np.memmap(path, np.uint8, "c", offset=block.start, shape=(block.stop - block.start,))
    return torch.frombuffer(raw, dtype=block.dtype).reshape(block.shape)


def _bad(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not a safetensors file ({reason}); use another checkpoint")
