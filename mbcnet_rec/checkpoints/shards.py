"""What a checkpoint holds: shards of logical tensors, so that it loads at any world size and under any plan.

A checkpoint is a folder: one safetensors file for each rank, and a manifest (manifest.py) that says which shard lies where.
Nothing in it is unpickled.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from data.errors import InputError
from mbcnet_rec.checkpoints.manifest import ShardEntry, read_checkpoint
from sharding.bridge.blocks import is_copy, local_blocks, wrapped_optimizer

PINNED_BYTES = 8 * 2**30  # of a rank's snapshots: pinned memory is taken from all other programs of the machine
AVERAGE = "average/"  # before the name of a dense parameter: the moving average of its values
Shape = tuple[int, ...]
Snapshot = list[tuple[ShardEntry, Tensor]]  # copies in CPU memory, which training does not touch
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK_BYTES = 8 << 20
ALIGNMENT = 8


@dataclass(frozen=True)
class TensorShard:
    """A shard of a logical tensor that this rank holds."""

    name: str  # of the logical tensor, equal on every world size and under every plan
    tensor: Tensor  # the live storage, so a load copies into it
    offsets: tuple[int, ...]  # where the shard begins in the logical tensor
    global_shape: Shape  # of the logical tensor
    # whether a rank before this one holds the same values and writes them: rank 0 alone writes what all have
    replicated: bool
    # whether each rank has values of its own (running statistics of batch norm). The same world size gets them back as they were,
    # another one gets their mean.
    per_rank: bool = False


def whole_shard(name: str, tensor: Tensor, *, replicated: bool = True, per_rank: bool = False) -> TensorShard:
    """A shard that is a whole logical tensor."""
    return TensorShard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape), replicated, per_rank)


def shards_of(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> list[TensorShard]:
    """List what this rank holds: parameters, buffers and optimizer state."""
    own = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    copies = is_copy(model)
    shards = []
    for name, value in model.state_dict().items():
        if name in own:
            shards.append(whole_shard(f"model/{name}", value, replicated=False, per_rank=True))
        else:
            shards += _split(f"model/{name}", value, copies)
    for part, keyed in optimizer.optimizers:
        for parameter, state in keyed.state_dict()["state"].items():
            # a table that lives on another rank is an empty parameter here
            if part == "dense" and not keyed.params[parameter].numel():
                continue
            named = _as_fused(wrapped_optimizer(keyed), state) if part == "replicated" else state
            for key, value in named.items():
                # TorchRec calls a fused state TABLE.momentum1; torch calls the same thing sum
                short = {"momentum1": "sum"}.get(key.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1])
                shards += _split(f"optim/{parameter}/{short}", value, copies)
    return shards


def _as_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """State of a replicated table in the form that the fused optimizer of a sharded one has."""
    if isinstance(optimizer, RowWiseAdagrad):  # one number a row: (rows, 1) here, (rows,) when fused
        state = {key: value.view(-1) if key == "sum" else value for key, value in state.items()}
    if isinstance(optimizer, (RowWiseAdagrad, torch.optim.Adagrad)):
        # they count steps for a decay that is off; fused ones do not
        return {key: value for key, value in state.items() if key != "step"}
    return state


def _split(name: str, value: Any, copies: bool) -> list[TensorShard]:
    """Shards of a tensor; `copies` says that another rank holds, and writes, the same ones."""
    blocks = local_blocks(value)
    if blocks is not None:
        shape = tuple(value.size())
        return [TensorShard(name, tensor, offsets, shape, replicated=copies) for tensor, offsets in blocks]
    return [whole_shard(name, value)] if isinstance(value, Tensor) else []


def take_snapshot(shards: Iterable[TensorShard], rank: int, reuse: Snapshot) -> Snapshot:
    """Begin to copy what this rank has to write, into the memory of an earlier snapshot that nobody reads any more where it fits.

    Copies of tensors on a GPU go into pinned memory, and are whole once the host has waited for that GPU.
    """
    snapshot, own = [], [shard for shard in shards if rank == 0 or not shard.replicated]
    pins = within_bound([shard.tensor.nbytes * shard.tensor.is_cuda for shard in own])
    for index, shard in enumerate(own):
        name = f"{shard.name}@{rank}" if shard.per_rank else shard.name
        source = shard.tensor.detach()
        copy = reuse[index][1] if index < len(reuse) else None
        if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda and pins[index])
        snapshot.append((ShardEntry(name, shard.offsets, shard.global_shape), copy.copy_(source, non_blocking=True)))
    return snapshot


def within_bound(sizes: Iterable[int], bound: int = PINNED_BYTES) -> list[bool]:
    """Which copies of these bytes lie in pinned memory: each that still fits."""
    fits = []
    for size in sizes:
        fits.append(size <= bound)
        bound -= size * fits[-1]
    return fits


class StoredShard(NamedTuple):
    """A shard in a file: what the manifest says of it, its shape, and how to map it into memory."""

    entry: ShardEntry
    shape: Shape
    read: Callable[[], Tensor]


class Saved:
    """A checkpoint on a disk, opened for reading: every size is checked, nothing is read yet."""

    def __init__(self, folder: Path, *, hashed: bool = True) -> None:
        """Check the manifest, every header and, `hashed`, each file's SHA-256; InputError if one is missing or contradicts another."""
        self.folder = folder
        self.manifest = read_checkpoint(folder, hashed=hashed)
        self.shapes: dict[str, Shape] = {}  # of logical tensors; per-rank ones stand under their plain names
        self._stored: dict[str, list[StoredShard]] = {}
        for rank_file in self.manifest.files:
            path = folder / rank_file.name
            file = open_tensors(path)
            if set(file.keys()) != {str(index) for index in range(len(rank_file.shards))}:
                raise InputError(f"{path}: holds other tensors than the manifest lists; use another checkpoint")
            for index, entry in enumerate(rank_file.shards):
                shape = tuple(file.get_slice(str(index)).get_shape())
                inside = len(shape) == len(entry.global_shape) and all(
                    offset + size <= whole
                    for offset, size, whole in zip(entry.offsets, shape, entry.global_shape, strict=True)
                )
                if not inside or self.shapes.setdefault(plain_name(entry.name), entry.global_shape) != (
                    entry.global_shape
                ):
                    raise InputError(f"{path}: {entry.name!r} does not lie inside its tensor; use another checkpoint")
                stored = StoredShard(entry, shape, partial(file.get_tensor, str(index)))
                self._stored.setdefault(entry.name, []).append(stored)

    def tensors(self) -> Iterator[tuple[ShardEntry, Tensor]]:
        """All that is stored, shard by shard; pages are read when they are touched."""
        for shards in self._stored.values():
            for shard in shards:
                yield shard.entry, shard.read()

    def whole(self, name: str) -> Tensor:
        """Return a tensor put together from its shards; InputError if it is missing or covered only in part."""
        shards = self._stored.get(name, [])
        shape = shards[0].entry.global_shape if shards else ()
        if not shards or sum(math.prod(shard.shape) for shard in shards) != math.prod(shape):
            raise InputError(f"{self.folder}: holds no whole {name!r}; use another checkpoint")
        target = torch.empty(shape, dtype=shards[0].read().dtype)
        self._fill(name, target, (0,) * len(shape))
        return target

    def copy_into(self, shard: TensorShard, rank: int, world_size: int) -> None:
        """Fill a live shard, or the rows that a table saved with fewer has; InputError if the checkpoint covers it only in part."""
        if f"{shard.name}@0" not in self._stored:
            self._fill(shard.name, shard.tensor, shard.offsets)
        elif world_size == self.manifest.world_size:
            self._fill(f"{shard.name}@{rank}", shard.tensor, shard.offsets)
        else:
            total = torch.zeros_like(shard.tensor, device="cpu")
            for saved_rank in range(self.manifest.world_size):
                part = torch.empty_like(total)
                self._fill(f"{shard.name}@{saved_rank}", part, shard.offsets)
                total += part
            shard.tensor.copy_(total / self.manifest.world_size)

    def _fill(self, name: str, target: Tensor, offsets: tuple[int, ...]) -> None:
        wanted = target.numel()
        if offsets:
            rows = self.shapes[plain_name(name)][0]
            wanted = max(0, min(rows - offsets[0], target.shape[0])) * math.prod(target.shape[1:])
        covered = sum(_copy(shard, target, offsets) for shard in self._stored.get(name, []))
        if covered != wanted:
            raise InputError(
                f"{self.folder}: {name!r} is covered only in part ({covered:,} of {wanted:,} values); use another checkpoint"
            )


