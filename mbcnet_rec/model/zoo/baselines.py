"""Models to compare MBCnet with. They share its tables, layers, branches, output type and objective (K = 0 branches).

Each is a config and an arch, a module (features of a batch) -> ModelOutput that contains no table; `Baseline` puts
the tables below it. FinalMLP has a file of its own.

Shapes: B batch, N flattened width of all fields, F fields, E experts, H width in which a branch ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data.errors import InputError
from mbcnet_rec.model.branches import (
    CrossConfig,
    EFGCBranch,
    EFGCConfig,
    FMConfig,
    build_cross,
    check_optional_widths,
    check_widths,
)
from mbcnet_rec.model.layers import (
    ALL,
    MLP,
    WIDE,
    FieldVectors,
    InputLayout,
    Regularisation,
    bi_interaction,
)
from mbcnet_rec.model.mbcnet import ModelOutput

if TYPE_CHECKING:  # torchrec takes seconds to import, and reading a config needs none of it
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from mbcnet_rec.model.sparse_arch import SparseArch


@dataclass(frozen=True)
class DNNConfig(Regularisation):
    """A deep network over all fields; by default the paper's deep branch and shared top in a row.

    Attributes:
        hidden: widths of the layers.
    """

    hidden: tuple[int, ...] = (2048, 1024, 512, 512, 512, 512, 256, 128)

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        super().__post_init__()
        check_widths("hidden", self.hidden)


@dataclass(frozen=True)
class CrossNetConfig(Regularisation):
    """A cross network over all fields.

    Attributes:
        cross: low_rank_mixture is the paper's CrossNetV2, full_rank what FuxiCTR and BARS call by that name.
        hidden: widths of layers between the cross network and the logit; none by default. The paper ends every
            model in 128 latents: [512, 512, 256, 128] are MBCnet's reduction and top.
    """

    cross: CrossConfig = CrossConfig()
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        super().__post_init__()
        check_optional_widths("hidden", self.hidden)


@dataclass(frozen=True)
class DCNv2Config(DNNConfig):
    """Cross and deep network in parallel. cross: of the one; hidden, batch_norm, dropout: of the other."""

    cross: CrossConfig = CrossConfig()
    hidden: tuple[int, ...] = (2048, 1024, 512, 512, 512)


@dataclass(frozen=True)
class DeepFMConfig(DNNConfig):
    """Factorisation machine and deep network. fm: width of the vectors; hidden, batch_norm, dropout: of the latter."""

    fm: FMConfig = FMConfig()


@dataclass(frozen=True)
class EFGCNetConfig(Regularisation):
    """The EFGC branch alone. efgc: of the groups; branch_dim: H; top: widths between the branch and the logit."""

    efgc: EFGCConfig = EFGCConfig()
    branch_dim: int = 512
    top: tuple[int, ...] = (512, 256, 128)

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        super().__post_init__()
        check_widths("top", self.top)
        if self.branch_dim < 1:
            raise InputError(f"branch_dim = {self.branch_dim}: wanted a width of 1 or more; raise it")


@dataclass(frozen=True)
class MMoEConfig(Regularisation):
    """Gated experts with the tower of a single task, the paper's MMOE+.

    Attributes:
        num_experts: E.
        expert, gate, tower: widths of each expert, of the gate before its softmax layer, and of the tower.
    """

    num_experts: int = 4
    expert: tuple[int, ...] = (512, 256, 128)
    gate: tuple[int, ...] = (128, 64)
    tower: tuple[int, ...] = (128, 64)

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        super().__post_init__()
        if self.num_experts < 1:
            raise InputError(f"num_experts = {self.num_experts}: wanted 1 or more; raise it")
        check_widths("expert", self.expert)
        check_optional_widths("gate", self.gate)
        check_optional_widths("tower", self.tower)


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


class DNNArch(nn.Module):
    """logit = w MLP(e) + b, e all fields concatenated."""

    def __init__(self, config: DNNConfig, layout: InputLayout) -> None:
        super().__init__()
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = nn.Linear(config.hidden[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        return logits_only(self.logit(self.mlp(features[ALL])).squeeze(1))


class CrossNetArch(nn.Module):
    """logit = w MLP(cross(e)) + b (DCN-V2; Wang et al., 2021), the MLP absent by default."""

    def __init__(self, config: CrossNetConfig, layout: InputLayout) -> None:
        super().__init__()
        self.cross = build_cross(config.cross, layout.width())
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = nn.Linear((layout.width(), *config.hidden)[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        return logits_only(self.logit(self.mlp(self.cross(features[ALL]))).squeeze(1))


class DCNv2Arch(nn.Module):
    """logit = w (cross(e) + MLP(e)) + b, where + concatenates: the parallel DCN-V2 (Wang et al., 2021)."""

    def __init__(self, config: DCNv2Config, layout: InputLayout) -> None:
        super().__init__()
        self.cross = build_cross(config.cross, layout.width())
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = nn.Linear(layout.width() + config.hidden[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        x = features[ALL]
        return logits_only(self.logit(torch.cat([self.cross(x), self.mlp(x)], dim=1)).squeeze(1))


class WideLogit(nn.Module):
    """sum_f w_f[x_f] + w x_dense + b: the linear model over ids and numbers.

    The weights of ids live in the tables of `wide_tables`.

    Args:
        layout: with wide weights.
    """

    def __init__(self, layout: InputLayout) -> None:
        super().__init__()
        layout.require_wide()
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


class FMArch(nn.Module):
    """logit = wide(x) + sum_{f < g} <v_f, v_g> (Rendle, 2010, Eq. 1)."""

    def __init__(self, config: FMConfig, layout: InputLayout) -> None:
        super().__init__()
        self.wide = WideLogit(layout)
        self.vectors = FieldVectors(layout, config.dim)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and the wide weights (B, F + D) to the logits."""
        pairs = bi_interaction(self.vectors(features[ALL])).sum(1)
        return logits_only(self.wide(features[WIDE]) + pairs)


