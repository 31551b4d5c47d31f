"""`mbcnet study NAME`: variants x seeds -> runs -> a page. Started again, it trains only the runs that are missing."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.engine import Engine
from data.errors import InputError
from data.whole_folder import write_whole
from mbcnet_rec.config import RunConfig, config_text, load_config
from mbcnet_rec.model.models import fit_widths
from mbcnet_rec.report.page import Block, Code, Heading, Table, Text, text_table, to_html
from mbcnet_rec.runtime.lock import locked
from mbcnet_rec.runtime.ranks import refuse_ranks
from mbcnet_rec.study.pictures import Material, draw_all
from mbcnet_rec.study.probe import measure_all
from mbcnet_rec.study.runs import NO_NUMBERS, Run, digest_of, place_run, read_row_scores, run_key, scores, train_all
from mbcnet_rec.study.studies import WORDS, Study, Variant, with_models
from mbcnet_rec.study.summary import Results, headline, judge_all, score_table, summarise, verdict_table
from mbcnet_rec.study.tuning import with_overrides


@dataclass(frozen=True)
class StudyRequest:
    """What `mbcnet study` was asked for."""

    study: Study
    config: Path  # the file that the variants start from
    overrides: tuple[str, ...] = ()  # changes of that config, `key.path=value`
    seeds: int = 3  # the config's own and those after it
    models: tuple[str, ...] = ()  # kinds to run; empty: the study's own
    tuned: Path | None = None  # folder of `mbcnet tune`, whose KIND.toml stands in for the config of that kind
    category: str = ""  # the field of Figure 7; "": found by name
    out: Path = Path("studies")  # folder of the runs and the page
    engine: Engine = Engine(workers=0)  # who trains
    command_line: str = ""  # that asked for it


def variant_config(base: RunConfig, variant: Variant, tuned: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A variant's config from the base, or KIND.toml in `tuned` with the command's overrides; InputError if its own overrides do not fit."""
    config = with_overrides(base, variant.overrides, f"variant {variant.name!r}")
    if tuned is not None and (tuned / f"{config.model.kind}.toml").is_file():
        winner = load_config(tuned / f"{config.model.kind}.toml", overrides)
        config = with_overrides(winner, variant.overrides, f"variant {variant.name!r}")
    return replace(config, model=fit_widths(config.model))


def conduct(request: StudyRequest) -> int:
    """Run what is missing, and write the report; InputError if the config, the study and the models do not fit together."""
    if request.engine.name == "local":
        refuse_ranks("study")
    base = load_config(request.config, request.overrides)
    titles = {name: kind.title or name for name, kind in base.model.kinds.items()}
    study = with_models(request.study, request.models, titles)
    request = replace(request, study=study)
    if request.tuned is not None and not any((request.tuned / f"{kind}.toml").is_file() for kind in base.model.kinds):
        raise InputError(f"--tuned {request.tuned}: holds no KIND.toml; name a folder that `mbcnet tune --out` wrote")
    variants = study.variants if study.name != "complexity" else ()
    configs = [variant_config(base, each, request.tuned, request.overrides) for each in variants]
    known = {}
    runs = [
        Run(variant.name, seed, place_run(config, seed, request.out, known))
        for seed in range(base.train.seed, base.train.seed + request.seeds)
        for variant, config in zip(variants, configs, strict=True)
    ]
    winners = sorted(request.tuned.glob("*.toml")) if request.tuned is not None else ()
    tuned = {file.name: file.read_text(encoding="utf-8") for file in winners}
    mark = f"<!-- depends on {digest_of({'run': run_key(base, known), 'tuned': tuned})} -->\n" if runs else ""
    with locked(request.out, "study") if request.engine.is_first else nullcontext():
        return _train_and_report(request, base, runs, mark)


