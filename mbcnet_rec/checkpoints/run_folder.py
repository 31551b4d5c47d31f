"""The names in a run folder, and where a run's checkpoints are."""

from pathlib import Path

from mbcnet_rec.checkpoints.storage import CheckpointStorage, open_storage
from mbcnet_rec.training.config import TrainConfig

CONFIG, PLAN, CHECKPOINTS, DONE = "config.toml", "plan.json", "checkpoints", "DONE"


def storage_of(train: TrainConfig, folder: Path) -> CheckpointStorage:
    """The storage of the checkpoints of the run in `folder`.

    Raises:
        InputError: `train.checkpoint_folder` is a URI that cannot be opened.
    """
    return open_storage(train.checkpoint_folder or folder / CHECKPOINTS)
