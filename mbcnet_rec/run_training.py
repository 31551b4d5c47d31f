"""The composition root of training: config -> streams, model, loop, run folder, report.

RUN/config.toml  schema.toml  vocabulary/  data.json  plan.json  metrics.jsonl  checkpoints/step_N/  tb/  DONE
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import mbcnet_rec.resume as resuming
from data.errors import InputError
from data.profile.grow import read_growth
from data.reading.files import files_in_words, resolve_files
from data.reading.storage import DataFile, FileList, is_uri
from data.schema import Schema
from data.stream import Batch, ParquetStream
from data.whole_folder import write_whole
from mbcnet_rec.build import build
from mbcnet_rec.checkpoints.compatibility import RowsAnew, load_checked, warm_start
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
from mbcnet_rec.run_start import Beginning, open_folder, refuse_contradiction, start_of
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
log = logging.getLogger(__name__)


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_partial: bool = False,
    continues: bool = False,
    again: bool = False,
    progressive: bool = False,
    watch: Watch | None = None,
    teach: Teach | None = None,
    report: Report | None = None,
    hooks: Hooks = Hooks(),  # noqa: B008 (frozen)
) -> int:
    """Train, evaluate the best checkpoint on the test rows, and fill the run folder. Every rank calls it.

    Args:
        config: of the run.
        resume: continue from the latest whole checkpoint of the run folder, if there is one.
        overwrite: replace an earlier run of the same folder, when everything that can be checked without training was checked.
        allow_partial: load what fits of a checkpoint of another model.
        continues: go on from the finished run of the folder with the config's training files, a day that it has not trained; or go on
            within that day.
        again: the same with files that were trained already.
        progressive: score the day's rows before the first of them is trained.
        watch: is told of every evaluation; may end training there.
        teach: adds teachers' logits to the training rows; only for a model that has teachers, see teachers.py.
        report: writes the page of the finished run folder, see report/run_report.py; none is written without it.
        hooks: where tests inject faults.

    Raises:
        InputError: the config, the schema, a row or the run folder is at fault.
        RunStoppedError: the run ends before its last step; see runtime/exits.py.
    """
    if config.model.teacher_kinds and teach is None:
        raise InputError(
            f"model.kind = {config.model.kind!r}: its teachers are trained first; start it by `mbcnet train`"
        )
    refuse_contradiction(resume, overwrite)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        resume, overwrite = not continues, False  # workers restarted after a fault continue from the last checkpoint
    settings, folder = config.train, config.run_folder
    require_client(settings.tracking)
    with (
        StopRequest() as stop,
        joined_process(settings.device, settings.timeout_seconds) as process,
        locked_together(process, "train", _own_folders(config)),
        Watchdog(process, folder, settings.stall_seconds, hooks.on_place) as watchdog,
    ):
        if settings.cuda_graph and process.device.type != "cuda":
            raise InputError(
                f"train.cuda_graph = true: this run is on a {process.device.type}, wanted a GPU; use --set train.cuda_graph=false"
            )

        def open_records(state: TrainState) -> Records:
            sink = MlflowSink(config) if settings.tracking else None
            return Records(folder, state.step, sink, day=state.first_step)

        storage = storage_of(settings, folder)
        start = start_of(config, storage, process, resume or continues, overwrite)
        if continues and start is None:
            raise InputError(f"{folder}: holds no run with a checkpoint that could be continued; train it first")
        before = resuming.earlier_start(config, storage, start, process)
        config = resuming.with_versions(config, {} if continues else before.run, process)
        own, files = resuming.agreed_schema(config, before, process, allow_partial=allow_partial)
        streams = open_splits(config.data, settings.seed, own, process)
        marks = answer_of_first(process, lambda: resuming.marks_of(streams, config.data.attempts))
        days = answer_of_first(
            process, lambda: days_of(config, start, before.run, marks, continues=continues, again=again)
        )
        day_rows: ParquetStream | None = None
        if progressive:  # as the model of the days before reads them
            options = config.data.eval_options(config.data.train_where)
            day_rows = ParquetStream(streams["train"].files, own, options, process.rank, process.world_size)
        schema, anew = own, None
        if days.begins and (grown := resuming.grown_schema(config, own, before, process, continues=continues)):
            schema, files = grown
            anew = answer_of_first(process, lambda: rows_begun_anew(own, schema))
            streams = open_splits(config.data, settings.seed, schema, process)
            days.lines[-1]["growth"] = read_growth(schema.folder)["tables"]
        train_rows, counts = streams["train"], _counts(streams)
        facts = resuming.facts_of(config, files, marks) | {"day": len(days.lines)}
        context = RunContext(process, folder, storage, stop, watchdog, open_records, watch, hooks, facts)
        notes = answer_of_first(
            process,
            lambda: resuming.refuse_other_start(
                config, before.run, marks, begins=days.begins, allow_partial=allow_partial
            ),
        )
        built = build(config if start is None else resuming.with_own_plan(config), schema, process)
        train_rows.on_rows = hooks.on_rows
        if settings.cuda_graph:
            replay_dense_arch(built.model)
        if process.device.type == "cuda":
            train_rows.on_batch = Batch.pin_memory
        if teach is not None:
            train_rows = teach(process, train_rows)
        valid = partial(opened_again, streams["valid"]) if "valid" in streams else None
        trainer = Trainer(settings, context, built, train_rows, valid)
        if anew is not None:
            tables = schema_with_wide(config.model, schema).tables
            anew = {each.name: anew[name] for each in tables for name in each.feature_names if name in anew}
        notes += [days.note] * bool(days.note)
        notes += _load(config, schema, trainer, before, allow_partial, days.begins, anew)
        if start is None or days.begins:
            days.lines[-1]["first_step"] = trainer.state.step
        # no rank writes into the folder before the files of an earlier run are out of the way
        begun = Beginning(config, schema, own, files, marks, days, built.plan)
        answer_of_first(process, lambda: open_folder(begun, before, overwrite=overwrite))
        if process.is_first:
            for note in notes:
                tell(note)
            tell(opening_line(config, schema, process, trainer.total_steps, start))
            tell(f"data: {counts}")
            if "growth" in days.lines[-1] and days.begins:
                tell_growth(trainer, days.lines[-1]["growth"])
        watchdog.open_stacks()
        if day_rows is not None and "profile" not in days.lines[-1]:
            _score_day(config, trainer, day_rows, days.lines)
        trainer.train()
        shares = collisions(built, schema)
        if process.is_first:  # before the test rows are scored: a log that is opened again begins at the test's line
            tell_collisions(trainer, shares)
        metrics: dict[str, Any] = {}
        try:
            metrics = _test(trainer, streams.get("test"))
        except InputError as error:
            trainer.faults.append(f"data.test: {error}")
        if process.is_first:
            with written(folder):
                close_day(folder, days.lines, streams["train"].num_rows, trainer.state, metrics)
                write_whole(folder / DONE, json_line({"step": trainer.state.step, **metrics}))
            has_report = _reported(folder, report)
            tell(closing_lines(config, schema, trainer, metrics, has_report))
        if trainer.faults:
            raise InputError(
                f"{trainer.faults[0]}; the run is done and its model is whole: fix the rows, then `mbcnet evaluate {folder}`"
            )
    return 0


def _reported(folder: Path, report: Report | None) -> bool:
    """Write the run's page and return whether it was written; a failure is a warning, since the run itself is done."""
    if report is None:
        return False
    try:
        report(folder)
    except Exception as error:  # pictures are drawn by a library that can fail in many ways
        log.warning("%s: its report was not written (%s: %s)", folder, type(error).__name__, error)
        return False
    return True


