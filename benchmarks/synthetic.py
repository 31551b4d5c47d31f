"""Whether the synthetic log tells models apart: test AUC of a DNN that ignores the groups, beside the best that any model can reach.

    python benchmarks/synthetic.py [--quick] [--json]

dnn_auc                    of `mbcnet_rec/configs/demo.toml`'s DNN after one epoch, on the last day
best_auc                   what the generator wrote down: the AUC of the true probabilities on the same rows
gap, standard_error        best_auc - dnn_auc, and the standard error of the DNN's AUC (Hanley and McNeil, 1982)
gap_in_standard_errors     above 3: measurably below

400,000 rows over 14 days (--quick: 60,000 over 6); one process.
"""

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from side_by_side import parser_of, print_figures

from data.synthetic.pailitao import pailitao_schema
from data.synthetic.write import write_synthetic
from mbcnet_rec.config import RunConfig, load_config
from mbcnet_rec.train import run_training

DEMO = Path(__file__).parents[1] / "mbcnet_rec" / "configs" / "demo.toml"


def main() -> int:
    arguments = parser_of(__doc__).parse_args()
    rows, days = (60_000, 6) if arguments.quick else (400_000, 14)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), rows, days)
    print_figures(figures, arguments.json)
    return 0


def measure(folder: Path, rows: int, days: int) -> dict[str, float]:
    """Write the log, train the DNN on all but the last two days, and score the last."""
    log = folder / "log"
    summary = write_synthetic(pailitao_schema("demo"), log, rows=rows, days=days)
    config = dnn_config(log, folder / "run")
    run_training(config)
    scores = json.loads((config.run_folder / "DONE").read_text())
    test = summary["splits"]["test"]
    positives = round(test["rows"] * test["label_rate"])
    error = standard_error(scores["auc"], positives, test["rows"] - positives)
    gap = test["best_auc"] - scores["auc"]
    return {
        "train_rows": summary["splits"]["train"]["rows"],
        "test_rows": test["rows"],
        "dnn_auc": scores["auc"],
        "best_auc": test["best_auc"],
        "dnn_log_loss": scores["log_loss"],
        "best_log_loss": test["best_log_loss"],
        "gap": gap,
        "standard_error": error,
        "gap_in_standard_errors": gap / error,
    }


def dnn_config(log: Path, out: Path) -> RunConfig:
    """The demo's DNN on another log, without evaluations on the way."""
    days = sorted(str(path) for path in log.glob("ds=*"))
    config = load_config(DEMO, ["model.kind=dnn"])
    return replace(
        config,
        schema=str(log / "schema.toml"),
        data=replace(config.data, train=tuple(days[:-2]), valid=(), test=(days[-1],)),
        train=replace(config.train, out=str(out), eval_every=0, device="cpu"),
    )


def standard_error(auc: float, positives: int, negatives: int) -> float:
    """Of an AUC: sqrt((A (1 - A) + (p - 1) (Q1 - A^2) + (n - 1) (Q2 - A^2)) / (p n)), Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A)."""
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    return math.sqrt(spread / (positives * negatives))


if __name__ == "__main__":
    sys.exit(main())
