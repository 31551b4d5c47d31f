"""What a start depends on, which its checkpoints store, and in what a start that resumes may differ from it.

{"files": of the schema's copy, "data" and "valid": fingerprints of the training and validation files, "config": {...}, "versions": {...}}
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError, some_of
from data.profile.fit import GROWTH, WAITING
from data.reading.column_types import pinned
from data.reading.conditions import select_files
from data.reading.files import column_sets, resolve_files
from data.reading.fingerprint import fingerprint, mark_differences, mark_files
from data.reading.snapshots import is_snapshot, pinned_paths
from data.schema import Schema, load_schema, schema_to_toml
from data.schema.parse import read_toml, to_toml_value
from data.stream import ParquetStream
from mbcnet_rec.checkpoints.run_folder import CONFIG, PLAN
from mbcnet_rec.checkpoints.run_schema import SCHEMA, file_sums, other_ids, own_schema, rows_begun_anew, saved_run
from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.config import RunConfig, earlier_options, flat
from mbcnet_rec.doctor import installed
from mbcnet_rec.lineage import DATA, Marks
from mbcnet_rec.runtime.process import Process, agreed, answer_of_first

PACKAGES = ("mbcnet-rec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
# options that fix the order of the rows, and so what a saved position means
ORDER = (
    "data.batch_size", "data.lanes", "data.order", "data.window_rows", "data.train_where", "data.keep_negatives",
    "data.drop_positives", "train.seed",
)  # fmt: skip
# options by which the same weights are another model: slices and logits go by the order of branches
MEANINGS = ("model.mbcnet.top_activation", "model.mbcnet.branches", "plugins")
# where things are; what the rows are is compared by the files
PLACES = ("name", "schema", "data.train", "train.out", "train.checkpoint_folder")
GROWING = frozenset({"num_embeddings", "min_count", "expire_after"})  # of fields with a vocabulary, from day to day
SHOWN = 8
Summed = tuple[Schema, dict[str, str]]  # and its `file_sums`
FACTS = {"train": "data", "valid": "valid"}  # split -> where a checkpoint has the fingerprint of its files


def marks_of(streams: Mapping[str, ParquetStream], attempts: int) -> Marks:
    """The marks of the files by which a run's course is another one."""
    return {split: mark_files(streams[split].files, attempts) for split in FACTS if split in streams}


def facts_of(config: RunConfig, files: dict[str, str], marks: Marks) -> dict[str, Any]:
    """The facts about a start that its checkpoints store, as JSON values."""
    return {
        "files": files,
        **{key: fingerprint(marks.get(split, ())) for split, key in FACTS.items()},
        "config": to_toml_value(config),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }


class Before(NamedTuple):
    """The checkpoint that a start goes on from."""

    storage: CheckpointStorage
    step: int | None  # none of a fresh start
    run: dict[str, Any]  # the facts that it stores


def earlier_start(config: RunConfig, storage: CheckpointStorage, step: int | None, process: Process) -> Before:
    """What a start goes on from; InputError if it is damaged. Every rank calls it."""

    def read() -> dict[str, Any]:
        if step is None:
            return {}
        run = saved_run(storage.manifest(step), config.run_folder)
        with suppress(InputError):  # checkpoints of earlier versions do not have it
            run.setdefault("config", read_toml(config.run_folder / CONFIG))
        earlier_options(run.get("config", {}))
        return run

    return Before(storage, step, answer_of_first(process, read))


def with_versions(config: RunConfig, run: Mapping[str, Any], process: Process) -> RunConfig:
    """The config with the version of each table that [data] names without one: a checkpoint's, or else the newest. Every rank calls it."""
    splits = {name: getattr(config.data, name) for name in ("train", "valid", "test")}
    if not any(is_snapshot(path) for paths in splits.values() for path in paths):
        return config
    before = run.get("config", {}).get("data", {})
    found = answer_of_first(
        process, lambda: {name: pinned_paths(paths, before.get(name, ())) for name, paths in splits.items()}
    )
    return replace(config, data=replace(config.data, **found))


def agreed_schema(config: RunConfig, before: Before, process: Process, *, allow_partial: bool) -> Summed:
    """The schema to train with, every field of ids typed, and its `file_sums`: the config's, or a resumed run's own. Every rank calls it.

    InputError if it is missing, changed, of other vocabularies than rank 0's; or with `allow_partial`, if rows would belong to other values.
    """

    def find() -> Summed:
        if not allow_partial:
            try:
                if own := own_schema(config.run_folder, before.storage, before.step):
                    return own, before.run["files"]
            except InputError:  # it has no copy either: the config's schema may still be the same
                if (config.run_folder / SCHEMA).is_file():
                    raise
        schema = _typed(config, load_schema(config.schema))
        sums = file_sums(schema)
        _refuse_other_schema(config, schema, sums, before)
        return schema, sums

    return _on_this_host(config, process, before, *answer_of_first(process, find))