def _train_and_report(request: StudyRequest, base: RunConfig, runs: Sequence[Run], mark: str) -> int:
    study = request.study
    failures = train_with_progress(runs, request.engine)
    if not request.engine.is_first:
        return 0
    done, found = [], Results({}, {})
    for run in runs:
        if run.done and (metrics := scores(run.folder))["note"] != NO_NUMBERS:
            done.append(run)
            found.scores.setdefault(run.variant, {})[run.seed] = metrics
            if (rows := read_row_scores(run.config)) is not None:
                found.rows.setdefault(run.variant, {})[run.seed] = rows
    blocks = report_blocks(request, base, done, found, failures)
    title = f"{study.reference}: {study.question}"
    lead = f"{base.name}, {request.seeds} seeds, schema {base.schema}. Study {study.name} of MBCnet (arXiv 2411.13057)."
    page = free_page(request.out / f"{study.name}_{base.name}.html", mark)
    write_whole(page, to_html(title, lead, blocks) + mark)
    shown = [each for each in blocks[: blocks.index(Heading("Pictures"))] if not isinstance(each, Heading)]
    print("\n\n".join(text_table(each) if isinstance(each, Table) else each.text for each in shown))
    print(f"wrote {page}")
    print(f"next: open {page} in a browser; the runs are in {request.out / 'runs'}, and are not trained again")
    if runs and not done:
        first = next(iter(failures.values()))[0]
        raise InputError(f"none of {len(runs)} runs ended: {first}; see {request.out}/runs/*.log")
    return 0


def free_page(wanted: Path, mark: str) -> Path:
    """Where a page goes that ends with this hash of what its runs depend on. One of others that is there stays; the new name has the hash."""
    if not mark or not wanted.exists() or mark in wanted.read_text(errors="replace", encoding="utf-8"):
        return wanted
    print(f"{wanted}: is of other data or settings, and stays")
    return wanted.with_name(f"{wanted.stem}_{mark.split()[3][:8]}{wanted.suffix}")


def train_with_progress(runs: Sequence[Run], engine: Engine) -> dict[str, list[str]]:
    """Train what is missing under a bar over runs; return variant -> why seeds of it failed."""
    failures: dict[str, list[str]] = {}
    todo = {run.folder for run in runs if not run.done}
    count, shown = len({run.folder for run in runs}), engine.is_first
    with tqdm(total=count, desc="runs", unit="run", disable=not shown) as bar:
        bar.update(count - len(todo))
        for run, failure in train_all(runs, engine):
            found = {} if failure else scores(run.folder)
            failure = failure or (NO_NUMBERS if found["note"] == NO_NUMBERS else "")
            if failure:
                failures.setdefault(run.variant, []).append(f"seed {run.seed}: {failure}")
                words = f"failed: {failure}"
            else:
                words = f"AUC {found['auc']:.4f}, log-loss {found['log_loss']:.4f}"
            if shown:
                bar.write(f"{run.variant}, seed {run.seed}: {words}")
            bar.update(1)
    return failures


def report_blocks(
    request: StudyRequest, base: RunConfig, runs: Sequence[Run], found: Results, failures: Mapping[str, Sequence[str]]
) -> list[Block]:
    """Put a study's report together."""
    study, material = request.study, Material(request.study, base, runs, found.scores, request.category)
    rows = summarise(study, found, failures)
    measured, told = measure_all(material)
    judged = judge_all(study.claims, found, measured)
    blocks: list[Block] = []
    if rows:
        blocks += [Heading("Result"), *headline(study, rows, judged), score_table(rows, watched=study.watched)]
        blocks += [Text(f"{row.name}: {each}") for row in rows for each in (*row.failures, *row.notes)]
    if any(row.difference or row.fused for row in rows):
        blocks.append(Text(WORDS["compared"]))
    if study.watched:
        blocks.append(Text(WORDS["watched"]))
    if rows and study.claims:
        asked = "What the paper claims" if study.claimed else "What is hoped for"
        blocks += [Heading(asked), verdict_table(judged), *map(Text, [WORDS["verdicts"], *told])]
    blocks += [Heading("Pictures"), *draw_all(material)]
    configs = [f"{run.variant}, seed {run.seed}: {run.folder}/config.toml" for run in runs]
    return [
        *blocks,
        Heading("Again"),
        Code(request.command_line),
        Code(config_text(base), "the config, every key resolved"),
        Code("\n".join(configs) or "none", "each run's own config"),
    ]
