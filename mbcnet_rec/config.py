"""RunConfig: the owners' configs together, read from TOML, overridden by `--set`, checked across parts."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from data.errors import InputError
from data.plugins import pinned
from data.reading.config import DataConfig
from data.schema.parse import parse_dataclass, parse_value, read_toml, to_toml_value
from data.whole_folder import home_path
from mbcnet_rec.model.models import ModelConfig
from mbcnet_rec.plugins import model_class, model_config
from mbcnet_rec.training.config import OptimConfig, TrainConfig
from sharding.plan.constraints import ShardingConfig

# Keys that hold paths, in which `~` is the home folder
PATH_KEYS = (
    "schema", "plugins", "data.train", "data.valid", "data.test", "train.out", "train.checkpoint_folder", "train.warm_start", "sharding.plan",
    "sharding.cluster",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """One run: what it reads, what it learns with, where tables live, how long."""

    name: str  # names its folder
    schema: str  # the schema file, fitted, relative to the working directory
    data: DataConfig
    model: ModelConfig = field(default_factory=model_config)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    # Python files that bring models, branches and losses; a resolved config pins each: FILE#sha256=HEX
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what no part can check alone."""
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError(f"name = {self.name!r}: wanted a plain word, since it names a folder; change it")
        if self.train.patience and not self.data.valid:
            raise InputError(
                f"train.patience = {self.train.patience}: early stop reads the validation AUC, but data.valid is "
                "empty; name the validation files or set train.patience = 0"
            )
        if self.train.schedule == "plateau" and not self.data.valid:
            raise InputError(
                "train.schedule = 'plateau': it reads the validation AUC, but data.valid is empty; name the "
                "validation files or use 'constant'"
            )

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.train.out or f"runs/{self.name}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the values: the classes of plug-ins are made in each process."""
        return config_of, (to_toml_value(self), self.name)


def next_data(data: DataConfig, given: Sequence[str]) -> DataConfig:
    """[data] with other training rows: files, folders, globs and URIs, or KEY=VALUE for that partition beside or below those of before."""
    paths: list[str] = []
    for value in given:
        key, equals, _ = value.partition("=")
        if not equals or "/" in value or Path(value).exists():
            paths.append(value)
            continue
        for path in data.train:
            parts = path.rstrip("/").split("/")
            at = next((index for index, part in enumerate(parts) if part.startswith(f"{key}=")), None)
            paths.append("/".join([*parts, "**", value] if at is None else [*parts[:at], value]))
    return replace(data, train=tuple(dict.fromkeys(paths)), train_where=())


# What runs of earlier versions did, whose config.toml lacks keys that came since
EARLIER = ("model.mbcnet.top_activation=relu", "model.dcnv2.top=[]")
RUN_FILES = ("config.toml", "metrics.jsonl")


def earlier_options(table: dict[str, Any]) -> dict[str, Any]:
    """Complete a run's resolved config, in place, by the options that came after its version."""
    known = dict(flat(table))
    for option in EARLIER:
        if option.partition("=")[0] not in known:
            apply_override(table, option)
    return table


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file and apply overrides `key.path=value`; the InputError names the file or override, key, value, and the fix."""
    table = read_toml(Path(path))
    if Path(path).name == RUN_FILES[0] and all((Path(path).parent / name).is_file() for name in RUN_FILES):
        earlier_options(table)
    for override in overrides:
        apply_override(table, override)
    return config_of(_at_home(table), str(path))


def config_of(table: Mapping[str, Any], source: str) -> RunConfig:
    """A run's config of a parsed TOML table; InputError as `load_config`."""
    plugins = parse_value(tuple[str, ...], table.get("plugins", []), source, "plugins")
    plugins = tuple(pinned(each, source) for each in plugins)
    model = parse_dataclass(model_class(plugins), table.get("model", {}), source, "model")
    return parse_dataclass(RunConfig, {**table, "model": model, "plugins": plugins}, source)


def _at_home(value: Any, key: str = "") -> Any:
    """A TOML value in which `~` and `~user` at the beginning of each path are the folders that they stand for."""
    if isinstance(value, dict):
        return {name: _at_home(each, f"{key}.{name}".lstrip(".")) for name, each in value.items()}
    if isinstance(value, list):
        return [_at_home(each, key) for each in value]
    return home_path(value, key) if key in PATH_KEYS and isinstance(value, str) else value


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set a dotted key of a parsed TOML table; `path+=value` adds to a list. InputError if it is no `path=value`, or leads through a value."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"--set {override!r}: wanted key.path=value, for example train.epochs=2; write it so")
    for name in names[:-1]:
        child = table.setdefault(name, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: {name!r} is {child!r}, not a table of keys; check the path")
        table = child
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = text.strip()  # a bare string
    last = names[-1].rstrip("+ ")
    table[last] = [*table.get(last, []), value] if last != names[-1] else value


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a parsed TOML table with their paths: ("train.epochs", 1), ..."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def config_text(config: RunConfig) -> str:
    """The resolved config as TOML: every key with the value that the run uses."""
    return tomli_w.dumps(to_toml_value(config))
