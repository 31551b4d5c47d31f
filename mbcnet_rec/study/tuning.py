"""Tuning: Optuna searches ranges that a TOML file gives (docs/studies.md), for each model with the same number of trials.

A key `model.KIND` or below is drawn only for models of that kind. A trial's values are drawn by its number's own seed, and each is a task of
an engine: its workers share one study, Optuna's journal (OUT/trials/KIND/journal.log), which has what the trials depend on, too. A later
start with the same space, config, schema and data continues where it stood. The winner, by validation AUC, is written as a whole config
(OUT/KIND.toml).
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from data.engine import HERE, Engine, meet, run_tasks
from data.errors import InputError, first_line
from data.schema.bounds import Bounded, bounded
from data.schema.parse import parse_dataclass, read_toml, to_toml_value, unknown_key
from data.whole_folder import write_whole
from mbcnet_rec.checkpoints.run_folder import DONE
from mbcnet_rec.config import RunConfig, apply_override, config_of, config_text, load_config
from mbcnet_rec.logs.metrics_log import METRICS
from mbcnet_rec.model.models import fit_widths
from mbcnet_rec.runtime.exits import no_room
from mbcnet_rec.runtime.lock import locked
from mbcnet_rec.runtime.ranks import alone, refuse_ranks
from mbcnet_rec.study import runs

SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
DEPENDS = "depends_on"  # user attribute of a study
# user attributes of a trial: which of the search's it is, and what came of it; of one that was interrupted there are several
NUMBER, OUTCOME = "number", "outcome"
JOURNAL = "journal.log"


@dataclass(frozen=True)
class Range:
    """What one key may be: choices, or numbers from low to high, both included, whole where both are."""

    choices: tuple[Any, ...] = ()  # TOML values
    low: int | float = math.nan
    high: int | float = math.nan
    log: bool = False  # draw evenly on the logarithm

    def __post_init__(self) -> None:
        has_range = self.low <= self.high and (self.low > 0 or not self.log)
        if bool(self.choices) == has_range:
            raise InputError(
                f"low = {self.low}, high = {self.high}, choices = {list(self.choices)}: wanted one or more choices, or "
                "low <= high, and low > 0 with log; change them"
            )

    def __str__(self) -> str:
        numbers = f"{self.low} to {self.high}{' log' if self.log else ''}"
        return json.dumps(self.choices) if self.choices else numbers


@dataclass(frozen=True)
class Search(Bounded):
    """What is tuned, and how hard."""

    space: dict[str, Range]  # dotted key of the config -> its range
    trials: int = bounded(12, at_least=1)  # of each model
    sampler: Literal["tpe", "random"] = "tpe"  # tpe learns from earlier trials

    def space_of(self, kind: str) -> dict[str, Range]:
        """The keys that matter to models of a kind: model.KIND.* does to that kind only."""
        others = {key for key in self.space if key.startswith("model.") and key.split(".")[1] != kind}
        return {key: range_ for key, range_ in self.space.items() if key not in others}


def load_search(path: Path, trials: int = 0) -> Search:
    """Read a space file; InputError if it is faulty. `trials`, unless 0, stands in for the file's."""
    table = read_toml(path)
    space = table.get("space")
    if not isinstance(space, dict) or not space:
        raise InputError(f"{path}: [space] is missing or empty; wanted at least one key with its range")
    for key, value in space.items():
        if isinstance(value, dict) and any(isinstance(each, dict) for each in value.values()):
            raise InputError(f"{path}: space.{key} = {value}: a dotted key is written in quotes; write them")
    return parse_dataclass(Search, table | ({"trials": trials} if trials else {}), str(path))


def check_keys(search: Search, config: RunConfig, kind: str) -> None:
    """Raise InputError where the config does not have a key, before a trial is drawn."""
    known = to_toml_value(config)
    for key, range_ in search.space_of(kind).items():
        inner = {name for choice in range_.choices if isinstance(choice, dict) for name in choice}
        for path in [f"{key}.{name}" for name in sorted(inner)] or [key]:
            table = known
            for name in path.split("."):
                table = table if isinstance(table, dict) else {}
                if name not in table:
                    raise InputError(f"space: {unknown_key(path, name, table)}")
                table = table[name]


