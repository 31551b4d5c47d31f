"""What all models to compare MBCnet with share: tables below, no branches above.

Shapes: B batch.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mbcnet_rec.model.mbcnet import ModelOutput

if TYPE_CHECKING:  # torchrec takes seconds to import, and reading a config needs none of it
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from mbcnet_rec.model.sparse_arch import SparseArch


class Baseline(nn.Module):
    """Tables, and an arch on top of them; no branches.

    Args:
        sparse_arch: the tables.
        dense_arch: features -> ModelOutput; a leaf for torch.fx.
    """

    def __init__(self, sparse_arch: "SparseArch", dense_arch: nn.Module) -> None:
        super().__init__()
        self.branch_names: tuple[str, ...] = ()
        self.latent_dim = 0
        self.sparse_arch = sparse_arch
        self.dense_arch = dense_arch

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: "KeyedJaggedTensor",
        weighted_features: "KeyedJaggedTensor | None" = None,
    ) -> ModelOutput:
        """Map a batch to its logits."""
        return self.dense_arch(self.sparse_arch(dense_features, sparse_features, weighted_features))


def logits_only(logits: Tensor) -> ModelOutput:
    """Wrap (B,) logits as the output of a model with K = 0 branches."""
    rows = logits.shape[0]  # len() would fix the batch size of an exported graph
    return ModelOutput(logits.new_empty(0, rows, 0), logits.new_empty(0, rows), logits)
