"""`mbcnet study NAME`: variants x seeds -> runs -> a page. Started again, it trains only the runs that are missing."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import InputError
from data.whole_folder import write_whole
from mbcnet_rec.config import RunConfig, config_text, load_config
from mbcnet_rec.model.widths import fit_widths
from mbcnet_rec.report.page import Block, Code, Heading, Table, Text, to_html
from mbcnet_rec.runtime.lock import locked
from mbcnet_rec.runtime.ranks import refuse_ranks
from mbcnet_rec.scoring.compare import p_text
from mbcnet_rec.study.dependencies import Known, dependencies, digest_of
from mbcnet_rec.study.pictures import Material, draw_all
from mbcnet_rec.study.row_scores import keep_row_scores, read_row_scores
from mbcnet_rec.study.runs import NO_NUMBERS, Run, place_run, scores, train_all, train_one
from mbcnet_rec.study.studies import MBCNET, MODELS, Study, Variant
from mbcnet_rec.study.summary import (
    CONFIDENCE,
    NO_VERDICT,
    SIGNIFICANT,
    TESTED,
    Compared,
    Results,
    Row,
    judge_all,
    summarise,
)
from mbcnet_rec.study.tuning import with_overrides
from mbcnet_rec.training.trainer import Watch

VERDICTS = (
    "reproduced: the difference of AUC is above 0 and its corrected p below 0.05; contradicted: below 0, likewise; same direction: above 0 only; "
    "not reproduced: the rest. One seed has no verdict."
)
COMPARED = (
    f"First the mean difference over seeds, paired by seed, with the {CONFIDENCE:.0%} interval of Student's t; then the interval over the test rows, "
    "of the seeds' mean scores (DeLong; rows of one group are taken together); then the p of both tests; last the verdict, which needs both: its p "
    "is the larger of the two, or 1 where they point to different sides, corrected for the number of comparisons in the column (Holm). "
    "ahead: a higher AUC, or a lower log-loss."
)
WATCHED = (
    "disagreement: the share of the training rows on which one branch teaches another, by the row's own threshold; the mean over directed pairs of "
    "branches and over the log. dead: seeds that ended with an output that says the same of every row, or with latents of 0."
)


@dataclass(frozen=True)
class StudyRequest:
    """What `mbcnet study` was asked for."""

    study: Study
    config: Path  # the file that the variants start from
    overrides: tuple[str, ...] = ()  # changes of that config, `key.path=value`
    seeds: int = 3  # the config's own and those after it
    models: tuple[str, ...] = ()  # kinds to run; empty: the study's own
    # folder of `mbcnet tune`, whose KIND.toml stands in for the config of that kind
    tuned: Path | None = None
    category: str = ""  # the field of Figure 7; "": found by name
    out: Path = Path("studies")  # folder of the runs and the page
    workers: int = 0  # processes; 0: chosen

    def command(self) -> str:
        """The line that does it again."""
        parts = ["mbcnet", "study", self.study.name, "--config", str(self.config), "--seeds", str(self.seeds)]
        parts += ["--models", *self.models] if self.models else []
        parts += ["--tuned", str(self.tuned)] if self.tuned else []
        parts += ["--category", self.category] if self.category else []
        for override in self.overrides:
            parts += ["--set", override]
        return shlex.join([*parts, "--out", str(self.out)])


def with_models(study: Study, models: Sequence[str]) -> Study:
    """Take other models into a study of models, or some of its own.

    Raises:
        InputError: the study does not compare models, or a kind is unknown.
    """
    if not models:
        return study
    if unknown := [kind for kind in models if kind not in MODELS]:
        raise InputError(f"--models {unknown[0]}: wanted one of {', '.join(MODELS)}; change it")
    if study.name == "table3":
        return replace(study, variants=tuple(MODELS[kind] for kind in models))
    wanted = {MODELS[kind].name for kind in models}
    kept = tuple(variant for variant in study.variants if variant.name.split(",")[0] in wanted)
    if not kept:
        raise InputError(
            f"--models {' '.join(models)}: study {study.name} has no row of these models; leave --models out"
        )
    return replace(study, variants=kept)


def variant_config(base: RunConfig, variant: Variant, tuned: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Make a variant's config from the base, or from KIND.toml in the folder `tuned`, with the command line's overrides, if that is there.

    Raises:
        InputError: its overrides do not fit the config.
    """
    config = with_overrides(base, variant.overrides, f"variant {variant.name!r}")
    if tuned is not None and (tuned / f"{config.model.kind}.toml").is_file():
        winner = load_config(tuned / f"{config.model.kind}.toml", overrides)
        config = with_overrides(winner, variant.overrides, f"variant {variant.name!r}")
    return replace(config, model=fit_widths(config.model))