def grown_schema(config: RunConfig, own: Schema, before: Before, process: Process, *, continues: bool) -> Summed | None:
    """What a run's own schema has grown to for the day that begins, as `agreed_schema`; None where it has not. Every rank calls it.

    A day that had begun goes on with the copy in the run folder, or where that is lost with the config's schema.
    """
    copy = config.run_folder / SCHEMA
    paths = [config.schema] if continues else [copy] if own.folder == copy.parent else [copy, config.schema]

    def find() -> Summed | None:
        found = (_grown(config, own, path) for path in paths)
        return next(((each, file_sums(each)) for each in found if each), None)

    found = answer_of_first(process, find)
    return _on_this_host(config, process, before._replace(step=None), *found) if found else None


def _on_this_host(config: RunConfig, process: Process, before: Before, schema: Schema, sums: dict[str, str]) -> Summed:
    """Rank 0's schema with vocabularies that this rank sees: another host may see checkpoints, or what the config names, and no run folder."""
    with agreed(process):
        if not (schema.folder / SCHEMA).is_file():
            own = own_schema(config.run_folder, before.storage, before.step)
            schema = replace(schema, folder=own.folder if own else Path(config.schema).parent)
        other = [name for name, sha256 in file_sums(schema).items() if name != SCHEMA and sums.get(name) != sha256]
        if other:
            raise InputError(f"{schema.folder}: {', '.join(other)}: other than on rank 0; give every host the same")
    return schema, sums


def _grown(config: RunConfig, own: Schema, path: str | Path) -> Schema | None:
    """The schema at `path` where it differs from the run's own copy by growth alone; None where it does not differ, or otherwise."""
    try:
        now = _typed(config, load_schema(path))
        is_growth = not _different(own, now, GROWING) and file_sums(now) != file_sums(own)
        return now if is_growth and rows_begun_anew(own, now) is not None else None
    except InputError:  # it is gone; see `schema_note`
        return None


def _typed(config: RunConfig, schema: Schema) -> Schema:
    schema.require_fitted()
    files = select_files(resolve_files(config.data.train), config.data.train_where, schema)
    return pinned(schema, column_sets(files, config.data.attempts))


def _refuse_other_schema(config: RunConfig, schema: Schema, sums: Mapping[str, str], before: Before) -> None:
    """Refuse a schema by which the rows of a checkpoint would mean something else."""
    if (before.run.get("files") or sums) == sums:
        return
    own = own_schema(config.run_folder, before.storage, before.step)
    assert own is not None
    for table, why in other_ids(own, schema).items():
        raise InputError(
            f"{config.schema}: table {table}: its rows in the checkpoint are of other ids ({why}); use the schema of the run, or begin "
            "another run with train.warm_start and the other tables in train.warm_start_tables"
        )


def start_differences(config: RunConfig, run: Mapping[str, Any], marks: Marks, also: tuple[str, ...] = ()) -> list[str]:
    """In what a checkpoint's start was another one: training files, options that fix the rows' order, and those that begin so."""
    found = [
        f"{key} = {now!r}, but {before!r} in its checkpoint"
        for key, before, now in option_differences(run, config)
        if key in ORDER or key.startswith(also)
    ]
    files = _data_difference(config, run, marks, "train")
    return [*found, f"data.train: {files}"] if files else found


def refuse_other_start(
    config: RunConfig, run: Mapping[str, Any], marks: Marks, *, begins: bool, allow_partial: bool
) -> list[str]:
    """InputError on rank 0 if an option that fixes the rows' order, or the training files differ; returns notes on what else does.

    `begins`: another day, for which the position does not count.
    """
    if not run:
        return []
    order = [] if begins else start_differences(config, run, marks)
    if order and not allow_partial:
        raise InputError(
            f"{config.run_folder}: {'; '.join(order)}: the place in the data where --resume continues means nothing then; make them equal "
            "again, or load what fits and read the data from the start with --allow-partial"
        )
    notes = [f"partial load: {what}" for what in order]
    changed = option_differences(run, config)
    for key, before, now in changed:
        if key in MEANINGS and key.startswith(("plugins", f"model.{config.model.kind}.")) and not allow_partial:
            raise InputError(
                f"{config.run_folder}: {key} = {now!r}, but {before!r} in its checkpoint, whose weights mean something else then; "
                f"add --set {key}={before}"
            )
    if others := _told(each for each in changed if each[0] not in ORDER):
        notes.append(f"note: other options than before: {others}")
    if files := _data_difference(config, run, marks, "valid"):
        notes.append(f"note: data.valid: {files}: scores, and which step is the best, do not compare with those before")
    versions = {name: (before, installed(name) or "none") for name, before in run.get("versions", {}).items()}
    if updated := [f"{name} {before} -> {now}" for name, (before, now) in versions.items() if before != now]:
        notes.append(f"note: other versions than before: {', '.join(updated)}")
    return notes


