"""MBCnet's EFGC branch alone. Shapes: B batch, n_g width of group g, H width in which the branch ends."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.branches import BranchesConfig, EFGCBranch, EFGCConfig
from mbcnet_rec.model.input_layout import InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Logit, Regularisation


@dataclass(frozen=True)
class EFGCNetConfig(Regularisation):
    """The EFGC branch alone. efgc: of the groups; branch_dim: H; top: widths between the branch and the logit."""

    efgc: EFGCConfig = EFGCConfig()
    branch_dim: int = bounded(512, at_least=1)
    top: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)


class EFGCArch(nn.Module):
    """logit = w top(EFGC(e)) + b: "EFGC" of Table 3."""

    def __init__(self, config: EFGCNetConfig, layout: InputLayout) -> None:
        super().__init__()
        alone = BranchesConfig(
            ("efgc",), config.efgc, branch_dim=config.branch_dim, batch_norm=config.batch_norm, dropout=config.dropout
        )
        self.branch = EFGCBranch(alone, layout)
        self.top = MLP(config.branch_dim, config.top, config)
        self.logit = Logit(config.top[-1])

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map each group g's (B, n_g) to the logits."""
        return logits_only(self.logit(self.top(self.branch(features))))


MODEL = ModelKind(
    "efgc", EFGCNetConfig, EFGCArch,
    widths=lambda ours: {"efgc": ours.efgc, "branch_dim": ours.branch_dim, "top": ours.top, "dropout": ours.dropout},
)  # fmt: skip