class DeepFMArch(nn.Module):
    """logit = FM(x) + w MLP(e), both on the same embeddings (Guo et al., 2017, Eq. 1)."""

    def __init__(self, config: DeepFMConfig, layout: InputLayout) -> None:
        super().__init__()
        self.fm = FMArch(config.fm, layout)
        self.mlp = MLP(layout.width(), config.hidden, config)
        self.logit = nn.Linear(config.hidden[-1], 1, bias=False)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) and the wide weights (B, F + D) to the logits."""
        deep = self.logit(self.mlp(features[ALL])).squeeze(1)
        return logits_only(self.fm(features).fused_logits + deep)


class EFGCArch(nn.Module):
    """logit = w top(EFGC(e)) + b: "EFGC" of Table 3."""

    def __init__(self, config: EFGCNetConfig, layout: InputLayout) -> None:
        super().__init__()
        self.branch = EFGCBranch(layout, config.efgc, config.branch_dim, config)
        self.top = MLP(config.branch_dim, config.top, config)
        self.logit = nn.Linear(config.top[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map each group g's (B, n_g) to the logits."""
        return logits_only(self.logit(self.top(self.branch(features))).squeeze(1))


class MMoEArch(nn.Module):
    """logit = w tower(sum_e g_e(e) expert_e(e)) + b, g = softmax(G gate(e) + c) (MMoE; Ma et al., 2018, Eq. 5 to 7).

    With one task, as the paper uses it.
    """

    def __init__(self, config: MMoEConfig, layout: InputLayout) -> None:
        super().__init__()
        width = layout.width()
        self.experts = nn.ModuleList(MLP(width, config.expert, config) for _ in range(config.num_experts))
        gate_width = (width, *config.gate)[-1]
        self.gate = nn.Sequential(MLP(width, config.gate, config), nn.Linear(gate_width, config.num_experts))
        self.tower = MLP(config.expert[-1], config.tower, config)
        self.logit = nn.Linear((config.expert[-1], *config.tower)[-1], 1)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        x = features[ALL]
        gates = torch.softmax(self.gate(x), dim=1)  # (B, E)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # (B, E, width)
        mixed = (gates.unsqueeze(2) * experts).sum(1)
        return logits_only(self.logit(self.tower(mixed)).squeeze(1))
