"""The picture of a plan, ranks by table, as HTML that stands alone."""

from pathlib import Path

import jinja2

from data.errors import InputError
from sharding.cost.assess import Assessment
from sharding.cost.memory import gib
from sharding.plan.compare import placement_text
from sharding.report.text import report_lines, table_totals

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


def write_html(assessment: Assessment, path: Path) -> None:
    """Write the report with a heat map whose cells say what they are when pointed at. One file, no network.

    Raises:
        InputError: the path cannot be written.
    """
    plan, grid = assessment.plan, heat(assessment)
    ranks = {"all tables": [1e3 * rank.times.total for rank in assessment.ranks]}
    page = jinja2.Environment(autoescape=True).from_string(_PAGE).render(
        assessment=assessment,
        heat=[(rows, max((max(row) for row in rows.values()), default=1.0)) for rows in (grid, ranks)],
        placements={name: placement_text(table) for name, table in plan.tables.items()},
        memory=[sum(assessment.memory(rank)) for rank in assessment.ranks],
        most=assessment.fullest_bytes,
        gib=gib,
        totals=table_totals(assessment),
        report="\n".join(report_lines(assessment, full=True)),
    )  # fmt: skip
    try:
        path.write_text(page)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another path with --html"
        ) from None


_PAGE = """\
{% set title = "Sharding plan: %s tables on %s" | format(assessment.plan.tables | length, assessment.cluster) -%}
<!doctype html><html lang=en><meta charset=utf-8><title>{{ title }}</title>
<style>body{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#222}h1{font-size:20px}table.heat{border-collapse:collapse}
table.heat td{min-width:7px;height:15px;border:1px solid #fff;background:#f3f3f3;padding:0}table.heat th{text-align:right;font-weight:normal;
font-size:12px;padding:0 8px;white-space:nowrap}td.n{text-align:right;padding:0 8px!important;background:none!important;font-size:12px}
table.list td,table.list th{padding:1px 10px;border-bottom:1px solid #eee;text-align:left}pre{background:#f7f7f7;padding:12px;overflow-x:auto}.scroll{overflow-x:auto}</style>
<h1>{{ title }}</h1>
<p>step {{ "%.2f" | format(1e3 * assessment.path.step) }} ms at least, {{ "{:,.0f}".format(assessment.samples_per_second) }} samples a second at most,
bound by {{ assessment.path.bound_by }}; busiest rank {{ "%.1f" | format(100 * assessment.over_bound) }} % above the lower bound</p>
<p>Rows are tables, columns are ranks; colour is time of a step, point at a cell to read it.</p>
<div class=scroll><table class=heat>
{%- for rows, largest in heat %}{% for name, row in rows.items() %}
<tr><th title="{{ placements.get(name, "") }}">{{ name }}</th>
{%- for value in row %}<td{% if value > 0 %} title="{{ name }}, rank {{ loop.index0 }}: {{ "%.3f" | format(value) }} ms" style="background:rgba(33,102,172,
{{- "%.3f" | format(0.12 + 0.88 * (value / largest) ** 0.5) }})"{% endif %}></td>{% endfor -%}
<td class=n>{{ "%.2f" | format(row | sum) }}</td></tr>{% endfor %}{% endfor %}
<tr><th>memory</th>{% for size in memory %}<td title="rank {{ loop.index0 }}: {{ gib(size) }}" style="background:rgba(106,81,163,
{{- "%.3f" | format(0.1 + 0.9 * size / most) }})"></td>{% endfor %}<td></td></tr></table></div>
<h2>Tables</h2><table class=list><tr><th>table<th>placement<th>bytes with state<th>ms of the slowest shard</tr>
{%- for name, (size, times) in totals.items() %}
<tr><td>{{ name }}</td><td>{{ placements[name] }}</td><td class=n>{{ "{:,}".format(size.rows + size.state) }}</td>
<td class=n>{{ "%.3f" | format(1e3 * times.total) }}</td></tr>{% endfor %}</table>
<h2>Report</h2><pre>{{ report }}</pre></html>
"""
