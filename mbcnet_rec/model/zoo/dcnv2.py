"""DCN-V2 (Wang et al., 2021): cross and deep network. Shapes: B batch, N flattened width of all fields."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.layers import MLP, Cross, CrossConfig
from mbcnet_rec.model.mbcnet import ModelOutput, logits_only
from mbcnet_rec.model.zoo.dnn import DNNConfig


@dataclass(frozen=True)
class DCNv2Config(DNNConfig):
    """Cross and deep network in parallel. cross: of the one; hidden, batch_norm, dropout: of the other."""

    cross: CrossConfig = CrossConfig()
    hidden: tuple[int, ...] = bounded((2048, 1024, 512, 512, 512), at_least=1, min_length=1)


class DCNv2Arch(nn.Module):
    """logit = w (cross(e) + MLP(e)) + b, where + concatenates: the parallel DCN-V2 (Wang et al., 2021)."""

    def __init__(self, config: DCNv2Config, layout: InputLayout) -> None:
        super().__init__()
        self.cross = Cross(config.cross, layout.width())
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = nn.Linear(layout.width() + config.hidden[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        x = features[ALL]
        return logits_only(self.logit(torch.cat([self.cross(x), self.mlp(x)], dim=1)).squeeze(1))