def conduct(request: StudyRequest) -> int:
    """Run what is missing, and write the report.

    Raises:
        InputError: the config, the study and the models do not fit together.
    """
    refuse_ranks("study")
    study = with_models(request.study, request.models)
    request = replace(request, study=study)
    if request.tuned is not None and not any((request.tuned / f"{kind}.toml").is_file() for kind in MODELS):
        raise InputError(
            f"--tuned {request.tuned}: wanted a folder with KIND.toml files, which `mbcnet tune --out {request.tuned}` writes; change it"
        )
    base = load_config(request.config, request.overrides)
    variants = study.variants if study.name != "complexity" else ()
    configs = [variant_config(base, each, request.tuned, request.overrides) for each in variants]
    known: Known = {}
    runs = [
        Run(variant.name, seed, place_run(config, seed, request.out, known))
        for seed in range(base.train.seed, base.train.seed + request.seeds)
        for variant, config in zip(variants, configs, strict=True)
    ]
    with locked(request.out, "study"):
        return _train_and_report(request, base, runs)


def _train_and_report(request: StudyRequest, base: RunConfig, runs: Sequence[Run]) -> int:
    study = request.study
    failures = train_with_progress(runs, request.workers)
    done = [run for run in runs if run.done and scores(run.folder)["auc"] is not None]
    found: Any = {}, {}
    for run in done:
        found[0].setdefault(run.variant, {})[run.seed] = scores(run.folder)
        if (rows := read_row_scores(run.folder)) is not None:
            found[1].setdefault(run.variant, {})[run.seed] = rows
    blocks = report_blocks(request, base, done, Results(*found), failures)
    title = f"{study.reference}: {study.question}"
    lead = f"{base.name}, {request.seeds} seeds, schema {base.schema}. Study {study.name} of MBCnet (arXiv 2411.13057)."
    mark = page_mark(base, request.tuned) if runs else ""
    page = free_page(request.out / f"{study.name}_{base.name}.html", mark)
    write_whole(page, to_html(title, lead, blocks) + mark)
    print("\n".join(text_table(block) for block in blocks[:3] if isinstance(block, Table)))
    print(f"wrote {page}")
    print(f"next: open {page} in a browser; the runs are in {request.out / 'runs'}, and are not trained again")
    if runs and not done:
        raise InputError(
            f"none of the {len(runs)} runs came to an end: {next(iter(failures.values()))[0]}; see {request.out}/runs/*.log"
        )
    return 0


def page_mark(base: RunConfig, tuned: Path | None) -> str:
    """A comment that ends a page: the hash of what its runs depend on."""
    winners = sorted(tuned.glob("*.toml")) if tuned is not None else ()
    depends = dependencies(base, {}) | {"tuned": {file.name: file.read_text(encoding="utf-8") for file in winners}}
    return f"<!-- depends on {digest_of(depends)} -->\n"


