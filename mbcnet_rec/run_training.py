"""The composition root of training: config -> streams, model, loop, run folder, report.

RUN/config.toml  schema.toml  vocabulary/  data.json  plan.json  metrics.jsonl  checkpoints/step_N/  tb/  DONE
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mbcnet_rec.resume as resuming
from data.errors import InputError
from data.profile.grow import read_growth
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import DataFile, FileList, is_uri
from data.schema import Schema
from data.stream import Batch, ParquetStream
from data.whole_folder import write_whole
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.compatibility import load_checked, warm_start
from mbcnet_rec.checkpoints.run_folder import DONE, storage_of
from mbcnet_rec.checkpoints.run_schema import rows_begun_anew
from mbcnet_rec.checkpoints.shards import Saved
from mbcnet_rec.config import DataConfig, RunConfig
from mbcnet_rec.cpu.layers import bf16_in_hardware
from mbcnet_rec.daily import collisions, score_day, tell_collisions, tell_growth
from mbcnet_rec.lineage import LINEAGE, Day, close_day, days_of, lineage_text
from mbcnet_rec.logs.metrics_log import PROGRESSIVE, Records, json_line, written
from mbcnet_rec.logs.mlflow import MlflowSink, require_client
from mbcnet_rec.logs.progress import tell
from mbcnet_rec.model.models import schema_with_wide
from mbcnet_rec.report.page import shown, to_text
from mbcnet_rec.run_start import Start, open_folder, start_of
from mbcnet_rec.runtime.exits import StopRequest
from mbcnet_rec.runtime.lock import locked_together
from mbcnet_rec.runtime.process import Process, agreed, answer_of_first, joined_process
from mbcnet_rec.runtime.watchdog import Watchdog
from mbcnet_rec.scoring.metrics import why_no_auc
from mbcnet_rec.scoring.tasks import output_names
from mbcnet_rec.scoring.trained_run import known_best
from mbcnet_rec.training.cuda_graph import replay_dense_arch
from mbcnet_rec.training.evaluation import EvaluationStoppedError
from mbcnet_rec.training.hooks import Hooks
from mbcnet_rec.training.state import RunContext, TrainState, Watch
from mbcnet_rec.training.trainer import Trainer

Teach = Callable[[Process, ParquetStream], ParquetStream]
Report = Callable[[Path], object]


class Asked(NamedTuple):
    """How a start treats what the run folder holds."""

    resume: bool = False  # continue from its latest whole checkpoint, if there is one
    overwrite: bool = False  # replace its run, when everything that can be checked without training was checked
    allow_partial: bool = False  # load what fits of a checkpoint of another model
    # go on from its finished run with the config's training files, a day that it has not trained; or go on within that day
    continues: bool = False
    again: bool = False  # the same with files that were trained already
    progressive: bool = False  # score the day's rows before the first of them is trained


def run_training(
    config: RunConfig,
    *,
    watch: Watch | None = None,
    teach: Teach | None = None,
    report: Report | None = None,
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen)
    **asked: bool,
) -> int:
    """On every rank, train, evaluate the best checkpoint on the test rows and fill the run folder, treated as `asked` (see Asked).

    `watch` is told of every evaluation, and may end training there; `teach` adds teachers' logits to the rows (teachers.py); `report` writes the
    folder's page; tests inject faults by `hooks`. InputError: config, schema, a row or the folder is at fault. RunStoppedError: see exits.py.
    """
    settings, folder, how = config.train, config.run_folder, Asked(**asked)
    if config.model.teacher_kinds and teach is None:
        raise InputError(
            f"model.kind = {config.model.kind!r}: its teachers are trained first; start it by `mbcnet train`"
        )
    if how.resume and how.overwrite:
        raise InputError("--resume with --overwrite: the one continues the run, the other replaces it; leave one out")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # workers restarted after a fault
        how = how._replace(resume=not how.continues, overwrite=False)
    require_client(settings.tracking)
    folders, elsewhere = {"train.out": folder}, settings.checkpoint_folder
    if elsewhere and not is_uri(elsewhere):
        folders["train.checkpoint_folder"] = Path(elsewhere)
    with (
        StopRequest() as stop,
        joined_process(settings.device, settings.timeout_seconds) as process,
        locked_together(process, "train", folders),
        Watchdog(process, folder, settings.stall_seconds, hooks.on_place) as watchdog,
    ):
        start = _find_start(config, how, process)

        def open_records(state: TrainState) -> Records:
            sink = MlflowSink(start.config) if settings.tracking else None
            return Records(folder, state.step, sink, day=state.first_step)

        day, storage = {"day": len(start.days.lines)}, start.before.storage
        facts = resuming.facts_of(start.config, start.files, start.marks) | day
        context = RunContext(process, folder, storage, stop, watchdog, open_records, watch, hooks, facts)
        trainer = _build_trainer(start, how, context, teach)
        _begin(start, trainer, overwrite=how.overwrite)
        watchdog.open_stacks()
        if start.day_rows is not None and "profile" not in start.days.lines[-1]:
            _score_day(start.config, trainer, start.day_rows, start.days.lines)
        trainer.train()
        _finish(start, trainer, report)
    return 0


def _find_start(config: RunConfig, how: Asked, process: Process) -> Start:
    """Find where a run begins, and what its rows are; nothing is written or built yet. Every rank calls it."""
    folder, storage = config.run_folder, storage_of(config.train, config.run_folder)
    if config.train.cuda_graph and process.device.type != "cuda":
        raise InputError(
            f"train.cuda_graph = true: this run is on a {process.device.type}, wanted a GPU; use --set train.cuda_graph=false"
        )
    step = start_of(config, storage, process, how.resume or how.continues, how.overwrite)
    if how.continues and step is None:
        raise InputError(f"{folder}: holds no run with a checkpoint that could be continued; train it first")
    before = resuming.earlier_start(config, storage, step, process)
    config = resuming.with_versions(config, {} if how.continues else before.run, process)
    own, files = resuming.agreed_schema(config, before, process, allow_partial=how.allow_partial)
    streams = open_splits(config.data, config.train.seed, own, process)
    marks = answer_of_first(process, lambda: resuming.marks_of(streams, config.data.attempts))
    days = answer_of_first(
        process, lambda: days_of(config, step, before.run, marks, continues=how.continues, again=how.again)
    )
    day_rows: ParquetStream | None = None
    if how.progressive:  # as the model of the days before reads them
        options = config.data.eval_options(config.data.train_where)
        day_rows = ParquetStream(streams["train"].files, own, options, process.rank, process.world_size)
    schema, anew = own, None
    if days.begins and (grown := resuming.grown_schema(config, own, before, process, continues=how.continues)):
        schema, files = grown
        rows = answer_of_first(process, lambda: rows_begun_anew(own, schema)) or {}
        tables = schema_with_wide(config.model, schema).tables
        anew = {each.name: rows[name] for each in tables for name in each.feature_names if name in rows}
        streams = open_splits(config.data, config.train.seed, schema, process)
        days.lines[-1]["growth"] = read_growth(schema.folder)["tables"]
    differences = {"begins": days.begins, "allow_partial": how.allow_partial}
    notes = answer_of_first(process, lambda: resuming.refuse_other_start(config, before.run, marks, **differences))
    notes += [days.note] * bool(days.note)
    return Start(config, before, own, schema, files, marks, days, streams, day_rows, anew, notes)


def _build_trainer(start: Start, how: Asked, context: RunContext, teach: Teach | None) -> Trainer:
    """Build the model, and load what the run goes on from; what there is to say of that is added to the start's notes."""
    config, process, valid = start.config, context.process, start.streams.get("valid")
    built = build(config if start.before.step is None else resuming.with_own_plan(config), start.schema, process)
    rows = start.streams["train"]
    rows.on_rows = context.hooks.on_rows
    if config.train.cuda_graph:
        replay_dense_arch(built.model)
    if process.device.type == "cuda":
        rows.on_batch = Batch.pin_memory
    if teach is not None:
        rows = teach(process, rows)
    again = None
    if valid is not None:
        again = partial(ParquetStream, valid.files, valid.schema, valid.options, process.rank, process.world_size)
    trainer = Trainer(config.train, context, built, rows, again)
    start.notes.extend(_load(start, trainer, allow_partial=how.allow_partial))
    return trainer


