"""Run by FuxiCTR's own Python: trains its models on rows that benchmarks/quality.py wrote, and prints their test metrics.

    PYTHONPATH=FUXICTR python fuxictr_models.py TASK.json

FUXICTR is a checkout of FuxiCTR's repository; its model zoo lies beside its package. Nothing of ours is imported here.
"""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ZOO = {
    "dnn": "DNN/DNN_torch/src/DNN.py",
    "dcnv2": "DCNv2/src/DCNv2.py",
    "finalmlp": "FinalMLP/src/FinalMLP.py",
}
CLASSES = {"dnn": "DNN", "dcnv2": "DCNv2", "finalmlp": "FinalMLP"}


def load_source(path: Path) -> ModuleType:
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(task: dict[str, Any], kind: str, seed: int) -> dict[str, float]:
    """Train one model and score the test rows with its best weights."""
    features = importlib.import_module("fuxictr.features")
    loaders = importlib.import_module("fuxictr.pytorch.dataloaders")
    torch_utils = importlib.import_module("fuxictr.pytorch.torch_utils")
    folder = Path(task["folder"])
    params = task["common"] | task["models"][kind] | {"seed": seed, "model_id": f"{kind}_{seed}"}
    torch_utils.seed_everything(seed)
    feature_map = features.FeatureMap(params["dataset_id"], str(folder))
    feature_map.load(str(folder / "feature_map.json"), params)
    model = getattr(load_source(Path(task["source"]) / "model_zoo" / ZOO[kind]), CLASSES[kind])(
        feature_map, **params
    )
    files = {f"{split}_data": str(folder / f"{split}.npz") for split in ("train", "valid", "test")}
    make = loaders.RankDataLoader
    train_rows, valid_rows = make(feature_map, stage="train", **files, **params).make_iterator()
    model.fit(train_rows, validation_data=valid_rows, **params)
    test = model.evaluate(make(feature_map, stage="test", **files, **params).make_iterator())
    return {"auc": float(test["AUC"]), "log_loss": float(test["logloss"])}


def main() -> None:
    """Train every model with every seed; the last line is one JSON object."""
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    logging.disable(logging.INFO)
    found: dict[str, list[dict[str, float]]] = {}
    for kind in task["models"]:
        for seed in task["seeds"]:
            found.setdefault(kind, []).append(train(task, kind, seed))
            print(f"{kind}, seed {seed}: {found[kind][-1]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
