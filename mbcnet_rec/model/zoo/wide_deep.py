"""Wide & Deep (Cheng et al., 2016). Shapes: B batch, N flattened width of all fields, F sparse fields, D dense columns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbcnet_rec.model.input_layout import ALL, WIDE, Embeddings, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Logit
from mbcnet_rec.model.side_by_side import side_by_side
from mbcnet_rec.model.zoo.dnn import DNNConfig, as_deep


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


@dataclass(frozen=True)
class WideDeepConfig(DNNConfig):
    """A linear model beside a deep network, which hidden, batch_norm and dropout are of.

    Attributes:
        embeddings: shared: the weights of the linear model have tables of their own; per_branch: they are one column of each row, and
            the deep network reads the others.
    """

    embeddings: Embeddings = "shared"

    def streams(self, groups: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Part -> the groups that it reads."""
        return {"wide": (WIDE,), "deep": (ALL,)}


class WideDeepArch(nn.Module):
    """logit = wide(x) + w MLP(e) (Wide & Deep; Cheng et al., 2016, Eq. 3). The schema's crosses are phi(x), which only the wide part reads."""

    def __init__(self, config: WideDeepConfig, layout: InputLayout) -> None:
        super().__init__()
        self._wide, self._deep = layout.tensor_name("wide", WIDE), layout.tensor_name("deep")
        self.wide = WideLogit(layout.of("wide"))
        self.mlp = MLP(layout.of("deep").width(), config.hidden, config)
        self.logit = Logit(config.hidden[-1], bias=False)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and the wide weights (B, F + D) to the logits."""
        x, y = features[self._wide], features[self._deep]
        deep, wide = side_by_side(y.device, lambda: self.logit(self.mlp(y)), lambda: self.wide(x))
        return logits_only(wide + deep)


MODEL = ModelKind(
    "wide_deep", WideDeepConfig, WideDeepArch, reads_wide=lambda _: True, wide_crosses=True, widths=as_deep
)