def _load(start: Start, trainer: Trainer, *, allow_partial: bool) -> list[str]:
    """Load the checkpoint of a step, or for a fresh start the tables of a warm start; return what there is to say of it."""
    config, before, process, notes = start.config, start.before, trainer.process, list[str]()
    if before.step is not None:
        with ExitStack() as fetched:
            with agreed(process):
                folder = fetched.enter_context(before.storage.fetched(before.step))
                # on a disk all ranks see the files that rank 0 has just verified; others have fetched their own
                saved = Saved(folder, hashed=before.storage.root is None)
            try:
                begins = start.days.begins
                notes = trainer.restore(saved, begins_day=begins, allow_partial=allow_partial, anew=start.anew)
            except InputError as error:
                raise InputError(f"{error}{resuming.told_differences(before.run, config)}") from None
        if not allow_partial and before.run.get("files") and (note := resuming.schema_note(config, start.schema)):
            notes.append(note)
    elif config.train.warm_start:
        notes = [warm_start(config.train, trainer.built, start.schema, process)]
    return notes


def _begin(start: Start, trainer: Trainer, *, overwrite: bool) -> None:
    """Write what the run folder says of a run before its first step, and tell what is about to be trained."""
    day, process = start.days.lines[-1], trainer.process
    if start.before.step is None or start.days.begins:
        day["first_step"] = trainer.state.step
    # no rank writes into the folder before the files of an earlier run are out of the way
    answer_of_first(process, lambda: open_folder(start, trainer.built.plan, overwrite=overwrite))
    if process.is_first:
        for line in (
            *start.notes,
            opening_line(start, process, trainer.total_steps),
            f"data: {_counts(start.streams)}",
        ):
            tell(line)
        if "growth" in day and start.days.begins:
            tell_growth(trainer, day["growth"])


