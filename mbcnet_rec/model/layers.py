"""The layers that branches are made of, and the layout of their input.

Shapes: B batch, N flattened width of all fields, F fields, n_f width of field f, G groups, n_g width of group
g, E experts, r low rank, D dense columns, k width of an FM vector. Activations are float32 (bfloat16 inside matrix products under autocast); parameters are
float32.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import Bounded, bounded

ALL = "all"  # the name of the group of every field
WIDE = "@wide"  # the name of the group of wide weights; reserved, it cannot clash with a user's group
WIDE_DIM = 4  # FBGEMM wants widths in multiples of 4, so one weight is the mean of 4 columns


@dataclass(frozen=True, kw_only=True)  # so that the inheriting config's own keys come first
class Regularisation(Bounded):
    """What every dense layer carries besides its ReLU. The configs of networks inherit these two keys.

    Attributes:
        batch_norm: in every dense layer. Padding rows of a last, partial batch enter its statistics, and
            those of a shared top are taken over all branches together.
        dropout: in every dense layer, a probability.
    """

    batch_norm: bool = False
    dropout: float = bounded(0.0, at_least=0, below=1, wanted="a probability in [0, 1)")


PLAIN = Regularisation()


@dataclass(frozen=True)
class InputLayout:
    """What the fields are called, how wide they are and which groups they form. A field may be in many groups.

    Attributes:
        embedding_dims: key of a KeyedJaggedTensor -> width; its order is the order inside "all".
        dense_slices: dense field -> (first column, width) in `dense_features`.
        groups: EFGC group -> keys of either kind.
        wide: whether each sparse field also looks up one weight per id, in a table of its own (`wide_tables`).
        projections: dense field -> the width to which a learned linear map brings it before the branches see it.
    """

    embedding_dims: Mapping[str, int]
    dense_slices: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[str, ...]]
    wide: bool = False
    projections: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse groups that cannot be cut out of the fields."""
        if both := self.embedding_dims.keys() & self.dense_slices.keys():
            raise InputError(
                f"field {min(both)!r} is both sparse and dense; wanted one kind; rename one of the two"
            )
        if self.wide and (odd := [key for key in self.embedding_dims if "@" in key]):
            raise InputError(
                f"field {odd[0]!r}: a model with wide weights wants names without '@'; name the field otherwise and "
                "give its column by `column`"
            )
        for name, keys in self.groups.items():
            where = f"groups.{name} = {list(keys)}"
            if name in (ALL, WIDE):
                raise InputError(f"{where}: the name {name!r} is taken; rename the group")
            if not keys or len(set(keys)) != len(keys):
                raise InputError(f"{where}: wanted at least one field and none twice; change the list")
            for key in keys:
                if key not in self.embedding_dims and key not in self.dense_slices:
                    raise InputError(
                        f"{where}: {key!r} is not a field; add it to the fields or take it out of the group"
                    )

    def keys(self, group: str) -> tuple[str, ...]:
        """List the keys of a group, sparse ones first, in the order in which their columns stand."""
        members = (*self.embedding_dims, *self.dense_slices) if group in (ALL, WIDE) else self.groups[group]
        return tuple(sorted(members, key=lambda key: key in self.dense_slices))  # a stable sort

    def width(self, group: str = ALL) -> int:
        """Columns of a group: N for "all", n_g for group g, F + D for the wide one."""
        if group == WIDE:
            return len(self.embedding_dims) + sum(self.field_width(key) for key in self.dense_slices)
        return sum(self.field_width(key) for key in self.keys(group))

    def field_width(self, key: str) -> int:
        """Columns of a field, after its projection."""
        if key in self.embedding_dims:
            return self.embedding_dims[key]
        return self.projections.get(key, self.dense_slices[key][1])

    def projected_slices(self) -> dict[str, tuple[int, int]]:
        """Dense field -> (first column, width) in the dense features after every projection, in the order of `dense_slices`."""
        slices, start = {}, 0
        for key in self.dense_slices:
            slices[key] = (start, self.field_width(key))
            start += self.field_width(key)
        return slices

    def common_width(self) -> int:
        """The most common width of the sparse fields."""
        return Counter(self.embedding_dims.values()).most_common(1)[0][0]

    def columns(self, key: str) -> tuple[int, int]:
        """(first column, width) of a field inside "all"."""
        keys = self.keys(ALL)
        return sum(self.field_width(each) for each in keys[: keys.index(key)]), self.field_width(key)

    def require_wide(self) -> None:
        """Refuse a layout without wide weights: a fault of the composition, not of the user.

        Raises:
            ValueError: `wide` is not set.
        """
        if not self.wide:
            raise ValueError("this model reads wide weights; build its layout and tables with wide=True")


