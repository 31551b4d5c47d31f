"""Which model: one config that holds those of every kind, and the one place that turns it into modules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from data.errors import InputError
from data.schema import Schema
from data.schema.bounds import Bounded
from mbcnet_rec.model.branches import BranchesConfig
from mbcnet_rec.model.input_layout import InputLayout, input_layout, wide_tables, with_streams
from mbcnet_rec.model.kinds import BranchKind, LossKind, Model, ModelKind
from mbcnet_rec.model.losses import CoteachingConfig, DifferentiationConfig, MeanOverRanks, identity
from mbcnet_rec.model.objective import Objective
from mbcnet_rec.model.tasks import TaskLosses

if TYPE_CHECKING:
    from mbcnet_rec.model.sparse_arch import SparseArch


@dataclass(frozen=True)
class ModelConfig(Bounded):
    """The model of a run. `config_class` makes the class that has the table of each kind: model.mbcnet, model.dnn, ...

    Attributes:
        kind: which model is built; the others' tables are ignored.
        init: of the weights of linear layers: torch's own, uniform within 1 / sqrt(fan_in); or xavier_normal with biases of 0, as
            FuxiCTR has it: twice as wide where a layer narrows much.
        task_weights: task -> its weight in the loss, where the schema has several labels; 1 unless said.
    """

    kind: str = "mbcnet"
    init: Literal["torch", "xavier_normal"] = "torch"
    task_weights: dict[str, float] = field(default_factory=dict)
    kinds: ClassVar[Mapping[str, ModelKind]] = {}  # those that `kind` can name
    terms: ClassVar[Mapping[str, Callable[..., Tensor]]] = {}  # of [model.losses]

    def __post_init__(self) -> None:
        """Refuse a kind that is not there."""
        super().__post_init__()
        if self.kind not in self.kinds:
            raise InputError(
                f"kind = {self.kind!r}: wanted one of {', '.join(map(repr, self.kinds))}; change the value, or name the file of a model of your "
                "own in plugins"
            )

    @property
    def own(self) -> Any:
        """The config of the kind that is built."""
        return getattr(self, self.kind)

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Branches of the model, in the order of its outputs."""
        return tuple(getattr(self.own, "branches", ()))

    @property
    def teacher_kinds(self) -> tuple[str, ...]:
        """Kinds of models that are trained first, to teach this one."""
        return tuple(getattr(self.own, "teachers", ()))


@cache  # or the same kinds would have configs of two classes, which are never equal
def config_class(
    kinds: tuple[ModelKind, ...], branches: tuple[BranchKind, ...] = (), losses: tuple[LossKind, ...] = ()
) -> type[ModelConfig]:
    """The class of configs of these models, whose branches can be these besides ours, and whose objectives can have these losses besides."""
    tables = []
    more = {each.name: each for each in branches}
    for kind in kinds:
        own = with_branches(kind.config, more) if more and issubclass(kind.config, BranchesConfig) else kind.config
        tables.append((kind.name, own, field(default_factory=own)))
    if losses:
        terms = make_dataclass("Losses", [(each.name, each.config | None, None) for each in losses], frozen=True)
        tables.append(("losses", terms, field(default_factory=terms)))
    namespace = {"kinds": {kind.name: kind for kind in kinds}, "terms": {each.name: each.term for each in losses}}
    namespace["__doc__"] = ModelConfig.__doc__
    return make_dataclass("ModelConfig", tables, bases=(ModelConfig,), namespace=namespace, frozen=True)


def with_branches(config: type, branches: Mapping[str, BranchKind]) -> type:
    """The class of a config of branches, with more that can be named: the table of each becomes a field of it."""
    tables = [(each.name, each.config, field(default_factory=each.config)) for each in branches.values() if each.config]
    more = {"available": {**config.available, **branches}, "__doc__": config.__doc__}  # type: ignore[attr-defined]
    return make_dataclass(config.__name__, tables, bases=(config,), namespace=more, frozen=True)


def fit_widths(model: ModelConfig) -> ModelConfig:
    """Give models that the config says nothing about the widths of its MBCnet, as the paper does."""
    unsaid = {}
    for name, kind in model.kinds.items():
        plain = type(getattr(model, name))()
        if kind.widths is not None and getattr(model, name) == plain:
            unsaid[name] = replace(plain, **kind.widths(model.mbcnet))  # pyright: ignore[reportAttributeAccessIssue]
    return replace(model, **unsaid)


def has_streams(config: ModelConfig) -> bool:
    """Whether parts of the model read slices of rows."""
    return getattr(config.own, "embeddings", "shared") == "per_branch"