def _load(
    config: RunConfig,
    schema: Schema,
    trainer: Trainer,
    before: resuming.Before,
    allow_partial: bool,
    begins_day: bool,
    anew: RowsAnew | None,
) -> list[str]:
    """Load the checkpoint of a step, or for a fresh start the tables of a warm start; return what there is to say of it."""
    process, storage, notes = trainer.process, before.storage, list[str]()
    if before.step is not None:
        with ExitStack() as fetched:
            with agreed(process):
                folder = fetched.enter_context(storage.fetched(before.step))
                # on a disk all ranks see the files that rank 0 has just verified; others have fetched their own
                saved = Saved(folder, hashed=storage.root is None)
            try:
                notes = trainer.restore(saved, begins_day=begins_day, allow_partial=allow_partial, anew=anew)
            except InputError as error:
                raise InputError(f"{error}{resuming.told_differences(before.run, config)}") from None
        if not allow_partial and before.run.get("files") and (note := resuming.schema_note(config, schema)):
            notes.append(note)
    elif config.train.warm_start:
        notes = [warm_start(config.train, trainer.built, schema, process)]
    return notes


def open_splits(config: DataConfig, seed: int, schema: Schema, process: Process) -> dict[str, ParquetStream]:
    """Open each split that the config names; every rank calls it. Reads footers only, so that faults show before anything is built.

    InputError if a path leads nowhere, or a file does not fit the schema.
    """
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


def opened_again(stream: ParquetStream) -> ParquetStream:
    """The same rows, from the first one."""
    return ParquetStream(stream.files, stream.schema, stream.options, stream.rank, stream.world_size)


def _counts(streams: Mapping[str, ParquetStream]) -> str:
    """How many rows and files each split has; what was left out beside several is said once."""
    told: set[DataFile] = set()
    counts = []
    for split, stream in streams.items():
        new = FileList(stream.files, [each for each in stream.files.others if each not in told])
        told |= {*new.others}
        counts.append(f"{split} {stream.num_rows:,} rows of {files_in_words(new)}")
    return ", ".join(counts)


def _own_folders(config: RunConfig) -> dict[str, Path]:
    """The folders in which no other process may write meanwhile: of the run, and of its checkpoints where they lie elsewhere."""
    folders, elsewhere = {"train.out": config.run_folder}, config.train.checkpoint_folder
    if elsewhere and not is_uri(elsewhere):
        folders["train.checkpoint_folder"] = Path(elsewhere)
    return folders


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


def opening_line(config: RunConfig, schema: Schema, process: Process, total_steps: int, start: int | None) -> str:
    """What is about to be trained, on one line, and what to know of it, a line each."""
    rows = sum(table.num_embeddings for table in schema.tables)
    begin = "from the start" if start is None else f"from step {start}"
    device = process.device.type
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
