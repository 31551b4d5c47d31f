"""MBCnet (arXiv 2411.13057): model, training, command line; and the Python API, described in api.py and docs/python.md."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.schema import load_schema
    from mbcnet_rec.api import Run, stream, train, train_step
    from mbcnet_rec.config import RunConfig, load_config

__all__ = ["Run", "RunConfig", "load_config", "load_schema", "stream", "train", "train_step"]
_HOMES = {"load_schema": "data.schema", "load_config": "mbcnet_rec.config", "RunConfig": "mbcnet_rec.config"}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used: torchrec takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "mbcnet_rec.api")), name)
