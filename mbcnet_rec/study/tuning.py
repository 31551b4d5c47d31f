"""Tuning: Optuna searches ranges that a TOML file gives, for each model with the same number of trials.

    trials = 12                                                  # of each model
    sampler = "tpe"                                              # or "random"
    [space]
    "optim.dense_lr" = { low = 3e-4, high = 3e-3, log = true }
    "model.dcnv2.cross.num_layers" = { low = 1, high = 4 }
    "model.mbcnet" = { choices = [                               # values that only fit together: one choice is a table
        { branch_dim = 32, "deep.hidden" = [64, 32] },
        { branch_dim = 64, "deep.hidden" = [128, 64] },
    ] }

A key `model.KIND` or below is drawn only for models of that kind. A study is kept in SQLite (OUT/KIND.db) with what its trials depend on:
a later start with the same space, config, schema and data continues where it stood. The winner, by validation AUC, is written as a whole
config (OUT/KIND.toml).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

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
from mbcnet_rec.runtime.ranks import refuse_ranks
from mbcnet_rec.study.dependencies import Known, dependencies, differences
from mbcnet_rec.study.runs import NO_NUMBERS, PRUNED, Run, Train, place_run, scores, train_one

SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
DEPENDS = "depends_on"  # user attribute of a study
AGAIN = "another_try_of"  # user attribute of a trial: the number of the one that was interrupted
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Range:
    """What one key may be: choices, or numbers from low to high, both included, whole where both are."""

    choices: tuple[Any, ...] = ()  # TOML values
    low: int | float = math.nan
    high: int | float = math.nan
    log: bool = False  # draw evenly on the logarithm

    def __post_init__(self) -> None:
        """Raise InputError where it is neither, or both."""
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


def tune_model(
    config: RunConfig, search: Search, kind: str, out: Path, train: Train = train_one
) -> tuple[Path, FrozenTrial]:
    """Run the trials of one model that are still missing, all with the config's seed; return the winner's config file, and its trial.

    The study file, the trials' runs and the winner lie in `out`. InputError if earlier trials were of another space, config, schema or
    data, or none came to an end.
    """
    out.mkdir(parents=True, exist_ok=True)
    known: Known = {}
    file = out / f"{kind}.db"
    study = open_study(file, kind)
    base = base_config(config, kind, out)
    space = {key: str(each) for key, each in search.space_of(kind).items()}
    facts = {"space": space, "sampler": search.sampler, **dependencies(base, known)}
    if not study.trials:
        study.set_user_attr(DEPENDS, json.dumps(facts))
    elif words := differences(json.loads(study.user_attrs.get(DEPENDS, "{}")), facts):
        raise InputError(
            f"{file}: its {len(study.trials)} trials had other settings or data ({words}); change that back to continue, or choose another --out"
        )
    # Trials of a start that was killed get another try with the values that they had drawn; the two count once.
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
    ended = len(study.get_trials(states=FINISHED)) - sum(AGAIN in trial.user_attrs for trial in study.trials)
    with tqdm(total=search.trials, initial=ended, desc=f"tune {kind}", unit="trial") as bar:
        for number in range(ended, search.trials):
            study.sampler = SAMPLERS[search.sampler](seed=config.train.seed + number)
            outcome = run_trial(study, base, search, out, train, known)
            bar.write(f"{kind}: trial {number + 1} of {search.trials}: {outcome}")
            bar.update(1)
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise InputError(f"{file}: none of the {search.trials} trials of {kind} came to an end; see {out}/runs/*.log")
    winner = study.best_trial
    path = out / f"{kind}.toml"
    best = with_overrides(base, winner.user_attrs["overrides"], str(path))
    write_whole(path, config_text(best))
    return path, winner


def open_study(file: Path, kind: str) -> optuna.Study:
    """Open or begin the study of a kind of model; InputError if the file is damaged, or of another version of Optuna."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    was_there = file.exists()
    try:
        return optuna.create_study(
            study_name=kind,
            storage=f"sqlite:///{file}",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        )
    except Exception as error:  # of Optuna, and of the database below it
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


def run_trial(study: optuna.Study, base: RunConfig, search: Search, out: Path, train: Train, known: Known) -> str:
    """Draw, train and score one trial; return what came of it in words.

    A trial whose validation AUC lies below the median of the earlier ones at the same evaluation is pruned.
    """
    trial = study.ask()
    overrides = draw_overrides(trial, search, base.model.kind)
    trial.set_user_attr("overrides", overrides)

    def ended(words: str, auc: float | None = None, state: TrialState | None = None) -> str:
        study.tell(trial, auc, state)
        return f"{words}: {', '.join(overrides)}"

    try:
        config = place_run(with_overrides(base, overrides, "the space"), base.train.seed, out, known)
    except InputError as error:
        return ended(f"no valid config ({error})", state=TrialState.FAIL)
    run, pruned = Run(base.model.kind, config.train.seed, config), False

    def watch(step: int, auc: float) -> bool:
        nonlocal pruned
        trial.report(auc, step)
        pruned = trial.should_prune()
        if pruned:
            (run.folder / PRUNED).touch()
        return pruned

    failure = "" if run.done else train(config, watch)
    if failure:
        return ended(f"failed ({failure})", state=TrialState.FAIL)
    if pruned:
        (run.folder / DONE).unlink()
        return ended("pruned", state=TrialState.PRUNED)
    found = scores(run.folder, ("valid",))
    if found["note"] == NO_NUMBERS:
        return ended(f"failed ({NO_NUMBERS})", state=TrialState.FAIL)
    if found["note"]:
        raise InputError(f"{run.folder}/{METRICS}: {found['note']}")
    return ended(f"valid AUC {found['auc']:.4f}", found["auc"])


def tune_models(config: RunConfig, search: Search, models: Sequence[str], out: Path, train: Train = train_one) -> int:
    """Tune each model with the same number of trials; say what won and where it is. InputError if a kind or a key is unknown."""
    refuse_ranks("tune")
    kinds = models or (config.model.kind,)
    for kind in kinds:  # a mistake shows before the first model has trained for an hour
        check_keys(search, with_overrides(config, [f"model.kind={kind}"], f"--models {kind}"), kind)
    lines = []
    with locked(out, "tune"):
        for kind in kinds:
            path, winner = tune_model(config, search, kind, out, train)
            trials = max(search.trials, winner.number + 1)
            lines.append(f"{kind}: valid AUC {winner.value:.4f} by trial {winner.number + 1} of {trials}: {path}")
    print("\n".join(lines))
    print(f"next: mbcnet train --config {path}")
    print(f"      mbcnet study table3 --config {path} --tuned {out} --models {' '.join(kinds)} --seeds 5")
    return 0
