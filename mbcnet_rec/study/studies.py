"""The studies of the paper as plain data: variants are overrides of a config, beside the paper's own figures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.errors import InputError

Picture = Literal[
    "scores", "branch_curves", "latents", "terms", "neurons", "categories", "density", "grid", "complexity"
]


Measure = Literal["separation", "consistency", "dependence"]  # what a claim is about if not AUC; see measured.py


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
    # each row is compared with the best of these other than itself
    reference_rows: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    pictures: tuple[Picture, ...] = ("scores",)
    claimed: bool = True  # by the paper; else the claims are hopes, and the page calls them so
    rivals: tuple[Variant, ...] = ()  # other models, which the rows are compared with; --models takes others
    watched: bool = False  # the table says how often branches disagree, and which runs are dead


# model.kind -> its row of the paper's Table 3
MODELS = {
    kind: Variant(name, (f"model.kind={kind}",), paper)
    for kind, name, paper in (
        ("dnn", "DNN", (0.7423, 0.2894, 0.7569, 0.2829)),
        ("crossnet", "CrossNetV2", (0.7437, 0.2917, 0.7555, 0.2835)),
        ("wide_deep", "Wide&Deep", (0.7392, 0.2911, 0.7513, 0.2863)),
        ("dcnv2", "DCNv2", (0.7461, 0.2872, 0.7559, 0.2837)),
        ("mmoe", "MMOE+", (0.7400, 0.2906, 0.7544, 0.2837)),
        ("enkd", "EnKD", (0.7450, 0.2871, 0.7541, 0.2834)),
        ("finalmlp", "FinalMLP", (0.7427, 0.2891, 0.7556, 0.2838)),
        ("efgc", "EFGC", (0.7490, 0.2880, 0.7600, 0.2825)),
        ("mbcnet", "MBCnet", (0.7522, 0.2866, 0.7642, 0.2800)),
    )
}
MBCNET = MODELS["mbcnet"]
_RIVALS = tuple(row.name for row in MODELS.values() if row.name not in ("MBCnet", "EFGC"))

_ALPHA, _BETA = "model.mbcnet.coteaching", "model.mbcnet.differentiation"


def _ours(name: str, overrides: tuple[str, ...], paper: tuple[float, ...] = ()) -> Variant:
    return Variant(name, ("model.kind=mbcnet", *overrides), paper)


def _branches(*names: str) -> tuple[str, ...]:
    return (f"model.mbcnet.branches={json.dumps(names)}",)


_STRONG = replace(MBCNET, name="strong to weak + moderate (MBCnet)")
_PRINCIPLES = (
    _ours("no discrimination", (f"{_ALPHA}.scheme=no_discrimination",), (0.5772, 0.3251, 0.5575, 0.3319)),
    _ours("weak to strong", (f"{_ALPHA}.scheme=weak_to_strong",), (0.4933, 0.3254, 0.4754, 0.3617)),
    _ours("max difference", (f"{_BETA}.kind=max_difference",), (0.7176, 0.3498, 0.7366, 0.3360)),
    _ours("min difference", (f"{_BETA}.kind=min_difference",), (0.7285, 0.3447, 0.7349, 0.3138)),
)
_NO_BCT, _NO_MDR = f"{_ALPHA}.weight=0.0", f"{_BETA}.weight=0.0"
_ABLATIONS = {  # what is removed -> the row
    "the EFGC branch": _ours("w/o EFGC", _branches("cross", "deep"), (0.7445, 0.2888, 0.7548, 0.2839)),
    "the cross branch": _ours("w/o CrossNet", _branches("efgc", "deep"), (0.7480, 0.2880, 0.7569, 0.2828)),
    "the deep branch": _ours("w/o DeepNet", _branches("efgc", "cross"), (0.7501, 0.2875, 0.7622, 0.2811)),
    "co-teaching": _ours("w/o BCT", (_NO_BCT,), (0.7510, 0.2874, 0.7628, 0.2806)),
    "moderate differentiation": _ours("w/o MDR", (_NO_MDR,), (0.7506, 0.2879, 0.7603, 0.2822)),
    "both losses": _ours("w/o BCT, w/o MDR", (_NO_BCT, _NO_MDR), (0.7443, 0.2954, 0.7609, 0.2818)),
}


def _principle_claims(ours: str) -> tuple[Claim, ...]:
    return (
        Claim("strong to weak beats no discrimination", ours, "no discrimination"),
        Claim("no discrimination beats weak to strong", "no discrimination", "weak to strong"),
        Claim("moderate beats max difference", ours, "max difference"),
        Claim("moderate beats min difference", ours, "min difference"),
    )


_ABLATION_CLAIMS = tuple(Claim(f"removing {what} costs AUC", "MBCnet", row.name) for what, row in _ABLATIONS.items())
_DENSITY_PAPER = {
    "dnn": (0.5132, 0.5885, 0.6770, 0.7223, 0.7423),
    "dcnv2": (0.5200, 0.5929, 0.6797, 0.7262, 0.7461),
    "mbcnet": (0.5277, 0.6015, 0.6890, 0.7319, 0.7522),
}
DENSITIES = (20, 40, 60, 80, 100)


def density_name(model: str, percent: int) -> str:
    """Name of the row of a model at a density."""
    return f"{model}, {percent} %"


_DENSITY_VARIANTS = tuple(
    Variant(
        density_name(MODELS[kind].name, each),
        (f"model.kind={kind}", f"data.drop_positives={(100 - each) / 100}"),
        (auc,),
    )
    for kind, row in _DENSITY_PAPER.items()
    for each, auc in zip(DENSITIES, row, strict=True)
)
_DENSITY_CLAIMS = tuple(
    Claim(f"MBCnet beats {worse} at {each} % of the positives", density_name("MBCnet", each), density_name(worse, each))
    for each in DENSITIES
    for worse in ("DNN", "DCNv2")
)
GRID_ALPHA = GRID_BETA = (0.0, 0.01, 0.1, 1.0)


def grid_name(alpha: float, beta: float) -> str:
    """Name of the row of a pair of loss weights."""
    return f"alpha {alpha:g}, beta {beta:g}"


_GRID_VARIANTS = tuple(
    _ours(
        grid_name(alpha, beta),
        (f"{_ALPHA}.weight={alpha}", f"{_BETA}.weight={beta}"),
        MBCNET.paper if alpha == beta == 0.1 else (),
    )
    for alpha in GRID_ALPHA
    for beta in GRID_BETA
)
_CENTRE = grid_name(0.1, 0.1)
_MORE_BRANCHES = {  # what is added -> the row
    "FM": _ours("MBCnet + FM", _branches("efgc", "cross", "deep", "fm")),
    "Wide": _ours("MBCnet + Wide", _branches("efgc", "cross", "deep", "wide")),
    "FM + Wide": _ours("MBCnet + FM + Wide", _branches("efgc", "cross", "deep", "fm", "wide")),
}
_NO_COOPERATION = "no cooperation"
_READINGS = {  # what is weighed -> the first and the second reading
    "alpha": ("-log 0.5", "base rate"),
    "beta": ("raw latents", "unit latents"),
    "alpha = beta =": ("-log 0.5, raw latents", "base rate, unit latents"),
}


def _reading(name: str, alpha: float, beta: float, second: bool) -> Variant:
    threshold, latents = ("base_rate", "unit") if second else (math.log(2), "raw")
    ours = (f"{_ALPHA}.weight={alpha}", f"{_ALPHA}.threshold={threshold}", f"{_BETA}.weight={beta}")
    return _ours(name, (*ours, f"{_BETA}.latents={latents}", "model.mbcnet.top_activation=none"))


_LOSSES = (
    _reading(_NO_COOPERATION, 0.0, 0.0, False),
    *(
        _reading(f"{what} {weight:g}, {name}", weight * ("alpha" in what), weight * ("beta" in what), bool(second))
        for what, names in _READINGS.items()
        for second, name in enumerate(names)
        for weight in GRID_ALPHA[1:]
    ),
)
_GATED, _CONFIDENT = ("model.mbcnet.fusion=gated",), (f"{_ALPHA}.confidence=true",)
_WARM_UP = (f"{_ALPHA}.warmup_steps=200", f"{_BETA}.warmup_steps=200")
_FUTURE = (
    MBCNET,
    _ours("gated fusion", _GATED),
    _ours("confident co-teaching", _CONFIDENT),
    _ours("warm-up of both losses", _WARM_UP),
    _ours("confident, warm-up, gated", (*_CONFIDENT, *_WARM_UP, *_GATED)),
    _ours("orthogonal by construction", (f"{_BETA}.parametrization=orthogonal",)),
)


# name, where it is in the paper, question; rows, the rows that each is compared with, claims, pictures
_STUDIES = (
    Study(
        "table3", "Table 3", "Is MBCnet better than the other models?",
        tuple(MODELS.values()), (*_RIVALS, "EFGC"),
        (
            *(Claim(f"MBCnet beats {name}", "MBCnet", name) for name in (*_RIVALS, "EFGC")),
            *(Claim(f"EFGC alone beats {name}", "EFGC", name) for name in _RIVALS),
        ),
    ),
    Study(
        "table5", "Table 5", "Who should teach whom, and how much may branches differ?",
        (*_PRINCIPLES, _STRONG), (_STRONG.name,), _principle_claims(_STRONG.name),
    ),
    Study(
        "table6", "Table 6", "What does each branch and each loss contribute?",
        (*_ABLATIONS.values(), MBCNET), ("MBCnet",), _ABLATION_CLAIMS,
    ),
    Study(
        "table7", "Table 7", "Is MBCnet ahead with fewer positives too?",
        _DENSITY_VARIANTS, (), _DENSITY_CLAIMS, ("density",),
    ),
    Study(
        "fig4", "Figure 4", "How do the branches learn, and where do their latents lie?",
        (MBCNET,), (),
        (
            Claim("the fused output beats the efgc branch", "MBCnet", "MBCnet/efgc"),
            Claim("the fused output beats the cross branch", "MBCnet", "MBCnet/cross"),
            Claim("the fused output beats the deep branch", "MBCnet", "MBCnet/deep"),
            Claim("branches are more tangled early than late", "MBCnet/late", "MBCnet/early", "separation"),
        ),
        ("branch_curves", "latents"),
    ),
    Study("fig5", "Figure 5", "Do the cooperation losses converge?", (MBCNET,), pictures=("terms",)),
    Study(
        "fig6", "Figure 6", "Do branches differ at the level of neurons?",
        (MBCNET,), (),
        (Claim("EFGC is closer to CrossNet than to Deep", "MBCnet/cross", "MBCnet/deep", "consistency"),),
        ("neurons",),
    ),
    Study(
        "fig7", "Figure 7 and Figure 1 a", "Which categories does each branch learn best?",
        (MBCNET,), (),
        (Claim("which branch is best depends on the category", "MBCnet/category", "MBCnet/chance", "dependence"),),
        ("categories",),
    ),
    Study(
        "fig8", "Figure 8", "Do FM and Wide branches add anything?",
        (MBCNET, *_MORE_BRANCHES.values()), ("MBCnet",),
        tuple(Claim(f"{what} added costs AUC", "MBCnet", row.name) for what, row in _MORE_BRANCHES.items()),
    ),
    Study(
        "fig9", "Figure 9", "How sensitive is MBCnet to alpha and beta?",
        _GRID_VARIANTS, (_CENTRE,),
        (
            Claim("alpha = beta = 0.1 beats no cooperation", _CENTRE, grid_name(0.0, 0.0)),
            Claim("alpha = 1 is too much", _CENTRE, grid_name(1.0, 0.1)),
            Claim("beta = 1 is too much", _CENTRE, grid_name(0.1, 1.0)),
        ),
        ("grid",), rivals=(MODELS["dcnv2"], MODELS["finalmlp"]),
    ),
    Study("complexity", "Table 8", "What does each part cost?", (MBCNET,), pictures=("complexity",)),
    Study(
        "claims", "Tables 5 and 6", "Which of the paper's claims hold on this data?",
        (MBCNET, *_PRINCIPLES, *_ABLATIONS.values()), ("MBCnet",), (*_principle_claims("MBCnet"), *_ABLATION_CLAIMS),
    ),
    Study(
        "losses", "Equations 12 and 14", "What do the readings of the two cooperation losses bring?",
        _LOSSES, (_NO_COOPERATION,), watched=True,
    ),
    Study(
        "future", "Section 5", "Do the options that the paper leaves to future work help?",
        _FUTURE, ("MBCnet",),
        tuple(Claim(f"{row.name} beats the paper's MBCnet", row.name, "MBCnet") for row in _FUTURE[1:]),
        claimed=False,
    ),
)  # fmt: skip
STUDIES = {study.name: study for study in _STUDIES}


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
        return replace(
            study, variants=study.variants + rivals, rivals=rivals, reference_rows=names or study.reference_rows
        )
    if not models:
        return study
    if study.name == "table3":
        return replace(study, variants=chosen, reference_rows=tuple(row.name for row in chosen if row != MBCNET))
    wanted = {row.name for row in chosen}
    kept = tuple(variant for variant in study.variants if variant.name.split(",")[0] in wanted)
    if not kept:
        raise InputError(f"--models {' '.join(models)}: study {study.name} has no row of these models; leave it out")
    return replace(study, variants=kept)
