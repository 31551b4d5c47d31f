"""Which rank of how many this process is, by the variables of the launcher that started it. Imports no torch."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from data.errors import InputError

# The variables of torchrun, and of launchers that do not set them: rank, ranks, rank on this host
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
WAY_OUT = (
    "start the ranks by `mbcnet launch` or torchrun, which set all that is needed, or unset {} to run in one process"
)


class Ranks(NamedTuple):
    """This process among the ranks; local ones are None where no variable says them."""

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None


def found_ranks(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """Read this process's rank from the environment; None where it is alone; InputError, with the way out, if variables contradict each other."""
    names = TORCHRUN
    if not environ.get("RANK"):
        if _number(environ, "WORLD_SIZE", 1) not in (None, 1):
            _refuse(environ, ("WORLD_SIZE",), "but RANK is not set")
        names = next((each for each in LAUNCHERS.values() if _number(environ, each[1], 1) not in (None, 1)), TORCHRUN)
        if not environ.get(names[0]):
            return None
    rank, size = _number(environ, names[0], 0), _number(environ, names[1], 1)
    if size is None:
        _refuse(environ, names[:1], f"but {names[1]} is not set")
    assert rank is not None
    if rank >= size:
        _refuse(environ, names[:2], "and ranks are counted from 0")
    if size == 1:
        return None
    missing = [name for name in MEETING_POINT if not environ.get(name)]
    if missing:
        _refuse(
            environ,
            names[:2],
            f"but {' and '.join(missing)}, where the ranks meet, not set: set them to rank 0's host and a free port of it",
        )
    port = _number(environ, "MASTER_PORT", 1)
    if port is None or port > 65535:
        _refuse(environ, ("MASTER_PORT",), "and ports end at 65535")
    local = _number(environ, names[2], 0)
    return Ranks(rank, size, local, _number(environ, "LOCAL_WORLD_SIZE", 1) if local is not None else None)


def refuse_ranks(command: str) -> None:
    """Raise InputError where a launcher has started a command as several ranks that starts processes of its own."""
    ranks = found_ranks()
    if ranks is not None:
        raise InputError(
            f"mbcnet {command}: started as {ranks.world_size} ranks, and it starts processes of its own; start it once, without torchrun, "
            "srun or mpirun"
        )


@contextmanager
def alone() -> Iterator[None]:
    """Hide the launcher from what runs inside, which then is no rank. Of several GPUs a local rank keeps the one of its number.

    A task of an engine is for itself, also where torchrun has started its process, or srun the Ray worker.
    """
    before, local = dict(os.environ), os.environ.get("LOCAL_RANK", "")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if local:
        os.environ["CUDA_VISIBLE_DEVICES"] = local if gpus == [""] else gpus[int(local) % len(gpus)]
    for name in ("LOCAL_WORLD_SIZE", *(name for names in (TORCHRUN, *LAUNCHERS.values()) for name in names)):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all: rank 0, one that is alone, or one whose variables make no rank."""
    for rank, size, _ in (TORCHRUN, *LAUNCHERS.values()):
        given = environ.get(rank, ""), environ.get(size, "")
        if all(text.isascii() and text.isdigit() for text in given):
            return not 0 < int(given[0]) < int(given[1])
    return True


def _number(environ: Mapping[str, str], name: str, least: int) -> int | None:
    """An environment variable's whole number; None where it is not set or empty."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        _refuse(environ, (name,), f"and wanted is a whole number of at least {least}")
    return int(text)


def _refuse(environ: Mapping[str, str], names: tuple[str, ...], why: str) -> NoReturn:
    shown = ", ".join(f"{name} = {environ[name]!r}" for name in names)
    raise InputError(f"environment: {shown}, {why}; {WAY_OUT.format(' and '.join(names))}")
