"""Are the shipped configs any good? Test log-loss of MBCnet, of the plain DNN of the same config, and of the label rate alone.

Prediction: MBCnet is below the DNN and the DNN below the label rate on each data set, in the mean over seeds.
The data sets are prepared from `--src`, a folder with the folders adult, movielens_latest_small and criteo_sample.
"""

import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from side_by_side import ROOT, mbcnet, parser_of, settings

FOLDERS = {"adult": "adult", "movielens": "movielens_latest_small", "criteo": "criteo_sample"}
MODELS = ("mbcnet", "dnn")


def label_rate_log_loss(train: Path, test: Path) -> float:
    """Mean log-loss of the training label rate p on the test rows: -(q log p + (1 - q) log(1 - p)), q the test label rate."""
    p, q = (statistics.fmean(pq.read_table(path)["label"].to_pylist()) for path in (train, test))
    return -(q * math.log(p) + (1 - q) * math.log(1 - p))


def train(name: str, model: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one model by the command line, in `folder`; its test metrics."""
    out, config = f"runs/{name}-{model}-{seed}", str(ROOT / f"mbcnet_rec/configs/{name}.toml")
    own = settings(f"model.kind={model}", f"train.seed={seed}", f"train.out={out}")
    mbcnet("train", "--config", config, *own, folder=folder)
    return json.loads((folder / out / "DONE").read_text())


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--src", type=Path, default=ROOT.parent / "shared/datasets")
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    args = parser.parse_args()
    names, seeds = (["criteo"], 1) if args.quick else (list(FOLDERS), args.seeds)
    result: dict[str, object] = {}
    heads = ("label rate", "DNN", "MBCnet", "DNN AUC", "MBCnet AUC")
    print(f"{'data set':<12}{''.join(f'{head:>12}' for head in heads)}   seeds won")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            if not (args.src / FOLDERS[name]).is_dir():
                print(f"{name:<12}its files are not in {args.src}")
                continue
            prepared = folder / "prepared" / name
            mbcnet("data", "prepare", name, "--src", str(args.src / FOLDERS[name]), "--out", str(prepared))
            prior = label_rate_log_loss(prepared / "train", prepared / "test")
            runs = {model: [train(name, model, seed, folder) for seed in range(seeds)] for model in MODELS}
            loss = {model: [run["log_loss"] for run in runs[model]] for model in MODELS}
            auc = {model: statistics.fmean(run["auc"] for run in runs[model]) for model in MODELS}
            won = sum(mbcnet < dnn for mbcnet, dnn in zip(loss["mbcnet"], loss["dnn"], strict=True))
            losses = [statistics.fmean(loss[model]) for model in ("dnn", "mbcnet")]
            means = [prior, *losses, auc["dnn"], auc["mbcnet"]]
            print(f"{name:<12}{''.join(f'{mean:12.4f}' for mean in means)}   {won} of {seeds}", flush=True)
            result[name] = {"label_rate": prior, "log_loss": loss, "auc": auc, "won": won}
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
