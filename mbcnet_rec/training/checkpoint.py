"""Checkpoints: one safetensors file a rank and a JSON manifest with SHA-256 sums, in a folder that appears by one rename. No pickle.

Tensors are kept as pieces of logical tensors: name, offsets, global shape. So a checkpoint loads at any world size and under any plan.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from data.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """A block of a logical tensor that this rank holds.

    Attributes:
        name: of the logical tensor, equal on every world size and under every plan.
        tensor: the live storage, so a load copies into it.
        offsets: of the block inside the logical tensor.
        global_shape: of the logical tensor.
        replicated: whether every rank holds the same values; then rank 0 alone writes them.
    """

    name: str
    tensor: Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    replicated: bool


def pieces_of(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> list[Piece]:
    """List what this rank holds: parameters, buffers and optimizer state."""
    pieces = [piece for name, value in model.state_dict().items() for piece in _split(f"model/{name}", value)]
    for part, keyed in optimizer.optimizers:
        for parameter, state in keyed.state_dict()["state"].items():
            for key, value in state.items():
                # TorchRec calls a fused state TABLE.momentum1; torch calls the same thing sum
                short = {"momentum1": "sum"}.get(key.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1])
                if part == "replicated":
                    if (
                        short == "step"
                    ):  # torch's Adagrad counts steps for a decay that is off; fused ones do not
                        continue
                    if (
                        value.dim() == 2 and value.shape[1] == 1
                    ):  # rowwise: (rows, 1) here, (rows,) when fused
                        value = value.view(-1)
                pieces += _split(f"optim/{parameter}/{short}", value)
    return pieces


def _split(name: str, value: Any) -> list[Piece]:
    shards = getattr(value, "local_shards", None)
    if shards is not None:
        shape = tuple(value.size())
        return [
            Piece(name, shard.tensor, tuple(shard.metadata.shard_offsets), shape, replicated=False)
            for shard in shards()
        ]
    if isinstance(value, Tensor):
        return [Piece(name, value, (0,) * value.dim(), tuple(value.shape), replicated=True)]
    return []


def save(folder: Path, pieces: list[Piece], extra: dict[str, Any], rank: int, world_size: int) -> None:
    """Write a checkpoint; every rank calls it.

    Args:
        folder: final place; it must not exist.
        pieces: this rank's.
        extra: JSON values: step, cursor, fingerprints.
        rank: of this process.
        world_size: number of processes.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(world_size)
    own = [piece for piece in pieces if rank == 0 or not piece.replicated]
    file = partial / f"rank_{rank:05d}.safetensors"
    save_file(
        {str(index): piece.tensor.detach().cpu().contiguous().clone() for index, piece in enumerate(own)},
        file,
    )
    with file.open("rb+") as written:
        os.fsync(written.fileno())
    listing = [{"name": p.name, "offsets": p.offsets, "global_shape": p.global_shape} for p in own]
    entries: list[Any] = [{"file": file.name, "sha256": _sha256(file), "pieces": listing}]
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, entries[0])
        entries = gathered
    if rank == 0:
        manifest = {"format": FORMAT, "world_size": world_size, "extra": extra, "files": entries}
        with (partial / MANIFEST).open("w") as out:
            json.dump(manifest, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, folder)
        directory = os.open(folder.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    _barrier(world_size)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step_{step}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending; whether they verify is not asked."""
    names = [path.name for path in checkpoints.glob("step_*") if (path / MANIFEST).is_file()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def latest_step(checkpoints: Path) -> int | None:
    """The newest step whose checkpoint verifies; None if there is none."""
    for step in reversed(saved_steps(checkpoints)):
        try:
            verify(step_folder(checkpoints, step))
        except InputError:
            continue
        return step
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare every file's SHA-256.

    Raises:
        InputError: the folder is no whole checkpoint.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {entry["file"]: entry["sha256"] for entry in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: not a checkpoint ({error}); choose a folder that `mbcnet train` wrote"
        ) from None
    for name, sha256 in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file() or _sha256(path) != sha256:
            raise InputError(
                f"{path}: missing or changed since it was written (SHA-256 differs); use another checkpoint"
            )
    return manifest


def load(folder: Path, pieces: list[Piece]) -> dict[str, Any]:
    """Copy a checkpoint into live tensors, whatever world size and plan wrote it.

    Returns:
        What `save` was given as `extra`.

    Raises:
        InputError: a tensor is missing, has another shape, or is covered only in part.
    """
    manifest = verify(folder)
    saved: dict[str, list[tuple[str, str, list[int], list[int]]]] = {}
    for entry in manifest["files"]:
        for index, piece in enumerate(entry["pieces"]):
            saved.setdefault(piece["name"], []).append(
                (entry["file"], str(index), piece["offsets"], piece["global_shape"])
            )
    handles = {
        entry["file"]: safe_open(folder / entry["file"], framework="pt") for entry in manifest["files"]
    }
    with torch.no_grad():
        for piece in pieces:
            sources = saved.get(piece.name)
            if sources is None:
                raise InputError(
                    f"{folder}: holds no {piece.name!r}; it belongs to another model or optimizer: use that run's config"
                )
            if tuple(sources[0][3]) != piece.global_shape:
                raise InputError(
                    f"{folder}: {piece.name!r} has shape {tuple(sources[0][3])}, this run wants {piece.global_shape}; use the "
                    "config and schema of that run (rowwise Adagrad state cannot move into or out of column shards)"
                )
            covered = sum(_copy(handles[file], key, offsets, piece) for file, key, offsets, _ in sources)
            if covered < piece.tensor.numel():
                raise InputError(
                    f"{folder}: {piece.name!r} is covered only in part ({covered} of {piece.tensor.numel()} values)"
                )
    return manifest["extra"]


def _copy(handle: Any, key: str, offsets: list[int], piece: Piece) -> int:
    """Copy the overlap of one saved block into a piece; return how many values that was."""
    if piece.tensor.dim() == 0:
        piece.tensor.copy_(handle.get_tensor(key))
        return 1
    block = handle.get_slice(key)
    source, target, count = [], [], 1
    for begin, size, own_begin, own_size in zip(
        offsets, block.get_shape(), piece.offsets, piece.tensor.shape, strict=True
    ):
        low, high = max(begin, own_begin), min(begin + size, own_begin + own_size)
        if low >= high:
            return 0
        source.append(slice(low - begin, high - begin))
        target.append(slice(low - own_begin, high - own_begin))
        count *= high - low
    piece.tensor[tuple(target)].copy_(block[tuple(source)])
    return count


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _barrier(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()