def _finish(start: Start, trainer: Trainer, report: Report | None) -> None:
    """Score the test rows, close the day and the run, write its page, and tell what came of it."""
    folder, process, metrics = start.config.run_folder, trainer.process, dict[str, Any]()
    shares = collisions(trainer.built, start.schema)
    if process.is_first:  # before the test rows are scored: a log that is opened again begins at the test's line
        tell_collisions(trainer, shares)
    try:
        metrics = _test(trainer, start.streams.get("test"))
    except InputError as error:
        trainer.faults.append(f"data.test: {error}")
    if process.is_first:
        with written(folder):
            close_day(folder, start.days.lines, start.streams["train"].num_rows, trainer.state, metrics)
            write_whole(folder / DONE, json_line({"step": trainer.state.step, **metrics}))
        has_report = _reported(folder, report)
        tell(closing_lines(start.config, start.schema, trainer, metrics, has_report))
    if trainer.faults:
        raise InputError(
            f"{trainer.faults[0]}; the run is done and its model is whole: fix the rows, then `mbcnet evaluate {folder}`"
        )


def _reported(folder: Path, report: Report | None) -> bool:
    """Write the run's page and return whether it was written; why not is a note, since the run itself is done."""
    if report is None:
        return False
    try:
        report(folder)
    except Exception as error:  # pictures are drawn by a library that can fail in many ways
        tell(f"note: {folder}: its report was not written ({type(error).__name__}: {error})")
        return False
    return True


def open_splits(config: DataConfig, seed: int, schema: Schema, process: Process) -> dict[str, ParquetStream]:
    """On every rank, open the footers of each split; InputError if a path leads nowhere, or a file does not fit the schema."""
    named = {
        "train": (config.train, config.train_options(seed)),
        "valid": (config.valid, config.eval_options(config.valid_where)),
        "test": (config.test, config.eval_options(config.test_where)),
    }
    with agreed(process):
        return {
            name: ParquetStream(resolve_files(paths), schema, options, process.rank, process.world_size)
            for name, (paths, options) in named.items()
            if paths
        }


def _counts(streams: Mapping[str, ParquetStream]) -> str:
    """How many rows and files each split has; what was left out beside several is said once."""
    told: set[DataFile] = set()
    counts = []
    for split, stream in streams.items():
        new = FileList(stream.files, [each for each in stream.files.others if each not in told])
        told |= {*new.others}
        counts.append(f"{split} {stream.num_rows:,} rows of {files_in_words(new)}")
    return ", ".join(counts)


