"""What is a user's history worth on MovieLens, and how is it pooled best? Test AUC, log-loss and GAUC of the shipped config without it and with each pooling.

Prediction: any history beats none, since most users of the test rows have no row in training; target attention beats the mean.
The data are prepared from `--src`, the folder movielens_latest_small.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from side_by_side import ROOT, mbcnet, parser_of, settings

FIELDS = ("history", "history_liked", "history_age")
TARGET = 'pooling = "target_attention", target = "movie_id"'
KEYS = ("auc", "log_loss", "gauc")


def schema_with(text: str, pooling: str) -> str:
    """The fitted schema with another pooling of the history, or without the history."""
    if pooling == "none":
        lines = [line for line in text.splitlines() if not line.startswith((*FIELDS, "user_history"))]
        return "\n".join(lines) + "\n"
    other = f'pooling = "{pooling}"' + (', target = "movie_id"' if pooling == "transformer" else "")
    return text if pooling == "target_attention" else text.replace(TARGET, other)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--src", type=Path, default=ROOT.parent / "shared/datasets/movielens_latest_small")
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    parser.add_argument("--poolings", default="none,mean,target_attention,transformer")
    args = parser.parse_args()
    poolings = ["mean", "target_attention"] if args.quick else args.poolings.split(",")
    config, result = str(ROOT / "mbcnet_rec/configs/movielens_history.toml"), {}
    print(f"{'pooling':<20}{'AUC':>20}{'log-loss':>20}{'GAUC':>20}")
    with tempfile.TemporaryDirectory() as temporary:
        folder, prepared = Path(temporary), Path(temporary) / "prepared/movielens_history"
        mbcnet("data", "prepare", "movielens_history", "--src", str(args.src), "--out", str(prepared))
        text = (prepared / "schema.toml").read_text()
        for pooling in poolings:
            schema = prepared / f"{pooling}.toml"
            schema.write_text(schema_with(text, pooling))
            runs = []
            for seed in range(1 if args.quick else args.seeds):
                out, short = f"runs/{pooling}-{seed}", ["train.max_steps=20"] if args.quick else []
                own = settings(f"schema={schema}", f"train.seed={seed}", f"train.out={out}", *short)
                mbcnet("train", "--config", config, *own, folder=folder)
                runs.append(json.loads((folder / out / "DONE").read_text()))
            found = {key: [run[key] for run in runs] for key in KEYS}
            cells = (f"{statistics.fmean(of):.4f} +- {statistics.pstdev(of):.4f}" for of in found.values())
            print(f"{pooling:<20}{''.join(f'{cell:>20}' for cell in cells)}", flush=True)
            result[pooling] = found
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