def draw_overrides(trial: Trial, search: Search, kind: str) -> list[str]:
    """Draw a value of each key that matters; return overrides `key=value` whose values are TOML."""
    overrides = []
    for key, range_ in search.space_of(kind).items():
        if range_.choices:
            texts = [json.dumps(each) for each in range_.choices]
            value = json.loads(trial.suggest_categorical(key, texts))  # type: ignore[arg-type]
        elif isinstance(range_.low, int) and isinstance(range_.high, int):
            value = trial.suggest_int(key, range_.low, range_.high, log=range_.log)
        else:
            value = trial.suggest_float(key, range_.low, range_.high, log=range_.log)
        chosen = value if isinstance(value, dict) else {"": value}
        overrides += [f"{key}.{name}".rstrip(".") + f"={json.dumps(each)}" for name, each in chosen.items()]
    return overrides


def with_overrides(config: RunConfig, overrides: Sequence[str], source: str) -> RunConfig:
    """Apply `key=value` overrides to a config; InputError, which names their `source`, if they make no valid config."""
    table = to_toml_value(config)
    for override in overrides:
        apply_override(table, override)
    return config_of(table, source)


class TrialTask(NamedTuple):
    """One trial for a worker."""

    result: Path  # file of what came of it in words, beside the journal
    number: int
    base: RunConfig
    search: Search
    out: Path
    train: runs.Train
    known: runs.Known


def tune_model(
    config: RunConfig, search: Search, kind: str, out: Path, train: runs.Train = runs.train_one, engine: Engine = HERE
) -> tuple[Path, FrozenTrial] | None:
    """Run a model's missing trials, all with the config's seed, in `out`; its winner's config file and trial, on torchrun's first rank.

    InputError if earlier trials were of another space, config, schema or data, or none came to an end.
    """
    folder, known = out / "trials" / kind, {}
    if engine.is_first:
        open_study(folder, kind)
    meet(engine, folder)
    study, base = open_study(folder, kind), base_config(config, kind, out)
    space = {key: str(each) for key, each in search.space_of(kind).items()}
    facts = {"space": space, "sampler": search.sampler, **runs.dependencies(base, known)}
    if not study.trials:
        study.set_user_attr(DEPENDS, json.dumps(facts))
    elif words := runs.differences(json.loads(study.user_attrs.get(DEPENDS, "{}")), facts):
        raise InputError(
            f"{folder}: its {len(study.trials)} trials had other settings or data ({words}); change that back to continue, or choose another --out"
        )
    paths = [folder / f"{number}.txt" for number in range(search.trials)]
    tasks = {path: TrialTask(path, number, base, search, out, train, known) for number, path in enumerate(paths)}
    before = {path for path in paths if path.exists()}
    with tqdm(total=search.trials, desc=f"tune {kind}", unit="trial", disable=not engine.is_first) as bar:
        for path in run_tasks(engine, run_trial, tasks, last=True, lost=lambda path: give_up(tasks[path])):
            if engine.is_first and path not in before:
                told = path.read_text(encoding="utf-8")
                bar.write(f"{kind}: trial {tasks[path].number + 1} of {search.trials}: {told}")
            bar.update(1)
    meet(engine, folder)
    if not engine.is_first:
        return None
    ended = study.get_trials(states=(TrialState.COMPLETE,))
    if not ended:
        raise InputError(f"{folder}: none of the {search.trials} trials of {kind} came to an end; see {out}/runs/*.log")
    winner = max(ended, key=lambda trial: (trial.value, -trial.user_attrs[NUMBER]))
    path = out / f"{kind}.toml"
    best = with_overrides(base, winner.user_attrs["overrides"], str(path))
    write_whole(path, config_text(best))
    return path, winner


