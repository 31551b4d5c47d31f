"""Runs independent tasks in processes of this machine, on a Ray cluster, or on the ranks of a torchrun job.

A task leaves its result in one file that is named by what it read, so a job that was killed goes on where it was, and nothing depends on
who ran which task, when, or how often: a task that was begun twice writes the same file.
"""

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError

ENGINES = ("local", "ray", "torchrun")
LOST_WORKERS = 3  # that a task may cost before it is taken to be the cause
LOOK_SECONDS = 0.2  # between looks for what other ranks have written


class Engine(NamedTuple):
    """Who runs tasks."""

    name: str = "local"  # one of ENGINES
    workers: int = 1  # processes of "local"; 1: this one
    address: str = "auto"  # of "ray": the cluster's
    cpus: float = 1  # of "ray": what a task takes
    gpus: float = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what comes of all tasks: of torchrun's ranks the first."""
        return self.name != "torchrun" or rank_and_size()[0] == 0


HERE = Engine()  # this process


def rank_and_size() -> tuple[int, int]:
    """This process among those that torchrun has started.

    Raises:
        InputError: it has started none.
    """
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise InputError(
            "--engine torchrun: RANK and WORLD_SIZE are not set; start the command by torchrun or `mbcnet launch`, or choose --engine local"
        ) from None


def run_tasks(
    engine: Engine, run: Callable[[Any], object], tasks: Mapping[Path, Any], *, last: bool = False
) -> Iterator[Path]:
    """Run each task whose result is not there, and yield each result's path when it is, in no order.

    Args:
        engine: who runs them.
        run: a function of a module. Writes the result of a task whole or not at all (`write_result`).
        tasks: path of the result -> what `run` takes; both can be pickled.
        last: whether only torchrun's first rank goes on afterwards; the others then wait for no results but their own.

    Raises:
        InputError: a task's, or workers were lost again and again.
    """
    if engine.name == "torchrun":
        yield from _among_ranks(run, tasks, last)
        return
    there = [path for path in tasks if path.exists()]
    yield from there
    left = {path: task for path, task in tasks.items() if path not in set(there)}
    if engine.name == "ray":
        yield from _on_ray(engine, run, left)
    elif engine.workers == 1 or len(left) < 2:
        for path, task in left.items():
            run(task)
            yield path
    else:
        yield from _in_processes(engine.workers, run, left)


def meet(engine: Engine, folder: Path) -> None:
    """Let torchrun's first rank wait until no other looks for results in a folder any more."""
    if engine.name != "torchrun":
        return
    rank, size = rank_and_size()
    start = "-".join(
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    )
    if rank:
        (folder / f"left-{start}-{rank}").touch()  # by this start: an earlier one may have left its own
    while not rank and not all((folder / f"left-{start}-{other}").exists() for other in range(1, size)):
        time.sleep(LOOK_SECONDS)


@contextmanager
def write_result(path: Path) -> Iterator[Path]:
    """Give a name to write to, which becomes `path` at the end. A task that runs twice at once writes twice."""
    draft = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # for the message
        raise
    finally:
        draft.unlink(missing_ok=True)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # Arrow, which is imported with the first task, heeds it too


def _in_processes(workers: int, run: Callable[[Any], object], left: dict[Path, Any]) -> Iterator[Path]:
    for _ in range(LOST_WORKERS):
        with ProcessPoolExecutor(min(workers, len(left)), get_context("spawn"), _one_thread) as pool:
            begun: dict[Future[object], Path] = {pool.submit(run, task): path for path, task in left.items()}
            try:
                while begun:
                    for future in wait(begun, return_when=FIRST_COMPLETED).done:
                        future.result()
                        path = begun.pop(future)
                        del left[path]
                        yield path
                return
            except BrokenProcessPool:  # a worker was killed; those tasks that are done stay done
                continue
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    raise InputError(
        f"{LOST_WORKERS} worker processes were lost, by the system's memory limit as a rule; take fewer --workers, then run the command again: "
        "it goes on where it was"
    )


def _among_ranks(run: Callable[[Any], object], tasks: Mapping[Path, Any], last: bool) -> Iterator[Path]:
    rank, size = rank_and_size()
    for path, task in list(tasks.items())[rank::size]:
        if not path.exists():
            run(task)
        yield path
    left = [path for number, path in enumerate(tasks) if number % size != rank]
    while left and not (last and rank):  # torchrun ends all ranks when one fails
        yield from (path for path in left if path.exists())
        left = [path for path in left if not path.exists()]
        time.sleep(LOOK_SECONDS if left else 0)


def _on_ray(engine: Engine, run: Callable[[Any], object], left: dict[Path, Any]) -> Iterator[Path]:
    ray = import_ray()
    if not ray.is_initialized():
        ray.init(address=engine.address, log_to_driver=False)
    remote = ray.remote(num_cpus=engine.cpus, num_gpus=engine.gpus, max_retries=LOST_WORKERS)(run)
    begun = {remote.remote(task): path for path, task in left.items()}
    try:
        while begun:
            (ready,), _ = ray.wait(list(begun), num_returns=1)
            ray.get(ready)
            yield begun.pop(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for each in begun:
            ray.cancel(each)


def import_ray() -> Any:
    """Ray, which is optional.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError(
            '--engine ray: Ray is not installed; pip install "mbcnet-rec[ray]", or choose --engine local'
        ) from None
