"""The feature-interaction branches: each maps the regrouped features of a batch to (B, branch_dim).

Shapes: B batch, N flattened width of all fields, D dense columns, F sparse fields, G groups, n_g width of group g, H = branch_dim.
Every dense layer carries ReLU, the one fully-connected layer that ends EFGC (Eq. 4) and Cross (Eq. 7)
included: the paper calls both "FC" and writes no activation; we read "ReLU on every layer".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import Bounded, bounded
from mbcnet_rec.model.factorisation import FieldVectors, bi_interaction
from mbcnet_rec.model.input_layout import ALL, WIDE, Embeddings, InputLayout
from mbcnet_rec.model.kinds import GROUPS, BranchKind
from mbcnet_rec.model.layers import MLP, Cross, CrossConfig, GroupedMLP, Regularisation


@dataclass(frozen=True)
class EFGCConfig(Bounded):
    """Extensible feature grouping and crossing. hidden: widths of every group's MLP."""

    hidden: tuple[int, ...] = bounded((1024, 128), at_least=1, min_length=1)


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
    """h = FC(h_1 + ... + h_G), h_g = MLP_g(e_g), where + concatenates (Eq. 2 to 4). It uses every group of the layout."""

    def __init__(self, config: "BranchesConfig", layout: InputLayout) -> None:
        super().__init__()
        if not layout.groups:
            raise InputError("branches has 'efgc' but the schema has no groups; add [groups] to it or drop the branch")
        self.groups = tuple(layout.groups)
        widths = [layout.width(group) for group in self.groups]
        self.crossing = GroupedMLP(widths, config.efgc.hidden, config)
        self.reduction = MLP(len(widths) * config.efgc.hidden[-1], (config.branch_dim,), config)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map each group g's (B, n_g) to (B, H)."""
        crossed = self.crossing([features[group] for group in self.groups])
        return self.reduction(torch.cat(crossed, dim=1))


class CrossBranch(nn.Module):
    """h = FC(f(e)), f a low-rank mixture or full-rank cross network over all fields (Eq. 7)."""

    def __init__(self, config: "BranchesConfig", layout: InputLayout) -> None:
        super().__init__()
        self.crossing = Cross(config.cross, layout.width())
        self.reduction = MLP(layout.width(), (config.branch_dim,), config)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.reduction(self.crossing(features[ALL]))


class DeepBranch(nn.Module):
    """h = MLP(e), e all fields concatenated (Eq. 5 and 6); H is the MLP's last width."""

    def __init__(self, config: "BranchesConfig", layout: InputLayout) -> None:
        super().__init__()
        self.mlp = MLP(layout.width(), config.deep.hidden, config)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.mlp(features[ALL])


class FMBranch(nn.Module):
    """h = FC(sum_{f < g} v_f * v_g): the products of all pairs of fields, not yet summed over their k entries.

    Figure 8 adds "the factorisation machine of DeepFM"; its scalar carries no latent, so we keep the vector of
    products (bi-interaction pooling; He and Chua, Neural Factorization Machines, 2017, Eq. 3).
    """

    def __init__(self, config: "BranchesConfig", layout: InputLayout) -> None:
        super().__init__()
        self.vectors = FieldVectors(layout, config.fm.dim)
        self.reduction = MLP(self.vectors.dim, (config.branch_dim,), config)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map "all" (B, N) to (B, H)."""
        return self.reduction(bi_interaction(self.vectors(features[ALL])))


class WideBranch(nn.Module):
    """h = FC(w_1[x_1] + ... + w_F[x_F] + x_dense), where + concatenates: one weight per id and field.

    The linear part of Wide & Deep (Cheng et al., 2016), with its sum left to the layer that leads to H.
    """

    def __init__(self, config: "BranchesConfig", layout: InputLayout) -> None:
        super().__init__()
        self.reduction = MLP(layout.width(WIDE), (config.branch_dim,), config)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the wide weights (B, F + D) to (B, H)."""
        return self.reduction(features[WIDE])


BRANCHES = {
    kind.name: kind
    for kind in (
        BranchKind("efgc", EFGCBranch, EFGCConfig, GROUPS),
        BranchKind("cross", CrossBranch, CrossConfig),
        BranchKind("deep", DeepBranch, DeepConfig),
        BranchKind("fm", FMBranch, FMConfig),
        BranchKind("wide", WideBranch, reads=WIDE),
    )
}


@dataclass(frozen=True)
class BranchesConfig(Regularisation):
    """Which branches there are, and what each is made of.

    Attributes:
        branches: any of efgc, cross, deep, fm, wide, each once, in the order of the outputs. A single branch
            has no cooperation losses.
        efgc, cross, deep, fm: of the branches; wide has no settings.
        branch_dim: H, the width in which every branch ends.
        embeddings: shared: every branch reads whole rows of the tables (Eq. 5 and 7); per_branch: each sparse field's row is cut into
            one slice for each branch that reads the field, so that branches differ. The same tables, the same lookups.
    """

    branches: tuple[str, ...] = ("efgc", "cross", "deep")
    efgc: EFGCConfig = EFGCConfig()
    cross: CrossConfig = CrossConfig()
    deep: DeepConfig = DeepConfig()
    fm: FMConfig = FMConfig()
    branch_dim: int = bounded(512, at_least=1)
    embeddings: Embeddings = "shared"
    available: ClassVar[Mapping[str, BranchKind]] = BRANCHES  # those that `branches` can name

    def streams(self, groups: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Branch -> the groups that it reads."""
        reads = {name: self.available[name].reads for name in self.branches}
        return {name: groups if own == GROUPS else (own,) for name, own in reads.items()}

    def __post_init__(self) -> None:
        """Refuse values that contradict each other or build no network."""
        super().__post_init__()
        branches = list(self.branches)
        if not branches or len(set(branches)) != len(branches) or not set(branches) <= self.available.keys():
            raise InputError(f"branches = {branches}: wanted one or more of {', '.join(self.available)}, each once")
        if "deep" in branches and self.deep.hidden[-1] != self.branch_dim:
            raise InputError(
                f"deep.hidden = {list(self.deep.hidden)}: wanted the last width to be branch_dim = {self.branch_dim}, "
                "since all branches share one top; change one of the two"
            )
