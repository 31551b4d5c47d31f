"""Runs independent tasks in processes of this machine, on a Ray cluster, or on the ranks of a torchrun job.

A task leaves its result in one file that is named by what it read, so a job that was killed goes on where it was, and nothing depends on
who ran which task, when, or how often: a task that was begun twice writes the same file.
"""

import importlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError, first_line
from data.whole_folder import write_whole

Run = Callable[[Any], object]
Lost = Callable[[Path], object]
LOST_WORKERS = 3  # that a task may cost before it is taken to be the cause
STOP_SECONDS = 10.0  # that a worker has to clean up
LOOK_SECONDS = 0.2  # between looks for what other ranks have written


class Engine(NamedTuple):
    """Who runs tasks."""

    name: str = "local"  # or ray, or torchrun
    workers: int = 1  # processes of "local"; 1: this one
    address: str = "auto"  # of "ray": the cluster's
    cpus: float = 1  # that a task takes, of "local" as threads; 0: its share of this machine's, on "ray" one
    gpus: float = 0  # the same, of "ray"

    @property
    def is_first(self) -> bool:
        """Whether this process writes what comes of all tasks: of torchrun's ranks the first."""
        return self.name != "torchrun" or rank_and_size()[0] == 0


HERE = Engine()  # this process


def rank_and_size() -> tuple[int, int]:
    """This process among those that torchrun has started; InputError if it has started none."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise InputError(
            "--engine torchrun: RANK and WORLD_SIZE are not set; start the command by torchrun or `mbcnet launch`, or choose --engine local"
        ) from None


def run_tasks(
    engine: Engine,
    run: Run,
    tasks: Mapping[Path, Any],
    *,
    last: bool = False,
    is_done: Callable[[Path], bool] = Path.exists,
    held: bool = False,
    lost: Lost | None = None,
) -> Iterator[Path]:
    """Run each task whose result is not there, and yield each result's path when it is, in no order.

    Args:
        engine: who runs them.
        run: a function of a module. Writes the result of a task whole or not at all (`write_result`).
        tasks: path of the result -> what `run` takes; both can be pickled.
        last: whether only torchrun's first rank goes on afterwards; the others then wait for no results but their own.
        is_done: whether a result is there.
        held: whether `run` keeps what it loads for the next task of its process: on Ray, tasks of actors then.
        lost: writes the result of a task that has cost LOST_WORKERS workers, which is given up then.

    Raises:
        InputError: a task's, or workers were lost again and again and nobody wants to be told.
    """
    if engine.name == "torchrun":
        yield from _among_ranks(run, tasks, last, is_done)
        return
    there = {path for path in tasks if is_done(path)}
    yield from there
    left = {path: task for path, task in tasks.items() if path not in there}
    if engine.name == "ray":
        yield from _on_ray(engine, run, left, held, lost)
    elif engine.workers == 1 or len(left) < 2:
        for path, task in left.items():
            run(task)
            yield path
    else:
        yield from _in_processes(engine, run, left, lost)


def meet(engine: Engine, folder: Path) -> None:
    """Wait until all of torchrun's ranks have called it. Files that ranks of a killed start have left under the same names do not count."""
    if engine.name != "torchrun":
        return
    rank, size = rank_and_size()
    first, *others = (_mark(folder, each) for each in range(size))
    if rank:
        own, mark = uuid.uuid4().hex, others[rank - 1]
        while own not in _read(first):
            if _read(mark) != own:  # not written yet, or taken for one of the dead
                with suppress(FileNotFoundError):  # the first makes the folder
                    write_whole(mark, own)
            time.sleep(LOOK_SECONDS)
        mark.unlink()
        return
    folder.mkdir(parents=True, exist_ok=True)
    for each in others:
        each.unlink(missing_ok=True)
    while not all(seen := [_read(each) for each in others]):
        time.sleep(LOOK_SECONDS)
    write_whole(first, " ".join(seen))
    while any(_read(each) == own for each, own in zip(others, seen, strict=True)):
        time.sleep(LOOK_SECONDS)
    first.unlink()


def _read(mark: Path) -> str:
    try:
        return mark.read_text(encoding="utf-8")
    except OSError:  # not there, or on a shared folder replaced just now
        return ""


def _mark(folder: Path, rank: int) -> Path:
    """What a rank writes while it waits: the first whom it has seen, the others what only they know."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return folder / f"rank-{'-'.join(os.environ.get(name, '') for name in names)}-{rank}"


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


def _begin(threads: int, stop: Connection) -> None:
    """In a worker: leave when the process that started it closes its end of `stop`, or is gone, however it went."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Arrow, which is imported with the first task, heeds it too
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        stop.poll(None)
        if parent.is_alive():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(STOP_SECONDS)
        os._exit(1)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    threading.Thread(target=watch, daemon=True).start()


