"""One process among the ranks of a run: its rank and device, and what the ranks exchange besides tensors of the model."""

import itertools
import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import InputError
from mbcnet_rec.runtime.exits import LostRankError
from mbcnet_rec.runtime.ranks import Ranks, found_ranks
from sharding.bridge.groups import leave_groups

T = TypeVar("T")
CPU = torch.device("cpu")
# torch.fx: "is_fx_tracing will return true ..."; torchrec.distributed.utils: "data_parallel: caching params will be ignored";
# comm: each rank of several hosts names the groups that it made
LOGGERS = (
    "torch.fx._symbolic_trace",
    *(f"torchrec.distributed.{name}" for name in ("planner", "planner.stats", "utils", "logger", "comm")),
)
MODULES = ("torchrec", "fbgemm_gpu", "torch.distributed", "torch.autograd")
_TIMES_JOINED = itertools.count()
# (address, port) -> what stays open for the next joining: rank 0 listens there
_STORES: dict[tuple[str, int], dist.Store] = {}


@dataclass(frozen=True)
class Process:
    """One rank."""

    rank: int  # this and the next: over all hosts
    world_size: int
    local_rank: int  # this and the next: on this host
    local_world_size: int
    device: torch.device  # what it computes on
    store: dist.Store | None = None  # through which the ranks have found each other

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into this rank's device. The only GPU that a rank sees is its own; see `refuse_shared_gpu`.

    InputError if cuda is wanted and none is usable, or there are fewer GPUs than ranks on this host.
    """
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no NVIDIA GPU"
        raise InputError(
            f"train.device = 'cuda': {reason}; use --set train.device=cpu, or install requirements/gpu.txt on a "
            "machine with a GPU (`mbcnet doctor` shows what is there)"
        )
    if wanted == "cpu" or not usable:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise _too_few(local_rank, count)
    return torch.device("cuda", index)


def refuse_shared_gpu(store: dist.Store, rank: int, local_rank: int, local_world_size: int, gpu: str) -> None:
    """InputError if two ranks of a host have one GPU, by its UUID: a scheduler may show each task one of its own. Every rank calls it."""
    store.set(f"gpu/{rank}", gpu)
    first = rank - local_rank
    gpus = {*store.multi_get([f"gpu/{each}" for each in range(first, first + local_world_size)])}
    if len(gpus) < local_world_size:
        raise _too_few(local_rank, len(gpus))


def _too_few(local_rank: int, count: int) -> InputError:
    fix = f"start at most that many processes on it (-j HOSTSx{count})"
    return InputError(f"local rank {local_rank}: this host has {count} GPU{'s' if count > 1 else ''}; {fix}")


@contextmanager
def joined_process(device: str = "auto", timeout_seconds: float = 600.0) -> Iterator[Process]:
    """Join the other ranks that a launcher started (see ranks.py), or be the only one; leave on exit.

    A collective that lacks a rank fails after `timeout_seconds`. InputError if the launcher's variables or the device are faulty.
    """
    ranks = found_ranks()
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = _meeting_point(ranks, timeout)
        local_rank, local_world_size = _on_this_host(ranks, store) if ranks else (0, 1)
        chosen = choose_device(device, local_rank)
        on_gpu = chosen.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(chosen)
            # NCCL's watchdog ends the communicators of a lost rank and not this process, which then says what was lost (`vote`)
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            if local_world_size > 1:
                uuid = str(torch.cuda.get_device_properties(chosen).uuid)
                refuse_shared_gpu(store, rank, local_rank, local_world_size, uuid)
        # On a CPU plain "gloo", not "cpu:gloo": with the latter a rank without local shards asks for CUDA when loading.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, OSError) as error:
        raise _cannot_meet(error, rank, world_size, timeout_seconds) from None
    try:
        process = Process(rank, world_size, local_rank, local_world_size, chosen, store)
        with quiet_libraries(), _as_torchrun_says(process):
            yield process
    except BaseException:
        leave_groups(abort=on_gpu)
        raise
    leave_groups()


def _is_ours_to_read(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Sharding spec not found for ")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence known words of torch and TorchRec; on exit loggers and filters are as they were before."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in MODULES:
            warnings.filterwarnings("ignore", module=module.replace(".", r"\.") + r"(\..*)?$")
        warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        root.addFilter(_is_ours_to_read)  # TorchRec logs this one by the root logger itself
        try:
            yield
        finally:
            root.removeFilter(_is_ours_to_read)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _on_this_host(ranks: Ranks, store: dist.Store) -> tuple[int, int]:
    """This rank's number among the ranks of its host, and how many they are; asked of the others where no variable says it.

    InputError if hosts have unequal numbers of ranks, or a host's ranks do not follow each other, as TorchRec takes for granted.
    """
    if ranks.local_rank is not None and ranks.local_world_size is not None:
        return ranks.local_rank, ranks.local_world_size
    store.set(f"host/{ranks.rank}", socket.gethostname())
    hosts = store.multi_get([f"host/{rank}" for rank in range(ranks.world_size)])
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    first, size = mine[0], len(mine)
    if first % size or mine != list(range(first, first + size)) or ranks.world_size % size:
        raise InputError(
            f"environment: ranks {', '.join(map(str, mine))} of {ranks.world_size} share a host; wanted the same number on each host, one "
            "after the other: with srun, --ntasks-per-node and --distribution=block"
        )
    return ranks.rank - first if ranks.local_rank is None else ranks.local_rank, size


@contextmanager
def _as_torchrun_says(process: Process) -> Iterator[None]:
    """Set the variables that TorchRec reads, where another launcher has not set them."""
    names = ("rank", "world_size", "local_rank", "local_world_size") if process.world_size > 1 else ()
    said = {name.upper(): str(getattr(process, name)) for name in names}
    missing = {name: value for name, value in said.items() if not os.environ.get(name)}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _meeting_point(ranks: Ranks | None, timeout: timedelta) -> dist.Store:
    """The store through which ranks find each other.

    On one host torchrun keeps one store over all restarts, and torch 2.13 no longer tells them apart: restarted ranks would read
    the addresses of their dead predecessors, and so would a process that trains and then evaluates. Hence a prefix for each
    attempt and, as all ranks join equally often, for each time of joining. Hosts count their attempts independently; for several
    hosts launch/agent.py makes a new store for each attempt.
    """
    if ranks is None:
        return dist.HashStore()
    held_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = not held_by_agent and ranks.rank == 0
    store = _STORES[address, port] = _STORES.get((address, port)) or _within(
        timeout.total_seconds(),
        lambda: dist.TCPStore(address, port, is_master=is_master, timeout=timeout, wait_for_workers=False),
        f"what listens at {address}:{port} does not answer as a meeting point",
    )
    several_hosts = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    attempt = "0" if several_hosts else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}/joined_{next(_TIMES_JOINED)}", store)


def _within(seconds: float, action: Callable[[], dist.Store], otherwise: str) -> dist.Store:
    """Run an action in a thread, since TCPStore waits forever where nothing answers; TimeoutError with the text `otherwise` if it takes longer."""
    result: Future[dist.Store] = Future()

    def run() -> None:
        try:
            result.set_result(action())
        except Exception as error:  # the caller raises it
            result.set_exception(error)

    threading.Thread(target=run, name="meeting-point", daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeoutError(otherwise)
    return result.result()


def _cannot_meet(error: Exception, rank: int, world_size: int, timeout_seconds: float) -> Exception:
    """The error to raise when the ranks do not come together."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return InputError(
            f"MASTER_PORT = {os.environ.get('MASTER_PORT')}: another program listens there; start with another port "
            "(torchrun --rdzv-backend c10d --rdzv-endpoint HOST:0 finds a free one)"
        )
    return LostRankError(
        f"rank {rank}: not all of {world_size} ranks came together within {timeout_seconds:g} s ({reason}); look at what the others "
        "said, or whether their hosts are up"
    )


