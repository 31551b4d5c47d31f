"""Factorisation machine (Rendle, 2010). Shapes: B batch, N flattened width of all fields, F sparse fields, D dense columns."""

from collections.abc import Mapping

from torch import Tensor, nn

from mbcnet_rec.model.branches import FMConfig
from mbcnet_rec.model.factorisation import FieldVectors, bi_interaction
from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.zoo.wide_deep import WideLogit


class FMArch(nn.Module):
    """logit = wide(x) + sum_{f < g} <v_f, v_g> (Rendle, 2010, Eq. 1)."""

    def __init__(self, config: FMConfig, layout: InputLayout) -> None:
        super().__init__()
        self.wide = WideLogit(layout)
        self.vectors = FieldVectors(layout, config.dim)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and the wide weights (B, F + D) to the logits."""
        pairs = bi_interaction(self.vectors(features[ALL])).sum(1)
        return logits_only(self.wide(features[WIDE]) + pairs)


MODEL = ModelKind("fm", FMConfig, FMArch, "FM", reads_wide=lambda _: True)
