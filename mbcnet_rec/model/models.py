"""Which model: one config that holds them all, and the one place that turns it into modules."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from mbcnet_rec.model.baselines import DNN, DNNConfig
from mbcnet_rec.model.layers import InputLayout
from mbcnet_rec.model.mbcnet import MBCNet, MBCNetConfig

if TYPE_CHECKING:
    from mbcnet_rec.model.sparse_arch import SparseArch


@dataclass(frozen=True)
class ModelConfig:
    """The model of a run.

    Attributes:
        kind: which of the models below is built; the others' tables are ignored.
        mbcnet: branches, shared top, fusion and cooperation losses.
        dnn: a plain deep network.
    """

    kind: Literal["mbcnet", "dnn"] = "mbcnet"
    mbcnet: MBCNetConfig = MBCNetConfig()
    dnn: DNNConfig = DNNConfig()


def build_model(config: ModelConfig, sparse_arch: "SparseArch", layout: InputLayout) -> nn.Module:
    """Build the model that `config.kind` names, on the given tables."""
    if config.kind == "dnn":
        return DNN(config.dnn, sparse_arch, layout)
    return MBCNet(config.mbcnet, sparse_arch, layout)
