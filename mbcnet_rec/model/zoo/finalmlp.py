"""FinalMLP (Mao et al., AAAI 2023): two MLP streams, each on gated fields, fused by a multi-head bilinear form.

Shapes: B batch, N flattened width of all fields, J heads, d_1 and d_2 last widths of the streams.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, Embeddings, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, logits_only
from mbcnet_rec.model.layers import MLP, Logit, Regularisation, without_autocast
from mbcnet_rec.model.side_by_side import side_by_side
from mbcnet_rec.model.zoo.dnn import as_deep


@dataclass(frozen=True)
class StreamConfig(Regularisation):
    """One stream.

    Attributes:
        hidden: widths of its MLP.
        gate: hidden widths of its field gate; none: no gate, and both streams without one are DualMLP.
        context: fields whose embeddings drive the gate; none: a learned vector, the same for all rows.
    """

    hidden: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)
    gate: tuple[int, ...] = bounded((128,), at_least=1)
    context: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that build no network."""
        super().__post_init__()
        if self.context and not self.gate:
            raise InputError(
                f"context = {list(self.context)}: wanted none, since gate = [] builds no gate; change one of the two"
            )


@dataclass(frozen=True)
class FinalMLPConfig:
    """The two streams and their fusion.

    Attributes:
        num_heads: J, which divides the last width of both streams.
        embeddings: shared, or per_branch: each stream reads a slice of every row.
    """

    first: StreamConfig = StreamConfig()
    second: StreamConfig = StreamConfig()
    num_heads: int = 1
    embeddings: Embeddings = "shared"

    def streams(self, groups: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Stream -> the groups that it reads."""
        return {"first": (ALL,), "second": (ALL,)}

    def __post_init__(self) -> None:
        """Refuse heads that do not fit."""
        widths = (self.first.hidden[-1], self.second.hidden[-1])
        if self.num_heads < 1 or any(width % self.num_heads for width in widths):
            raise InputError(
                f"num_heads = {self.num_heads}: wanted a divisor of the streams' last widths {list(widths)}; change it"
            )


class FinalMLPArch(nn.Module):
    """logit = fusion(MLP_1(g_1 * e), MLP_2(g_2 * e)), e all fields concatenated."""

    def __init__(self, config: FinalMLPConfig, layout: InputLayout) -> None:
        super().__init__()
        self._first, self._second = layout.tensor_name("first"), layout.tensor_name("second")
        self.first = build_stream(config.first, layout.of("first"), "model.finalmlp.first.context")
        self.second = build_stream(config.second, layout.of("second"), "model.finalmlp.second.context")
        self.fusion = BilinearFusion(config.first.hidden[-1], config.second.hidden[-1], config.num_heads)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N), or that of either stream, to the logits."""
        x, y = features[self._first], features[self._second]
        return logits_only(self.fusion(*side_by_side(x.device, lambda: self.first(x), lambda: self.second(y))))


class FieldGate(nn.Module):
    """x -> 2 sigmoid(G ReLU(.. x_context)) * x: one gate for each of the N columns (Eq. 4 and 5).

    The context is the named fields' own embeddings, or without names a learned vector, zero at first. (FuxiCTR looks its
    context up in tables of the gate's own.)
    """

    def __init__(self, layout: InputLayout, context: tuple[str, ...], hidden: tuple[int, ...]) -> None:
        super().__init__()
        self._columns = [layout.columns(key) for key in context]
        width = sum(width for _, width in self._columns) or layout.common_width()
        self.vector = None if context else nn.Parameter(torch.zeros(1, width))
        self.gate = nn.Sequential(MLP(width, hidden), nn.Linear(hidden[-1], layout.width()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, N)."""
        if self.vector is None:
            context = torch.cat([x.narrow(1, start, width) for start, width in self._columns], dim=1)
        else:
            context = self.vector  # (1, width): one gate for all rows
        return 2.0 * torch.sigmoid(self.gate(context)) * x


class BilinearFusion(nn.Module):
    """w_1 h_1 + w_2 h_2 + b + sum_j h_1^j W_j h_2^j, h^j the j-th of J equal parts (Eq. 9 and 10)."""

    def __init__(self, first_dim: int, second_dim: int, num_heads: int) -> None:
        super().__init__()
        self.first, self.second = Logit(first_dim), Logit(second_dim, bias=False)
        self.heads = nn.Parameter(torch.empty(num_heads, first_dim // num_heads, second_dim // num_heads))
        # Each W_j seen as the (d_1 d_2 / J, 1) matrix of a linear map of the products, as FuxiCTR draws it.
        nn.init.normal_(self.heads, std=(2.0 / (self.heads.numel() + 1)) ** 0.5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map (B, d_1) and (B, d_2) to (B,)."""
        num_heads = len(self.heads)
        linear = self.first(first) + self.second(second)
        parts_1, parts_2 = first.unflatten(1, (num_heads, -1)), second.unflatten(1, (num_heads, -1))
        with without_autocast(first.device.type):
            mapped = torch.einsum("bjm,jmn->bjn", parts_1.to(self.heads.dtype), self.heads)
        return linear + (mapped * parts_2).sum((1, 2))


def build_stream(config: StreamConfig, layout: InputLayout, key: str) -> nn.Sequential:
    """Build gate and MLP of a stream: (B, N) -> (B, d). `key`: the config key of its context.

    Raises:
        InputError: the context names something that is not a field.
    """
    unknown = set(config.context) - set(layout.keys(ALL))
    if unknown:
        raise InputError(f"{key} = {list(config.context)}: {min(unknown)!r} is not a field of the schema; take it out")
    mlp = MLP(layout.width(), config.hidden, config)
    if not config.gate:
        return nn.Sequential(mlp)
    return nn.Sequential(FieldGate(layout, config.context, config.gate), mlp)


def _streams(ours: Any) -> dict[str, Any]:
    stream = StreamConfig(**as_deep(ours), gate=ours.top[-1:])
    return {"first": stream, "second": stream}


MODEL = ModelKind("finalmlp", FinalMLPConfig, FinalMLPArch, widths=_streams)
