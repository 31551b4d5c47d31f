"""What holds for every test: nothing that it starts outlives it, and what it changes in this process is put back."""

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
PATIENCE_SECONDS = 5.0  # threads and processes that are ending may take as long
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Threads that libraries keep for the whole process once they are used: they belong to no test.
LIBRARY_THREADS = ("pytest_timeout", "execnet", "tqdm_monitor", "TMonitor", "fsspecIO", "asyncio_")
# The second is forked_ranks.py's: it ends with this process.
LIBRARY_PROCESSES = ("resource_tracker", "script_server.py")
# pytest's own variables, and those that torch and matplotlib set on import
LIBRARY_VARIABLES = ("PYTEST_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "MPLBACKEND", "PYDEVD_", "TORCH_CPP_LOG_LEVEL")


def started() -> set[int]:
    """Processes whose parent is this one, zombies among them."""
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += (task / "children").read_text().split()
        except OSError:  # the thread has ended, or the kernel was built without these lists
            continue
    return set(map(int, found))


def started_by_scan() -> set[int]:
    """The same where the kernel has no lists of children: every process is looked at."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return found


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs inherit it, and hand it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
HAS_LISTS = Path(f"/proc/self/task/{os.getpid()}/children").exists()


def children() -> dict[int, str]:
    """Processes that this process has started and that run: pid -> command line."""
    found = {}
    for pid in started() if HAS_LISTS else started_by_scan():
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended meanwhile
            continue
    # the whole line is searched: the clone may lie in a folder of any depth
    return {pid: line[:100] for pid, line in found.items() if not any(name in line for name in LIBRARY_PROCESSES)}


def threads() -> dict[int, str]:
    """Python threads of this process that no library keeps: ident -> name."""
    return {
        thread.ident: thread.name
        for thread in threading.enumerate()
        if thread.ident and not thread.name.startswith(LIBRARY_THREADS) and thread is not threading.main_thread()
    }


def settings() -> dict[str, object]:
    """What a test can change in this process for the tests after it."""
    return {
        **{
            f"environment variable {name}": value
            for name, value in os.environ.items()
            if not name.startswith(LIBRARY_VARIABLES)
        },
        "the working directory": os.getcwd(),
        "warnings.showwarning": warnings.showwarning,
        "the root logger's handlers": tuple(map(type, logging.getLogger().handlers)),
        "the root logger's filters": tuple(logging.getLogger().filters),
        **{f"the handler of {each.name}": signal.getsignal(each) for each in SIGNALS},
    }


def leftovers(before: tuple[dict, dict, dict]) -> list[str]:
    """What is running or changed now and was not before, after it had time to end."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = [f"process {pid} ({line})" for pid, line in children().items() if pid not in before[0]]
        found += [f"thread {name!r}" for ident, name in threads().items() if ident not in before[1]]
        if not found or time.monotonic() > end:
            break
        time.sleep(0.02)
    now = settings()
    names = before[2].keys() | now.keys()
    return found + [name for name in names if before[2].get(name) != now.get(name)]


def watched(what: str) -> Iterator[None]:
    """Fail if something outlives `what`."""
    before = children(), threads(), settings()
    yield
    found = leftovers(before)
    if found:
        pytest.fail(f"{what} left behind: {'; '.join(sorted(found))}", pytrace=False)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of serving_data.py, trained once."""
    from serving_data import trained_runs  # which imports torch: most tests need neither

    return trained_runs(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def artifact(runs: Path) -> Path:
    """One of them, as the scorer's tests serve it."""
    from serving_data import artifact_of

    return artifact_of(runs, "row_wise", "fp32")


@pytest.fixture(autouse=True, scope="module")
def nothing_outlives_a_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads, processes and settings of a module's fixtures end with the module."""
    yield from watched(request.module.__name__)


@pytest.fixture(autouse=True)
def nothing_outlives_a_test(nothing_outlives_a_module: None) -> Iterator[None]:
    """Threads, processes, variables, handlers and filters of a test end with it."""
    yield from watched("the test")
