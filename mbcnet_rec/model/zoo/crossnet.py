"""A cross network over all fields: the paper's CrossNetV2. Shapes: B batch, N flattened width of all fields."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Cross, CrossConfig, Logit, Regularisation


@dataclass(frozen=True)
class CrossNetConfig(Regularisation):
    """A cross network over all fields.

    Attributes:
        cross: low_rank_mixture is the paper's CrossNetV2, full_rank what FuxiCTR and BARS call by that name.
        hidden: widths of layers between the cross network and the logit; none by default. The paper ends every
            model in 128 latents: [512, 512, 256, 128] are MBCnet's reduction and top.
    """

    cross: CrossConfig = CrossConfig()
    hidden: tuple[int, ...] = bounded((), at_least=1)


class CrossNetArch(nn.Module):
    """logit = w MLP(cross(e)) + b (DCN-V2; Wang et al., 2021), the MLP absent by default."""

    def __init__(self, config: CrossNetConfig, layout: InputLayout) -> None:
        super().__init__()
        self.cross = Cross(config.cross, layout.width())
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = Logit((layout.width(), *config.hidden)[-1])

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        return logits_only(self.logit(self.mlp(self.cross(features[ALL]))))


MODEL = ModelKind(
    "crossnet", CrossNetConfig, CrossNetArch,
    widths=lambda ours: {"cross": ours.cross, "hidden": (ours.branch_dim, *ours.top), "dropout": ours.dropout},
)  # fmt: skip
