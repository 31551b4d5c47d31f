"""The models, branches and losses that there are: ours, those of installed packages, and those of files that a config names."""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

from data.errors import InputError
from data.plugins import entry_points, load_plugin, offered
from mbcnet_rec.model import mbcnet, zoo
from mbcnet_rec.model.branches import BRANCHES
from mbcnet_rec.model.kinds import BranchKind, LossKind, ModelKind
from mbcnet_rec.model.models import ModelConfig, config_class

Kind = TypeVar("Kind", ModelKind, BranchKind, LossKind)


@cache
def our_modules() -> tuple[ModuleType, ...]:
    """The files that export our own models."""
    found = pkgutil.iter_modules(zoo.__path__)
    return (mbcnet, *(importlib.import_module(f"{zoo.__name__}.{each.name}") for each in found))


def model_class(plugins: Sequence[str] = ()) -> type[ModelConfig]:
    """The class of [model] with the tables of every model, those of `plugins` (see `pinned`) too; InputError if one fails, or two have one name."""
    files = [load_plugin(each) for each in plugins]
    models = (*offered([*our_modules()], ModelKind), *entry_points("mbcnet.models"), *offered(files, ModelKind))
    branches = (*BRANCHES.values(), *entry_points("mbcnet.branches"), *offered(files, BranchKind))
    more = tuple(each for each in _named(branches) if each.name not in BRANCHES)
    losses = (*entry_points("mbcnet.losses"), *offered(files, LossKind))
    return config_class(_named(models), more, _named(losses))


def model_config(*values: Any, plugins: Sequence[str] = (), **tables: Any) -> ModelConfig:
    """A model's config by its values: `model_config("dnn", dnn=DNNConfig(hidden=(64,)))`."""
    return model_class(plugins)(*values, **tables)


def _named(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Each once; InputError where a name is no key of TOML that a config can have, or two have it, or a table does not stand by default."""
    by_name: dict[str, Kind] = {}
    for each in kinds:
        what = type(each).__name__
        if not each.name.isidentifier() or hasattr(ModelConfig, each.name):
            raise InputError(f"{what} {each.name!r}: wanted another plain word for a name; change it")
        if by_name.setdefault(each.name, each) is not each:
            raise InputError(f"{what} {each.name!r}: there are two of that name; rename one")
        try:
            _ = each.config and each.config()
        except TypeError as error:
            raise InputError(f"{what} {each.name!r}: its config needs a default for each field ({error})") from None
    return tuple(by_name.values())
