"""The scenarios of tests/test_training_tasks.py: runs of one and two ranks on two labels, and what they said."""

import shutil
import sys
from pathlib import Path

from forked_ranks import mbcnet, report, run_ranks, training
from tasks_data import write_tasks
from tiny_run import lines_of

from mbcnet_rec.training.hooks import Hooks

FOLDER = Path(sys.argv[1])
CONFIG = write_tasks(FOLDER)
STEPS = 20
COMMON = [
    f"train.max_steps={STEPS}", "train.log_every=5", "train.eval_every=10", "model.mbcnet.coteaching.threshold=base_rate",
    "model.task_weights.buy=0.5",
]  # fmt: skip
PLAIN = [each for each in COMMON if "weights" not in each]


def run(name, *settings, world=1, resume=False, common=COMMON):
    every = [f"train.out={FOLDER / name}", *common, *settings]
    action = training(CONFIG, every, lambda rank: Hooks(), resume=resume)
    return run_ranks(action, FOLDER / "logs" / name, world=world, limit=200)


def again():
    """Lose the last checkpoint of the run of two ranks, continue from the one before."""
    shutil.copytree(FOLDER / "two", FOLDER / "again")
    shutil.rmtree(FOLDER / "again" / "checkpoints" / f"step_{STEPS}")
    result = run("again", world=2, resume=True)
    return result | {"lines": lines_of(FOLDER / "again")}


def command(name, world, *args):
    return run_ranks(mbcnet([*map(str, args)]), FOLDER / "logs" / name, world=world, limit=200)


if __name__ == "__main__":
    test = FOLDER / "test.parquet"
    report(
        {
            "one": lambda: run("one") | {"lines": lines_of(FOLDER / "one")},
            "two": lambda: run("two", world=2) | {"lines": lines_of(FOLDER / "two")},
            "again": again,
            "esmm": lambda: (
                run("esmm", "model.kind=esmm", "train.early_stop=log_loss/click_and_buy", common=PLAIN)
                | {"lines": lines_of(FOLDER / "esmm")}
            ),
            "stopped": lambda: (
                run("stopped", "train.early_stop=auc/buy/deep", "train.eval_every=1", "train.patience=2", world=2)
                | {"lines": lines_of(FOLDER / "stopped")}
            ),
            "wrong": lambda: run("wrong", "train.early_stop=auc/cart"),
            "sampled": lambda: run("sampled", "data.keep_negatives=0.5"),
            "evaluate": lambda: command("evaluate", 2, "evaluate", FOLDER / "two", "--json", "--by", "hour"),
            "binned": lambda: command("binned", 2, "evaluate", FOLDER / "two", "--json", "--exact-rows", "100"),
            "predict": lambda: command("predict", 2, "predict", FOLDER / "two", "--data", test, "--out", FOLDER / "s2"),
            "predict_esmm": lambda: command(
                "predict_esmm", 1, "predict", FOLDER / "esmm", "--data", test, "--out", FOLDER / "s_esmm"
            ),
            "compare": lambda: command("compare", 1, "compare", FOLDER / "one", FOLDER / "two"),
            "importance": lambda: command("importance", 1, "importance", FOLDER / "one"),
            **{
                f"export_{name}": lambda name=name: command(
                    f"export_{name}",
                    1,
                    "export",
                    FOLDER / name,
                    "--out",
                    FOLDER / f"artifact_{name}",
                    "--rows",
                    "fp32",
                    "--no-aot",
                )
                for name in ("two", "esmm")
            },
            "calibrate": lambda: command(
                "calibrate", 1, "export", FOLDER / "two", "--out", FOLDER / "c", "--calibrate", "platt", "--no-aot"
            ),
        },
        FOLDER / "results.json",
    )
