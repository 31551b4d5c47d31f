"""The picture of a plan, ranks by table, as HTML that stands alone."""

import jinja2

from sharding.cost.assess import Assessment
from sharding.cost.memory import gib
from sharding.plan.compare import placement_text
from sharding.report.text import report_lines

ROWS_SHOWN = 40  # tables with a row of their own, by time; the rest share one


def heat(assessment: Assessment) -> dict[str, list[float]]:
    """Milliseconds of each rank by table: those with most time first, all others summed in the last row."""
    grid = {}
    for name, costs in assessment.costs.items():
        grid[name] = [0.0] * len(assessment.ranks)
        for cost in costs:
            grid[name][cost.rank] += 1e3 * cost.times.total
    names = sorted(grid, key=lambda name: -sum(grid[name]))
    shown, rest = names[:ROWS_SHOWN], names[ROWS_SHOWN:]
    rows = {name: grid[name] for name in shown}
    if rest:
        rows[f"{len(rest)} other tables"] = [sum(column) for column in zip(*map(grid.get, rest), strict=True)]  # type: ignore[arg-type]
    return rows


def html_page(assessment: Assessment) -> str:
    """The report with a heat map whose cells say what they are when pointed at. One file, no network."""
    plan, grid = assessment.plan, heat(assessment)
    ranks = {"all tables": [1e3 * rank.times.total for rank in assessment.ranks]}
    templates = jinja2.Environment(loader=jinja2.PackageLoader("sharding.report"), autoescape=True)
    return templates.get_template("plan.html").render(
        assessment=assessment,
        heat=[(rows, max((max(row) for row in rows.values()), default=1.0)) for rows in (grid, ranks)],
        placements={name: placement_text(table) for name, table in plan.tables.items()},
        memory=[sum(assessment.memory(rank)) for rank in assessment.ranks],
        gib=gib,
        report="\n".join(report_lines(assessment, full=True)),
    )  # fmt: skip