def open_study(folder: Path, kind: str) -> optuna.Study:
    """Open or begin the study of a kind of model; InputError if the file is damaged, or of another version of Optuna."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / JOURNAL
    was_there = file.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.create_study(
            study_name=kind,
            storage=JournalStorage(JournalFileBackend(str(file))),
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        )
    except Exception as error:  # of Optuna, and of the file below it
        if not was_there:
            file.unlink(missing_ok=True)
        if no_room(error):
            raise
        raise InputError(f"{file}: is no study of Optuna's ({first_line(error)}); choose another --out") from None


def base_config(config: RunConfig, kind: str, out: Path) -> RunConfig:
    """Make what the draws of a kind override; InputError if there is no such kind, or a winner's file is faulty.

    Widths that the config leaves open are those of its MBCnet. EnKD's teachers, where tuned in the same folder, are those winners.
    """
    config = with_overrides(config, [f"model.kind={kind}"], f"--models {kind}")
    model = fit_widths(config.model)
    for teacher in model.teacher_kinds:
        if (out / f"{teacher}.toml").is_file():
            winner = load_config(out / f"{teacher}.toml").model
            model = replace(model, **{teacher: getattr(winner, teacher)})
    return replace(config, model=model)


def run_trial(task: TrialTask) -> None:
    """Draw, train and score one trial, and write what came of it in words; an interrupted one is tried again, and the two count once.

    It is pruned where its validation AUC lies below the median of those that have ended, at the same evaluation.
    """
    study = open_study(task.result.parent, task.base.model.kind)
    earlier = tries_of(study, task.number)
    if earlier and earlier[-1].state.is_finished() and OUTCOME in earlier[-1].user_attrs:
        write_whole(task.result, earlier[-1].user_attrs[OUTCOME])  # it was killed in between
        return
    fail(study, earlier)
    study.sampler = SAMPLERS[task.search.sampler](seed=task.base.train.seed + task.number)
    trial = study.ask()
    trial.set_user_attr(NUMBER, task.number)
    overrides = draw_overrides(trial, task.search, task.base.model.kind)
    trial.set_user_attr("overrides", overrides)
    words, auc, state = _outcome(trial, overrides, task)
    told = f"{words}: {', '.join(overrides)}"
    trial.set_user_attr(OUTCOME, told)
    study.tell(trial, auc, state)
    write_whole(task.result, told)


def tries_of(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """A trial of the search as Optuna has it, one for each time that it was begun."""
    return [each for each in study.get_trials(deepcopy=False) if each.user_attrs.get(NUMBER) == number]


def fail(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Mark those that nobody works on any more."""
    for each in trials:
        if not each.state.is_finished():
            study.tell(each.number, state=TrialState.FAIL)


def give_up(task: TrialTask) -> None:
    """Mark a trial whose worker was lost again and again as failed."""
    study = open_study(task.result.parent, task.base.model.kind)
    fail(study, tries_of(study, task.number))
    write_whole(task.result, f"failed ({runs.LOST})")


def _outcome(trial: Trial, overrides: list[str], task: TrialTask) -> tuple[str, float | None, TrialState | None]:
    try:
        config = with_overrides(task.base, overrides, "the space")
        config = runs.place_run(config, task.base.train.seed, task.out, task.known)
    except InputError as error:
        return f"no valid config ({error})", None, TrialState.FAIL
    run, pruned = runs.Run(task.base.model.kind, config.train.seed, config), False

    def watch(step: int, auc: float) -> bool:
        nonlocal pruned
        trial.report(auc, step)
        pruned = trial.should_prune()
        if pruned:
            (run.folder / runs.PRUNED).touch()
        return pruned

    with alone():
        failure = "" if run.done else task.train(config, watch)
    if failure:
        return f"failed ({failure})", None, TrialState.FAIL
    if pruned:
        (run.folder / DONE).unlink()
        return "pruned", None, TrialState.PRUNED
    found = runs.scores(run.folder, ("valid",))
    if found["note"] == runs.NO_NUMBERS:
        return f"failed ({runs.NO_NUMBERS})", None, TrialState.FAIL
    if found["note"]:
        raise InputError(f"{run.folder}/{METRICS}: {found['note']}")
    return f"valid AUC {found['auc']:.4f}", found["auc"], None


def tune_models(
    config: RunConfig,
    search: Search,
    models: Sequence[str],
    out: Path,
    train: runs.Train = runs.train_one,
    engine: Engine = HERE,
) -> int:
    """Tune each model with the same number of trials; say what won and where it is. InputError if a kind or a key is unknown."""
    if engine.name == "local":
        refuse_ranks("tune")
    kinds = models or (config.model.kind,)
    for kind in kinds:  # a mistake shows before the first model has trained for an hour
        check_keys(search, with_overrides(config, [f"model.kind={kind}"], f"--models {kind}"), kind)
    lines = []
    with locked(out, "tune") if engine.is_first else nullcontext():
        for kind in kinds:
            won = tune_model(config, search, kind, out, train, engine)
            if won is not None:
                path, winner = won
                number = winner.user_attrs[NUMBER] + 1
                trials = max(search.trials, number)
                lines.append(f"{kind}: valid AUC {winner.value:.4f} by trial {number} of {trials}: {path}")
    if lines:
        print("\n".join(lines))
        print(f"next: mbcnet train --config {path}")
        print(f"      mbcnet study table3 --config {path} --tuned {out} --models {' '.join(kinds)} --seeds 5")
    return 0
