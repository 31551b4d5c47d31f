"""Which model a worker serves: load and warm up, swap, roll back, follow what another worker or a watched folder asked for.

Workers agree by files in one folder of the start, each written whole: wanted.json, the number and chain that all shall serve, and
<pid>.json, the number that a worker has. A worker that starts again after a crash finds there what the others serve. A chain is an
artifact's folder and deltas'; the artifact that deltas lead to is written there too, so that workers share its pages.
"""

# pyright: reportMissingImports=false

import dataclasses
import fcntl
import gc
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from data.errors import InputError, first_line
from mbcnet_rec.server.options import Options
from mbcnet_rec.server.requests import Refused, names_of
from mbcnet_rec.serving import loader
from mbcnet_rec.serving.delta import write_child
from mbcnet_rec.serving.preprocess import Preprocessor

SWAP_SECONDS = 120.0  # within which all workers must have loaded
RETRY_SECONDS = 5.0  # after which a worker that could not load tries again
SEEN = "seen.json"  # of a watched folder: name -> mark of what has been taken, or was there at the start
KEPT = 20  # models that rollbacks can go back to, one after the other


@dataclass(frozen=True)
class Loaded:
    """One model, and what its artifact says of it."""

    model: loader.ServingModel
    version: str  # name, step and the first digits of model.json's sum, which has the sums of all other files
    folder: Path
    written: float  # seconds since 1970
    check: dict[str, Any]  # check.json
    names: dict[str, str]  # requests.names_of

    def description(self) -> dict[str, Any]:
        """What the page shows."""
        spec = {name: self.model.spec[name] for name in ("kind", "branches", "rows")}
        spec |= {"tasks": self.model.tasks} if self.model.tasks else {}
        schema, types = self.model.preprocess.schema, self.model.preprocess.encoder.id_type
        fields = [
            {"name": each.name, "kind": each.kind, "type": types.get(each.name)}
            | {"columns": [name for name in (each.source_column, each.weights) if name]}
            for each in schema.features
        ]
        sample = {name: json.dumps(values[0]) for name, values in self.check["sample"].items()}
        own = {"model": self.version, "has_branches": self.model.branch_graph is not None, "fields": fields}
        tables = [dataclasses.asdict(each) for each in schema.tables]
        return spec | own | {"groups": schema.groups, "tables": tables, "check": self.check | {"sample": sample}}

    def parts_of(self, shared: frozenset[str]) -> tuple[Preprocessor, Preprocessor]:
        """What encodes these shared columns, and what the others."""
        whole = self.model.preprocess
        return whole.part(shared), whole.part(frozenset(whole.columns) - shared)


def load_model(folder: Path, *, verify: bool = True) -> Loaded:
    """Load an artifact and score a row: a real one if it has one; InputError if it is no artifact, is damaged, or does not score."""
    try:
        file = folder / loader.MODEL
        model, check = loader.load(folder, verify=verify), read_json(folder / "check.json")
        sample = check["sample"] = {name: [None] for name in model.preprocess.columns} | check.get("sample", {})
        digest, step = hashlib.sha256(file.read_bytes()).hexdigest()[:8], model.spec.get("step", 0)
        model.predict(sample)
        version, names = f"{model.spec['name']}-{step}-{digest}", names_of(model.preprocess.schema)
        return Loaded(model, version, folder, file.stat().st_mtime, check, names)
    except Exception as error:
        raise _not_served(folder, error) from None