def _leave(number: int, _frame: object) -> None:
    """Clean up and exit, once: Ctrl-C reaches a worker from the terminal, too."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def _in_processes(engine: Engine, run: Run, left: Mapping[Path, Any], lost: Lost | None) -> Iterator[Path]:
    """Each worker is a pool of its own: where one is killed, the others' tasks go on."""

    def worker() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), _begin, (threads, stopped))

    threads = int(engine.cpus) or max(1, len(os.sched_getaffinity(0)) // engine.workers)
    stopped, stop = Pipe(duplex=False)
    waiting, losses = list(left)[::-1], Counter[Path]()
    idle = [worker() for _ in range(min(engine.workers, len(left)))]
    begun: dict[Future[object], tuple[Path, ProcessPoolExecutor]] = {}
    try:
        while waiting or begun:
            while waiting and idle:
                path, pool = waiting.pop(), idle.pop()
                try:
                    begun[pool.submit(run, left[path])] = path, pool
                except BrokenProcessPool:  # killed while it had no task: a loss of no task
                    waiting.append(path)
                    idle.append(worker())
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                path, pool = begun.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    idle.append(worker())
                    losses[path] += 1
                    if losses[path] < LOST_WORKERS:
                        waiting.append(path)
                        continue
                    _give_up(path, lost)
                else:
                    idle.append(pool)
                yield path
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        stop.close()  # a task may be a whole training: none is waited for
        raise
    finally:
        for pool in (*idle, *(pool for _, pool in begun.values())):
            pool.shutdown(cancel_futures=True)
        stop.close()
        stopped.close()


def _give_up(path: Path, lost: Lost | None) -> None:
    if lost is None:
        raise InputError(
            f"{LOST_WORKERS} worker processes were lost, by the system's memory limit as a rule; take fewer --workers, then run the command "
            "again: it goes on where it was"
        ) from None
    lost(path)


def _among_ranks(run: Run, tasks: Mapping[Path, Any], last: bool, is_done: Callable[[Path], bool]) -> Iterator[Path]:
    rank, size = rank_and_size()
    for path, task in list(tasks.items())[rank::size]:
        if not is_done(path):
            run(task)
        yield path
    left = [path for number, path in enumerate(tasks) if number % size != rank]
    while left and not (last and rank):  # torchrun ends all ranks when one fails
        done = {path for path in left if is_done(path)}
        yield from done
        left = [path for path in left if path not in done]
        time.sleep(LOOK_SECONDS if left else 0)


def _there(folder: str, run: Run, task: Any) -> None:
    """Run a task in the folder where the command was given: relative paths are meant from there."""
    os.chdir(folder)
    run(task)


class _Worker:
    """Of an actor: one process for many tasks."""

    def do(self, path: Path, *call: Any) -> Path:
        """Run one; the path of its result."""
        _there(*call)
        return path


def _on_ray(engine: Engine, run: Run, left: Mapping[Path, Any], held: bool, lost: Lost | None) -> Iterator[Path]:
    ray, here = import_ray(), os.getcwd()
    if not ray.is_initialized():
        try:
            ray.init(address=engine.address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--engine ray --address {engine.address}: no cluster can be reached ({first_line(error)}); start one (`ray start --head`, or "
                "`mbcnet launch ray-up`), or choose --engine local"
            ) from None
    options = {"num_cpus": engine.cpus or 1, "num_gpus": engine.gpus}
    begun: dict[Any, Path] = {}
    try:
        if held:
            has, takes = ray.cluster_resources(), {"CPU": engine.cpus or 1, "GPU": engine.gpus}
            slots = [int(has.get(name, 0) / share) for name, share in takes.items() if share]
            actor = ray.remote(**options, max_restarts=-1, max_task_retries=LOST_WORKERS - 1)(_Worker)
            actors = [actor.remote() for _ in range(max(1, min(len(left), *slots)))]
            pool = importlib.import_module("ray.util").ActorPool(actors)
            yield from pool.map_unordered(lambda each, path: each.do.remote(path, here, run, left[path]), list(left))
        remote = ray.remote(**options, max_retries=LOST_WORKERS - 1)(_there)
        begun = {} if held else {remote.remote(here, run, task): path for path, task in left.items()}
        while begun:
            (ready,), _ = ray.wait(list(begun), num_returns=1)
            path = begun.pop(ready)
            try:
                ray.get(ready)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
                _give_up(path, lost)
            yield path
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError:
        _give_up(Path(), None)
    finally:
        for each in begun:
            ray.cancel(each)


def import_ray() -> Any:
    """Ray, which is optional; InputError if it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError(
            '--engine ray: Ray is not installed; pip install "mbcnet-rec[ray]", or choose --engine local'
        ) from None
