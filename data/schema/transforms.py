"""Transforms of numbers that others bring: functions of a file that the schema's [transforms] names, or of installed packages.

    [transforms]
    clipped = { file = "my_transforms.py", limit = 10.0 }      # the file is relative to the schema
    [fields]
    price = { kind = "numeric", transform = "clipped" }

A transform is a function (config, numbers (n,) float64) -> (n,) float64, whose attribute `config` is a frozen dataclass with defaults. It
needs nothing of ours, so it serves where this project is not installed. A package offers it by an entry point of mbcnet.transforms.
"""

import json
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..errors import InputError  # relative: an exported artifact carries this file
from ..plugins import entry_points, load_plugin, pinned
from .feature import Feature, Transform
from .parse import parse_dataclass

FILE = "file"  # the key of an entry that is not the function's own
Entries = Mapping[str, Mapping[str, Any]]


def checked_transforms(
    entries: Entries, features: list[Feature], source: str, folder: Path
) -> dict[str, dict[str, Any]]:
    """The entries of [transforms] with their files pinned; InputError where one, or a field's transform, is none."""
    found = {name: dict(entry) for name, entry in entries.items()}
    for entry in found.values():
        if FILE in entry:
            entry[FILE] = pinned(os.path.join(folder.absolute(), str(entry[FILE])), source)
    for feature in features:
        if feature.transform not in (*get_args(Transform), *found):
            found[feature.transform] = {}
    for name, entry in found.items():
        _transform(name, json.dumps(entry), source)
    return found


def transform_of(entries: Entries, feature: Feature) -> Callable[[np.ndarray], np.ndarray] | None:
    """What a field's numbers go through, if it is no transform of ours."""
    if feature.transform in get_args(Transform):
        return None
    return _transform(feature.transform, json.dumps(entries[feature.transform]), "[transforms]")


@cache
def _transform(name: str, entry: str, source: str) -> Callable[[np.ndarray], np.ndarray]:
    table = json.loads(entry)
    file = table.pop(FILE, "")
    offered = vars(load_plugin(file)) if file else {each.__name__: each for each in entry_points("mbcnet.transforms")}
    function: Any = offered.get(name)
    if not hasattr(function, "config"):
        known = ", ".join(map(repr, get_args(Transform)))
        raise InputError(
            f"{source}: transform = {name!r}: wanted {known}, or a function of this name with an attribute `config` in the file that "
            f"[transforms] {name} = {{ file = ... }} gives, or in an installed package; change the value"
        )
    return partial(function, parse_dataclass(function.config, table, source, f"transforms.{name}"))