def plain_name(name: str) -> str:
    """The logical name behind NAME@RANK."""
    head, at, rank = name.rpartition("@")
    return head if at and rank.isdecimal() else name


def _copy(stored: StoredShard, target: Tensor, offsets: tuple[int, ...]) -> int:
    """Copy the overlap of a stored shard and a live one; return how many values that was."""
    source, own, count = [], [], 1
    for begin, size, own_begin, own_size in zip(stored.entry.offsets, stored.shape, offsets, target.shape, strict=True):
        low, high = max(begin, own_begin), min(begin + size, own_begin + own_size)
        if low >= high:
            return 0
        source.append(slice(low - begin, high - begin))
        own.append(slice(low - own_begin, high - own_begin))
        count *= high - low
    with torch.no_grad():
        target[tuple(own)].copy_(stored.read()[tuple(source)])
    return count


def of_average(saved: Saved, shards: Iterable[TensorShard]) -> Iterator[TensorShard]:
    """The same shards, but that those of weights whose average the checkpoint has are filled with that."""
    for shard in shards:
        average = AVERAGE + shard.name.removeprefix("model/")
        yield replace(shard, name=average) if average in saved.shapes else shard


def load_shards(saved: Saved, shards: Iterable[TensorShard], rank: int, world_size: int) -> None:
    """Copy any world size's checkpoint into live tensors; InputError if one is missing, has another shape, or is covered only in part."""
    for shard in shards:
        if saved.shapes.get(shard.name) != shard.global_shape:
            found = saved.shapes.get(shard.name, "nothing")
            raise InputError(
                f"{saved.folder}: {shard.name!r}: found {found}, this run wants {shard.global_shape}; use that run's "
                "config and schema"
            )
        saved.copy_into(shard, rank, world_size)


def write_tensors(tensors: dict[str, Tensor], sink: BinaryIO | pa.NativeFile) -> str:
    """Write a safetensors file of tensors that live in CPU memory; return the SHA-256 of what was written.

    The library itself writes to a path or to bytes in memory: an object store would need a second copy of the state, the sum a second pass.
    """
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

    InputError if it is not a safetensors file, or its header contradicts its size, of which nothing was allocated then.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({str(error)[:200]}); use another checkpoint") from None
