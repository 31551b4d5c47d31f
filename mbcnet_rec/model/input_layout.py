"""What a model sees of a schema: names, widths and groups of its fields, and the tables of single weights that a wide part adds."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data.errors import InputError
from data.schema import Schema, Table
from data.schema.names import own_table
from data.schema.sequences import sequences_of

ALL = "all"  # the name of the group of every field
WIDE = "@wide"  # the name of the group of wide weights; reserved, it cannot clash with a user's group
Embeddings = Literal["shared", "per_branch"]  # whether the parts of a model read whole rows, or slices of their own
WIDE_DIM = 4  # FBGEMM needs widths in multiples of 4, so one weight is the mean of 4 columns


@dataclass(frozen=True)
class Stream:
    """What one part of a model reads where rows are cut between its parts: see `with_streams`."""

    groups: tuple[str, ...]
    slices: Mapping[str, tuple[int, int]]  # sparse field -> (first column, width) of its row


@dataclass(frozen=True)
class SequenceInput:
    """A sequence: its field and those beside it, the targets of the first of them, and how it is pooled (see Feature)."""

    fields: tuple[str, ...]
    targets: tuple[str, ...]
    max_length: int
    pooling: str


@dataclass(frozen=True)
class InputLayout:
    """What the fields are called, how wide they are and which groups they form. A field may be in many groups.

    Attributes:
        embedding_dims: key of a KeyedJaggedTensor -> width; its order is the order inside "all".
        dense_slices: dense field -> (first column, width) in `dense_features`.
        groups: EFGC group -> keys of either kind.
        wide: whether each sparse field also looks up one weight per id, in a table of its own (`wide_tables`).
        projections: dense field -> the width to which a learned linear map brings it before the branches see it.
        streams: parts of the model that read slices of rows of their own; none: all read whole rows.
        wide_only: sparse fields that are in the wide group alone.
        sequences: of fields of `embedding_dims`, whose rows the model pools itself.
        singles: fields of one id that read the same tables.
        tasks: where the schema has several labels, those of the model: name -> weight in the loss.
    """

    embedding_dims: Mapping[str, int]
    dense_slices: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[str, ...]]
    wide: bool = False
    projections: Mapping[str, int] = dataclasses.field(default_factory=dict)
    streams: Mapping[str, Stream] = dataclasses.field(default_factory=dict)
    wide_only: frozenset[str] = frozenset()
    sequences: tuple[SequenceInput, ...] = ()
    singles: tuple[str, ...] = ()
    tasks: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def unpooled(self) -> frozenset[str]:
        """Fields whose tables do not pool."""
        return frozenset(self.singles).union(*(each.fields for each in self.sequences))

    @property
    def num_tasks(self) -> int:
        """T, 1 where there is one label."""
        return len(self.tasks) or 1

    def __post_init__(self) -> None:
        """Refuse names that the model needs itself."""
        if taken := {ALL, WIDE} & self.groups.keys():
            raise InputError(f"groups.{min(taken)}: the model needs this name itself; rename the group")

    def keys(self, group: str) -> tuple[str, ...]:
        """List the keys of a group, sparse ones first, in the order in which their columns stand."""
        members = (*self.embedding_dims, *self.dense_slices) if group in (ALL, WIDE) else self.groups[group]
        members = tuple(key for key in members if group == WIDE or key not in self.wide_only)
        return tuple(sorted(members, key=lambda key: key in self.dense_slices))  # a stable sort

    def width(self, group: str = ALL) -> int:
        """Columns of a group: N for "all", n_g for group g, one a sparse field and the dense columns for the wide one."""
        if group == WIDE and not self.wide:  # a fault of the composition, not of the user
            raise ValueError("this model reads wide weights; build its layout and tables with wide=True")
        return sum(
            1 if group == WIDE and key in self.embedding_dims else self.field_width(key) for key in self.keys(group)
        )

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

    def of(self, stream: str) -> "InputLayout":
        """The layout as one stream sees it: its slices are the rows."""
        if not self.streams:
            return self
        own = self.streams[stream]
        dims = {field: width for field, (_, width) in own.slices.items()}
        return dataclasses.replace(self, embedding_dims=dims, streams={}, wide=WIDE in own.groups)

    def tensor_name(self, stream: str, group: str = ALL) -> str:
        """The name of the tensor that holds a group for a stream."""
        return f"{group}@{stream}" if self.streams else group

    def reads(self, stream: str) -> dict[str, str]:
        """Group -> `tensor_name`, for the groups of a stream."""
        shared = (ALL, *self.groups, *((WIDE,) if self.wide else ()))
        groups = self.streams[stream].groups if self.streams else shared
        return {group: self.tensor_name(stream, group) for group in groups}

    def tensors(self) -> dict[str, tuple[str, str]]:
        """Name of each tensor that the regroup makes -> its group and the stream that reads it, "" where all do."""
        return {name: (group, stream) for stream in self.streams or ("",) for group, name in self.reads(stream).items()}

    def tensor_widths(self) -> dict[str, int]:
        """Name of each tensor that the regroup makes -> its columns."""
        return {name: self.of(stream).width(group) for name, (group, stream) in self.tensors().items()}

    def row_slices(self, field: str) -> list[tuple[str, int]]:
        """Stream and width of each slice of a field's row, in the order of columns; columns that nobody reads are of stream ""."""
        cut = sorted((own.slices[field], name) for name, own in self.streams.items() if field in own.slices)
        rest = self.embedding_dims[field] - sum(width for (_, width), _ in cut)
        return [*((name, width) for (_, width), name in cut), *([("", rest)] if rest else [])]