class HasTable(Protocol):
    """What `wide_tables` reads of a table: data.schema.Table or torchrec's EmbeddingBagConfig."""

    @property
    def name(self) -> str:
        """Unique among tables."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Columns of a row."""
        ...

    @property
    def feature_names(self) -> Sequence[str]:
        """The fields that look rows up."""
        ...


Table = TypeVar("Table", bound=HasTable)


def wide_tables(tables: Sequence[Table]) -> list[Table]:
    """List the extra tables of a model with wide weights: one weight per id and field.

    Each field gets a table "wide_FIELD" with the rows and pooling of its own table, also where fields share one.
    The weight is the mean of its four columns: their gradients are equal, so Adam, Adagrad and rowwise Adagrad
    move it as they would move one number; plain SGD moves it at a quarter of its rate.

    Args:
        tables: data.schema.Table or torchrec's EmbeddingBagConfig; the result is of the same kind.

    Raises:
        InputError: a table already has such a name.
    """
    taken = {table.name for table in tables}
    wide = [
        dataclasses.replace(
            table,  # type: ignore[type-var]
            name=f"wide_{field}",
            embedding_dim=WIDE_DIM,
            feature_names=type(table.feature_names)([field]),  # type: ignore[call-arg]
        )
        for table in tables
        for field in table.feature_names
    ]
    for table in wide:
        if table.name in taken:
            raise InputError(
                f"tables.{table.name}: the model keeps wide weights under this name; rename the field or table"
            )
    return wide


class MLP(nn.Sequential):
    """h_{l+1} = dropout(ReLU(norm(W_l h_l + b_l))): ReLU after every layer, the last one included.

    Args:
        in_features: width of the input.
        hidden: width of each layer; none is the identity.
        regularisation: batch norm before each ReLU, dropout after it.
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], regularisation: Regularisation = PLAIN
    ) -> None:
        layers: list[nn.Module] = []
        for out_features in hidden:
            layers.append(nn.Linear(in_features, out_features))
            if regularisation.batch_norm:
                layers.append(nn.BatchNorm1d(out_features))
            layers.append(nn.ReLU(inplace=True))  # its own output is all that its gradient needs
            if regularisation.dropout > 0:
                layers.append(nn.Dropout(regularisation.dropout))
            in_features = out_features
        super().__init__(*layers)


class GroupedMLP(nn.Module):
    """G MLPs of the same hidden widths on inputs of different widths (Eq. 3).

    Args:
        in_features: n_g of each group.
        hidden, regularisation: of every MLP.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        hidden: Sequence[int],
        regularisation: Regularisation = PLAIN,
    ) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(width, hidden, regularisation) for width in in_features)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map G tensors (B, n_g) to G tensors (B, hidden[-1])."""
        return [mlp(features) for mlp, features in zip(self.mlps, inputs, strict=True)]


class Cross(nn.Module):
    """The cross network of DCNv2: x_{l+1} = x_l + x_0 * layer_l(x_l), with * element by element.

    Args:
        layers: modules (B, N) -> (B, N).
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_0: Tensor) -> Tensor:
        """Map (B, N) to (B, N); after L layers the polynomial degree in x_0 is up to L + 1."""
        x = x_0
        for layer in self.layers:
            x = (x_0 * layer(x)).add_(x)  # the gradient of torch.addcmul takes two passes more
        return x


