"""The names in a run folder, where a run's checkpoints are, and how a new run takes the place of an earlier one.

A run folder with a config.toml holds a run. A replaced run is moved to RUN/.replaced, its config.toml first, and the new one's files
come from RUN/.new, its config.toml last: so whenever the process ends, `recover` finds one whole run or the other. Checkpoints outside
of the folder cannot be moved away: from the file RUN/.replaced/.going on they are removed, and `recover` ends what was begun.
"""

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from data.errors import InputError
from data.reading.storage import is_uri
from data.schema.parse import parse_dataclass, read_toml
from mbcnet_rec.checkpoints.storage import CheckpointStorage
from mbcnet_rec.runtime.exits import CannotWriteError
from mbcnet_rec.training.config import TrainConfig

CONFIG, PLAN, CHECKPOINTS, DONE = "config.toml", "plan.json", "checkpoints", "DONE"
NEW, REPLACED, GOING = ".new", ".replaced", ".going"


def storage_of(train: TrainConfig, folder: Path) -> CheckpointStorage:
    """The storage of the checkpoints of the run in `folder`; InputError if it is a URI that cannot be opened."""
    return CheckpointStorage(train.checkpoint_folder or folder / CHECKPOINTS)


def train_config_of(folder: Path) -> TrainConfig | None:
    """The [train] part of the config of the run in `folder`, None where it holds no run; InputError if it cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    return parse_dataclass(TrainConfig, read_toml(path).get("train", {}), str(path), "train")


def other_checkpoints(train: TrainConfig, folder: Path) -> str:
    """Where the run in `folder` has its checkpoints, if that is elsewhere than `train` says; an empty string if it is there, or no run."""
    theirs = None
    with suppress(InputError):  # of a version that knew other keys
        theirs = train_config_of(folder)
    if theirs is None or _location(theirs, folder) == _location(train, folder):
        return ""
    return theirs.checkpoint_folder or str(folder / CHECKPOINTS)


def _location(train: TrainConfig, folder: Path) -> str:
    place = train.checkpoint_folder
    return place.rstrip("/") if is_uri(place) else str(Path(place or folder / CHECKPOINTS).resolve())


def put_in_place(folder: Path, names: Collection[str], *, elsewhere: bool) -> None:
    """Make RUN/.new the run in place of `names`; with `elsewhere` also of the checkpoints outside of the folder where its config has its own.

    OSError, and the earlier run as it was, if it cannot move; else raises as `recover`.
    """
    replaced, new = folder / REPLACED, folder / NEW
    try:
        replaced.mkdir()
        for name in sorted(names, key=lambda name: name != CONFIG):
            if os.path.lexists(folder / name):
                os.replace(folder / name, replaced / name)
        if elsewhere:
            (replaced / GOING).touch()
        else:
            _move(new, folder)
    except OSError:
        recover(folder)
        raise
    recover(folder)


def recover(folder: Path) -> None:
    """Bring back a run whose replacement was cut off, or finish the replacement if removal of its checkpoints elsewhere had begun; remove the rest.

    CannotWriteError if such a checkpoint cannot be removed.
    """
    replaced, new = folder / REPLACED, folder / NEW
    if replaced.is_dir() and not (folder / CONFIG).exists():
        train = train_config_of(new) if (replaced / GOING).exists() else None
        if train is not None:
            _clear(storage_of(train, folder))
            _move(new, folder)
        else:
            for path in replaced.iterdir():  # what the new one has put there
                remove(folder / path.name)
            _move(replaced, folder)
    remove(replaced)
    remove(new)


def _clear(storage: CheckpointStorage) -> None:
    try:
        storage.clear()
    except OSError as error:
        raise CannotWriteError(
            f"rank 0: {error.filename or storage.location}: checkpoints of the run that is replaced cannot be removed "
            f"({error.strerror or error}); repair the storage, then start again with --resume: the new run takes its place"
        ) from None


def _move(source: Path, folder: Path) -> None:
    """Move what is in `source` to `folder`, the config last."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == CONFIG):
        os.replace(path, folder / path.name)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
