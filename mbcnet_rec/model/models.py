"""Which model: one config that holds them all, and the one place that turns it into modules."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from data.errors import InputError
from data.schema import Schema
from mbcnet_rec.model.branches import FMConfig
from mbcnet_rec.model.input_layout import InputLayout, input_layout, wide_tables, with_streams
from mbcnet_rec.model.losses import MeanOverRanks, identity
from mbcnet_rec.model.mbcnet import BranchArch, MBCNet, MBCNetConfig, Model
from mbcnet_rec.model.objective import Objective
from mbcnet_rec.model.zoo.crossnet import CrossNetArch, CrossNetConfig
from mbcnet_rec.model.zoo.dcnv2 import DCNv2Arch, DCNv2Config
from mbcnet_rec.model.zoo.deepfm import DeepFMArch, DeepFMConfig
from mbcnet_rec.model.zoo.dnn import DNNArch, DNNConfig
from mbcnet_rec.model.zoo.efgc import EFGCArch, EFGCNetConfig
from mbcnet_rec.model.zoo.enkd import DistillationObjective, EnKDConfig
from mbcnet_rec.model.zoo.finalmlp import FinalMLPArch, FinalMLPConfig
from mbcnet_rec.model.zoo.fm import FMArch
from mbcnet_rec.model.zoo.mmoe import MMoEArch, MMoEConfig
from mbcnet_rec.model.zoo.wide_deep import WideDeepArch, WideDeepConfig

if TYPE_CHECKING:
    from mbcnet_rec.model.sparse_arch import SparseArch

ModelKind = Literal[
    "mbcnet", "dnn", "crossnet", "wide_deep", "dcnv2", "mmoe", "enkd", "finalmlp", "deepfm", "fm", "efgc"
]


@dataclass(frozen=True)
class ModelConfig:
    """The model of a run.

    Attributes:
        kind: which of the models below is built; the others' tables are ignored.
        init: of the weights of linear layers: torch's own, uniform within 1 / sqrt(fan_in); or xavier_normal with biases of 0, as
            FuxiCTR has it: twice as wide where a layer narrows much.
        mbcnet, dnn, ...: the config of each kind, described there; `wide_deep` is one weight per id and field plus the deep
            network of its config, `enkd` the student of EnKD and its distillation.
    """

    kind: ModelKind = "mbcnet"
    init: Literal["torch", "xavier_normal"] = "torch"
    mbcnet: MBCNetConfig = MBCNetConfig()
    dnn: DNNConfig = DNNConfig()
    crossnet: CrossNetConfig = CrossNetConfig()
    wide_deep: WideDeepConfig = WideDeepConfig()
    dcnv2: DCNv2Config = DCNv2Config()
    mmoe: MMoEConfig = MMoEConfig()
    enkd: EnKDConfig = EnKDConfig()
    finalmlp: FinalMLPConfig = FinalMLPConfig()
    deepfm: DeepFMConfig = DeepFMConfig()
    fm: FMConfig = FMConfig()
    efgc: EFGCNetConfig = EFGCNetConfig()


# kind of a model -> what builds its dense arch of its config, the key of that name, and the layout
ARCHES: dict[ModelKind, Callable[[Any, InputLayout], nn.Module]] = {
    "mbcnet": BranchArch,
    "dnn": DNNArch,
    "crossnet": CrossNetArch,
    "wide_deep": WideDeepArch,
    "dcnv2": DCNv2Arch,
    "mmoe": MMoEArch,
    "enkd": DNNArch,
    "finalmlp": FinalMLPArch,
    "deepfm": DeepFMArch,
    "fm": FMArch,
    "efgc": EFGCArch,
}


def has_streams(config: ModelConfig) -> bool:
    """Whether parts of the model read slices of rows."""
    return getattr(getattr(config, config.kind), "embeddings", "shared") == "per_branch"


def model_layout(config: ModelConfig, schema: Schema) -> InputLayout:
    """What the model sees of a schema, which has no wide tables.

    Raises:
        InputError: a row has fewer columns than parts of the model that read it.
    """
    layout = input_layout(schema, needs_wide(config))
    if not has_streams(config):
        return layout
    return with_streams(layout, getattr(config, config.kind).streams(tuple(layout.groups)))


def needs_wide(config: ModelConfig) -> bool:
    """Whether the model reads wide weights of tables of their own, `wide_tables`: then its layout says wide=True."""
    if has_streams(config):
        return False  # one column of each row
    if config.kind == "mbcnet":
        return "wide" in config.mbcnet.branches
    return config.kind in ("wide_deep", "fm", "deepfm")


def schema_with_wide(config: ModelConfig, schema: Schema) -> Schema:
    """Add a table of one weight per id for each field, where the model has a wide part; else return the schema.

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
    return replace(schema, tables=(*schema.tables, *wide_tables(schema.tables)))


def build_model(config: ModelConfig, sparse_arch: "SparseArch", layout: InputLayout) -> Model:
    """Build the model that `config.kind` names, on the given tables."""
    if config.kind == "mbcnet":
        model: Model = MBCNet(config.mbcnet, sparse_arch, layout)
    else:
        model = Model(sparse_arch, build_arch(config, layout))
    if config.init == "xavier_normal":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def build_arch(config: ModelConfig, layout: InputLayout) -> nn.Module:
    """Build the dense arch, which stands on the tables: features -> ModelOutput."""
    return ARCHES[config.kind](getattr(config, config.kind), layout)


def build_objective(config: ModelConfig, model: Model, mean_over_ranks: MeanOverRanks = identity) -> Objective:
    """Wrap a model in its training objective."""
    if config.kind == "enkd":
        return DistillationObjective(model, config.enkd)
    return Objective(model, config.mbcnet.coteaching, config.mbcnet.differentiation, mean_over_ranks)
