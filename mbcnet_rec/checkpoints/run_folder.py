"""The names in a run folder, where a run's checkpoints are, and which is the best."""

import json
import warnings
from pathlib import Path

from data.errors import InputError
from mbcnet_rec.checkpoints.manifest import check_files, read_manifest
from mbcnet_rec.checkpoints.storage import (
    CheckpointStorage,
    DamagedCheckpointWarning,
    latest_step,
    open_storage,
)
from mbcnet_rec.checkpoints.writer import BEST
from mbcnet_rec.training.config import TrainConfig

CONFIG, PLAN, CHECKPOINTS, DONE = "config.toml", "plan.json", "checkpoints", "DONE"


def storage_of(train: TrainConfig, folder: Path) -> CheckpointStorage:
    """The storage of the checkpoints of the run in `folder`.

    Raises:
        InputError: `train.checkpoint_folder` is a URI that cannot be opened.
    """
    return open_storage(train.checkpoint_folder or folder / CHECKPOINTS)


def best_step(storage: CheckpointStorage) -> int | None:
    """The step of a run's best checkpoint, else of its latest whole one; None if it has none."""
    try:
        step = int(json.loads(storage.read_note(BEST))["step"])
        if step in storage.steps():
            with storage.fetched(step) as folder:
                check_files(folder, read_manifest(folder))
            return step
    except InputError as error:
        warnings.warn(f"{error} (the best one, passed over)", DamagedCheckpointWarning, stacklevel=2)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return latest_step(storage)