@contextmanager
def blamed_on(process: Process) -> Iterator[None]:
    """Add this rank to an error about its own rows, so that it is this rank which prints it."""
    try:
        yield
    except InputError as error:
        error.add_note(f"rank {process.rank}")
        raise


@contextmanager
def agreed(process: Process) -> Iterator[None]:
    """Raise an InputError of some ranks on all of them: that of the lowest such rank. Every rank enters; no collective is inside."""
    fault = ""
    try:
        yield
    except InputError as error:
        fault = str(error)
    faults = from_all_ranks(fault, process)
    for rank, each in enumerate(faults):
        if each:
            raise InputError(each if set(faults) == {each} else f"rank {rank}: {each}")


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor over ranks; no gradient flows through it. In place for more than one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The greatest of all ranks' values, for each entry. In place for more than one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank calls it."""
    return vote([flag])[0] is not None


def vote(flags: Sequence[bool | Tensor], device: torch.device = CPU) -> list[int | None]:
    """For each flag the lowest rank that sets it, None if none does; one collective, equal on every rank. RuntimeError if a rank is lost.

    Flags that are tensors of () lie on `device`. On cuda all goes over NCCL, and this host waits once; a lost rank shows in the answer.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [0 if flag else None for flag in flags]
    world_size, rank = dist.get_world_size(), dist.get_rank()
    votes = torch.zeros(len(flags) + 2, dtype=torch.int32, device=device)
    for place, flag in enumerate(flags):
        if isinstance(flag, Tensor):
            votes[place] = flag * (world_size - rank)
        elif flag:
            votes[place].fill_(world_size - rank)
    # the greatest of each of these is world_size once all ranks are in it
    votes[-2].fill_(world_size - rank)
    votes[-1].fill_(rank + 1)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    *answer, with_first, with_last = votes.tolist()
    if not with_first == with_last == world_size:
        raise RuntimeError("NCCL ended a collective that not all ranks had joined")
    return [world_size - value if value else None for value in answer]


def wait_for_device(process: Process) -> None:
    """Wait, on every rank, until this rank's GPU is done; RuntimeError if a rank was lost, so that what it has computed is not to be used."""
    if process.device.type == "cuda":
        vote([torch.zeros((), dtype=torch.bool, device=process.device)], process.device)


