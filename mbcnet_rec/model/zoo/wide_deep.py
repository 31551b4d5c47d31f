"""Wide & Deep (Cheng et al., 2016). Shapes: B batch, N flattened width of all fields, F sparse fields, D dense columns."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mbcnet_rec.model.input_layout import ALL, WIDE, InputLayout
from mbcnet_rec.model.layers import MLP
from mbcnet_rec.model.mbcnet import ModelOutput, logits_only
from mbcnet_rec.model.zoo.dnn import DNNConfig


class WideLogit(nn.Module):
    """sum_f w_f[x_f] + w x_dense + b: the linear model over ids and numbers. The weights of ids live in the tables of `wide_tables`."""

    def __init__(self, layout: InputLayout) -> None:
        super().__init__()
        self._num_sparse = len(layout.embedding_dims)
        self.dense_weight = nn.Parameter(torch.zeros(layout.width(WIDE) - self._num_sparse))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, wide: Tensor) -> Tensor:
        """Map the wide weights (B, F + D) to (B,)."""
        of_ids, numbers = wide[:, : self._num_sparse], wide[:, self._num_sparse :]
        return of_ids.sum(1) + (numbers * self.dense_weight).sum(1) + self.bias


class WideDeepArch(nn.Module):
    """logit = wide(x) + w MLP(e) (Wide & Deep; Cheng et al., 2016), without hand-made cross products."""

    def __init__(self, config: DNNConfig, layout: InputLayout) -> None:
        super().__init__()
        self.wide = WideLogit(layout)
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = nn.Linear(config.hidden[-1], 1, bias=False)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and the wide weights (B, F + D) to the logits."""
        return logits_only(self.wide(features[WIDE]) + self.logit(self.mlp(features[ALL])).squeeze(1))
