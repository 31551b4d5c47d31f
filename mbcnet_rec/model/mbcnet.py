"""MBCnet: one regroup of the sharded tables' output, K branches, one shared top, K + 1 logit layers.

Shapes: B batch, N flattened width of all fields, K branches, H branch_dim, d latent width (the last width of
the top).

Every model is split in two. SparseArch holds the tables; TrainPipelineSparseDist traces it with torch.fx, so
its forward has no control flow over data. The dense arch, here BranchArch, holds all the rest, contains no table and is a leaf of
that trace: plain Python is fine in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.branches import BranchesConfig
from mbcnet_rec.model.input_layout import WIDE, InputLayout
from mbcnet_rec.model.kinds import Model, ModelKind, ModelOutput, each_label
from mbcnet_rec.model.layers import MLP, Logit
from mbcnet_rec.model.losses import CoteachingConfig, DifferentiationConfig, at_least_float32
from mbcnet_rec.model.side_by_side import side_by_side

if TYPE_CHECKING:  # torchrec takes seconds to import, and reading a config needs none of it
    from mbcnet_rec.model.sparse_arch import SparseArch


@dataclass(frozen=True)
class MBCNetConfig(BranchesConfig):
    """The paper's network and objective (section 4.1.3) by default.

    Attributes:
        top: widths of the shared top.
        top_activation: of its last layer, whose outputs are the latents: none or relu. With relu the differentiation loss has its
            minimum at latents of 0, where nothing learns any more.
        fusion: of the latents: their mean (Eq. 15), or gated: a softmax weight per branch and sample.
        coteaching, differentiation: of the objective.
    """

    top: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)
    top_activation: Literal["none", "relu"] = "none"
    fusion: Literal["mean", "gated"] = "mean"
    coteaching: CoteachingConfig = CoteachingConfig()
    differentiation: DifferentiationConfig = DifferentiationConfig()


class MBCNet(Model):
    """The multi-branch cooperation network (Figure 2), on tables that are regrouped by the same layout."""

    def __init__(self, config: MBCNetConfig, sparse_arch: "SparseArch", layout: InputLayout) -> None:
        super().__init__(sparse_arch, BranchArch(config, layout))


class BranchArch(nn.Module):
    """Branches -> shared top -> latents -> logits.

    h^k = branch_k(e),   z^k = f_theta(h^k) (Eq. 8),   logit^k = w_k z^k + b_k (Eq. 9),   logit = w fusion(z) + b (Eq. 15)
    """

    def __init__(self, config: MBCNetConfig, layout: InputLayout) -> None:
        super().__init__()
        num_branches, latent_dim = len(config.branches), config.top[-1]
        self.latent_dim = latent_dim
        self.branches = nn.ModuleDict(
            {name: config.available[name].build(config, layout.of(name)) for name in config.branches}
        )
        self._reads = {name: layout.reads(name) for name in config.branches}
        self.top = MLP(config.branch_dim, config.top, config, last_relu=config.top_activation == "relu")
        self.branch_logits = nn.ModuleList(Logit(latent_dim, layout.num_tasks) for _ in range(num_branches))
        self.fusion = GatedFusion(num_branches, latent_dim) if config.fusion == "gated" else MeanFusion()
        self.fused_logit = Logit(latent_dim, layout.num_tasks)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and each group g (B, n_g), or those of each branch, to latents (K, B, d) and logits."""
        latents = self.latents(features, list(self.branches))
        logits = [layer(latent) for layer, latent in zip(self.branch_logits, latents, strict=True)]
        return ModelOutput(latents, torch.stack(logits), self.fused_logit(self.fusion(at_least_float32(latents))))

    def serve(self, features: Mapping[str, Tensor], names: Sequence[str], *, each: bool = False) -> Tensor:
        """Map features to the logit that the named branches serve (B,), or with `each` and their own beside it (B, 1 + K).

        Several fuse their latents; of a single one of several its own logit (Eq. 9) serves, which was trained on just that latent.
        """
        latents = self.latents(features, names)  # (K, B, d)
        alone = len(names) == 1 < len(self.branches)
        if alone or each:
            layers = [self.branch_logits[list(self.branches).index(name)] for name in names]
            own = [layer(latent) for layer, latent in zip(layers, latents, strict=True)]
        fused = own[0] if alone else self.fused_logit(self.fusion(latents))
        return torch.stack([fused, *own], dim=1) if each else fused

    def latents(self, features: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Map features to the latents (K, B, d) of the named branches."""
        calls = [
            partial(self.branches[name], {group: features[own] for group, own in self._reads[name].items()})
            for name in names
        ]
        # One behind the other: one large product per layer of the top instead of K small ones.
        hidden = torch.cat(side_by_side(next(iter(features.values())).device, *calls))  # (K B, H)
        return self.top(hidden).unflatten(0, (len(names), -1))


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


MODEL = ModelKind(
    "mbcnet", MBCNetConfig, BranchArch, tasks=each_label,
    reads_wide=lambda config: any(config.available[name].reads == WIDE for name in config.branches),
)  # fmt: skip
