"""The studies of the paper, as studies.toml has them: variants are overrides of a config, beside the paper's own figures."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.errors import InputError
from data.schema.parse import parse_dataclass

Picture = Literal[
    "scores", "branch_curves", "latents", "terms", "neurons", "categories", "density", "grid", "complexity"
]


Measure = Literal["separation", "consistency", "dependence"]  # what a claim is about if not AUC; see probe.py


@dataclass(frozen=True)
class Variant:
    """One row of a study's table."""

    name: str
    overrides: tuple[str, ...] = ()  # `key.path=value` on the config
    # AUC and log-loss that the paper prints for Pailitao-12month, then for Pailitao-24month; empty where it prints none
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What the paper says that a reader can check: `better` has the higher AUC. Both are variants, or outputs of them, VARIANT/BRANCH.

    With a `measure` it is about that, of the study's first variant.
    """

    text: str
    better: str
    worse: str
    measure: Measure | Literal[""] = ""


@dataclass(frozen=True)
class Study:
    """One table or figure of the paper."""

    name: str  # what `mbcnet study NAME` calls it
    reference: str  # where it is in the paper
    question: str
    variants: tuple[Variant, ...]
    reference_rows: tuple[str, ...] = ()  # each row is compared with the best of these other than itself
    claims: tuple[Claim, ...] = ()
    pictures: tuple[Picture, ...] = ("scores",)
    claimed: bool = True  # by the paper; else the claims are hopes, and the page calls them so
    rivals: tuple[Variant, ...] = ()  # other models, which the rows are compared with; --models takes others
    watched: bool = False  # the table says how often branches disagree, and which runs are dead


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


STUDIES = {
    name: parse_dataclass(Study, {"name": name, **entry}, "studies.toml", name)
    for name, entry in _toml("studies.toml").items()
}
WORDS = _toml("words.toml")
# model.kind -> its row of the paper's Table 3
MODELS = {row.overrides[0].partition("=")[2]: row for row in STUDIES["table3"].variants}
MBCNET = MODELS["mbcnet"]
DENSITIES = (20, 40, 60, 80, 100)
GRID_ALPHA = GRID_BETA = (0.0, 0.01, 0.1, 1.0)


def density_name(model: str, percent: int) -> str:
    """Name of the row of a model at a density."""
    return f"{model}, {percent} %"


def grid_name(alpha: float, beta: float) -> str:
    """Name of the row of a pair of loss weights."""
    return f"alpha {alpha:g}, beta {beta:g}"


def with_models(study: Study, models: Sequence[str], titles: Mapping[str, str]) -> Study:
    """Take other models into a study of models, as rivals of its rows, or some of its own; InputError if it has no rows of them.

    `titles`: of every model that the config can name.
    """
    more = {kind: Variant(title, (f"model.kind={kind}",)) for kind, title in titles.items() if kind not in MODELS}
    rows = MODELS | more
    if unknown := [kind for kind in models if kind not in rows]:
        raise InputError(f"--models {unknown[0]}: wanted one of {', '.join(rows)}; change it")
    chosen = tuple(rows[kind] for kind in models)
    if study.rivals:
        rivals = tuple(row for row in chosen if row != MBCNET) if models else study.rivals
        names = tuple(each.name for each in rivals)
        against = names or study.reference_rows
        return replace(study, variants=study.variants + rivals, rivals=rivals, reference_rows=against)
    if not models:
        return study
    if study.name == "table3":
        return replace(study, variants=chosen, reference_rows=tuple(row.name for row in chosen if row != MBCNET))
    wanted = {row.name for row in chosen}
    kept = tuple(variant for variant in study.variants if variant.name.split(",")[0] in wanted)
    if not kept:
        raise InputError(f"--models {' '.join(models)}: study {study.name} has no row of these models; leave it out")
    return replace(study, variants=kept)