def with_streams(layout: InputLayout, reads: Mapping[str, tuple[str, ...]]) -> InputLayout:
    """Cut each sparse field's row into one slice for every stream that reads the field; dense fields go to all.

    Slices are as even as whole columns allow, later streams get what is over. A stream of wide weights gets one column.

    Args:
        layout: of whole rows.
        reads: stream -> the groups that it reads, ALL and WIDE among them.

    Raises:
        InputError: a row has fewer columns than readers.
    """
    members = {stream: {key for group in groups for key in layout.keys(group)} for stream, groups in reads.items()}
    slices: dict[str, dict[str, tuple[int, int]]] = {stream: {} for stream in reads}
    for field, width in layout.embedding_dims.items():
        readers = [stream for stream in reads if field in members[stream]]
        single = [stream for stream in readers if reads[stream] == (WIDE,)]
        if len(readers) > width:
            raise InputError(
                f'embeddings = "per_branch": the row of field {field!r} has {width} columns for {len(readers)} readers '
                f"({', '.join(readers)}); give it a larger embedding_dim"
            )
        share, over = divmod(width - len(single), max(1, len(readers) - len(single)))
        start = 0
        for place, stream in enumerate(each for each in readers if each not in single):
            own = share + (place >= len(readers) - len(single) - over)
            slices[stream][field] = (start, own)
            start += own
        for stream in single:
            slices[stream][field] = (start, 1)
            start += 1
    streams = {stream: Stream(groups, slices[stream]) for stream, groups in reads.items()}
    return dataclasses.replace(layout, streams=streams)


def input_layout(schema: Schema, wide: bool = False, wide_only: frozenset[str] = frozenset()) -> InputLayout:
    """Describe a schema's fields and groups to a model. `schema` has no wide tables: a field's own table gives its width."""
    dims = {feature.name: schema.table_of[feature.name].embedding_dim for feature in (*schema.sparse, *schema.weighted)}
    slices, start = {}, 0
    for feature in schema.dense:
        slices[feature.name] = (start, feature.dense_width)
        start += feature.dense_width
    projections = {feature.name: feature.projection for feature in schema.dense if feature.projection}
    named = {feature.name: feature for feature in schema.features}
    sequences = tuple(
        SequenceInput(
            tuple(each.name for each in fields), tuple(each.target for each in fields if each.target),
            named[name].max_length, named[name].pooling,
        )
        for name, fields in sequences_of(schema.features).items()
    )  # fmt: skip
    groups = {name: members for name, members in schema.groups.items() if not wide_only.issuperset(members)}
    singles = tuple(each.name for each in schema.sparse if each.is_single and schema.table_of[each.name].positions)
    return InputLayout(
        dims, slices, groups, wide, projections, sequences=sequences, singles=singles, wide_only=wide_only
    )


def wide_table(field: str) -> str:
    """The name of the table of a field's wide weights."""
    return own_table(f"wide_{field}")


def wide_tables(tables: Sequence[Table]) -> list[Table]:
    """List the extra tables of a model with wide weights: one weight per id and field.

    Each field gets a table of its own (`wide_table`) with the rows and pooling of its own table, also where fields share one.
    The weight is the mean of its four columns: their gradients are equal, so Adam, Adagrad and rowwise Adagrad
    move it as they would move one number; plain SGD moves it at a quarter of its rate.

    Raises:
        InputError: a table already has such a name.
    """
    wide = [
        dataclasses.replace(table, name=wide_table(field), embedding_dim=WIDE_DIM, feature_names=(field,), positions=0)
        for table in tables
        for field in table.feature_names
    ]
    if taken := {table.name for table in tables} & {table.name for table in wide}:
        raise InputError(
            f"tables.{min(taken)}: the model keeps wide weights under this name; rename the field or table"
        )
    return wide
