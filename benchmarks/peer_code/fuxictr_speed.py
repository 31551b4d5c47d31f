"""Run by FuxiCTR's own Python: trains its models on Parquet rows of benchmarks/peers.py by its own fit loop, and tells the rate of each.

    PYTHONPATH=FUXICTR python fuxictr_speed.py THREADS

Tasks come as lines on standard input; see timed_steps.py. Nothing of ours is imported here.
"""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from fuxictr_models import CLASSES, ZOO, load_source
from timed_steps import answer_tasks


def train(task: dict[str, Any]) -> None:
    """One epoch: rows from Parquet, its evaluation and its checkpoint at the end."""
    features = importlib.import_module("fuxictr.features")
    loaders = importlib.import_module("fuxictr.pytorch.dataloaders")
    torch_utils = importlib.import_module("fuxictr.pytorch.torch_utils")
    params = task["params"]
    torch_utils.seed_everything(0)
    feature_map = features.FeatureMap(params["dataset_id"], task["folder"])
    feature_map.load(str(Path(task["folder"]) / "feature_map.json"), params)
    source = load_source(Path(task["source"]) / "model_zoo" / ZOO[task["model"]])
    model = getattr(source, CLASSES[task["model"]])(feature_map, **params)
    rows = loaders.RankDataLoader(
        feature_map, stage="train", train_data=task["train"], valid_data=task["valid"], **params
    )
    train_rows, valid_rows = rows.make_iterator()
    model.fit(train_rows, validation_data=valid_rows, **params)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    logging.disable(logging.INFO)
    answer_tasks(train)
