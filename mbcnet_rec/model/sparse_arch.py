"""Tables and the one regroup of their output into groups: the part that TorchRec shards.

Shapes: B batch, F sparse fields, N flattened width of all fields, n_g width of group g, D dense columns.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.regroup import KTRegroupAsDict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mbcnet_rec.model.input_layout import WIDE, WIDE_DIM, InputLayout, wide_table
from mbcnet_rec.model.sequences import SequencePooling

RegroupOp = Literal["permute", "split"]


class Lookup(NamedTuple):
    """An embedding collection of a model."""

    name: str  # the attribute of SparseArch that holds it, and so part of its tables' names in checkpoints
    # KeyedJaggedTensor -> KeyedTensor, or where `unbounded` -> (KeyedTensor, None), or where `sequences` -> field -> JaggedTensor
    collection: nn.Module
    weighted: bool = False  # whether it looks up the fields with weights, or all others
    unbounded: bool = False  # whether its tables give rows to unbounded ids
    sequences: bool = False  # whether its rows are not pooled


class SparseArch(nn.Module):
    """Embedding collections, which together look up every field of the layout, and the one regroup of their output (Eq. 1 and 2)."""

    def __init__(self, lookups: Sequence[Lookup], layout: InputLayout) -> None:
        super().__init__()
        for lookup in lookups:
            self.add_module(lookup.name, lookup.collection)
        self._inputs = [(each.name, each.weighted, each.unbounded) for each in lookups if not each.sequences]
        self._unpooled = [each.name for each in lookups if each.sequences]
        if self._unpooled:
            self.sequences = SequencePooling(layout)
        self.regroup = FeatureRegroup(layout)

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        weighted_features: KeyedJaggedTensor | None = None,
    ) -> dict[str, Tensor]:
        """Look up every field once: "all" -> (B, N), group g -> (B, n_g), and wide weights if there are any."""
        return self.regroup(self.pooled(sparse_features, weighted_features), dense_features)

    def pooled(
        self, sparse_features: KeyedJaggedTensor, weighted_features: KeyedJaggedTensor | None = None
    ) -> list[KeyedTensor]:
        """Look up every field once: the output of each collection."""
        outputs = []
        for name, weighted, unbounded in self._inputs:
            output = getattr(self, name)(weighted_features if weighted else sparse_features)
            outputs.append(output[0] if unbounded else output)
        if self._unpooled:
            outputs.append(self.sequences([getattr(self, name)(sparse_features) for name in self._unpooled]))
        return outputs


class FeatureRegroup(nn.Module):
    """Pooled embeddings and dense columns -> one tensor per group (Eq. 2), and "all" (Eq. 5).

    Columns are always found by key: the order of keys in the output of a sharded collection depends on the
    plan. Inside a group sparse fields come first, then dense ones, each in the layout's order. A dense vector x with a projection
    enters every group as W x + b, which is computed once. Where the layout has streams, each gets tensors of its own, of its slices of
    the rows.

    Args:
        layout: names and widths of the fields and groups.
        op: how sparse columns are regrouped; None: by `regroup_op`.
    """

    def __init__(self, layout: InputLayout, op: RegroupOp | None = None) -> None:
        super().__init__()
        self._op = op
        self._layout = layout
        members = {name: (stream, layout.of(stream).keys(group)) for name, (group, stream) in layout.tensors().items()}
        # (field or wide key, stream) of each slice; the stream of whole rows is ""
        self._sparse = {
            name: [(key, stream) for key in keys if key in layout.embedding_dims]
            for name, (stream, keys) in members.items()
        }
        slices = layout.projected_slices() if layout.projections else layout.dense_slices
        self.dense_slices = {
            name: join_slices([slices[key] for key in keys if key in slices]) for name, (_, keys) in members.items()
        }
        self._raw = list(layout.dense_slices.items())
        self.projections = nn.ModuleDict(
            {
                f"projection_{place}": nn.Linear(width, layout.projections[key])
                for place, (key, (_, width)) in enumerate(self._raw)
                if key in layout.projections
            }
        )
        if layout.wide:
            self._sparse[WIDE] = [(wide_key(field), "") for field in layout.embedding_dims]
        self._fields = frozenset(layout.embedding_dims)
        # one table serves each: their key is the field
        self._wide_only = layout.wide_only if layout.wide else frozenset()
        self._keys: list[list[str]] = []  # of the collections' outputs at the last call
        self._widths: list[dict[str, int]] = []  # of the slices of each output, in the order of columns
        self._cuts = Cuts([], {})
        self._permute: KTRegroupAsDict | None = None

    def forward(self, keyed_tensors: Sequence[KeyedTensor], dense_features: Tensor) -> dict[str, Tensor]:
        """Regroup the outputs of collections, which together hold every field and its wide weight if there are any, and (B, D) columns.

        "all" -> (B, N), each group g -> (B, n_g), and WIDE -> (B, F + D) if the layout has wide weights.
        """
        self._follow_plan(keyed_tensors)
        if self.projections:
            dense_features = self._project(dense_features)
        if (self._op or regroup_op(dense_features.device)) == "permute":
            assert self._permute is not None
            cut = list(keyed_tensors)
            if self._layout.streams:
                cut = [
                    KeyedTensor(list(widths), list(widths.values()), tensor.values())
                    for widths, tensor in zip(self._widths, keyed_tensors, strict=True)
                ]
            sparse = {name: [tensor] for name, tensor in self._permute(cut).items()}
        else:
            sparse = self._cuts.pieces([tensor.values() for tensor in keyed_tensors])
        groups = {}
        for name, slices in self.dense_slices.items():
            pieces = sparse.get(name, [])
            if name == WIDE:
                # The mean of 4 equal columns learns like one weight under any adaptive optimizer.
                columns = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
                pieces = [columns.unflatten(1, (-1, WIDE_DIM)).mean(2)]
            pieces = [*pieces, *(dense_features.narrow(1, start, width) for start, width in slices)]
            groups[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return groups

    def _project(self, dense_features: Tensor) -> Tensor:
        pieces = []
        for place, (_, (start, width)) in enumerate(self._raw):
            piece = dense_features.narrow(1, start, width)
            name = f"projection_{place}"
            pieces.append(self.projections[name](piece) if name in self.projections else piece)
        return torch.cat(pieces, dim=1)

    def _follow_plan(self, keyed_tensors: Sequence[KeyedTensor]) -> None:
        # The permutation caches its columns at the first call; a change of plan would turn it silently wrong.
        keys = [list(tensor.keys()) for tensor in keyed_tensors]
        if keys == self._keys:
            return
        self._keys = keys
        pieces: dict[tuple[str, str], str] = {}
        self._widths = [{} for _ in keyed_tensors]
        for own, tensor in zip(self._widths, keyed_tensors, strict=True):
            for key, width in zip(tensor.keys(), tensor.length_per_key(), strict=True):
                # where a collection has a field's wide weights alone, they stand under the field's own key
                alone = key in self._wide_only or key in self._layout.unpooled
                field = wide_key(key) if alone else field_of(key, self._fields)
                for stream, share in self._layout.row_slices(field) if self._layout.streams else [("", width)]:
                    name = pieces[field, stream] = f"{key}/{stream}" if stream else key
                    own[name] = share
        named = {name: [pieces[each] for each in slices] for name, slices in self._sparse.items() if slices}
        self._permute = KTRegroupAsDict(list(named.values()), list(named))
        self._cuts = cuts_of(self._widths, named)


def wide_key(field: str) -> str:
    """Key of a field's wide weight in the output of a collection: two tables serve the field, so TorchRec adds the table's name."""
    return f"{field}@{wide_table(field)}"


def field_of(key: str, fields: Container[str]) -> str:
    """Key of the output of a collection -> the field, or `wide_key(field)`: where two tables serve a field, it is FIELD@TABLE."""
    head, parts = key, key.split("@")
    while head not in fields:  # a name may hold "@" itself
        parts.pop()
        head = "@".join(parts)
    return key if key == wide_key(head) else head


def regroup_op(device: torch.device) -> RegroupOp:
    """Choose the regroup by device: FBGEMM's fused permute on CUDA, split + cat on CPU.

    Measured on CPU, seven overlapping groups of 192 keys: the permute is 17 to 80 times slower.
    """
    return "permute" if device.type == "cuda" else "split"


@dataclass(frozen=True)
class Cuts:
    """Where tensors (B, sum of widths) are cut, so that every group is made of whole pieces, and of as few as that allows."""

    # of the pieces of each tensor; empty where every group takes it whole or not at all
    widths: list[list[int]]
    # group -> (tensor, piece) in the order of its columns; piece None is the whole tensor, uncut
    places: dict[str, list[tuple[int, int | None]]]

    def pieces(self, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Views: group -> one (B, width) for each of its pieces."""
        cut = [
            tensor.split(widths, dim=1) if widths else () for tensor, widths in zip(tensors, self.widths, strict=True)
        ]
        return {
            name: [tensors[tensor] if piece is None else cut[tensor][piece] for tensor, piece in places]
            for name, places in self.places.items()
        }


