"""What a start depends on, which its checkpoints store, and in what a start that resumes may differ from it.

{"files": of the schema's copy, "data": fingerprint of the training files, "config": {...}, "versions": {...}}
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.reading.column_types import pinned
from data.reading.files import column_sets, resolve_files
from data.reading.fingerprint import FileMark, fingerprint, mark_differences, mark_files
from data.reading.partitions import select_files
from data.schema import Schema, load_schema, schema_to_toml
from data.schema.parse import read_toml, to_toml_value
from data.stream import ParquetStream
from mbcnet_rec.checkpoints.compatibility import saved_run
from mbcnet_rec.checkpoints.run_folder import CONFIG, PLAN
from mbcnet_rec.checkpoints.run_schema import SCHEMA, file_sums, other_ids, own_schema
from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.config import RunConfig
from mbcnet_rec.doctor import installed
from mbcnet_rec.runtime.process import Process, agreed, broadcast_value, first_decides

DATA = "data.json"  # in a run folder: the training files, see data/reading/fingerprint.py
PACKAGES = ("mbcnet-rec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
# options that fix the order of the rows, and so what a saved position means
ORDER = (
    "data.batch_size", "data.lanes", "data.order", "data.window_rows", "data.train_where", "data.keep_negatives",
    "data.drop_positives", "train.seed",
)  # fmt: skip
# where things are; what the rows are is compared by the files
PLACES = ("name", "schema", "data.train", "train.out", "train.checkpoint_folder")
SHOWN = 8


def facts_of(config: RunConfig, files: Mapping[str, str], marks: list[FileMark]) -> dict[str, Any]:
    """The facts about a start that its checkpoints store, as JSON values."""
    return {
        "files": dict(files),
        "data": fingerprint(marks),
        "config": to_toml_value(config),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }


def earlier_facts(
    config: RunConfig, storage: CheckpointStorage, step: int | None, process: Process
) -> dict[str, Any]:
    """The facts that a checkpoint stores, equal on every rank; none for a fresh start. Every rank calls it.

    Raises:
        InputError: the checkpoint is damaged.
    """
    run: dict[str, Any] = {}
    with first_decides(process):
        if step is not None and process.is_first:
            run = saved_run(storage.manifest(step), config.run_folder)
            with suppress(InputError):  # checkpoints of earlier versions do not have it
                run.setdefault("config", read_toml(config.run_folder / CONFIG))
    return broadcast_value(run, process)


def agreed_schema(
    config: RunConfig, run: Mapping[str, Any], process: Process, *, allow_partial: bool
) -> tuple[Schema, dict[str, str]]:
    """The schema to train with, and its `file_sums`: the config's, or where a run is resumed its own copy. Every rank calls it.

    Every field of ids has a type: that which the schema says, else that of the training files.

    Raises:
        InputError: it is not there, or changed since; a rank has other vocabularies than rank 0; or with `allow_partial`, rows of a table
            would belong to other values.
    """
    folder = config.run_folder
    has_copy = bool(run.get("files")) and (folder / SCHEMA).is_file()
    schema: Schema | None = None
    sums: dict[str, str] = {}
    with first_decides(process):
        if process.is_first:
            if has_copy and not allow_partial:
                schema, sums = own_schema(folder, run), run["files"]
            else:
                schema = _typed(config, load_schema(config.schema))
                sums = file_sums(schema)
                _refuse_other_schema(config, schema, sums, run, has_copy)
    found, sums, has_copy = broadcast_value((schema, sums, has_copy and not allow_partial), process)
    sees_copy = has_copy and (folder / SCHEMA).is_file()  # another host may see checkpoints only
    own = replace(found, folder=folder if sees_copy else Path(config.schema).parent)
    with agreed(process):
        other = [
            name for name, sha256 in file_sums(own).items() if name != SCHEMA and sums.get(name) != sha256
        ]
        if other:
            raise InputError(
                f"{own.folder}: {', '.join(other)}: other than on rank 0; give every host the same"
            )
    return own, sums


def _typed(config: RunConfig, schema: Schema) -> Schema:
    schema.require_fitted()
    files = select_files(resolve_files(config.data.train), config.data.train_where, schema)
    return pinned(schema, column_sets(files, config.data.attempts))


def _refuse_other_schema(
    config: RunConfig, schema: Schema, sums: Mapping[str, str], run: Mapping[str, Any], has_copy: bool
) -> None:
    """Refuse a schema by which the rows of a checkpoint would mean something else."""
    files, folder = run.get("files"), config.run_folder
    if not files or files == sums:
        return
    if not has_copy:
        differ = sorted(name for name in files | sums if files.get(name) != sums.get(name))
        raise InputError(
            f"{folder / SCHEMA}: is missing, and schema = {config.schema!r} is not that of the checkpoint ({', '.join(differ)} differ); "
            "bring the run folder back, or begin anew with --overwrite"
        )
    try:
        before = own_schema(folder, run)
    except InputError:
        if file_sums(load_schema(folder / SCHEMA)) != sums:
            raise
        return  # it was loaded in part before, and no checkpoint was written since
    assert before is not None
    for table, why in other_ids(before, schema).items():
        raise InputError(
            f"{config.schema}: table {table}: its rows in the checkpoint are of other ids ({why}); use the schema of the run, or begin "
            "another run with train.warm_start and the other tables in train.warm_start_tables"
        )


def agreed_marks(stream: ParquetStream, process: Process) -> list[FileMark]:
    """The marks of the training files, on rank 0; it is rank 0's reading error that every rank raises."""
    marks: list[FileMark] = []
    with first_decides(process):
        if process.is_first:
            marks = mark_files(stream.files, stream.options.attempts)
    return marks


