"""A study's tables and sentences: what summary.py has found, for a page and a terminal."""

from collections.abc import Sequence

from mbcnet_rec.report.page import Block, Table, Text
from mbcnet_rec.scoring.compare import p_text
from mbcnet_rec.study.studies import MBCNET, Study
from mbcnet_rec.study.summary import CONFIDENCE, NO_VERDICT, SIGNIFICANT, TESTED, Compared, Judged, Row

PLACES = ("ahead", "level", "behind")
VERDICTS = (
    "reproduced: the difference of AUC is above 0 and its corrected p below 0.05; contradicted: below 0, likewise; same direction: above 0 only; "
    "not reproduced: the rest. One seed has no verdict."
)
COMPARED = (
    f"First the mean difference over seeds, paired by seed, with the {CONFIDENCE:.0%} interval of Student's t; then the interval over the test rows, "
    "of the seeds' mean scores (AUC, by DeLong) or mean losses, rows of one group taken together; then the p of both tests; last the verdict, which needs both: its p "
    "is the larger of the two, or 1 where they point to different sides, corrected for the number of comparisons in the column (Holm). "
    "ahead: a higher AUC, or a lower log-loss."
)
WATCHED = (
    "disagreement: the share of the training rows on which one branch teaches another, by the row's own threshold; the mean over directed pairs of "
    "branches and over the log. dead: seeds that ended with an output that says the same of every row, or with latents of 0."
)


def score_table(rows: Sequence[Row], *, watched: bool = False) -> Table:
    """Mean, sd, paired differences, and the paper's figures. Columns that all rows leave empty are left out."""
    against = {row.against for row in rows if row.against}
    one = f" to {min(against)}" if len(against) == 1 else ""
    to = ["" if one else f"to {row.against}\n" for row in rows]
    columns = {
        "": [row.name for row in rows],
        "seeds": [str(row.seeds) for row in rows],
        "dead": [f"{row.dead} of {row.seeds}" if row.dead else "no" if watched else "" for row in rows],
        "AUC": [_mean_sd(row.auc) if row.seeds else "" for row in rows],
        "log-loss": [_mean_sd(row.log_loss) if row.seeds else "" for row in rows],
        f"difference of AUC{one}": [
            format_difference(row.difference, each) for row, each in zip(rows, to, strict=True)
        ],
        f"of log-loss{one}": [
            format_difference(row.loss_difference, each, better=-1) for row, each in zip(rows, to, strict=True)
        ],
        "fused less its best branch, AUC": [format_difference(row.fused, f"to {row.best_branch}\n") for row in rows],
        "disagreement": [f"{row.disagreement:.2%}" if watched else "" for row in rows],
        "paper, 12 months": [_pair(row.paper[:2]) for row in rows],
        "paper, 24 months": [_pair(row.paper[2:4]) for row in rows],
    }
    kept = {header: cells for header, cells in columns.items() if any(cells)}
    ended = [index for index, row in enumerate(rows) if row.auc[0] == row.auc[0]]
    best = max(ended, key=lambda index: rows[index].auc[0], default=-1)
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)), best)


def _pair(figures: Sequence[float]) -> str:
    """AUC and log-loss as the paper prints them."""
    return " / ".join(f"{each:.4f}" for each in figures)


def headline(study: Study, rows: Sequence[Row], judged: Sequence[Judged]) -> list[Block]:
    """The study's answer in a few sentences: who is ahead, by how much, and how many claims hold."""
    said = []
    ended = [row for row in rows if row.auc[0] == row.auc[0]]
    if len(ended) > 1:
        best = max(ended, key=lambda row: row.auc[0])
        said.append(f"The highest mean AUC is that of {best.name}, {best.auc[0]:.4f}.")
    ours = next((row for row in ended if row.name == MBCNET.name), None)
    if ours is not None and ours.difference is not None:
        said.append(_sentence(ours.name, f"{ours.against}, the best of the others", ours.difference))
        named = {claim.worse: area for claim, _, area, _ in judged if claim.better == ours.name and area is not None}
        if "FinalMLP" in named and ours.against != "FinalMLP":
            said.append(_sentence(ours.name, "FinalMLP", named["FinalMLP"]))
    rivals = {each.name for each in study.rivals}
    cells = [(row, row.difference) for row in rows if row.name not in rivals and row.difference is not None]
    if rivals and cells:
        places = ["dead" if row.dead else verdict_of(difference) for row, difference in cells]
        counts = ", ".join(f"{each} in {places.count(each)}" for each in dict.fromkeys((*PLACES, *places)))
        higher = sum(difference.seeds.value > 0 for row, difference in cells if not row.dead)
        said.append(
            f"Of {len(cells)} pairs of alpha and beta MBCnet has a higher AUC than {cells[0][0].against}, the best other model, in {higher}; "
            f"by both tests it is {counts}."
        )
    verdicts = [verdict for _, verdict, _, _ in judged]
    counted = {each: verdicts.count(each) for each in TESTED}
    if tested := sum(counted.values()):
        asked = "claims of the paper" if study.claimed else "hopes"
        said.append(f"Of {tested} {asked}: {', '.join(f'{count} {each}' for each, count in counted.items())}.")
    return [Text(" ".join(said))] if said else []


def _sentence(ours: str, theirs: str, compared: Compared) -> str:
    """Who is ahead by how much, and how sure that is."""
    seeds, rows = compared.seeds, compared.rows
    told = f"p {p_text(seeds.p)} over seeds, {p_text(rows.p) if rows else '-'} over rows, {p_text(compared.p)} corrected: {verdict_of(compared)}"
    return f"{ours} is {'ahead of' if seeds.value > 0 else 'behind'} {theirs}, by {abs(seeds.value):.4f} ({told})."


def verdict_table(judged: Sequence[Judged]) -> Table:
    """What became of each claim."""
    lines = tuple(
        (
            claim.text, said,
            format_difference(area, f"{claim.measure}\n" if claim.measure else ""),
            format_difference(loss, better=-1),
        )
        for claim, said, area, loss in judged
        if area is not None or claim.measure
    )  # fmt: skip
    return Table(("claim", "here", "difference of AUC, or of what is named", "of log-loss"), lines)


def verdict_of(compared: Compared, better: int = 1) -> str:
    """ahead, level, behind or no verdict. `better`: the sign of a difference that speaks for the first of the two."""
    if compared.p != compared.p:
        return NO_VERDICT
    return PLACES[0 if compared.seeds.value * better > 0 else 2] if compared.p < SIGNIFICANT else PLACES[1]


def format_difference(compared: Compared | None, before: str = "", better: int = 1) -> str:
    """A difference with its interval over seeds, that over rows, the p of both, and the verdict with the corrected p, a line each."""
    if compared is None:
        return ""
    seeds, rows = compared.seeds, compared.rows
    over_seeds = f" [{seeds.low:+.4f}, {seeds.high:+.4f}]" if seeds.low == seeds.low else ""
    lines = [f"{before}{seeds.value:+.4f}{over_seeds}"]
    lines += [f"rows [{rows.low:+.4f}, {rows.high:+.4f}]"] if rows and rows.low == rows.low else []
    lines += [f"p {p_text(seeds.p)} seeds, {p_text(rows.p) if rows else '-'} rows"]
    lines += [f"{verdict_of(compared, better)}, p {p_text(compared.p)} corrected".removesuffix(", p - corrected")]
    return "\n".join(lines)


def _mean_sd(value: tuple[float, float]) -> str:
    mean, sd = value
    if mean != mean:
        return "NaN"
    return f"{mean:.4f}" + (f" ± {sd:.4f}" if sd == sd else "")