class FullRankCross(Cross):
    """layer_l(x) = W_l x + b_l, with W_l (N, N)."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__([nn.Linear(width, width) for _ in range(num_layers)])


class LowRankMixtureCross(Cross):
    """layer_l is a mixture of low-rank experts (Appendix A; DCNv2, Eq. 4): see LowRankMixture."""

    def __init__(self, width: int, num_layers: int, num_experts: int, low_rank: int) -> None:
        super().__init__([LowRankMixture(width, num_experts, low_rank) for _ in range(num_layers)])


class LowRankMixture(nn.Module):
    """sum_e g_e(x) U_e tanh(C_e tanh(V_e^T x)) + b, with g(x) = softmax(G x).

    The gates sum to 1, so one bias outside the sum is the same as a common bias inside every expert.

    Args:
        width: N.
        num_experts: E.
        low_rank: r.
    """

    def __init__(self, width: int, num_experts: int, low_rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(num_experts, low_rank, width))  # V_e^T
        self.c = nn.Parameter(torch.empty(num_experts, low_rank, low_rank))
        self.u = nn.Parameter(torch.empty(num_experts, width, low_rank))
        self.gate = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(width))
        # each expert by its own fan-in and fan-out
        for matrix in (*self.v.detach(), *self.c.detach(), *self.u.detach(), self.gate.detach()):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        num_experts, low_rank, _ = self.v.shape
        # One wide product for all experts and the gate instead of E + 1 thin ones; another one on the way back.
        projected = self.product(x, torch.cat([self.v.flatten(0, 1), self.gate]))  # (B, E r + E)
        low, scores = projected.split([num_experts * low_rank, num_experts], dim=1)
        low = torch.tanh(low).unflatten(1, (num_experts, low_rank))  # (B, E, r)
        gated = torch.tanh(self.expert_products(low)) * torch.softmax(scores, dim=1).unsqueeze(2)
        return self.product(gated.flatten(1), self.u.transpose(0, 1).flatten(1), self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b: (B, n), (m, n), (m,) -> (B, m). mbcnet_rec/cpu has another way to the same numbers."""
        return F.linear(x, weight, bias)

    def expert_products(self, low: Tensor) -> Tensor:
        """C_e x_e of each expert: (B, E, r) -> (B, E, r). mbcnet_rec/cpu has another way to the same numbers."""
        return torch.einsum("bes,ers->ber", low, self.c)


class FieldVectors(nn.Module):
    """(B, N) -> (B, F, k): one vector of the same width for every field, as a factorisation machine wants.

    A sparse field whose table is k wide enters as it is, so fields of equal width give the plain FM. The
    others, and all dense fields, enter through a matrix of their own: v_f = e_f P_f with P_f (n_f, k). For a
    number x that is x * v with a learned v (Rendle, 2010).

    Args:
        layout: gives the fields.
        dim: k; 0: the most common width of the sparse fields.
    """

    def __init__(self, layout: InputLayout, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim or layout.common_width()
        alike: dict[tuple[int, bool], list[int]] = {}  # (width, whether sparse) -> first columns
        for key in layout.keys(ALL):
            start, width = layout.columns(key)
            alike.setdefault((width, key in layout.embedding_dims), []).append(start)
        self.projections = nn.ParameterDict()
        self._num_kinds = len(alike)
        for kind, ((width, sparse), starts) in enumerate(alike.items()):
            columns = torch.tensor(starts).unsqueeze(1) + torch.arange(width)  # (F_kind, width)
            self.register_buffer(f"columns_{kind}", columns, persistent=False)
            if not sparse or width != self.dim:
                # A projection keeps the length of an embedding; the vector of a number starts as small as one.
                std = width**-0.5 if sparse else 0.01
                matrices = torch.randn(len(starts), width, self.dim) * std
                self.projections[str(kind)] = nn.Parameter(matrices)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, F, k); fields of one kind and width stand together."""
        vectors = []
        for kind in range(self._num_kinds):
            columns = self.get_buffer(f"columns_{kind}")
            fields = x.index_select(1, columns.flatten()).unflatten(1, columns.shape)  # (B, F_kind, width)
            if str(kind) in self.projections:
                fields = torch.einsum("bfn,fnk->bfk", fields, self.projections[str(kind)])
            vectors.append(fields)
        return torch.cat(vectors, dim=1)


def bi_interaction(vectors: Tensor) -> Tensor:
    """sum_{f < g} v_f * v_g, element by element, in O(F k): ((sum_f v_f)^2 - sum_f v_f^2) / 2. (B, F, k) -> (B, k)."""
    return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1))
