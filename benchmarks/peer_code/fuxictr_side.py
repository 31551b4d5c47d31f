"""Run by FuxiCTR's own Python: trains its models for benchmarks/quality.py, same_start.py and peers.py. Imports nothing of ours.

    PYTHONPATH=FUXICTR python fuxictr_side.py models|same_start TASK.json
    PYTHONPATH=FUXICTR python fuxictr_side.py speed THREADS           tasks on standard input; see timed_steps.py

FUXICTR is a checkout of FuxiCTR's repository; its model zoo lies beside its package.
"""

# pyright: reportMissingImports=false
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from given_masks import give_masks
from timed_steps import answer_tasks

ZOO = {
    "dnn": ("DNN", "DNN/DNN_torch/src/DNN.py"),
    "dcnv2": ("DCNv2", "DCNv2/src/DCNv2.py"),
    "finalmlp": ("FinalMLP", "FinalMLP/src/FinalMLP.py"),
}
# Beginnings of the names of its dense parameters, in the order of ours
GATES = "fs_module.fs{0}_ctx_bias fs_module.fs{0}_gate. mlp{0}."
ORDER = {
    "dnn": ["mlp."],
    "dcnv2": ["crossnet.", "parallel_dnn.", "fc."],
    "finalmlp": [
        *GATES.format(1).split(),
        *GATES.format(2).split(),
        "fusion_module.w_xy",
        "fusion_module.w_x.",
        "fusion_module.w_y.weight",
    ],
}
TABLES = "embedding_layer.embedding_layer.embedding_layers."
SPARE = "fusion_module.w_y.bias"


def made_model(task: dict[str, Any], kind: str, params: dict[str, Any]) -> tuple[Any, Any]:
    """The feature map in the task's folder, and a model of the zoo."""
    folder = Path(task["folder"])
    feature_map = FeatureMap(params["dataset_id"], str(folder))
    feature_map.load(str(folder / "feature_map.json"), params)
    name, file = ZOO[kind]
    spec = importlib.util.spec_from_file_location(name, Path(task["source"]) / "model_zoo" / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return feature_map, getattr(module, name)(feature_map, **params)


def train_models(task: dict[str, Any]) -> None:
    """Train every model with every seed and score the test rows with its best weights; the last line is one JSON object."""
    files = {f"{split}_data": f"{task['folder']}/{split}.npz" for split in ("train", "valid", "test")}
    found: dict[str, list[dict[str, float]]] = {}
    for kind, seed in ((kind, seed) for kind in task["models"] for seed in task["seeds"]):
        params = task["common"] | task["models"][kind] | {"seed": seed, "model_id": f"{kind}_{seed}"}
        seed_everything(seed)
        feature_map, model = made_model(task, kind, params)
        train, valid = RankDataLoader(feature_map, stage="train", **files, **params).make_iterator()
        model.fit(train, validation_data=valid, **params)
        test = model.evaluate(RankDataLoader(feature_map, stage="test", **files, **params).make_iterator())
        found.setdefault(kind, []).append({"auc": float(test["AUC"]), "log_loss": float(test["logloss"])})
        print(f"{kind}, seed {seed}: {found[kind][-1]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


def train_fast(task: dict[str, Any]) -> None:
    """One epoch: rows from Parquet, its evaluation and its checkpoint at the end."""
    params = task["params"]
    seed_everything(0)
    feature_map, model = made_model(task, task["model"], params)
    files = {"train_data": task["train"], "valid_data": task["valid"]}
    train, valid = RankDataLoader(feature_map, stage="train", **files, **params).make_iterator()
    model.fit(train, validation_data=valid, **params)


def load_weights(model: Any, kind: str, weights: Any) -> None:
    """Copy tables by field, behind a row of padding, and the rest in order; refuse what does not fit."""
    parameters = dict(model.named_parameters())
    tables = {name: name[len(TABLES) :].removesuffix(".weight") for name in parameters if name.startswith(TABLES)}
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


def train_from_start(task: dict[str, Any]) -> None:
    """Train from given weights on given batches and predict after each epoch; slow down and stop as its fit() does."""
    folder, params, a_pass = Path(task["folder"]), task["params"], task["steps_an_epoch"]
    feature_map, model = made_model(task, task["kind"], params)
    model._max_gradient_norm = params["max_gradient_norm"]
    load_weights(model, task["kind"], np.load(folder / "weights.npz"))
    give_masks(model, task["mask_seed"])
    # as its fit() begins
    model._best_metric, model._stopping_steps, model._stop_training, model._epoch_index = -np.inf, 0, False, 0
    Path(model.checkpoint).parent.mkdir(parents=True, exist_ok=True)
    rows = {split: dict(np.load(folder / f"{split}_rows.npz")) for split in ("train", "valid", "test")}
    ends = np.cumsum(rows["train"].pop(""))
    found = {}
    for step, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        model.train()
        model.train_step(inputs(rows["train"], feature_map, slice(start, end)))
        if step % a_pass == 0:
            epoch = step // a_pass - 1
            model.eval()
            with torch.no_grad():
                for split in ("valid", "test"):
                    output = model(inputs(rows[split], feature_map, slice(None)))["y_pred"]
                    found[f"{split}/{epoch}"] = output[:, 0].numpy()
            labels = rows["valid"][feature_map.labels[0]][:, 0]
            model.checkpoint_and_earlystop(model.evaluate_metrics(labels, found[f"valid/{epoch}"], ["AUC"]))
            if model._stop_training:
                break
    np.savez(folder / "predictions.npz", **found)


def inputs(rows: dict[str, np.ndarray], feature_map: Any, part: slice) -> dict[str, torch.Tensor]:
    """Columns of ids or labels, and lists as wide as the feature map says."""
    found = {}
    for name, column in rows.items():
        values, spec = column[part], feature_map.features.get(name, {"type": "label"})
        if spec["type"] == "sequence":
            values = np.pad(values, ((0, 0), (0, spec["max_len"] - values.shape[1])))
        found[name] = torch.from_numpy(values[:, 0] if spec["type"] == "categorical" else values)
    return found


if __name__ == "__main__":
    logging.disable(logging.INFO)
    if sys.argv[1] == "speed":
        torch.set_num_threads(int(sys.argv[2]))
        answer_tasks(train_fast)
    else:
        given = json.loads(Path(sys.argv[2]).read_text())
        torch.set_num_threads(given["threads"])
        {"models": train_models, "same_start": train_from_start}[sys.argv[1]](given)