def _test(trainer: Trainer, stream: ParquetStream | None) -> dict[str, Any]:
    """Score the best checkpoint, or the last weights without validation, on the test rows; log it."""
    if stream is None:
        return {}
    state, process = trainer.state, trainer.process
    if state.best_step >= 0 and state.best_step != state.step:
        with trainer.context.storage.fetched(state.best_step) as folder:
            saved = Saved(folder)
            load_checked(saved, trainer.built, process)
            trainer.dense.restore(saved, state.best_step)
    try:
        metrics = trainer.evaluate(stream)
    except EvaluationStoppedError:
        raise trainer.preempted() from None
    if process.is_first:
        with closing(trainer.context.open_records(state)) as records:
            records.add(state.best_step if state.best_step >= 0 else state.step, "test", metrics)
    return metrics


def _score_day(config: RunConfig, trainer: Trainer, rows: ParquetStream, days: list[Day]) -> None:
    """Score the rows of the day that begins, by the weights of the days before; log what was found, and the alarms."""
    try:
        days[-1] |= score_day(trainer, rows, days[:-1])
    except EvaluationStoppedError:
        raise trainer.preempted() from None
    if not trainer.process.is_first:
        return
    found = days[-1]["progressive"]
    with written(config.run_folder):
        write_whole(config.run_folder / LINEAGE, lineage_text(days))
    if found:
        with closing(trainer.context.open_records(trainer.state)) as records:
            records.add(trainer.state.step, PROGRESSIVE, found)
        tell(f"{days[-1]['name']}, before it is trained: AUC {shown(found['auc'])}, NE {shown(found['ne'])}")
    for alarm in days[-1]["alarms"]:
        tell(f"ALARM: {days[-1]['name']}: {alarm}")


def opening_line(start: Start, process: Process, total_steps: int) -> str:
    """What is about to be trained, on one line, and what to know of it, a line each."""
    config, schema, device = start.config, start.schema, process.device.type
    rows = sum(table.num_embeddings for table in schema.tables)
    begin = "from the start" if start.before.step is None else f"from step {start.before.step}"
    line = (
        f"{config.name}: {config.model.kind} on {len(schema.features)} fields of {schema.name}, "
        f"{len(schema.tables)} tables of {rows:,} rows, {process.world_size} processes on "
        f"{device}, {total_steps} steps of {config.data.batch_size} rows, {begin}"
    )
    return "\nnote: ".join([line, *warnings_of(config, device, bf16_in_hardware())])


def warnings_of(config: RunConfig, device: str, has_bf16: bool) -> list[str]:
    """What a user may not expect of a config. `has_bf16`: whether this CPU multiplies bf16 without emulation."""
    found = []
    if config.train.autocast == "none" and device == "cuda":
        found.append(
            "train.autocast = 'none': matrix products in float32, without tensor cores, several times slower than with train.autocast = 'bf16'"
        )
    correction = config.data.train_options(config.train.seed).logit_correction
    if correction:
        found.append(
            f"data.keep_negatives = {config.data.keep_negatives} without weights makes probabilities too high: add {correction:.4f} to "
            "logits, or set data.negative_weights = 'importance'"
        )
    if config.train.autocast == "bf16" and device == "cpu" and not has_bf16:
        found.append(
            "train.autocast = 'bf16', and this processor has no fast bf16 products: a step takes longer than with float32, several times as long "
            "where they are emulated; use --set train.autocast=none"
        )
    return found


def closing_lines(
    config: RunConfig, schema: Schema, trainer: Trainer, metrics: dict[str, Any], has_report: bool
) -> str:
    """What a run ends with: test scores beside the best reachable if known, where everything is, and what to try next."""
    outputs: dict[str, tuple[float, float]] = {}
    for name in output_names(trainer.built.tasks, trainer.built.branch_names) if metrics else ():
        own = f"/{name}" if name else ""
        outputs[name or "fused"] = metrics[f"auc{own}"], metrics[f"log_loss{own}"]
    if metrics and (best := known_best(schema, "test", metrics["rows"])):
        outputs["best reachable"] = best
    invalid = {key.removeprefix("invalid/"): n for key, n in metrics.items() if key.startswith("invalid/")}
    return to_text(
        "closing.txt",
        metrics=metrics,
        outputs=outputs,
        reason=why_no_auc(metrics) if metrics else "",
        invalid=", ".join(f"{name} {count:,}" for name, count in invalid.items()),
        state=trainer.state,
        judged_by=trainer.judge.title,
        folder=config.run_folder,
        has_report=has_report,
        plain="" if not trainer.built.branch_names else "shared_bottom" if trainer.built.tasks else "dnn",
    )