def free_page(wanted: Path, mark: str) -> Path:
    """Where a page goes. One of other data or settings that is there already stays; then a hash is added to the name."""
    if not mark or not wanted.exists() or mark in wanted.read_text(errors="replace", encoding="utf-8"):
        return wanted
    print(f"{wanted}: is of other data or settings, and stays")
    return wanted.with_name(f"{wanted.stem}_{mark.split()[3][:8]}{wanted.suffix}")


def train_with_progress(runs: Sequence[Run], workers: int) -> dict[str, list[str]]:
    """Train what is missing under a bar over runs; return variant -> why seeds of it failed."""
    failures: dict[str, list[str]] = {}
    todo = {run.folder for run in runs if not run.done}
    with tqdm(total=len({run.folder for run in runs}), desc="runs", unit="run") as bar:
        bar.update(bar.total - len(todo))
        for run, failure in train_all(runs, workers, train_and_score):
            found = {} if failure else scores(run.folder)
            if not failure and found["auc"] is None:
                failure = NO_NUMBERS
            if failure:
                failures.setdefault(run.variant, []).append(f"seed {run.seed}: {failure}")
                words = f"failed: {failure}"
            else:
                words = f"AUC {found['auc']:.4f}, log-loss {found['log_loss']:.4f}"
            bar.write(f"{run.variant}, seed {run.seed}: {words}")
            bar.update(1)
    return failures


def report_blocks(
    request: StudyRequest,
    base: RunConfig,
    runs: Sequence[Run],
    found: Results,
    failures: Mapping[str, Sequence[str]],
) -> list[Block]:
    """Put a study's report together."""
    study = request.study
    rows = summarise(study, found, failures)
    blocks: list[Block] = []
    if rows:
        blocks += [Heading("Result"), *headline(study, rows, found), score_table(rows, watched=study.watched)]
        blocks += [Text(f"{row.name}: {failure}") for row in rows for failure in row.failures]
    if any(row.difference or row.fused for row in rows):
        blocks.append(Text(COMPARED))
    if study.watched:
        blocks.append(Text(WATCHED))
    if rows and study.claims:
        asked = "What the paper claims" if study.claimed else "What is hoped for"
        blocks += [Heading(asked), verdict_table(study, found), Text(VERDICTS)]
    blocks += [Heading("Pictures"), *draw_all(Material(study, base, runs, found.scores, request.category))]
    configs = [f"{run.variant}, seed {run.seed}: {run.folder}/config.toml" for run in runs]
    return [
        *blocks,
        Heading("Again"),
        Code(request.command()),
        Code(config_text(base), "the config, every key resolved"),
        Code("\n".join(configs) or "none", "each run's own config"),
    ]


def score_table(rows: Sequence[Row], *, watched: bool = False) -> Table:
    """Mean, sd, paired differences, and the paper's figures. Columns that all rows leave empty are left out."""
    against = {row.against for row in rows if row.against}
    one = f" to {min(against)}" if len(against) == 1 else ""
    columns = {
        "": [row.name for row in rows],
        "seeds": [str(row.seeds) for row in rows],
        "dead": [f"{row.dead} of {row.seeds}" if row.dead else "no" if watched else "" for row in rows],
        "AUC": [_mean_sd(row.auc) for row in rows],
        "log-loss": [_mean_sd(row.log_loss) for row in rows],
        f"difference of AUC{one}": [format_difference(row.difference) for row in rows],
        "of log-loss": [format_difference(row.loss_difference, better=-1) for row in rows],
        "compared with": ["" if one else row.against for row in rows],
        "fused less its best branch, AUC": [format_difference(row.fused, f"to {row.best_branch}\n") for row in rows],
        "disagreement": [f"{row.disagreement:.2%}" if watched else "" for row in rows],
        "paper, 12 months": [_pair(row.paper[:2]) for row in rows],
        "paper, 24 months": [_pair(row.paper[2:4]) for row in rows],
    }
    kept = {header: cells for header, cells in columns.items() if any(cells)}
    ended = [index for index, row in enumerate(rows) if row.seeds]
    best = max(ended, key=lambda index: rows[index].auc[0], default=-1)
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)), best)


