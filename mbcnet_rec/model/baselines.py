"""Models to compare MBCnet with. They share its tables, its output type and its objective (K = 0 branches).

Shapes: B batch, N flattened width of all fields, d latent width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mbcnet_rec.model.branches import check_widths
from mbcnet_rec.model.layers import ALL, MLP, InputLayout
from mbcnet_rec.model.mbcnet import ModelOutput, check_dropout

if TYPE_CHECKING:  # torchrec takes seconds to import, and reading a config needs none of it
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from mbcnet_rec.model.sparse_arch import SparseArch


@dataclass(frozen=True)
class DNNConfig:
    """A plain deep network over all fields; by default the paper's deep branch and shared top in a row.

    Attributes:
        hidden: widths of the layers; the last one is d.
        batch_norm: in every layer.
        dropout: in every layer, a probability.
    """

    hidden: tuple[int, ...] = (2048, 1024, 512, 512, 512, 512, 256, 128)
    batch_norm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        check_widths("hidden", self.hidden)
        check_dropout(self.dropout)


class DNN(nn.Module):
    """logit = w MLP(e) + b, e all fields concatenated.

    Args:
        config: widths.
        sparse_arch: the tables.
        layout: the same that `sparse_arch` regroups by.
    """

    def __init__(self, config: DNNConfig, sparse_arch: "SparseArch", layout: InputLayout) -> None:
        super().__init__()
        self.branch_names: tuple[str, ...] = ()
        self.latent_dim = config.hidden[-1]
        self.sparse_arch = sparse_arch
        self.dense_arch = DNNArch(config, layout)

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: "KeyedJaggedTensor",
        weighted_features: "KeyedJaggedTensor | None" = None,
    ) -> ModelOutput:
        """Map a batch to its logit; no branches."""
        return self.dense_arch(self.sparse_arch(dense_features, sparse_features, weighted_features))


class DNNArch(nn.Module):
    """The part of DNN without tables, a leaf for torch.fx."""

    def __init__(self, config: DNNConfig, layout: InputLayout) -> None:
        super().__init__()
        self.mlp = MLP(layout.width(), config.hidden, config.batch_norm, config.dropout)
        self.logit = nn.Linear(config.hidden[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the fused logit (B,)."""
        latent = self.mlp(features[ALL])  # (B, d)
        logits = self.logit(latent).squeeze(1)
        return ModelOutput(latent.new_empty((0, *latent.shape)), logits.new_empty((0, len(logits))), logits)
