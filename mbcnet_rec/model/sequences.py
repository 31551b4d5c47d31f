"""Sequences of looked-up rows -> one vector for each field, in float32: by target attention (DIN), a small transformer, a mean or a sum.

Shapes: B batch, L longest sequence, E width of an event (all fields of the sequence side by side), P that of the fields with a target,
which stand first.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from mbcnet_rec.model.input_layout import InputLayout, SequenceInput
from mbcnet_rec.model.layers import without_autocast

HIDDEN = (64, 16)  # of the MLP that makes an event's weight
HEADS = 2  # of the transformer; a row's width is a multiple of 4


class SequencePooling(nn.Module):
    """Pools every sequence of a layout, and hands on the single rows that stand in the same tables."""

    def __init__(self, layout: InputLayout) -> None:
        super().__init__()
        self._dims, self._sequences, self._singles = layout.embedding_dims, layout.sequences, layout.singles
        self.lengths = {field: each.max_length for each in layout.sequences for field in each.fields}
        self.lengths |= dict.fromkeys(layout.singles, 1)
        self.pools = nn.ModuleList([_Pool(each, layout.embedding_dims) for each in layout.sequences])

    def forward(self, looked_up: Sequence[Mapping[str, JaggedTensor]]) -> KeyedTensor:
        """Pool what collections looked up: field -> the rows of all its ids. The host waits for no length."""
        found = {field: rows for output in looked_up for field, rows in output.items() if field in self.lengths}
        padded = {field: found[field].to_padded_dense(length) for field, length in self.lengths.items()}
        return self.pooled(padded, {each.fields[0]: found[each.fields[0]].lengths() for each in self._sequences})

    def pooled(self, padded: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> KeyedTensor:
        """Pool padded rows, field -> (B, L, D), where `lengths` (B,) says of a sequence's first field how many there are."""
        pieces = [padded[field][:, 0].float() for field in self._singles]
        with without_autocast(next(iter(padded.values())).device.type):
            for each, pool in zip(self._sequences, self.pools, strict=True):
                events = torch.cat([padded[field].float() for field in each.fields], dim=2)
                places = torch.arange(each.max_length, device=events.device)
                mask = (places < lengths[each.fields[0]][:, None]).float()
                targets = [padded[target][:, 0].float() for target in each.targets]
                pieces.append(pool(events, mask, torch.cat(targets, dim=1) if targets else None))
        fields = [*self._singles, *(field for each in self._sequences for field in each.fields)]
        # another key than the field's own, which has its wide weights in another collection
        return KeyedTensor(
            [f"{field}@" for field in fields], [self._dims[each] for each in fields], torch.cat(pieces, dim=1)
        )


class _Pool(nn.Module):
    """Events (B, L, E), mask (B, L) and targets (B, P) -> (B, E)."""

    def __init__(self, sequence: SequenceInput, dims: Mapping[str, int]) -> None:
        super().__init__()
        self._pooling = sequence.pooling
        width = sum(dims[field] for field in sequence.fields)
        paired = sum(dims[target] for target in sequence.targets)
        self.encoder = EncoderLayer(width, sequence.max_length) if sequence.pooling == "transformer" else None
        self.attention = TargetAttention(width, paired) if paired else None

    def forward(self, events: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        if self.encoder is not None:
            events = self.encoder(events, mask)
        weights = mask
        if self.attention is not None:
            weights = mask * self.attention(events, target)
        elif self._pooling != "sum":
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1.0)
        return torch.matmul(weights[:, None], events).squeeze(1)


class TargetAttention(nn.Module):
    """The weight of event h beside target t, MLP([h, t, h - t, h * t]), not normalised: DIN, Eq. 3 (Zhou et al., 2018)."""

    def __init__(self, width: int, paired: int) -> None:
        super().__init__()
        self._paired = paired
        sizes, layers = (width + 3 * paired, *HIDDEN), []
        for size, out in zip(sizes, HIDDEN, strict=False):
            layers += [nn.Linear(size, out), nn.SiLU()]  # smooth, as DIN's Dice is
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(self, events: Tensor, target: Tensor) -> Tensor:
        """Map (B, L, E) and (B, P) to (B, L)."""
        own = events[..., : self._paired]
        other = target[:, None].expand_as(own)
        return self.mlp(torch.cat([events, other, own - other, own * other], dim=2)).squeeze(2)


class EncoderLayer(nn.Module):
    """One pre-norm encoder layer of a transformer over events, with learned places: (B, L, E), mask (B, L) -> (B, L, E)."""

    def __init__(self, width: int, max_length: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(max_length, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.heads, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, events: Tensor, mask: Tensor) -> Tensor:
        """Let every event see the others that are there."""
        x = events + self.places
        q, k, v = (
            each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in self.heads(self.norms[0](x)).chunk(3, dim=2)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        # finite, so that a row without events has no NaN; its weights are 0 in the end
        scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        x = x + self.out((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))
