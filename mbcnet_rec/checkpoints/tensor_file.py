"""safetensors files: written with their SHA-256 in one pass to any stream, opened by the safetensors library.

The writer is our own because the library writes to a path only, or to bytes in memory: a stream into an object store would
need a second copy of the state, and the SHA-256 a second pass over the file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import InputError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK_BYTES = 8 << 20
ALIGNMENT = 8


def write_tensors(tensors: dict[str, Tensor], sink: BinaryIO | pa.NativeFile) -> str:
    """Write tensors that live in CPU memory; return the SHA-256 of what was written."""
    header, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
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


def open_tensors(path: Path) -> Any:
    """Map a file into memory: `get_slice(name).get_shape()`, `get_tensor(name)`. The library checks that the header claims what the file has.

    Raises:
        InputError: it is not a safetensors file, or its header contradicts its size. Nothing of the claimed size was allocated.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({str(error)[:200]}); use another checkpoint") from None
