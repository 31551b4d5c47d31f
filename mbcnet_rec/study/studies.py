"""The studies of the paper as plain data: variants are overrides of a config, beside the paper's own figures. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Picture = Literal[
    "scores", "branch_curves", "latents", "terms", "neurons", "categories", "density", "grid", "complexity"
]


@dataclass(frozen=True)
class Variant:
    """One row of a study's table.

    Attributes:
        name: of the row.
        overrides: `key.path=value` on the config.
        paper: AUC and log-loss that the paper prints for Pailitao-12month and, behind them, for Pailitao-24month; empty
            where it prints none.
    """

    name: str
    overrides: tuple[str, ...] = ()
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What the paper says that a reader can check: the variant `better` has the higher AUC."""

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Study:
    """One table or figure of the paper.

    Attributes:
        name: by which it is called.
        reference: where it is in the paper.
        question: that it answers.
        variants: its rows.
        reference_rows: the rows are compared with the best of these, by paired seeds; the best row is among them if it
            is a baseline itself, and is then compared with the next.
        claims: that its rows can confirm or not.
        pictures: what is drawn.
        claimed: whether the paper makes the claims; else they are hopes, and the page calls them so.
    """

    name: str
    reference: str
    question: str
    variants: tuple[Variant, ...]
    reference_rows: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    pictures: tuple[Picture, ...] = ("scores",)
    claimed: bool = True


MBCNET = Variant("MBCnet", ("model.kind=mbcnet",), (0.7522, 0.2866, 0.7642, 0.2800))

MODELS = {  # model.kind -> its row of Table 3; the last two are not in it
    "dnn": Variant("DNN", ("model.kind=dnn",), (0.7423, 0.2894, 0.7569, 0.2829)),
    "crossnet": Variant("CrossNetV2", ("model.kind=crossnet",), (0.7437, 0.2917, 0.7555, 0.2835)),
    "wide_deep": Variant("Wide&Deep", ("model.kind=wide_deep",), (0.7392, 0.2911, 0.7513, 0.2863)),
    "dcnv2": Variant("DCNv2", ("model.kind=dcnv2",), (0.7461, 0.2872, 0.7559, 0.2837)),
    "mmoe": Variant("MMOE+", ("model.kind=mmoe",), (0.7400, 0.2906, 0.7544, 0.2837)),
    "enkd": Variant("EnKD", ("model.kind=enkd",), (0.7450, 0.2871, 0.7541, 0.2834)),
    "finalmlp": Variant("FinalMLP", ("model.kind=finalmlp",), (0.7427, 0.2891, 0.7556, 0.2838)),
    "efgc": Variant("EFGC", ("model.kind=efgc",), (0.7490, 0.2880, 0.7600, 0.2825)),
    "mbcnet": MBCNET,
    "deepfm": Variant("DeepFM", ("model.kind=deepfm",)),
    "fm": Variant("FM", ("model.kind=fm",)),
}
BASELINES = ("DNN", "CrossNetV2", "Wide&Deep", "DCNv2", "MMOE+", "EnKD", "FinalMLP", "DeepFM", "FM")

_ALPHA, _BETA = "model.mbcnet.coteaching", "model.mbcnet.differentiation"
_STRONG = replace(MBCNET, name="strong to weak + moderate (MBCnet)")
_PRINCIPLES = (
    Variant(
        "no discrimination",
        ("model.kind=mbcnet", f"{_ALPHA}.scheme=no_discrimination"),
        (0.5772, 0.3251, 0.5575, 0.3319),
    ),
    Variant(
        "weak to strong",
        ("model.kind=mbcnet", f"{_ALPHA}.scheme=weak_to_strong"),
        (0.4933, 0.3254, 0.4754, 0.3617),
    ),
    Variant(
        "max difference",
        ("model.kind=mbcnet", f"{_BETA}.kind=max_difference"),
        (0.7176, 0.3498, 0.7366, 0.3360),
    ),
    Variant(
        "min difference",
        ("model.kind=mbcnet", f"{_BETA}.kind=min_difference"),
        (0.7285, 0.3447, 0.7349, 0.3138),
    ),
)
_ABLATIONS = (
    Variant(
        "w/o EFGC",
        ("model.kind=mbcnet", 'model.mbcnet.branches=["cross", "deep"]'),
        (0.7445, 0.2888, 0.7548, 0.2839),
    ),
    Variant(
        "w/o CrossNet",
        ("model.kind=mbcnet", 'model.mbcnet.branches=["efgc", "deep"]'),
        (0.7480, 0.2880, 0.7569, 0.2828),
    ),
    Variant(
        "w/o DeepNet",
        ("model.kind=mbcnet", 'model.mbcnet.branches=["efgc", "cross"]'),
        (0.7501, 0.2875, 0.7622, 0.2811),
    ),
    Variant("w/o BCT", ("model.kind=mbcnet", f"{_ALPHA}.weight=0.0"), (0.7510, 0.2874, 0.7628, 0.2806)),
    Variant("w/o MDR", ("model.kind=mbcnet", f"{_BETA}.weight=0.0"), (0.7506, 0.2879, 0.7603, 0.2822)),
    Variant(
        "w/o BCT, w/o MDR",
        ("model.kind=mbcnet", f"{_ALPHA}.weight=0.0", f"{_BETA}.weight=0.0"),
        (0.7443, 0.2954, 0.7609, 0.2818),
    ),
)


