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
from mbcnet_rec.model.layers import ALL, MLP, FullRankCross, GroupedMLP, InputLayout, LowRankMixtureCross


@dataclass(frozen=True)
class EFGCConfig:
    """Extensible feature grouping and crossing. hidden: widths of every group's MLP."""

    hidden: tuple[int, ...] = (1024, 128)

    def __post_init__(self) -> None:
        """Refuse widths that are no widths."""
        check_widths("hidden", self.hidden)


@dataclass(frozen=True)
class CrossConfig:
    """The cross network.

    Attributes:
        kind: low_rank_mixture (the paper's CrossNetV2) or full_rank (what FuxiCTR and BARS call by that
            name).
        num_layers: cross layers; L layers reach degree L + 1.
        num_experts, low_rank: of low_rank_mixture.
    """

    kind: Literal["low_rank_mixture", "full_rank"] = "low_rank_mixture"
    num_layers: int = 2
    num_experts: int = 2
    low_rank: int = 16

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        if self.kind not in ("low_rank_mixture", "full_rank"):
            raise InputError(
                f"kind = {self.kind!r}: wanted 'low_rank_mixture' or 'full_rank'; change the value"
            )
        for key in ("num_layers", "num_experts", "low_rank"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} = {getattr(self, key)}: wanted an integer of at least 1; raise it")


@dataclass(frozen=True)
class DeepConfig:
    """The deep network. hidden: widths of its layers; the last one is branch_dim."""

    hidden: tuple[int, ...] = (2048, 1024, 512, 512, 512)

    def __post_init__(self) -> None:
        """Refuse widths that are no widths."""
        check_widths("hidden", self.hidden)


class EFGCBranch(nn.Module):
    """h = FC(h_1 + ... + h_G), h_g = MLP_g(e_g), where + concatenates (Eq. 2 to 4).

    Args:
        layout: names the groups; every group is used.
        config: widths of the group MLPs.
        branch_dim: H.
        batch_norm, dropout: of every layer.

    Raises:
        InputError: the layout has no group.
    """

    def __init__(
        self,
        layout: InputLayout,
        config: EFGCConfig,
        branch_dim: int,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not layout.groups:
            raise InputError(
                "branches has 'efgc' but the schema has no groups; add [groups] to it or drop the branch"
            )
        self.groups = tuple(layout.groups)
        widths = [layout.width(group) for group in self.groups]
        self.crossing = GroupedMLP(widths, config.hidden, batch_norm, dropout)
        self.reduction = MLP(len(widths) * config.hidden[-1], (branch_dim,), batch_norm, dropout)

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
        batch_norm, dropout: of the reduction layer.
    """

    def __init__(
        self,
        layout: InputLayout,
        config: CrossConfig,
        branch_dim: int,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = layout.width()
        if config.kind == "low_rank_mixture":
            self.crossing = LowRankMixtureCross(width, config.num_layers, config.num_experts, config.low_rank)
        else:
            self.crossing = FullRankCross(width, config.num_layers)
        self.reduction = MLP(width, (branch_dim,), batch_norm, dropout)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.reduction(self.crossing(features[ALL]))


class DeepBranch(nn.Module):
    """h = MLP(e), e all fields concatenated (Eq. 5 and 6); H is the MLP's last width.

    Args:
        layout: gives N.
        config: widths.
        batch_norm, dropout: of every layer.
    """

    def __init__(
        self, layout: InputLayout, config: DeepConfig, batch_norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.mlp = MLP(layout.width(), config.hidden, batch_norm, dropout)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.mlp(features[ALL])


def check_widths(key: str, widths: tuple[int, ...]) -> None:
    """Refuse an empty list of layers and widths below 1.

    Raises:
        InputError: naming the key and its value.
    """
    if not widths or min(widths) < 1:
        raise InputError(
            f"{key} = {list(widths)}: wanted at least one width, each 1 or more; change the list"
        )
