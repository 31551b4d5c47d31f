"""MBCnet: one regroup of the sharded tables' output, K branches, one shared top, K + 1 logit layers.

Shapes: B batch, N flattened width of all fields, K branches, H branch_dim, d latent width (the last width of
the top).

The model is split in two. SparseArch holds the tables; TrainPipelineSparseDist traces it with torch.fx, so
its forward has no control flow over data. BranchArch holds all the rest, contains no table and is a leaf of
that trace: plain Python is fine in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import bounded
from mbcnet_rec.model.branches import (
    CrossBranch,
    CrossConfig,
    DeepBranch,
    DeepConfig,
    EFGCBranch,
    EFGCConfig,
    FMBranch,
    FMConfig,
    WideBranch,
)
from mbcnet_rec.model.layers import MLP, InputLayout, Regularisation
from mbcnet_rec.model.losses import CoteachingConfig, DifferentiationConfig

if TYPE_CHECKING:  # torchrec takes seconds to import, and reading a config needs none of it
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from mbcnet_rec.model.sparse_arch import SparseArch

BRANCHES = ("efgc", "cross", "deep", "fm", "wide")


@dataclass(frozen=True)
class MBCNetConfig(Regularisation):
    """The paper's network and objective (section 4.1.3) by default.

    Attributes:
        branches: any of efgc, cross, deep, fm, wide, each once, in the order of the outputs. A single branch
            has no cooperation losses.
        efgc, cross, deep, fm: of the branches; wide has no choices.
        branch_dim: H, the width in which every branch ends.
        top: widths of the shared top.
        fusion: of the latents: their mean (Eq. 15), or gated: a softmax weight per branch and sample.
        coteaching, differentiation: of the objective.
    """

    branches: tuple[str, ...] = ("efgc", "cross", "deep")
    efgc: EFGCConfig = EFGCConfig()
    cross: CrossConfig = CrossConfig()
    deep: DeepConfig = DeepConfig()
    fm: FMConfig = FMConfig()
    branch_dim: int = bounded(512, at_least=1)
    top: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)
    fusion: Literal["mean", "gated"] = "mean"
    coteaching: CoteachingConfig = CoteachingConfig()
    differentiation: DifferentiationConfig = DifferentiationConfig()

    def __post_init__(self) -> None:
        """Refuse values that contradict each other or build no network."""
        super().__post_init__()
        branches = list(self.branches)
        if not branches or len(set(branches)) != len(branches) or not set(branches) <= set(BRANCHES):
            raise InputError(f"branches = {branches}: wanted one or more of {', '.join(BRANCHES)}, each once")
        if "deep" in branches and self.deep.hidden[-1] != self.branch_dim:
            raise InputError(
                f"deep.hidden = {list(self.deep.hidden)}: wanted the last width to be branch_dim = {self.branch_dim}, "
                "since all branches share one top; change one of the two"
            )


class ModelOutput(NamedTuple):
    """What every model returns. K = 0 for models without branches."""

    latents: Tensor  # (K, B, d)
    branch_logits: Tensor  # (K, B)
    fused_logits: Tensor  # (B,), the prediction that serves


class MBCNet(nn.Module):
    """The multi-branch cooperation network (Figure 2).

    Args:
        config: of branches, top and fusion.
        sparse_arch: the tables.
        layout: the same that `sparse_arch` regroups by.
    """

    def __init__(self, config: MBCNetConfig, sparse_arch: "SparseArch", layout: InputLayout) -> None:
        super().__init__()
        self.branch_names: tuple[str, ...] = config.branches
        self.latent_dim = config.top[-1]
        self.sparse_arch = sparse_arch
        self.dense_arch = BranchArch(config, layout)

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: "KeyedJaggedTensor",
        weighted_features: "KeyedJaggedTensor | None" = None,
    ) -> ModelOutput:
        """Map a batch to latents, branch logits and the fused logit."""
        return self.dense_arch(self.sparse_arch(dense_features, sparse_features, weighted_features))


class BranchArch(nn.Module):
    """Branches -> shared top -> latents -> logits.

        h^k = branch_k(e),   z^k = f_theta(h^k) (Eq. 8),   logit^k = w_k z^k + b_k (Eq. 9),   logit = w
        fusion(z) + b (Eq. 15)

    Args:
        config: of branches, top and fusion.
        layout: widths of the groups.
    """

    def __init__(self, config: MBCNetConfig, layout: InputLayout) -> None:
        super().__init__()
        num_branches, latent_dim = len(config.branches), config.top[-1]
        self.branches = nn.ModuleDict({name: build_branch(name, config, layout) for name in config.branches})
        self.top = MLP(config.branch_dim, config.top, config)
        self.branch_logits = nn.ModuleList(nn.Linear(latent_dim, 1) for _ in range(num_branches))
        self.fusion = GatedFusion(num_branches, latent_dim) if config.fusion == "gated" else MeanFusion()
        self.fused_logit = nn.Linear(latent_dim, 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and each group g (B, n_g) to latents (K, B, d) and logits."""
        hidden = torch.stack([branch(features) for branch in self.branches.values()])  # (K, B, H)
        # Stacked over rows: one large product per layer of the top instead of K small ones.
        latents = self.top(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])  # (K, B, d)
        logits = [layer(latent).squeeze(1) for layer, latent in zip(self.branch_logits, latents, strict=True)]
        fused_logits = self.fused_logit(self.fusion(latents)).squeeze(1)
        return ModelOutput(latents, torch.stack(logits), fused_logits)


class MeanFusion(nn.Module):
    """z = 1/K sum_k z^k (Eq. 15)."""

    def forward(self, latents: Tensor) -> Tensor:
        """Map (K, B, d) to (B, d)."""
        return latents.mean(0)


class GatedFusion(nn.Module):
    """z = sum_k g_k z^k, g = softmax(G (z^1 + ... + z^K) + c), where + concatenates."""

    def __init__(self, num_branches: int, latent_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(num_branches * latent_dim, num_branches)

    def forward(self, latents: Tensor) -> Tensor:
        """Map (K, B, d) to (B, d)."""
        gates = torch.softmax(self.gate(latents.transpose(0, 1).flatten(1)), dim=1)  # (B, K)
        return (gates.t().unsqueeze(2) * latents).sum(0)


def build_branch(name: str, config: MBCNetConfig, layout: InputLayout) -> nn.Module:
    """Build the branch of that name: features -> (B, H)."""
    match name:
        case "efgc":
            return EFGCBranch(layout, config.efgc, config.branch_dim, config)
        case "cross":
            return CrossBranch(layout, config.cross, config.branch_dim, config)
        case "deep":
            return DeepBranch(layout, config.deep, config)
        case "fm":
            return FMBranch(layout, config.fm, config.branch_dim, config)
        case "wide":
            return WideBranch(layout, config.branch_dim, config)
        case _:
            raise ValueError(f"branch {name!r} is not one of {BRANCHES}")
