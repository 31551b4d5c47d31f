"""The feature-interaction branches: each maps the regrouped features of a batch to (B, branch_dim).

Shapes: B batch, N flattened width of all fields, G groups, n_g width of group g, H = branch_dim.
Every dense layer carries ReLU, the one fully-connected layer that ends EFGC (Eq. 4) and Cross (Eq. 7)
included: the paper calls both "FC" and writes no activation; we read "ReLU on every layer".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import Bounded, bounded
from mbcnet_rec.model.layers import (
    ALL,
    MLP,
    PLAIN,
    WIDE,
    Cross,
    FieldVectors,
    FullRankCross,
    GroupedMLP,
    InputLayout,
    LowRankMixtureCross,
    Regularisation,
    bi_interaction,
)


@dataclass(frozen=True)
class EFGCConfig(Bounded):
    """Extensible feature grouping and crossing. hidden: widths of every group's MLP."""

    hidden: tuple[int, ...] = bounded((1024, 128), at_least=1, min_length=1)


@dataclass(frozen=True)
class CrossConfig(Bounded):
    """The cross network.

    Attributes:
        kind: low_rank_mixture (the paper's CrossNetV2) or full_rank (what FuxiCTR and BARS call by that
            name).
        num_layers: cross layers; L layers reach degree L + 1.
        num_experts, low_rank: of low_rank_mixture.
    """

    kind: Literal["low_rank_mixture", "full_rank"] = "low_rank_mixture"
    num_layers: int = bounded(2, at_least=1)
    num_experts: int = bounded(2, at_least=1)
    low_rank: int = bounded(16, at_least=1)


@dataclass(frozen=True)
class DeepConfig(Bounded):
    """The deep network. hidden: widths of its layers; the last one is branch_dim."""

    hidden: tuple[int, ...] = bounded((2048, 1024, 512, 512, 512), at_least=1, min_length=1)


@dataclass(frozen=True)
class FMConfig(Bounded):
    """The factorisation machine.

    Attributes:
        dim: k, width of the vectors that are multiplied; 0: the most common width of the sparse fields. A
            sparse field of another width, and every dense field, is projected to k (see FieldVectors).
    """

    dim: int = bounded(0, at_least=0, wanted="0 (the fields' own width) or more")


class EFGCBranch(nn.Module):
    """h = FC(h_1 + ... + h_G), h_g = MLP_g(e_g), where + concatenates (Eq. 2 to 4).

    Args:
        layout: names the groups; every group is used.
        config: widths of the group MLPs.
        branch_dim: H.
        regularisation: of every layer.

    Raises:
        InputError: the layout has no group.
    """

    def __init__(
        self,
        layout: InputLayout,
        config: EFGCConfig,
        branch_dim: int,
        regularisation: Regularisation = PLAIN,
    ) -> None:
        super().__init__()
        if not layout.groups:
            raise InputError(
                "branches has 'efgc' but the schema has no groups; add [groups] to it or drop the branch"
            )
        self.groups = tuple(layout.groups)
        widths = [layout.width(group) for group in self.groups]
        self.crossing = GroupedMLP(widths, config.hidden, regularisation)
        self.reduction = MLP(len(widths) * config.hidden[-1], (branch_dim,), regularisation)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map each group g's (B, n_g) to (B, H)."""
        crossed = self.crossing([features[group] for group in self.groups])
        return self.reduction(torch.cat(crossed, dim=1))


class CrossBranch(nn.Module):
    """h = FC(f(e)), f a low-rank mixture or full-rank cross network over all fields (Eq. 7).

    Args:
        layout: gives N.
        config: kind and size of the cross network.
        branch_dim: H.
        regularisation: of the reduction layer.
    """

    def __init__(
        self,
        layout: InputLayout,
        config: CrossConfig,
        branch_dim: int,
        regularisation: Regularisation = PLAIN,
    ) -> None:
        super().__init__()
        self.crossing = build_cross(config, layout.width())
        self.reduction = MLP(layout.width(), (branch_dim,), regularisation)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.reduction(self.crossing(features[ALL]))


class DeepBranch(nn.Module):
    """h = MLP(e), e all fields concatenated (Eq. 5 and 6); H is the MLP's last width.

    Args:
        layout: gives N.
        config: widths.
        regularisation: of every layer.
    """

    def __init__(
        self, layout: InputLayout, config: DeepConfig, regularisation: Regularisation = PLAIN
    ) -> None:
        super().__init__()
        self.mlp = MLP(layout.width(), config.hidden, regularisation)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.mlp(features[ALL])


class FMBranch(nn.Module):
    """h = FC(sum_{f < g} v_f * v_g): the products of all pairs of fields, not yet summed over their k entries.

    Figure 8 adds "the factorisation machine of DeepFM"; its scalar carries no latent, so we keep the vector of
    products (bi-interaction pooling; He and Chua, Neural Factorization Machines, 2017, Eq. 3).

    Args:
        layout: gives the fields.
        config: width of the vectors.
        branch_dim: H.
        regularisation: of the last layer.
    """

    def __init__(
        self,
        layout: InputLayout,
        config: FMConfig,
        branch_dim: int,
        regularisation: Regularisation = PLAIN,
    ) -> None:
        super().__init__()
        self.vectors = FieldVectors(layout, config.dim)
        self.reduction = MLP(self.vectors.dim, (branch_dim,), regularisation)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.reduction(bi_interaction(self.vectors(features[ALL])))


class WideBranch(nn.Module):
    """h = FC(w_1[x_1] + ... + w_F[x_F] + x_dense), where + concatenates: one weight per id and field.

    The linear part of Wide & Deep (Cheng et al., 2016), with its sum left to the layer that leads to H.

    Args:
        layout: with wide weights.
        branch_dim: H.
        regularisation: of the last layer.
    """

    def __init__(self, layout: InputLayout, branch_dim: int, regularisation: Regularisation = PLAIN) -> None:
        super().__init__()
        layout.require_wide()
        self.reduction = MLP(layout.width(WIDE), (branch_dim,), regularisation)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the wide weights (B, F + D) to (B, H)."""
        return self.reduction(features[WIDE])


def build_cross(config: CrossConfig, width: int) -> Cross:
    """Build the cross network of that kind: (B, width) -> (B, width)."""
    if config.kind == "low_rank_mixture":
        return LowRankMixtureCross(width, config.num_layers, config.num_experts, config.low_rank)
    return FullRankCross(width, config.num_layers)
