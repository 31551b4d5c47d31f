"""Managed collision (zero-collision hash): which row of its table an unbounded id has, as TorchRec keeps it, in buckets.

TorchRec's own collection has as many buckets as ranks, so its row of an id changes with the world size. Here the number of buckets is
the table's: bucket b of K serves the ids h with floor(h / ceil((2^63 - 1) / K)) = b, holds the rows [b R / K, (b + 1) R / K) of R, and
is one MCHManagedCollisionModule. A rank holds K / ranks neighbouring buckets, so the row of an id is the same on every number of ranks
that divides K. (HashZchManagedCollisionModule has buckets of its own, but FBGEMM's kernel of it only reads on a CPU.)

The last row of each bucket is looked up by the bucket's ids that have no row.

Shapes: R rows of the table, r rows of this rank, K buckets.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from data.schema import Schema, Table
from sharding.bridge.initialise import CHUNK_ROWS, table_rows

POLICIES: dict[str, Callable[[], MCHEvictionPolicy]] = {
    "distance_lfu": DistanceLFU_EvictionPolicy,
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
}
ID_RANGE = 2**63 - 1  # ids are in [0, ID_RANGE)
FREE = 2**63 - 1  # TorchRec's mark of a row without an id
EMBEDDING_MODULE = "_embedding_module"  # TorchRec's name of the rows inside a managed collection
REMAPPERS = (
    "_managed_collision_collection._managed_collision_modules"  # and of what gives ids their rows, by table
)
STATE = ("raw_ids", "slots", "counts", "last_access_iter")


def collision_collection(schema: Schema, collection: EmbeddingBagCollection) -> nn.Module:
    """Put managed collision before a collection of tables that all have a `zch`. On the collection's device."""
    device, tables = collection.device, {table.name: table for table in schema.tables}
    modules: dict[str, ManagedCollisionModule] = {
        config.name: BucketedCollisions(tables[config.name], 0, config.num_embeddings, device)
        for config in collection.embedding_bag_configs()
    }
    collisions = ManagedCollisionCollection(
        modules, collection.embedding_bag_configs(), need_preprocess=False
    )
    return ManagedCollisionEmbeddingBagCollection(collection, collisions)