def _not_served(folder: Path, error: Exception) -> InputError:
    """Of any class, for files that somebody else wrote."""
    words = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return InputError(f"{folder} cannot be served: {words}{first_line(error)}; export or copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it whole, by a rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)


def marks_in(folder: Path) -> dict[str, list[int]]:
    """Name -> mark of each artifact and delta below a folder; a copy of links, other rights or an edited check.json changes none."""
    found = {}
    for path in folder.glob(f"[!.]*/{loader.MODEL}"):
        with suppress(OSError):  # gone by now
            stat = path.stat()
            if ".partial-" not in path.parent.name:  # whole_folder's draft; one that was replaced is .NAME.earlier-PID
                found[path.parent.name] = [stat.st_mtime_ns, stat.st_size]
    return found


class Models:
    """The models of one worker."""

    def __init__(self, options: Options) -> None:
        self.options, self.state = options, options.state
        self.folder = options.models.resolve() if options.models else None
        self.current: Loaded | None = None  # a pass reads it once, so none mixes two
        self.other: Loaded | None = None
        self.number = -1
        self._taking = threading.Lock()
        self._again = 0.0  # of time.monotonic: when what could not be loaded is tried again
        self._failed: dict[str, list[int]] = {}  # name in the watched folder -> sizes of its files

    def start(self) -> None:
        """Load what all serve. Raises InputError."""
        self.living()
        if not self._again:  # before it reads what to load, so that a switch that it does not know of yet waits for it
            self._tell(self.number)
        gc.freeze()  # a collection after a swap need not look at what is never replaced
        self.follow()

    def follow(self) -> None:
        """Load what all shall serve, if this worker does not yet; and, in one of the workers, look into the watched folder."""
        wanted = read_json(self.state / "wanted.json")
        if wanted and wanted["number"] > self.number and time.monotonic() >= self._again:
            if self.options.shadow and self.other is None:
                self.other = load_model(self.options.shadow, verify=False)
            try:
                loaded = load_model(self._place(wanted["chain"]), verify=False)
                self._take(replace(loaded, folder=Path(wanted["chain"][-1])), wanted["number"])
            except InputError as error:
                self._again = time.monotonic() + RETRY_SECONDS
                self._tell(wanted["number"], str(error))
                if self.current is None:
                    raise
        if self.options.watch and self.current is not None:
            self._look()

    def _take(self, loaded: Loaded, number: int) -> None:
        with self._taking:
            if number < self.number:  # another thread has switched meanwhile
                return
            self.current, self.number = loaded, number
        gc.collect()  # the old one's pages
        self._tell(number)

    def _tell(self, number: int, error: str = "") -> None:
        write_json(self.state / f"{os.getpid()}.json", {"number": number, "error": error})

    def switch(self, name: str | None, wait: bool = True) -> list[str]:
        """Let all workers serve another artifact, or what a delta makes of theirs; None: the one before. Returns what went wrong in workers.

        Refused, and what serves serves on, if it cannot be served; BlockingIOError if another change is under way without `wait`.
        """
        with (self.state / "lock").open("w") as lock:  # one change at a time, of all workers
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            wanted, seen = read_json(self.state / "wanted.json"), read_json(self.state / SEEN)
            if not wanted or self.current is None:  # this worker's start would take the place of what it switches to
                raise Refused("the model of the start is not loaded yet; ask /health/ready", 503, "start")
            number, chain, before = wanted["number"] + 1, wanted["chain"], wanted["before"]
            if name is None and not before:
                raise Refused("there is no model before this one", 409, "model")
            folder = None if name is None else self._inside(name)
            mark = marks_in(folder.parent).get(folder.name) if folder else None
            if not wait and name and mark == seen.get(name):  # another worker has taken it meanwhile
                return []
            is_delta = folder is not None and (folder / loader.DELTA).is_file()
            wanted_chain = before[-1] if folder is None else [*(chain if is_delta else ()), str(folder)]
            try:
                loaded = replace(load_model(self._whole(wanted_chain)), folder=Path(wanted_chain[-1]))
            except InputError as error:
                self._clear([chain, *before[-1:]])
                raise Refused(str(error), 400, "model") from None
            if wanted_chain != chain:
                before = before[:-1] if folder is None else [*before, chain][-KEPT:]
            elif loaded.version == self.current.version and not self._behind(number - 1):
                return []
            had, self.number = self.number, number  # this worker need not load it once more
            try:
                write_json(self.state / "wanted.json", {"number": number, "chain": wanted_chain, "before": before})
            except OSError as error:
                self.number = had
                words = f"{self.state}: cannot tell the other workers ({first_line(error)}); make room there"
                raise Refused(words, 500, "model") from None
            self._take(loaded, number)
            if name is not None and self.options.watch:
                write_json(self.state / SEEN, seen | {name: mark})
            end = time.monotonic() + SWAP_SECONDS
            while time.monotonic() < end:
                faults = self._behind(number)
                if "" not in faults:
                    self._clear([wanted_chain, *before[-1:]])
                    return faults
                time.sleep(0.02)
            return ["a worker has not loaded it in time"]

    def _behind(self, number: int) -> list[str]:
        """Of each worker that does not serve this model what went wrong, or nothing as long as it has not told."""
        told = self.living().items()
        late = ["" for _, each in told if each.get("number", -1) < number]
        return late + [f"worker {pid}: {each['error']}" for pid, each in told if each.get("error")]

    def _place(self, chain: Sequence[str]) -> Path:
        """Where the artifact that a chain leads to is, or will be."""
        made = hashlib.sha256(json.dumps(chain).encode()).hexdigest()[:16]
        return self.state / "made" / made if len(chain) > 1 else Path(chain[0])

    def _whole(self, chain: Sequence[str]) -> Path:
        """Write the artifact that a chain leads to, where it is not there yet. Raises InputError."""
        place = self._place(chain)
        if len(chain) > 1 and not place.exists():
            parent, delta = self._whole(chain[:-1]), Path(chain[-1])
            try:
                write_child(parent, delta, place)
            except Exception as error:
                raise _not_served(delta, error) from None
        return place

    def _clear(self, chains: Sequence[Sequence[str]]) -> None:
        """Keep on disk what these chains lead to; a rollback makes an earlier one again."""
        kept = [self._place(chain) for chain in chains]
        for path in (self.state / "made").glob("*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def living(self) -> dict[str, dict[str, Any]]:
        """What each worker has said last, by its process; what one that was killed has left goes."""
        found = {}
        for path in self.state.glob("[0-9]*.json"):
            try:
                os.kill(int(path.stem), 0)
                found[path.stem] = read_json(path)
            except ProcessLookupError:
                mark_process_dead(int(path.stem))
                path.unlink(missing_ok=True)
        return found

    def _inside(self, name: str) -> Path:
        """A folder below the one that the start named; nothing on the way or in it is a link."""
        if self.folder is None:
            raise Refused("the start named no --models FOLDER to take models from", 403, "model")
        path = self.folder / name
        if ".." in Path(name).parts or "\0" in name or not path.is_relative_to(self.folder) or path == self.folder:
            raise Refused(f"{name!r}: wanted the name of a folder below --models", 403, "model")
        if path.resolve() != path or any(each.is_symlink() for each in path.rglob("*")):
            raise Refused(f"{name!r}: a link is on the way or in it; copy the artifact itself", 403, "model")
        return path

    def _look(self) -> None:
        """Serve what has come into the folder, in the order in which it was written. A copy that is not whole yet is tried again when it has grown."""
        assert self.folder is not None
        seen = read_json(self.state / SEEN)
        for name, mark in sorted(marks_in(self.folder).items(), key=lambda each: each[1]):
            sizes = [mark[0], *(path.stat().st_size for path in (self.folder / name).rglob("*"))]
            if mark == seen.get(name) or sizes == self._failed.get(name):
                continue
            try:
                self.switch(name, wait=False)
                self._failed.clear()  # a delta may have waited for this one
            except BlockingIOError:  # another worker is at it, and waits for this thread
                return
            except Refused as error:
                self._failed[name] = sizes
                print(f"mbcnet serve: {name}: not taken: {error}", flush=True)