def refuse_other_start(
    config: RunConfig, run: Mapping[str, Any], marks: list[FileMark], process: Process, *, allow_partial: bool
) -> list[str]:
    """Refuse to resume where the saved position in the data means nothing; return notes on what else differs. Every rank calls it.

    Raises:
        InputError: an option that fixes the order of the rows differs, or the training files do.
    """
    notes: list[str] = []
    with first_decides(process):
        if process.is_first and run:
            changed = option_differences(run, config)
            order = [
                f"{key} = {now!r}, but {before!r} in its checkpoint"
                for key, before, now in changed
                if key in ORDER
            ]
            if files := _data_difference(config, run, marks):
                order.append(f"data.train: {files}")
            if order and not allow_partial:
                raise InputError(
                    f"{config.run_folder}: {'; '.join(order)}: the place in the data where --resume continues means nothing then; make them equal "
                    "again, or load what fits and read the data from the start with --allow-partial"
                )
            notes += [f"partial load: {what}" for what in order]
            others = [f"{key} {before!r} -> {now!r}" for key, before, now in changed if key not in ORDER]
            notes += [f"note: other options than before: {_some(others)}"] if others else []
            notes += _version_notes(run)
    return notes


def finished_difference(config: RunConfig, run: Mapping[str, Any], marks: list[FileMark]) -> str:
    """In what a run that is done was another one than its config says now: rows, model or optimizers; an empty string if in nothing."""
    found = [
        f"{key} = {now!r}, but {before!r} in its checkpoint"
        for key, before, now in option_differences(run, config)
        if key in ORDER or key.startswith(("model.", "optim."))
    ]
    files = _data_difference(config, run, marks)
    return "; ".join([*found, f"data.train: {files}"] if files else found)


def option_differences(run: Mapping[str, Any], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, value in the checkpoint's config, value now) of each option that differs; those of places do not count."""
    before, now = dict(_flat(run.get("config", {}))), dict(_flat(to_toml_value(config)))
    return [
        (key, before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value and key not in PLACES
    ]


def told_differences(run: Mapping[str, Any], config: RunConfig) -> str:
    """What to add to a refusal: the options that differ; an empty string where none does."""
    changed = [f"{key} {before!r} -> {now!r}" for key, before, now in option_differences(run, config)]
    return f"; options that differ: {_some(changed)}" if changed else ""


def _some(phrases: list[str]) -> str:
    more = f", and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
    return ", ".join(phrase[:200] for phrase in phrases[:SHOWN]) + more


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _data_difference(config: RunConfig, run: Mapping[str, Any], marks: list[FileMark]) -> str:
    """In what the training files differ from the checkpoint's, in words; an empty string if in nothing that is known."""
    before = run.get("data")
    if before is None or before == fingerprint(marks):
        return ""
    with suppress(OSError, ValueError, TypeError, KeyError):  # untrusted, and only for the words
        then = [
            FileMark(*mark)
            for mark in json.loads((config.run_folder / DATA).read_text(encoding="utf-8"))["train"]
        ]
        if fingerprint(then) == before:
            return mark_differences(then, marks)
    return "other files"


def data_text(marks: list[FileMark]) -> str:
    """What RUN/data.json says."""
    return json.dumps({"train": marks}) + "\n"


def _version_notes(run: Mapping[str, Any]) -> list[str]:
    before = run.get("versions", {})
    changed = [
        f"{name} {before[name]} -> {installed(name) or 'none'}"
        for name in PACKAGES
        if name in before and before[name] != installed(name)
    ]
    return [f"note: other versions than before: {', '.join(changed)}"] if changed else []


def schema_note(config: RunConfig, own: Schema) -> str:
    """That the config's schema has become another than the run's own copy, with which it continues; an empty string if not, or gone."""
    try:
        now = load_schema(config.schema)
        sums = [file_sums(schema) for schema in (own, now)]
    except InputError:
        return ""
    tops = [schema_to_toml(schema.standing_alone()) for schema in (own, now)]
    # types that the run has taken from its files are no difference
    fields = tops[1]["fields"]
    for before, after in (
        (tops[0], tops[1]),
        *((each, fields.get(name, {})) for name, each in tops[0]["fields"].items()),
    ):
        for key in {"type", "group_type"} - after.keys():
            before.pop(key, None)
    differ = [
        f"field {name}"
        for name in tops[0]["fields"] | tops[1]["fields"]
        if _of(tops[0], name) != _of(tops[1], name)
    ]
    differ += [key for key in tops[0] | tops[1] if key != "fields" and tops[0].get(key) != tops[1].get(key)]
    differ += [
        name for name in sums[0] | sums[1] if name != SCHEMA and sums[0].get(name) != sums[1].get(name)
    ]
    if not differ:
        return ""
    return (
        f"note: schema = {config.schema!r} is another one now ({_some(differ)}): this run continues with its own copy, "
        f"{config.run_folder / SCHEMA}"
    )


def _of(top: Mapping[str, Any], name: str) -> Any:
    return top["fields"].get(name)


def with_own_plan(config: RunConfig) -> RunConfig:
    """The config with the run's own plan, where the plan file that it names is gone."""
    own, named = config.run_folder / PLAN, config.sharding.plan
    if not named or Path(named).exists() or not own.is_file():
        return config
    return replace(config, sharding=replace(config.sharding, plan=str(own)))