def _principle_claims(ours: str) -> tuple[Claim, ...]:
    return (
        Claim("strong to weak beats no discrimination", ours, "no discrimination"),
        Claim("no discrimination beats weak to strong", "no discrimination", "weak to strong"),
        Claim("moderate beats max difference", ours, "max difference"),
        Claim("moderate beats min difference", ours, "min difference"),
    )


def _ablation_claims() -> tuple[Claim, ...]:
    texts = {
        "w/o EFGC": "removing the EFGC branch costs AUC",
        "w/o CrossNet": "removing the cross branch costs AUC",
        "w/o DeepNet": "removing the deep branch costs AUC",
        "w/o BCT": "removing co-teaching costs AUC",
        "w/o MDR": "removing moderate differentiation costs AUC",
        "w/o BCT, w/o MDR": "removing both losses costs AUC",
    }
    return tuple(Claim(text, "MBCnet", name) for name, text in texts.items())


_DENSITY_PAPER = {
    "dnn": (0.5132, 0.5885, 0.6770, 0.7223, 0.7423),
    "dcnv2": (0.5200, 0.5929, 0.6797, 0.7262, 0.7461),
    "mbcnet": (0.5277, 0.6015, 0.6890, 0.7319, 0.7522),
}
DENSITIES = (20, 40, 60, 80, 100)


def density_name(model: str, percent: int) -> str:
    """Name of the row of a model at a density."""
    return f"{model}, {percent} %"


def _density_variants() -> Iterator[Variant]:
    for kind, row in _DENSITY_PAPER.items():
        for percent, auc in zip(DENSITIES, row, strict=True):
            overrides = (f"model.kind={kind}", f"data.drop_positives={(100 - percent) / 100}")
            yield Variant(density_name(MODELS[kind].name, percent), overrides, (auc,))


def _density_claims() -> Iterator[Claim]:
    for percent in DENSITIES:
        for kind in ("dnn", "dcnv2"):
            worse = MODELS[kind].name
            yield Claim(
                f"MBCnet beats {worse} at {percent} % of the positives",
                density_name("MBCnet", percent),
                density_name(worse, percent),
            )


GRID_ALPHA = GRID_BETA = (0.0, 0.01, 0.1, 1.0)


def grid_name(alpha: float, beta: float) -> str:
    """Name of the row of a pair of loss weights."""
    return f"alpha {alpha:g}, beta {beta:g}"


def _grid_variants() -> Iterator[Variant]:
    for alpha in GRID_ALPHA:
        for beta in GRID_BETA:
            overrides = ("model.kind=mbcnet", f"{_ALPHA}.weight={alpha}", f"{_BETA}.weight={beta}")
            yield Variant(grid_name(alpha, beta), overrides, MBCNET.paper if alpha == beta == 0.1 else ())