def option_differences(run: Mapping[str, Any], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, value in the checkpoint's config, value now) of each option that differs; those of places do not count."""
    before, now = dict(flat(run.get("config", {}))), dict(flat(to_toml_value(config)))
    return [
        (key, before[key], value)
        for key, value in now.items()
        if key in before and _meant(before[key], key) != _meant(value, key) and key not in PLACES
    ]


def _meant(value: Any, key: str) -> Any:
    """Of plug-ins their texts, wherever they lie."""
    return [each.partition("#")[2] for each in value] if key == "plugins" else value


def told_differences(run: Mapping[str, Any], config: RunConfig) -> str:
    """What to add to a refusal: the options that differ; an empty string where none does."""
    changed = _told(option_differences(run, config))
    return f"; options that differ: {changed}" if changed else ""


def _told(changed: Iterable[tuple[str, Any, Any]]) -> str:
    return some_of([f"{key} {before!r} -> {now!r}"[:200] for key, before, now in changed], SHOWN, ", ")


def _data_difference(config: RunConfig, run: Mapping[str, Any], marks: Marks, split: str) -> str:
    """In what the files of a split differ from the checkpoint's, in words; an empty string if in nothing that is known."""
    before, now = run.get(FACTS[split]), marks.get(split, [])
    if before is None or before == fingerprint(now):
        return ""
    with suppress(OSError, ValueError, TypeError, KeyError):  # untrusted, and only for the words
        then = json.loads((config.run_folder / DATA).read_text(encoding="utf-8"))[split]
        if fingerprint(then) == before:
            return mark_differences(then, now)
    return "other files"


def schema_note(config: RunConfig, own: Schema) -> str:
    """That the config's schema has become another than the run's own copy, with which it continues; an empty string if not, or gone."""
    try:
        differ = _different(own, load_schema(config.schema))
    except InputError:
        return ""
    if not differ:
        return ""
    return (
        f"note: schema = {config.schema!r} is another one now ({some_of(differ, SHOWN, ', ')}): this run continues with its own copy, "
        f"{config.run_folder / SCHEMA}"
    )


def _different(own: Schema, other: Schema, ignored: frozenset[str] = frozenset()) -> list[str]:
    """In which fields, other keys and vocabularies another schema is not the run's own. With keys that do not count vocabularies do not, either."""
    before, now = (_entries(each, ignored) for each in (own, other))
    # types that the run has taken from its files are no difference
    fields = [(entry, now.get(key, {})) for key, entry in before.items() if key.startswith("field ")]
    for entry, after in ((before, now), *fields):
        for key in {"type", "group_type"} - after.keys():
            entry.pop(key, None)
    return [key for key in before | now if before.get(key) != now.get(key)]


def _entries(schema: Schema, ignored: frozenset[str]) -> dict[str, Any]:
    """What a schema says, a key or field each, and the hashes of its vocabularies."""
    top = schema_to_toml(schema.standing_alone())
    with_vocabulary = {each.table_name for each in schema.features if each.vocabulary}
    growing = [entry for entry in top["fields"].values() if "vocabulary" in entry]
    for entry in (*growing, *(entry for name, entry in top.get("tables", {}).items() if name in with_vocabulary)):
        for key in ignored:
            entry.pop(key, None)
    fields = {f"field {name}": entry for name, entry in top.pop("fields").items()}
    sums = {} if ignored else file_sums(schema)
    return (
        fields | top | {name: sha256 for name, sha256 in sums.items() if not name.startswith((SCHEMA, GROWTH, WAITING))}
    )


def with_own_plan(config: RunConfig) -> RunConfig:
    """The config with the run's own plan, where the plan file that it names is gone."""
    own, named = config.run_folder / PLAN, config.sharding.plan
    if not named or Path(named).exists() or not own.is_file():
        return config
    return replace(config, sharding=replace(config.sharding, plan=str(own)))