def side_store(process: Process, prefix: str) -> dist.Store | None:
    """A connection to the rendezvous store for a thread, which then does not block the main thread's. None for one rank."""
    if process.world_size == 1:
        return None
    store: Any = process.store
    with suppress(AttributeError, RuntimeError, NotImplementedError):
        store = store.clone()  # a store without connections, such as a file, can be shared
    return dist.PrefixStore(prefix, store)


def gather_rows(rows: np.ndarray, process: Process) -> np.ndarray | None:
    """Join every rank's rows (n_r, C), in rank order, on rank 0; None elsewhere. n_r may differ between ranks."""
    if process.world_size == 1:
        return rows
    parts: list[Any] | None = [None] * process.world_size if process.is_first else None
    dist.gather_object(rows, parts, dst=0)
    return None if parts is None else np.concatenate(parts)


def from_all_ranks(value: Any, process: Process) -> list[Any]:
    """Return every rank's value on every rank, in rank order."""
    values = [value] * process.world_size
    if process.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(counts: Sequence[Any], process: Process) -> list[Any]:
    """Add whole numbers, or rows of them, over all ranks. Every rank calls it."""
    found = torch.tensor(counts, dtype=torch.int64)
    if process.world_size > 1 and len(counts):
        dist.all_reduce(found)
    return found.tolist()


def broadcast_value(value: Any, process: Process) -> Any:
    """Return rank 0's value on every rank."""
    if process.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def answer_of_first(process: Process, ask: Callable[[], T]) -> T:
    """Return on every rank what rank 0, which alone asks, is answered; an InputError of it is raised on every rank. Every rank calls it."""
    answer, problem = None, ""
    if process.is_first:
        try:
            answer = ask()
        except InputError as error:
            problem = str(error)
    answer, problem = broadcast_value((answer, problem), process)
    if problem:
        raise InputError(problem)
    return answer


@contextmanager
def averaged_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Give every rank the mean of the ranks' floating-point buffers, and its own back on exit: evaluation does not change what is trained."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        mean_over_ranks(buffer)
    try:
        yield
    finally:
        for buffer, values in zip(buffers, own, strict=True):
            buffer.copy_(values)