def text_table(table: Table) -> str:
    """A table for the terminal, which is Markdown too."""
    rows = [table.header, *(tuple(cell.replace("\n", "; ") for cell in row) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _pair(figures: Sequence[float]) -> str:
    """AUC and log-loss as the paper prints them."""
    return " / ".join(f"{each:.4f}" for each in figures)


def headline(study: Study, rows: Sequence[Row], found: Results) -> list[Block]:
    """The study's answer in a sentence or two: who is ahead, by how much, and how many claims hold."""
    said = []
    ended = [row for row in rows if row.seeds]
    if len(ended) > 1:
        best = max(ended, key=lambda row: row.auc[0])
        said.append(f"The highest mean AUC is that of {best.name}, {best.auc[0]:.4f}.")
    ours = next((row for row in ended if row.name == MBCNET.name and row.against), None)
    if ours is not None and ours.difference is not None:
        mean, p = ours.difference.seeds.mean, ours.difference.p
        place = "ahead of" if mean > 0 else "behind"
        told = f" (p = {p:.3f})" if p == p else ""
        sure = "." if p < SIGNIFICANT else ": within what seeds or rows alone can do."
        said.append(
            f"{ours.name} is {place} {ours.against}, the best it is compared with, by {abs(mean):.4f}{told}{sure}"
        )
    verdicts = [verdict for _, verdict, _, _ in judge_all(study.claims, found)]
    counts = {each: verdicts.count(each) for each in TESTED}
    if tested := sum(counts.values()):
        asked = "claims of the paper" if study.claimed else "hopes"
        said.append(f"Of {tested} {asked}: {', '.join(f'{count} {each}' for each, count in counts.items())}.")
    return [Text(" ".join(said))] if said else []


def verdict_table(study: Study, found: Results) -> Table:
    """What became of each claim."""
    lines = tuple(
        (claim.text, said, format_difference(area), format_difference(loss, better=-1))
        for claim, said, area, loss in judge_all(study.claims, found)
        if area is not None
    )
    return Table(("claim", "here", "difference of AUC", "of log-loss"), lines)


def format_difference(compared: Compared | None, before: str = "", better: int = 1) -> str:
    """A difference with its interval over seeds, that over rows, the p of both, and the verdict with the corrected p, a line each.

    `better`: the sign of a difference that speaks for the first of the two.
    """
    if compared is None:
        return ""
    seeds, rows = compared.seeds, compared.rows
    over_seeds = "" if seeds.seeds < 2 else f" [{seeds.low:+.4f}, {seeds.high:+.4f}]"
    lines = [f"{before}{seeds.mean:+.4f}{over_seeds}"]
    lines += [f"rows [{rows.low:+.4f}, {rows.high:+.4f}]"] if rows else []
    of_each = [("seeds", seeds.p), *([("rows", rows.p)] if rows else [])]
    told = [f"{p_text(p)} {name}" for name, p in of_each if p == p]
    lines += [f"p {', '.join(told)}"] if told else []
    known = compared.p == compared.p
    place = "ahead" if seeds.mean * better > 0 else "behind"
    lines.append(f"{place if compared.p < SIGNIFICANT else 'level'}, p {p_text(compared.p)}" if known else NO_VERDICT)
    return "\n".join(lines)


def train_and_score(config: RunConfig, watch: Watch | None = None) -> str:
    """Train a run as `train_one` does, and keep what it says of each test row."""
    failure = train_one(config, watch)
    if not failure and (config.data.test or config.data.valid):
        keep_row_scores(config)
    return failure


def _mean_sd(value: tuple[float, float]) -> str:
    mean, sd = value
    if mean != mean:  # no seed ended
        return ""
    return f"{mean:.4f}" + (f" ± {sd:.4f}" if sd == sd else "")
