"""Which model: one config that holds them all, and the one place that turns it into modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from mbcnet_rec.model.branches import FMConfig
from mbcnet_rec.model.layers import InputLayout
from mbcnet_rec.model.mbcnet import MBCNet, MBCNetConfig
from mbcnet_rec.model.zoo.baseline import Baseline
from mbcnet_rec.model.zoo.crossnet import CrossNetArch, CrossNetConfig
from mbcnet_rec.model.zoo.dcnv2 import DCNv2Arch, DCNv2Config
from mbcnet_rec.model.zoo.deepfm import DeepFMArch, DeepFMConfig
from mbcnet_rec.model.zoo.dnn import DNNArch, DNNConfig
from mbcnet_rec.model.zoo.efgc import EFGCArch, EFGCNetConfig
from mbcnet_rec.model.zoo.enkd import EnKDConfig
from mbcnet_rec.model.zoo.finalmlp import FinalMLPArch, FinalMLPConfig
from mbcnet_rec.model.zoo.fm import FMArch
from mbcnet_rec.model.zoo.mmoe import MMoEArch, MMoEConfig
from mbcnet_rec.model.zoo.wide_deep import WideDeepArch

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
        mbcnet: branches, shared top, fusion and cooperation losses.
        dnn: a plain deep network.
        crossnet: a cross network: the paper's CrossNetV2.
        wide_deep: one weight per id and field, plus a deep network.
        dcnv2: cross and deep network in parallel.
        mmoe: gated experts with one tower: the paper's MMOE+.
        enkd: the student of EnKD, a deep network, and its distillation.
        finalmlp: two MLP streams with field gates and bilinear fusion.
        deepfm: factorisation machine plus deep network.
        fm: factorisation machine.
        efgc: MBCnet's EFGC branch alone.
    """

    kind: ModelKind = "mbcnet"
    init: Literal["torch", "xavier_normal"] = "torch"
    mbcnet: MBCNetConfig = MBCNetConfig()
    dnn: DNNConfig = DNNConfig()
    crossnet: CrossNetConfig = CrossNetConfig()
    wide_deep: DNNConfig = DNNConfig()
    dcnv2: DCNv2Config = DCNv2Config()
    mmoe: MMoEConfig = MMoEConfig()
    enkd: EnKDConfig = EnKDConfig()
    finalmlp: FinalMLPConfig = FinalMLPConfig()
    deepfm: DeepFMConfig = DeepFMConfig()
    fm: FMConfig = FMConfig()
    efgc: EFGCNetConfig = EFGCNetConfig()


# kind of a baseline -> what builds it of its config, the key of that name, and the layout
ARCHES: dict[str, Callable[[Any, InputLayout], nn.Module]] = {
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


def needs_wide(config: ModelConfig) -> bool:
    """Whether the model reads wide weights: then its layout says wide=True and its tables include `wide_tables`."""
    if config.kind == "mbcnet":
        return "wide" in config.mbcnet.branches
    return config.kind in ("wide_deep", "fm", "deepfm")


def build_model(config: ModelConfig, sparse_arch: "SparseArch", layout: InputLayout) -> nn.Module:
    """Build the model that `config.kind` names, on the given tables."""
    if config.kind == "mbcnet":
        model: nn.Module = MBCNet(config.mbcnet, sparse_arch, layout)
    else:
        model = Baseline(sparse_arch, build_arch(config, layout))
    if config.init == "xavier_normal":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def build_arch(config: ModelConfig, layout: InputLayout) -> nn.Module:
    """Build what stands on the tables of a baseline: features -> ModelOutput."""
    if config.kind not in ARCHES:
        raise ValueError(f"{config.kind}: MBCNet stands on its tables by itself: build_model")
    return ARCHES[config.kind](getattr(config, config.kind), layout)