def cuts_of(tensors: Sequence[Mapping[str, int]], groups: Mapping[str, Sequence[str]]) -> Cuts:
    """Find the cuts for groups of keys in tensors, each given as key -> width in the order of its columns.

    Fields that stand side by side in a tensor and in all groups stay one piece: hundreds of views cost more than a lookup.
    """
    slices: dict[str, tuple[int, tuple[int, int]]] = {}  # key -> tensor, (first column, width)
    for place, widths in enumerate(tensors):
        start = 0
        for key, width in widths.items():
            slices[key] = place, (start, width)
            start += width
    totals = [sum(widths.values()) for widths in tensors]
    runs = {
        name: [
            (place, run)
            for place, own in groupby((slices[key] for key in keys), key=itemgetter(0))
            for run in join_slices([each for _, each in own])
        ]
        for name, keys in groups.items()
    }
    bounds: list[set[int]] = [set() for _ in tensors]
    for place, (start, width) in chain.from_iterable(runs.values()):
        if width < totals[place]:
            bounds[place] |= {0, start, start + width, totals[place]}
    starts = [sorted(each) for each in bounds]
    places: dict[str, list[tuple[int, int | None]]] = {}
    for name, own in runs.items():
        places[name] = []
        for place, (start, width) in own:
            if width == totals[place]:
                places[name].append((place, None))
            else:
                first, last = starts[place].index(start), starts[place].index(start + width)
                places[name] += [(place, piece) for piece in range(first, last)]
    return Cuts([[high - low for low, high in pairwise(each)] for each in starts], places)


def join_slices(slices: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring (start, width) slices, so that hundreds of fields in a row cost one copy."""
    joined: list[tuple[int, int]] = []
    for start, width in slices:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + width)
        else:
            joined.append((start, width))
    return joined