def model_layout(config: ModelConfig, schema: Schema) -> InputLayout:
    """What the model sees of a schema, which has no wide tables.

    Raises:
        InputError: a row has fewer columns than parts of the model that read it.
    """
    layout = input_layout(schema, needs_wide(config), _wide_only(config, schema))
    layout = replace(layout, tasks=tasks_of(config, schema))
    if not has_streams(config):
        return layout
    return with_streams(layout, config.own.streams(tuple(layout.groups)))


def _wide_only(config: ModelConfig, schema: Schema) -> frozenset[str]:
    crosses = frozenset(each.name for each in schema.features if each.is_cross)
    return crosses if config.kinds[config.kind].wide_crosses else frozenset()


def tasks_of(config: ModelConfig, schema: Schema) -> dict[str, float]:
    """The tasks of the model in the order of its logits, with their weights in the loss; none where the schema has one label.

    Raises:
        InputError: the model has one logit, or takes other labels, or a weight is of no task.
    """
    build = config.kinds[config.kind].tasks
    if schema.tasks and build is None:
        able = ", ".join(sorted(name for name, kind in config.kinds.items() if kind.tasks is not None))
        schema.require_one_label(f"model.kind = {config.kind!r} (of several labels: {able})")
    tasks = build(schema.tasks) if build is not None else {}
    for task, branch in product(tasks, config.branch_names):
        if (name := f"{task}_{branch}") in tasks:
            raise InputError(
                f"schema {schema.name!r}: label {name!r}: branch {branch} of {task!r} has a column of this name in what predict writes; "
                "rename the label column, or the branch"
            )
    for name, weight in config.task_weights.items():
        if name not in tasks or not 0 <= weight < math.inf:
            wanted = (
                f"a number of 0 or more for one of {', '.join(tasks)}" if tasks else "none, since there is one label"
            )
            raise InputError(f"model.task_weights.{name} = {weight}: wanted {wanted}; change it")
    tasks |= config.task_weights
    if tasks and not any(tasks.values()):
        raise InputError("model.task_weights: all are 0, so nothing would be learned; raise one")
    return tasks


def needs_wide(config: ModelConfig) -> bool:
    """Whether the model reads wide weights of tables of their own, `wide_tables`: then its layout says wide=True."""
    # a stream of wide weights is one column of each row
    return not has_streams(config) and config.kinds[config.kind].reads_wide(config.own)


def schema_with_wide(config: ModelConfig, schema: Schema) -> Schema:
    """Add a table of one weight per id for each field, where the model has a wide part; else return the schema.

    A field that only the wide part reads has no other table.

    Raises:
        InputError: a field's ids are unbounded: TorchRec looks each one up in one table only.
    """
    if not needs_wide(config):
        return schema
    unbounded = [table.feature_names[0] for table in schema.tables if table.zch is not None]
    if unbounded:
        raise InputError(
            f"schema {schema.name!r}: field {unbounded[0]!r} is of encoding 'zch', and this model has a wide part, which looks each field "
            "up in a second table, as TorchRec's managed collision cannot; use encoding = 'hash' for the field, or a model without a "
            "wide part"
        )
    kept = [table for table in schema.tables if not _wide_only(config, schema).issuperset(table.feature_names)]
    return replace(schema, tables=(*kept, *wide_tables(schema.tables)))


def build_model(config: ModelConfig, sparse_arch: "SparseArch", layout: InputLayout) -> Model:
    """Build the model that `config.kind` names, on the given tables."""
    model = Model(sparse_arch, build_arch(config, layout), layout.tasks)
    if config.init == "xavier_normal":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def build_arch(config: ModelConfig, layout: InputLayout) -> nn.Module:
    """Build the dense arch, which stands on the tables: features -> ModelOutput."""
    return config.kinds[config.kind].arch(config.own, layout)


def build_objective(config: ModelConfig, model: Model, mean_over_ranks: MeanOverRanks = identity) -> nn.Module:
    """Wrap a model in its training objective."""
    own, build, losses = config.own, config.kinds[config.kind].objective, getattr(config, "losses", None)
    used = {name: each for name in config.terms if (each := getattr(losses, name)) is not None}
    if build is not None:
        if used:
            raise InputError(f"model.losses.{min(used)}: a {config.kind} has an objective of its own; remove the table")
        return build(model, own, mean_over_ranks)
    terms = {name: partial(config.terms[name], each) for name, each in used.items()}
    coteaching = getattr(own, "coteaching", CoteachingConfig(weight=0.0))
    differentiation = getattr(own, "differentiation", DifferentiationConfig(weight=0.0))
    objective = Objective(model, coteaching, differentiation, mean_over_ranks, terms)
    if model.tasks:
        if terms:
            raise InputError(
                f"model.losses.{min(terms)}: it is of one label, and the schema has several; remove the table"
            )
        objective.losses = TaskLosses(objective.losses, model.tasks, getattr(model.dense_arch, "targets", None))
    return objective
