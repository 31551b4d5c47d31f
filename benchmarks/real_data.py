"""Are the shipped configs any good? Test log-loss of MBCnet, of the plain DNN of the same config, and of the label rate alone.

Prediction: MBCnet is below the DNN and the DNN below the label rate on each data set, in the mean over seeds.
The data sets are prepared from `--src`, a folder with the folders adult, movielens_latest_small and criteo_sample.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
FOLDERS = {"adult": "adult", "movielens": "movielens_latest_small", "criteo": "criteo_sample"}
MODELS = ("mbcnet", "dnn")


def label_rate_log_loss(train: Path, test: Path) -> float:
    """Mean log-loss of the training label rate p on the test rows: -(q log p + (1 - q) log(1 - p)), q the test label rate."""
    p, q = (statistics.fmean(pq.read_table(path)["label"].to_pylist()) for path in (train, test))
    return -(q * math.log(p) + (1 - q) * math.log(1 - p))


def train(name: str, model: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one model by the command line, in `folder`; its test metrics."""
    out = f"runs/{name}-{model}-{seed}"
    settings = [f"model.kind={model}", f"train.seed={seed}", f"train.out={out}"]
    command = [sys.executable, "-m", "mbcnet_rec.cli", "train"]
    command += ["--config", str(ROOT / f"mbcnet_rec/configs/{name}.toml")]
    subprocess.run(
        [*command, *(word for value in settings for word in ("--set", value))],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return json.loads((folder / out / "DONE").read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", type=Path, default=ROOT.parent / "shared/datasets")
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    parser.add_argument("--quick", action="store_true", help="Criteo's sample only, one seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    names, seeds = (["criteo"], 1) if args.quick else (list(FOLDERS), args.seeds)
    result: dict[str, object] = {}
    print(
        f"{'data set':<12}{'label rate':>11}{'DNN':>9}{'MBCnet':>9}{'DNN AUC':>10}{'MBCnet AUC':>12}   seeds won"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            if not (args.src / FOLDERS[name]).is_dir():
                print(f"{name:<12}its files are not in {args.src}")
                continue
            prepared = folder / "prepared" / name
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "mbcnet_rec.cli",
                    "data",
                    "prepare",
                    name,
                    "--src",
                    str(args.src / FOLDERS[name]),
                    "--out",
                    str(prepared),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            prior = label_rate_log_loss(prepared / "train", prepared / "test")
            runs = {model: [train(name, model, seed, folder) for seed in range(seeds)] for model in MODELS}
            loss = {model: [run["log_loss"] for run in runs[model]] for model in MODELS}
            auc = {model: statistics.fmean(run["auc"] for run in runs[model]) for model in MODELS}
            mean = {model: statistics.fmean(loss[model]) for model in MODELS}
            won = sum(mbcnet < dnn for mbcnet, dnn in zip(loss["mbcnet"], loss["dnn"], strict=True))
            print(
                f"{name:<12}{prior:>11.4f}{mean['dnn']:>9.4f}{mean['mbcnet']:>9.4f}{auc['dnn']:>10.4f}{auc['mbcnet']:>12.4f}"
                f"   {won} of {seeds}",
                flush=True,
            )
            result[name] = {"label_rate": prior, "log_loss": loss, "auc": auc, "won": won}
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
