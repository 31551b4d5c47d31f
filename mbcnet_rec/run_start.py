"""Whether a run may begin in its folder, from which step it continues, and what it writes there before its first step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.errors import InputError
from data.plugins import PLUGINS, write_plugins
from data.reading.storage import is_uri
from data.schema import Schema
from data.schema.transforms import FILE
from data.stream import ParquetStream
from data.whole_folder import NO_ROOM, write_whole
from mbcnet_rec.checkpoints import run_folder
from mbcnet_rec.checkpoints.compatibility import RowsAnew
from mbcnet_rec.checkpoints.run_schema import BEFORE, COPIED, write_copy
from mbcnet_rec.checkpoints.storage import BEST, CheckpointStorage, latest_step
from mbcnet_rec.config import RunConfig, config_text
from mbcnet_rec.lineage import DATA, LINEAGE, Days, Marks, lineage_text
from mbcnet_rec.logs.metrics_log import METRICS, written
from mbcnet_rec.logs.mlflow import RUN_ID
from mbcnet_rec.resume import Before
from mbcnet_rec.runtime.lock import names_in
from mbcnet_rec.runtime.process import Process, answer_of_first
from mbcnet_rec.runtime.watchdog import STACKS
from mbcnet_rec.training.faults import FAULTS
from sharding.plan.placement import Plan, plan_text

# what a run writes
_OWN = {run_folder.CONFIG, METRICS, run_folder.PLAN, DATA, LINEAGE, run_folder.DONE, RUN_ID, "report.html"}
_OWN |= {*COPIED, run_folder.CHECKPOINTS, STACKS, FAULTS, PLUGINS, "tb"}
LOST = "{}: is done, but has no checkpoint; bring one back, or begin anew with --overwrite"


def start_of(
    config: RunConfig, storage: CheckpointStorage, process: Process, resume: bool, overwrite: bool
) -> int | None:
    """Check folder and storage, and find the step to continue from; None for a fresh start. Nothing of an earlier run is removed."""

    def find() -> int | None:
        with written(config.run_folder):
            run_folder.recover(config.run_folder)
        check_folder(config, resume, overwrite)
        _check_storage(config, storage, resume, overwrite)
        step = latest_step(storage) if resume else None
        if resume and step is None:
            _refuse_lost_checkpoints(config, storage)
        return step

    return answer_of_first(process, find)


def _refuse_lost_checkpoints(config: RunConfig, storage: CheckpointStorage) -> None:
    """Raise InputError where a run without a whole checkpoint cannot begin anew unasked: it has had some."""
    folder, steps = config.run_folder, storage.steps()
    elsewhere = run_folder.other_checkpoints(config.train, folder)
    if steps:
        raise InputError(
            f"{folder}: of {len(steps)} checkpoints none is whole; bring one back, or begin anew with --overwrite"
        )
    if elsewhere and CheckpointStorage(elsewhere).steps():
        raise InputError(
            f"train.checkpoint_folder = {config.train.checkpoint_folder!r}: no checkpoint is there, those of {folder} are in "
            f"{elsewhere}; set it so, move them, or begin anew with --overwrite"
        )
    if (folder / run_folder.DONE).exists():
        raise InputError(LOST.format(folder))


def check_folder(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Raise InputError where the run folder cannot be used. For rank 0."""
    folder, source = config.run_folder, config.train.warm_start
    names, other = set(names_in(folder)), "choose another folder with --set train.out=FOLDER"
    # a run that died before it wrote its config has left some of its own
    ours = names <= _OWN | {f".{run_folder.CONFIG}.partial"}
    is_left = ours and run_folder.CONFIG not in names and (resume or overwrite)
    if not names or is_left:
        return
    if run_folder.CONFIG not in names or not names & {run_folder.PLAN, METRICS}:
        raise InputError(f"{folder}: exists and holds no run; {other}")
    if not resume and not overwrite:
        raise InputError(f"{folder}: holds a run already; --resume continues it, --overwrite replaces it; or {other}")
    if overwrite and source and folder.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise InputError(
            f"train.warm_start = {source!r}: --overwrite replaces this very run; {other}, or start from a copy of the run"
        )


def _check_storage(config: RunConfig, storage: CheckpointStorage, resume: bool, overwrite: bool) -> None:
    """Raise InputError where checkpoints cannot be written; leftovers of dead runs are removed. For rank 0."""
    try:
        storage.clean()
        storage.check_writable()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        reason = error.strerror or str(error).splitlines()[0]
        raise InputError(
            f"train.checkpoint_folder: checkpoints cannot be written ({reason}); repair the storage or choose another place"
        ) from None
    if resume or not storage.steps():
        return
    place, folder = f"train.checkpoint_folder = {config.train.checkpoint_folder!r}", config.run_folder
    if not overwrite:
        raise InputError(
            f"{place}: holds checkpoints already; continue with --resume, replace them with --overwrite, or change it"
        )
    if not (folder / run_folder.CONFIG).is_file() or run_folder.other_checkpoints(config.train, folder):
        raise InputError(
            f"{place}: holds checkpoints that are not those of the run in {folder}, which --overwrite replaces; choose another place, or "
            "remove them yourself"
        )


class Start(NamedTuple):
    """Where a run begins, and with what."""

    config: RunConfig
    before: Before
    own: Schema  # that of the checkpoint
    schema: Schema  # the same, unless its vocabularies have grown since
    files: dict[str, str]  # of the schema, see checkpoints/run_schema.py
    marks: Marks  # of the streams' files
    days: Days
    streams: dict[str, ParquetStream]  # by split
    day_rows: ParquetStream | None  # the training rows as they are scored before they are trained
    anew: RowsAnew | None  # of tables that have grown
    notes: list[str]  # for the user


def open_folder(start: Start, plan: Plan, *, overwrite: bool) -> None:
    """Write what a run begins with; a fresh one takes the place of an earlier run, and of what a start that died has left."""
    config, before, folder = start.config, start.before, start.config.run_folder
    storage, fresh = before.storage, before.step is None
    new, place = folder / run_folder.NEW, config.train.checkpoint_folder
    if place and not is_uri(place):  # so that it holds from every working directory
        config = replace(config, train=replace(config.train, checkpoint_folder=str(Path(place).absolute())))

    with written(folder):
        run_folder.remove(new)
        new.mkdir(parents=True)
        write_whole(new / run_folder.CONFIG, config_text(config))
        write_whole(new / run_folder.PLAN, plan_text(plan))
        write_whole(new / DATA, json.dumps(start.marks) + "\n")
        write_whole(new / LINEAGE, lineage_text(start.days.lines))
        names = {run_folder.CONFIG, run_folder.PLAN, DATA, LINEAGE, PLUGINS}
        transforms = [each[FILE] for each in start.schema.transforms.values() if FILE in each]
        write_plugins(new, [*start.config.plugins, *transforms])
        if fresh or start.schema.folder.resolve() != folder.resolve():
            write_copy(start.schema, new, start.files)
            if before.step is not None and start.own is not start.schema and not storage.manifest(before.step).copies:
                write_copy(start.own, new / BEFORE, before.run["files"])
            names |= {*COPIED}
        if fresh:
            write_whole(new / METRICS, "")
            # the stacks of a start that died stay, and its run on an MLflow server
            names = _OWN if overwrite else _OWN - {STACKS, RUN_ID}
        run_folder.put_in_place(folder, names, elsewhere=fresh and bool(place))
        if start.days.begins:  # which is the best of the day before says nothing of this one
            storage.remove_note(BEST)
        (folder / run_folder.DONE).unlink(missing_ok=True)
