"""Run by FuxiCTR's own Python: trains a model from given weights on given batches for benchmarks/same_start.py, and writes its predictions.

    PYTHONPATH=FUXICTR python fuxictr_same_start.py TASK.json

FUXICTR is a checkout of FuxiCTR's repository. Nothing of ours is imported here.
"""

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr_models import CLASSES, ZOO, load_source
from given_masks import give_masks

# Beginnings of the names of its dense parameters, in the order of ours
ORDER = {
    "dnn": ["mlp."],
    "dcnv2": ["crossnet.", "parallel_dnn.", "fc."],
    "finalmlp": [
        "fs_module.fs1_ctx_bias",
        "fs_module.fs1_gate.",
        "mlp1.",
        "fs_module.fs2_ctx_bias",
        "fs_module.fs2_gate.",
        "mlp2.",
        "fusion_module.w_xy",
        "fusion_module.w_x.",
        "fusion_module.w_y.weight",
    ],
}
TABLES = "embedding_layer.embedding_layer.embedding_layers."
SPARE = "fusion_module.w_y.bias"


def load_weights(model: Any, kind: str, weights: Any) -> None:
    """Copy tables by field, behind a row of padding, and the rest in order; refuse what does not fit."""
    parameters = dict(model.named_parameters())
    tables = {
        name: name[len(TABLES) :].removesuffix(".weight") for name in parameters if name.startswith(TABLES)
    }
    dense = [name for start in ORDER[kind] for name in parameters if name.startswith(start)]
    given = sorted(name for name in weights.files if name.startswith("dense/"))
    left = set(parameters) - set(tables) - set(dense) - {SPARE}
    assert len(given) == len(dense) and not left, (given, dense, left)
    with torch.no_grad():
        for name, field in tables.items():
            parameters[name][1:] = torch.from_numpy(weights[f"table/{field}"])
        for name, key in zip(dense, given, strict=True):
            parameters[name].copy_(torch.from_numpy(weights[key]).reshape(parameters[name].shape))
    if SPARE in parameters:
        parameters[SPARE].requires_grad_(False)
        assert not parameters[SPARE].any()


def main() -> None:
    """Train and predict after each epoch; under the protocol slow down and stop as its fit() does."""
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    logging.disable(logging.INFO)
    folder, kind = Path(task["folder"]), task["kind"]
    feature_map = importlib.import_module("fuxictr.features").FeatureMap(
        task["params"]["dataset_id"], str(folder)
    )
    feature_map.load(str(folder / "feature_map.json"), task["params"])
    source = Path(task["source"]) / "model_zoo" / ZOO[kind]
    model = getattr(load_source(source), CLASSES[kind])(feature_map, **task["params"])
    model._max_gradient_norm = task["params"]["max_gradient_norm"]
    load_weights(model, kind, np.load(folder / "weights.npz"))
    give_masks(model, task["mask_seed"])
    # as its fit() begins
    model._best_metric, model._stopping_steps, model._stop_training, model._epoch_index = -np.inf, 0, False, 0
    Path(model.checkpoint).parent.mkdir(parents=True, exist_ok=True)
    rows = {split: dict(np.load(folder / f"{split}_rows.npz")) for split in ("train", "valid", "test")}
    train = rows["train"]
    ends = np.cumsum(train.pop(""))
    a_pass = task["steps_an_epoch"]
    found = {}
    for step, end in enumerate(ends):
        start = ends[step - 1] if step else 0
        model.train()
        model.train_step({name: tensor(part[start:end], feature_map, name) for name, part in train.items()})
        if (step + 1) % a_pass == 0:
            epoch = (step + 1) // a_pass - 1
            for split in ("valid", "test"):
                found[f"{split}/{epoch}"] = predictions(model, rows[split], feature_map)
            if task["protocol"]:
                model.checkpoint_and_earlystop(
                    model.evaluate_metrics(
                        labels_of(rows["valid"], feature_map), found[f"valid/{epoch}"], ["AUC"]
                    )
                )
                if model._stop_training:
                    break
    np.savez(folder / "predictions.npz", **found)


def predictions(model: Any, rows: dict[str, np.ndarray], feature_map: Any) -> np.ndarray:
    """Probabilities of rows."""
    model.eval()
    with torch.no_grad():
        inputs = {name: tensor(part, feature_map, name) for name, part in rows.items()}
        return model(inputs)["y_pred"][:, 0].numpy()


def labels_of(rows: dict[str, np.ndarray], feature_map: Any) -> np.ndarray:
    """Labels of rows."""
    return rows[feature_map.labels[0]][:, 0]


def tensor(rows: np.ndarray, feature_map: Any, name: str) -> torch.Tensor:
    """A column of ids or labels, or lists as wide as the feature map says."""
    spec = feature_map.features.get(name, {"type": "label"})
    if spec["type"] == "sequence":
        rows = np.pad(rows, ((0, 0), (0, spec["max_len"] - rows.shape[1])))
    elif spec["type"] == "categorical":
        rows = rows[:, 0]
    return torch.from_numpy(rows)


if __name__ == "__main__":
    main()
