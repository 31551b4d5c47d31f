"""Latency of one request to an exported MBCnet of the paper's size, beside DCNv2 and DNN on the same tables.

    python benchmarks/latency.py [--quick] [--json] [--rows 1,8,64,512] [--threads-list 1,2,4] [--format int8] [--compiled]

192 fields, 2,780 dims, seven groups of 800 dims together, tables cut to --max-rows rows; weights are drawn, not trained. A request is
columns of plain Python values, ids drawn evenly over the tables. The models take turns, request by request.

MODEL_p50_ms_ROWS, MODEL_p99_ms_ROWS   of a whole request at the first number of threads; p99 is null where the calls are too few
over_dcnv2_ms_ROWS                     median of MBCnet minus that of DCNv2, which is MBCnet without its EFGC branch
products_over_dcnv2_ms_ROWS            the same of the dense parts' bare products by torch.mm: what is left if all else is free
preprocess_share_ROWS                  share of MBCnet's request that is spent before the tables
tables_mb, float_tables_mb             of the artifact's rows, and as float32
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_size import MBCNET, cut_schema
from side_by_side import CLOCKS, Clock, print_figures, take_turns, timing_parser_of
from torch.utils._python_dispatch import TorchDispatchMode

from data.schema import Schema
from mbcnet_rec.config import DataConfig, RunConfig
from mbcnet_rec.model.models import ModelConfig
from mbcnet_rec.serving import loader as serving
from mbcnet_rec.serving.artifact import take_apart, untrained, with_rows, write_artifact
from mbcnet_rec.serving.latency import Contest, Models, Timing, contestants, draw_requests, latency_lines, race


def main() -> int:
    parser = timing_parser_of(__doc__)
    parser.add_argument("--rows", default="", help="of a request; default 1,8,64,512, quick 1,64,512")
    parser.add_argument("--threads-list", default="", help="default 1,2,4, quick 1")
    parser.add_argument("--format", choices=("fp32", "fp16", "int8", "int4"), default="int8")
    parser.add_argument("--max-rows", type=int, default=10_000, help="of a table")
    parser.add_argument("--seconds", type=float, help="of each cell; default 10, quick 2")
    parser.add_argument("--compiled", action="store_true", help="also the dense part compiled by AOTInductor")
    args = parser.parse_args()
    contest = Contest(
        numbers(args.rows or ("1,64,512" if args.quick else "1,8,64,512")),
        numbers(args.threads_list or ("1" if args.quick else "1,2,4")),
        args.seconds or (2.0 if args.quick else 10.0),
        calls=20 if args.quick else 100,
        clock=CLOCKS[args.clock],
    )
    schema = cut_schema(args.max_rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mbcnet"
        write_drawn(schema, folder, args.format, compiled=args.compiled)
        models = contestants([folder], ("dcnv2", "dnn"), compiled=args.compiled)
        requests = {rows: draw_requests(schema, {}, rows) for rows in contest.rows}
        timings = race(models, requests, contest)
        stored = (folder / serving.TABLES).stat().st_size
        torch.set_num_threads(contest.threads[0])
        bare = {
            f"products_over_dcnv2_ms_{rows}": products_over(models, requests[rows][0], contest, args.clock)
            for rows in contest.rows
        }
    print("\n".join(latency_lines(["an MBCnet of the paper's size"], timings)))
    floats = sum(4 * table.num_embeddings * table.embedding_dim for table in schema.tables)
    figures = figures_of(timings, contest) | bare | {"tables_mb": stored / 1e6, "float_tables_mb": floats / 1e6}
    print_figures(figures | {"threads": contest.threads[0], "format": args.format}, args.json)
    return 0


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def write_drawn(schema: Schema, folder: Path, rows: str, *, compiled: bool, model: ModelConfig = MBCNET) -> None:
    """Export a model of drawn weights."""
    config = RunConfig("paper_size", "schema.toml", DataConfig(train=("none",)), model)
    torch.manual_seed(0)
    weights = untrained(config, schema)
    for table in weights.tables:
        weights.rows[table.name] = 0.01 * torch.randn(table.num_embeddings, table.embedding_dim)
    write_artifact(with_rows(take_apart(weights), weights, rows), config, folder, aot=compiled)


class Products(TorchDispatchMode):
    """Keeps the two matrices of each product that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.pairs.append(args[-2:])
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def products_over(models: Models, request: Mapping[str, Any], contest: Contest, clock: Clock) -> float:
    """Milliseconds that MBCnet's bare products take more than DCNv2's, by turns."""
    cases = {}
    for name in ("mbcnet", "dcnv2"):
        x = models[name].embed(models[name].preprocess(request))
        with Products() as products:
            models[name].graph(x)
        cases[name] = partial(multiply, products.pairs)
    times = take_turns(cases, contest.seconds / 2, least_rounds=contest.calls, clock=clock)
    return 1e3 * statistics.median(a - b for a, b in zip(times["mbcnet"], times["dcnv2"], strict=True))


def multiply(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for left, right in pairs:
        torch.mm(left, right)


def figures_of(timings: Sequence[Timing], contest: Contest) -> dict[str, Any]:
    at = {(each.model, each.rows): each for each in timings if each.threads == contest.threads[0]}
    figures: dict[str, Any] = {}
    for (model, rows), each in at.items():
        figures |= {f"{model}_p50_ms_{rows}": each.p50, f"{model}_p99_ms_{rows}": each.p99}
    for rows in contest.rows:
        own, base = at["mbcnet", rows], at["dcnv2", rows]
        figures[f"over_dcnv2_ms_{rows}"] = own.p50 - base.p50
        figures[f"preprocess_share_{rows}"] = own.preprocess / (own.preprocess + own.tables + own.dense)
    return figures


if __name__ == "__main__":
    sys.exit(main())
