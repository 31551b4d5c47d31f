"""The parts of a factorisation machine. Shapes: B batch, N flattened width of all fields, F fields, n_f width of field f, k width of a vector."""

import torch
from torch import Tensor, nn

from mbcnet_rec.model.input_layout import ALL, InputLayout


class FieldVectors(nn.Module):
    """(B, N) -> (B, F, k): one vector of the same width for every field, for a factorisation machine.

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