class BucketedCollisions(ManagedCollisionModule):
    """The buckets of one table that a rank holds.

    Their state is kept in tensors of (r,) int64 on which each bucket has a view, so that TorchRec shards it like the rows:
    raw_ids and slots are the ids, ascending in each bucket (FREE where there is none), and the row of each; counts and
    last_access_iter are what the eviction policies go by.

    Args:
        table: whose `zch` says how many buckets there are and what is evicted.
        start, stop: rows of the table that are held here, at borders of buckets.
        device: of the state; on "meta" nothing is held.
    """

    raw_ids: Tensor
    slots: Tensor
    counts: Tensor
    last_access_iter: Tensor
    _current_iter_tensor: Tensor  # steps so far

    def __init__(self, table: Table, start: int, stop: int, device: torch.device) -> None:
        assert table.zch is not None
        self.table, self.zch, self.start = table, table.zch, start
        self.bucket_rows = table.num_embeddings // self.zch.buckets
        borders = [self.bucket_rows * bucket for bucket in range(self.zch.buckets + 1)]
        super().__init__(device, borders)
        rows = stop - start
        self.register_buffer("raw_ids", torch.full((rows,), FREE, dtype=torch.int64, device=device))
        self.register_buffer("slots", torch.arange(start, stop, dtype=torch.int64, device=device))
        for name in STATE[2:]:
            self.register_buffer(name, torch.zeros(rows, dtype=torch.int64, device=device))
        own = () if device.type == "meta" else range(start // self.bucket_rows, stop // self.bucket_rows)
        # in a plain list, or the state would be there twice
        self.own_buckets = [_Bucket(self, bucket) for bucket in own]

    def state_of(self, bucket: int) -> dict[str, Tensor]:
        """A bucket's view of each tensor of the state."""
        first = bucket * self.bucket_rows - self.start
        return {name: getattr(self, name)[first : first + self.bucket_rows] for name in STATE}

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Leave ids as they are: the data plane has hashed them."""
        return features

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Note the ids of a training step, and admit new ones every `eviction_interval` steps. Evaluation changes nothing."""
        if self.training:
            step = int(self._current_iter_tensor)
            for name, feature in features.items():
                for bucket, ids in self._by_bucket(feature.values()):
                    bucket.note(name, ids, step)
            self._current_iter_tensor += 1
        return features

    @torch.no_grad()
    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """Return the row in the table, [start, stop), for every id."""
        remapped = {}
        for name, feature in features.items():
            rows = torch.empty_like(feature.values())
            bucket_of = self._bucket_of(feature.values())
            for bucket in self.own_buckets:
                chosen = (bucket_of == bucket.number).nonzero().squeeze(1)
                rows[chosen] = bucket.remap({name: _flat(feature.values()[chosen])})[name].values()
            remapped[name] = JaggedTensor(
                rows, lengths=feature.lengths(), offsets=feature.offsets(), weights=feature.weights_or_none()
            )
        return remapped

    def forward(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True
    ) -> dict[str, JaggedTensor]:
        """Note ids, and return their rows."""
        return self.remap(self.profile(features))

    def evict(self) -> Tensor | None:
        """Return rows of the table whose id has changed since the last call, for their values to be drawn anew."""
        changed = [rows for bucket in self.own_buckets if (rows := bucket.evict()) is not None]
        return torch.cat(changed) if changed else None

    def used_rows(self) -> int:
        """Rows of this rank that have an id."""
        return int((self.raw_ids != FREE).sum())

    def is_sound(self) -> bool:
        """Whether the state is one that training makes: each bucket's rows once each, and its ids ascending."""
        for bucket in self.own_buckets:
            state = self.state_of(bucket.number)
            first = bucket.number * self.bucket_rows
            rows = torch.arange(first, first + self.bucket_rows, device=self.slots.device)
            ids = state["raw_ids"]
            if not torch.equal(state["slots"].sort().values, rows) or bool((ids[1:] < ids[:-1]).any()):
                return False
            if int(ids[0]) < 0 or int(ids[-1]) != FREE or int(state["slots"][-1]) != int(rows[-1]):
                return False
        return True

    def input_size(self) -> int:
        """Ids are in [0, input_size)."""
        return ID_RANGE

    def output_size(self) -> int:
        """Rows held here."""
        return len(self.raw_ids)

    def buckets(self) -> int:
        """K."""
        return self.zch.buckets

    def open_slots(self) -> Tensor:
        """Return (1,): rows held here that an id can still have."""
        return (self.raw_ids == FREE).sum().reshape(1) - len(self.own_buckets)

    def validate_state(self) -> None:
        """Nothing to do: every checkpoint has the buckets of the schema."""

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int] | None = None,
        device: torch.device | None = None,
    ) -> "BucketedCollisions":
        """Make the part of a rank that holds these rows."""
        start, stop = output_id_range
        assert start % self.bucket_rows == 0 and stop % self.bucket_rows == 0, (
            output_id_range,
            self.bucket_rows,
        )
        return BucketedCollisions(self.table, start, stop, device or self.device)

    def _bucket_of(self, ids: Tensor) -> Tensor:
        return torch.div(ids, -(-ID_RANGE // self.zch.buckets), rounding_mode="floor")

    def _by_bucket(self, ids: Tensor) -> Iterator[tuple["_Bucket", Tensor]]:
        bucket_of = self._bucket_of(ids)
        for bucket in self.own_buckets:
            yield bucket, ids[bucket_of == bucket.number]


class _Bucket(MCHManagedCollisionModule):
    """TorchRec's module for the ids of one bucket, with the changes that a resumed run and FBGEMM on a CPU need.

    The history holds every id of the steps since the last admission: TorchRec's is as long as the first batch was, and drops what
    does not fit. Admission is due at multiples of `eviction_interval`, not that many steps after a start. A row that is given to an
    id for the first time keeps its initial values.
    """

    def __init__(self, whole: BucketedCollisions, number: int) -> None:
        first = number * whole.bucket_rows
        super().__init__(
            whole.bucket_rows,
            whole.device,
            POLICIES[whole.zch.eviction](),
            whole.zch.eviction_interval,
            input_hash_size=ID_RANGE,
            output_global_offset=first,
            output_segments=[first, first + whole.bucket_rows],
        )
        state = whole.state_of(number)
        self.number = number
        self.evictions = 0  # ids that lost their row since the last checkpoint was loaded
        self._mch_sorted_raw_ids, self._mch_remapped_ids_mapping = state["raw_ids"], state["slots"]
        for name in self._mch_metadata:
            self._mch_metadata[name] = state[name]
            setattr(self, f"_mch_{name}", state[name])
        self._input_history_buffer_size = 0
        self._history_accumulator = torch.empty(0, dtype=torch.int64, device=whole.device)
        self._has_iters = any(name == "last_access_iter" for name in self._mch_metadata)
        if self._has_iters:
            self._history_metadata["last_access_iter"] = torch.empty_like(self._history_accumulator)

    def note(self, name: str, ids: Tensor, step: int) -> None:
        """Note the ids of training step `step`, counted from 0."""
        self._reserve(self._current_history_buffer_offset + len(ids))
        self._current_iter = step
        self._last_eviction_iter = step - step % self._eviction_interval
        self.profile({name: _flat(ids)})

    def history(self) -> Tensor:
        """Return (2, n) int64: the ids since the last admission and the step of each, for a checkpoint."""
        count = self._current_history_buffer_offset
        ids = self._history_accumulator[:count]
        iters = self._history_metadata["last_access_iter"][:count] if self._has_iters else ids
        return torch.stack([ids, iters])

    def load_history(self, history: Tensor) -> None:
        """Take up what `history` gave."""
        count = history.shape[1]
        self._current_history_buffer_offset = 0
        self._reserve(count)
        self._history_accumulator[:count] = history[0]
        if self._has_iters:
            self._history_metadata["last_access_iter"][:count] = history[1]
        self._current_history_buffer_offset = count

    def _reserve(self, count: int) -> None:
        if count <= self._input_history_buffer_size:
            return
        kept, size = self._current_history_buffer_offset, count + count // 4

        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(size)
            new[:kept] = old[:kept]
            return new

        self._history_accumulator = grown(self._history_accumulator)
        for name, old in self._history_metadata.items():
            self._history_metadata[name] = grown(old)
        self._input_history_buffer_size = size

    def _update_and_evict(self, *arguments: Any) -> None:
        first = self._output_global_offset
        used = torch.zeros(self._zch_size, dtype=torch.bool, device=self.device)
        used[self._mch_remapped_ids_mapping - first] = self._mch_sorted_raw_ids != FREE
        super()._update_and_evict(*arguments)
        rows = self._evicted_emb_indices
        self._evicted_emb_indices = rows[used[rows - first]]
        self.evictions += len(self._evicted_emb_indices)


def _flat(ids: Tensor) -> JaggedTensor:
    """Ids for TorchRec, which asks whose they are and does not look."""
    nobody = ids.new_empty(0)
    return JaggedTensor(ids, lengths=nobody, offsets=nobody)


class ShardedCollisions(ShardedManagedCollisionEmbeddingBagCollection):
    """TorchRec's sharded collection, in which the values of a row that changes its id depend on seed, table and row alone.

    TorchRec draws them from torch's generator, so that they would depend on the world size.
    """

    seed = 0
    std = 0.0

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        for table, rows in evictions_per_table.items():
            if rows is None or not len(rows):
                continue
            kernel, index = self._table_to_tbe_and_index[table]
            weights = kernel.split_embedding_weights()[int(index)]
            with torch.no_grad():
                offset = self._managed_collision_collection._table_to_offset[table]
                fresh = self._fresh_rows(table, weights)
                weights[rows] = fresh[(rows + offset) % len(fresh)]
                states = kernel.split_optimizer_states()  # of plain SGD, an empty list
                for state in states[int(index)] if states else ():
                    state[rows] = 0

    def _fresh_rows(self, table: str, weights: Tensor) -> Tensor:
        """(CHUNK_ROWS, D) to draw from: those that the first rows of a table of this name and seed start with."""
        known = self.__dict__.setdefault("_fresh", {})
        if table not in known:
            (_, rows), *_ = table_rows(self.seed, f"{table}/fresh", 0, CHUNK_ROWS, weights.shape[1], self.std)
            known[table] = rows.to(weights)
        return known[table]


class CollisionSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """Makes ShardedCollisions.

    Args:
        rows: the sharder of the rows.
        seed, std: of the values of rows that change their id.
    """

    def __init__(self, rows: Any, seed: int = 0, std: float = 0.0) -> None:
        super().__init__(rows)
        self.seed, self.std = seed, std

    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCollisions:
        """Shard the rows and the ids of a collection."""
        rows: Any = self._e_sharder
        sharded = ShardedCollisions(
            module, params, rows, self._mc_sharder, env, device or torch.device("cpu")
        )
        sharded.seed, sharded.std = self.seed, self.std
        return sharded


def collisions_of(model: nn.Module) -> list[BucketedCollisions]:
    """This rank's part of the managed collision of each table; empty for most models."""
    return [module for module in model.modules() if isinstance(module, BucketedCollisions)]