_EXTRA = ("model.kind=mbcnet", 'model.mbcnet.branches=["efgc", "cross", "deep", ')
_MORE_BRANCHES = (
    MBCNET,
    Variant("MBCnet + FM", (_EXTRA[0], _EXTRA[1] + '"fm"]')),
    Variant("MBCnet + Wide", (_EXTRA[0], _EXTRA[1] + '"wide"]')),
    Variant("MBCnet + FM + Wide", (_EXTRA[0], _EXTRA[1] + '"fm", "wide"]')),
)
_FUTURE = (
    MBCNET,
    Variant("gated fusion", ("model.kind=mbcnet", "model.mbcnet.fusion=gated")),
    Variant("confident co-teaching", ("model.kind=mbcnet", f"{_ALPHA}.confidence=true")),
    Variant(
        "warm-up of both losses",
        ("model.kind=mbcnet", f"{_ALPHA}.warmup_steps=200", f"{_BETA}.warmup_steps=200"),
    ),
    Variant(
        "confident, warm-up, gated",
        (
            "model.kind=mbcnet",
            f"{_ALPHA}.confidence=true",
            f"{_ALPHA}.warmup_steps=200",
            f"{_BETA}.warmup_steps=200",
            "model.mbcnet.fusion=gated",
        ),
    ),
    Variant("orthogonal by construction", ("model.kind=mbcnet", f"{_BETA}.parametrization=orthogonal")),
)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "table3",
            "Table 3",
            "Is MBCnet better than the other models?",
            tuple(list(MODELS.values())[:9]),
            BASELINES,
            (
                *(Claim(f"MBCnet beats {name}", "MBCnet", name) for name in (*BASELINES[:7], "EFGC")),
                Claim("EFGC alone beats DNN", "EFGC", "DNN"),
            ),
        ),
        Study(
            "table5",
            "Table 5",
            "Who should teach whom, and how much may branches differ?",
            (*_PRINCIPLES, _STRONG),
            (_STRONG.name,),
            _principle_claims(_STRONG.name),
        ),
        Study(
            "table6",
            "Table 6",
            "What does each branch and each loss contribute?",
            (*_ABLATIONS, MBCNET),
            ("MBCnet",),
            _ablation_claims(),
        ),
        Study(
            "table7",
            "Table 7",
            "Is MBCnet ahead with fewer positives too?",
            tuple(_density_variants()),
            (),
            tuple(_density_claims()),
            ("density",),
        ),
        Study(
            "fig4",
            "Figure 4",
            "How do the branches learn, and where do their latents lie?",
            (MBCNET,),
            pictures=("branch_curves", "latents"),
        ),
        Study("fig5", "Figure 5", "Do the cooperation losses converge?", (MBCNET,), pictures=("terms",)),
        Study(
            "fig6",
            "Figure 6",
            "Do branches differ at the level of neurons?",
            (MBCNET,),
            pictures=("neurons",),
        ),
        Study(
            "fig7",
            "Figure 7 and Figure 1 a",
            "Which categories does each branch learn best?",
            (MBCNET,),
            pictures=("categories",),
        ),
        Study(
            "fig8",
            "Figure 8",
            "Do FM and Wide branches add anything?",
            _MORE_BRANCHES,
            ("MBCnet",),
            tuple(
                Claim(f"{each.name.removeprefix('MBCnet + ')} added costs AUC", "MBCnet", each.name)
                for each in _MORE_BRANCHES[1:]
            ),
        ),
        Study(
            "fig9",
            "Figure 9",
            "How sensitive is MBCnet to alpha and beta?",
            tuple(_grid_variants()),
            (grid_name(0.1, 0.1),),
            (
                Claim("alpha = beta = 0.1 beats no cooperation", grid_name(0.1, 0.1), grid_name(0.0, 0.0)),
                Claim("alpha = 1 is too much", grid_name(0.1, 0.1), grid_name(1.0, 0.1)),
                Claim("beta = 1 is too much", grid_name(0.1, 0.1), grid_name(0.1, 1.0)),
            ),
            ("grid",),
        ),
        Study("complexity", "Table 8", "What does each part cost?", (MBCNET,), pictures=("complexity",)),
        Study(
            "claims",
            "Tables 5 and 6",
            "Which of the paper's claims hold on this data?",
            (MBCNET, *_PRINCIPLES, *_ABLATIONS),
            ("MBCnet",),
            (*_principle_claims("MBCnet"), *_ablation_claims()),
        ),
        Study(
            "future",
            "Section 5",
            "Do the options that the paper leaves to future work help?",
            _FUTURE,
            ("MBCnet",),
            tuple(
                Claim(f"{each.name} beats the paper's MBCnet", each.name, "MBCnet") for each in _FUTURE[1:]
            ),
            claimed=False,
        ),
    )
}
