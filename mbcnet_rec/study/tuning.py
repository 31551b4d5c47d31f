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

A key `model.KIND` or below is drawn only for models of that kind. A study is kept in SQLite (OUT/KIND.db): a later
start goes on where it stood. The winner, by validation AUC, is written as a whole config (OUT/KIND.toml).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from data.errors import InputError
from data.schema.parse import parse_dataclass, read_toml, to_toml_value, unknown_key
from mbcnet_rec.checkpoints.run_folder import DONE
from mbcnet_rec.config import RunConfig, apply_override, config_text, load_config
from mbcnet_rec.logs.metrics_log import write_whole
from mbcnet_rec.study.runs import Run, best_valid_auc, place_run, train_one
from mbcnet_rec.study.widths import fit_widths

SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
AGAIN = "another_try_of"  # user attribute of a trial: the number of the one that was interrupted
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Range:
    """What one key may be: choices, or numbers from low to high, both included, whole where both are.

    Attributes:
        choices: TOML values; empty for a range of numbers.
        low, high: of a range of numbers.
        log: draw evenly on the logarithm.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


@dataclass(frozen=True)
class Space:
    """What is tuned, and how hard.

    Attributes:
        ranges: dotted key of the config -> its range.
        trials: of each model.
        sampler: tpe, which learns from earlier trials, or random.
    """

    ranges: Mapping[str, Range]
    trials: int
    sampler: str


def load_space(path: Path, trials: int = 0) -> Space:
    """Read a space file.

    Args:
        path: the file.
        trials: instead of the file's; 0: the file's.

    Raises:
        InputError: naming the file, the key, the value, what was wanted and how to fix it.
    """
    table = read_toml(path)
    if unknown := table.keys() - {"trials", "sampler", "space"}:
        raise InputError(
            f"{path}: {min(unknown)} is not a known key; use trials, sampler and the table [space]"
        )
    sampler, count = table.get("sampler", "tpe"), trials or table.get("trials", 12)
    if sampler not in SAMPLERS:
        raise InputError(f"{path}: sampler = {sampler!r}: wanted 'tpe' or 'random'; change the value")
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{path}: trials = {count!r}: wanted an integer of 1 or more; raise it")
    ranges = table.get("space")
    if not isinstance(ranges, Mapping) or not ranges:
        raise InputError(f"{path}: [space] is missing or empty; wanted at least one key with its range")
    return Space(
        {key: _range(f"{path}: space.{key}", value) for key, value in ranges.items()}, count, sampler
    )


def _range(where: str, value: Any) -> Range:
    shown = dict(value) if isinstance(value, Mapping) else value
    keys = set(value) if isinstance(value, Mapping) else set()
    if keys == {"choices"}:
        if not isinstance(value["choices"], list) or not value["choices"]:
            raise InputError(f"{where}.choices = {value['choices']!r}: wanted a list of one or more values")
        return Range(choices=tuple(value["choices"]))
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise InputError(
            f"{where} = {shown!r}: wanted {{ choices = [..] }} or {{ low = .., high = .., log = true or false }}; note that a dotted "
            "key is written in quotes"
        )
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (low, high))
    if not numbers or low > high or (log and low <= 0):
        raise InputError(f"{where} = {shown!r}: wanted low <= high, and low > 0 with log; change them")
    return Range(low=low, high=high, log=bool(log))


def applies(key: str, kind: str) -> bool:
    """Whether a key of the space matters to models of a kind: model.KIND.* does to that kind only."""
    names = key.split(".")
    return names[0] != "model" or len(names) == 1 or names[1] == kind


def check_keys(space: Space, config: RunConfig, kind: str) -> None:
    """Refuse keys that the config does not have, before a trial is drawn.

    Raises:
        InputError: naming the key and the nearest one.
    """
    known = to_toml_value(config)
    for key, range_ in space.ranges.items():
        if not applies(key, kind):
            continue
        inner = {name for choice in range_.choices if isinstance(choice, dict) for name in choice}
        for path in [f"{key}.{name}" for name in sorted(inner)] or [key]:
            table = known
            for name in path.split("."):
                table = table if isinstance(table, dict) else {}
                if name not in table:
                    raise InputError(f"space: {unknown_key(path, name, table)}")
                table = table[name]


def draw_overrides(trial: Trial, space: Space, kind: str) -> list[str]:
    """Draw a value of each key that matters; return overrides `key=value` whose values are TOML."""
    overrides = []
    for key, range_ in space.ranges.items():
        if not applies(key, kind):
            continue
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
    """Apply `key=value` overrides to a config.

    Raises:
        InputError: they make no valid config; `source` says where they come from.
    """
    table = to_toml_value(config)
    for override in overrides:
        apply_override(table, override)
    return parse_dataclass(RunConfig, table, source)


def tune_model(
    config: RunConfig, space: Space, kind: str, out: Path, bar: "tqdm[Any]"
) -> tuple[Path, FrozenTrial]:
    """Run the trials of one model that are still missing, and write the winner's config.

    Args:
        config: what the space leaves open; every trial has its seed.
        space: ranges, number of trials, sampler.
        kind: the kind of model.
        out: folder of the study file, the trials' runs and the winner.
        bar: progress over trials; it prints a line after each.

    Returns:
        The winner's config file, and its trial.

    Raises:
        InputError: no trial came to an end.
    """
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{out / f'{kind}.db'}"
    study = optuna.create_study(
        study_name=kind,
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )
    # Trials of a start that was killed get another try with the values that they had drawn; the two count once.
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
    base = base_config(config, kind, out)
    ended = len(study.get_trials(states=FINISHED)) - sum(AGAIN in trial.user_attrs for trial in study.trials)
    bar.update(min(ended, space.trials))
    for number in range(ended, space.trials):
        study.sampler = SAMPLERS[space.sampler](seed=config.train.seed + number)
        outcome = run_trial(study, study.ask(), base, space, out)
        bar.write(f"{kind}: trial {number + 1} of {space.trials}: {outcome}")
        bar.update(1)
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise InputError(
            f"{storage}: none of the {space.trials} trials of {kind} came to an end; see {out}/runs/*.log"
        )
    winner = study.best_trial
    path = out / f"{kind}.toml"
    best = with_overrides(base, winner.user_attrs["overrides"], str(path))
    write_whole(path, config_text(best))
    return path, winner


def base_config(config: RunConfig, kind: str, out: Path) -> RunConfig:
    """Make what the draws of a kind override.

    Widths that the config leaves open are those of its MBCnet. EnKD's teachers, where they have been tuned in the same
    folder, are those winners.

    Raises:
        InputError: there is no such kind, or a winner's file is faulty.
    """
    config = with_overrides(config, [f"model.kind={kind}"], f"--models {kind}")
    model = fit_widths(config.model)
    if kind == "enkd":
        for teacher in model.enkd.teachers:
            if (out / f"{teacher}.toml").is_file():
                winner = load_config(out / f"{teacher}.toml").model
                model = replace(model, **{teacher: getattr(winner, teacher)})
    return replace(config, model=model)


def run_trial(study: optuna.Study, trial: Trial, base: RunConfig, space: Space, out: Path) -> str:
    """Draw, train and score one trial; return what came of it in words.

    A trial whose validation AUC lies below the median of the earlier ones at the same evaluation is pruned.
    """
    overrides = draw_overrides(trial, space, base.model.kind)
    trial.set_user_attr("overrides", overrides)
    shown = ", ".join(overrides)
    try:
        config = place_run(with_overrides(base, overrides, "the space"), base.train.seed, out)
    except InputError as error:
        study.tell(trial, state=TrialState.FAIL)
        return f"no valid config ({error}): {shown}"
    run, pruned = Run(base.model.kind, config.train.seed, config), False

    def watch(step: int, auc: float) -> bool:
        nonlocal pruned
        trial.report(auc, step)
        pruned = trial.should_prune()
        return pruned

    failure = "" if run.done else train_one(config, watch)
    if failure:
        study.tell(trial, state=TrialState.FAIL)
        return f"failed ({failure}): {shown}"
    if pruned:
        (run.folder / DONE).unlink()  # it is not the whole run that its config describes
        study.tell(trial, state=TrialState.PRUNED)
        return f"pruned: {shown}"
    auc = best_valid_auc(run.folder)
    study.tell(trial, auc)
    return f"valid AUC {auc:.4f}: {shown}"


def tune_models(config: RunConfig, space: Space, models: Sequence[str], out: Path) -> int:
    """Tune each model with the same number of trials; say what won and where it is.

    Raises:
        InputError: a kind is unknown, the config lacks a key of the space, or no trial came to an end.
    """
    kinds = models or (config.model.kind,)
    for kind in kinds:  # a mistake shows before the first model has trained for an hour
        check_keys(space, with_overrides(config, [f"model.kind={kind}"], f"--models {kind}"), kind)
    lines = []
    for kind in kinds:
        with tqdm(total=space.trials, desc=f"tune {kind}", unit="trial") as bar:
            path, winner = tune_model(config, space, kind, out, bar)
        lines.append(
            f"{kind}: valid AUC {winner.value:.4f} by trial {winner.number + 1} of {space.trials}: {path}"
        )
    print("\n".join(lines))
    print(f"next: mbcnet train --config {path}")
    print(f"      mbcnet study table3 --config {path} --tuned {out} --models {' '.join(kinds)} --seeds 5")
    return 0
