"""DeepFM (Guo et al., 2017). Shapes: B batch, N flattened width of all fields, F sparse fields, D dense columns."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mbcnet_rec.model.branches import FMConfig
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Logit
from mbcnet_rec.model.side_by_side import side_by_side
from mbcnet_rec.model.zoo.dnn import DNNConfig, as_deep
from mbcnet_rec.model.zoo.fm import FMArch


@dataclass(frozen=True)
class DeepFMConfig(DNNConfig):
    """Factorisation machine and deep network. fm: width of the vectors; hidden, batch_norm, dropout: of the latter."""

    fm: FMConfig = FMConfig()


class DeepFMArch(nn.Module):
    """logit = FM(x) + w MLP(e), both on the same embeddings (Guo et al., 2017, Eq. 1)."""

    def __init__(self, config: DeepFMConfig, layout: InputLayout) -> None:
        super().__init__()
        self.fm = FMArch(config.fm, layout)
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = Logit(config.hidden[-1], bias=False)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and the wide weights (B, F + D) to the logits."""
        deep, pairs = side_by_side(
            features[ALL].device, lambda: self.logit(self.mlp(features[ALL])), lambda: self.fm(features).fused_logits
        )
        return logits_only(pairs + deep)


MODEL = ModelKind("deepfm", DeepFMConfig, DeepFMArch, "DeepFM", reads_wide=lambda _: True, widths=as_deep)
