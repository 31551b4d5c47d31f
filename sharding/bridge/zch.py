"""Managed collision (zero-collision hash): which row of its table an unbounded id has, as TorchRec keeps it, in buckets.

TorchRec's own collection has as many buckets as ranks, so its row of an id changes with the world size. Here the number of buckets is
the table's: bucket b of K serves the ids h with floor(h / ceil((2^63 - 1) / K)) = b and holds the rows [b R / K, (b + 1) R / K) of R.
A rank holds K / ranks neighbouring buckets, so the row of an id is the same on every number of ranks that divides K.
(HashZchManagedCollisionModule has buckets of its own, but FBGEMM's kernel of it only reads on a CPU.)

The last row of each bucket is looked up by the bucket's ids that have no row.

Shapes: R rows of the table, r rows of this rank, K buckets.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.mc_modules import ManagedCollisionCollectionSharder
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
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from data.schema import Schema, Table
from sharding.bridge.blocks import CHUNK_ROWS, table_rows

POLICIES: dict[str, Callable[[], MCHEvictionPolicy]] = {
    "distance_lfu": DistanceLFU_EvictionPolicy,
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
}
ID_RANGE = 2**63 - 1  # ids are in [0, ID_RANGE)
FREE = 2**63 - 1  # TorchRec's mark of a row without an id
EMBEDDING_MODULE = "_embedding_module"  # TorchRec's name of the rows inside a managed collection
# and of what gives ids their rows, by table
REMAPPERS = "_managed_collision_collection._managed_collision_modules"
STATE = ("raw_ids", "slots", "counts", "last_access_iter")


def collision_collection(schema: Schema, collection: EmbeddingBagCollection) -> nn.Module:
    """Put managed collision before a collection of tables that all have a `zch`. On the collection's device."""
    configs, tables = collection.embedding_bag_configs(), {table.name: table for table in schema.tables}
    modules: dict[str, ManagedCollisionModule] = {
        config.name: BucketedCollisions(tables[config.name], 0, config.num_embeddings, collection.device)
        for config in configs
    }
    collisions = ManagedCollisionCollection(modules, configs, need_preprocess=False)
    return ManagedCollisionEmbeddingBagCollection(collection, collisions)


class BucketedCollisions(ManagedCollisionModule):
    """The buckets of one table that a rank holds.

    `table.zch` says how many buckets there are and what is evicted; [start, stop) are the rows held here, at borders of buckets.
    The state is kept in tensors of (r,) int64 on which each bucket has a view, so that TorchRec shards it like the rows:
    raw_ids and slots are the ids, ascending in each bucket (FREE where there is none), and the row of each; counts and
    last_access_iter are what the eviction policies go by. On the device "meta" nothing is held.
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
        super().__init__(device, [self.bucket_rows * bucket for bucket in range(self.zch.buckets + 1)])
        slots = torch.arange(start, stop, dtype=torch.int64, device=device)
        self.register_buffer("raw_ids", torch.full_like(slots, FREE))
        self.register_buffer("slots", slots)
        self.register_buffer("counts", torch.zeros_like(slots))
        self.register_buffer("last_access_iter", torch.zeros_like(slots))
        own = () if device.type == "meta" else range(start // self.bucket_rows, stop // self.bucket_rows)
        self.own_buckets = [Bucket(self, bucket) for bucket in own]
        # (2, n) each: ids that no bucket has been given yet, and their step, counted from 1
        self.noted: list[Tensor] = []
        # outside of training: ids, and those without a row
        self.looked_up = torch.zeros(2, dtype=torch.int64, device=device)
        self.forget()
        self.register_load_state_dict_post_hook(lambda _module, _keys: self.forget())

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Leave ids as they are: the data plane has hashed them."""
        return features

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Note the ids of a training step, and admit new ones every `eviction_interval` steps. Evaluation changes nothing."""
        if self.training:
            if self._step is None:
                self._step = int(self._current_iter_tensor)
            self._current_iter_tensor += 1
            self._step += 1
            for feature in features.values():
                self.noted.append(torch.stack([feature.values(), torch.full_like(feature.values(), self._step)]))
                if self._step % self.zch.eviction_interval == 0:
                    self.deal_out()
                    for bucket in self.own_buckets:
                        bucket.admit(self._step)
                    self._keys = None
        return features

    @torch.no_grad()
    def remap(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True, write_weights: Tensor | None = None
    ) -> dict[str, JaggedTensor]:
        """Return the row in the table, [start, stop), for every id."""
        remapped = {}
        for name, feature in features.items():
            ids, keys = feature.values(), self._searched()
            found = torch.searchsorted(keys[:-1], ids)
            last_rows = (self._bucket_of(ids) + 1) * self.bucket_rows - 1
            is_known = self.raw_ids[found] == ids
            rows = self.slots[found].where(is_known, last_rows)
            if not self.training:
                self.looked_up += torch.stack([torch.ones_like(is_known), ~is_known]).sum(1)
            remapped[name] = JaggedTensor(
                rows, lengths=feature.lengths(), offsets=feature.offsets(), weights=feature.weights_or_none()
            )
        return remapped

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        """Note ids, and return their rows."""
        return self.remap(self.profile(features))

    def forget(self) -> None:
        """Forget what follows from the state. Call after the state was loaded."""
        self._step: int | None = None  # as _current_iter_tensor says, which the host would wait for
        self._keys: Tensor | None = None

    def _searched(self) -> Tensor:
        """Return (r,) ascending: raw_ids, where all buckets are searched at once with the greatest id of its bucket in place of FREE."""
        if len(self.own_buckets) < 2:
            return self.raw_ids
        if self._keys is None:
            width = -(-ID_RANGE // self.zch.buckets)
            ends = [min((bucket.number + 1) * width - 1, FREE) for bucket in self.own_buckets]
            greatest = torch.tensor(ends, device=self.raw_ids.device)[:, None]
            self._keys = self.raw_ids.view(len(ends), -1).minimum(greatest).flatten()
        return self._keys

    def deal_out(self) -> None:
        """Give every bucket its part of the noted ids: on a GPU the host waits for each."""
        noted = torch.cat([self.slots.new_empty(2, 0), *self.noted], dim=1)
        self.noted = []
        for bucket, chosen in self._split(noted[0]):
            bucket.noted.append(noted[:, chosen])

    def evict(self) -> Tensor | None:
        """Return rows of the table whose id has changed since the last call, for their values to be drawn anew."""
        changed = [rows for bucket in self.own_buckets for rows in bucket.changed]
        for bucket in self.own_buckets:
            bucket.changed = []
        return torch.cat(changed) if changed else None

    def used_rows(self) -> int:
        """Rows of this rank that have an id."""
        return int((self.raw_ids != FREE).sum())

    def is_sound(self) -> bool:
        """Whether the state, just loaded, is one that training makes: each bucket's rows once each, and its ids ascending."""
        self.forget()
        for bucket in self.own_buckets:
            ids, slots = bucket.state["raw_ids"], bucket.state["slots"]
            rows = torch.arange(bucket.last_row + 1 - len(ids), bucket.last_row + 1, device=slots.device)
            if not torch.equal(slots.sort().values, rows) or bool((ids[1:] < ids[:-1]).any()):
                return False
            if int(ids[0]) < 0 or int(ids[-1]) != FREE or int(slots[-1]) != bucket.last_row:
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
        assert start % self.bucket_rows == stop % self.bucket_rows == 0, (output_id_range, self.bucket_rows)
        return BucketedCollisions(self.table, start, stop, device or self.device)

    def _bucket_of(self, ids: Tensor) -> Tensor:
        return torch.div(ids, -(-ID_RANGE // self.zch.buckets), rounding_mode="floor")

    def _split(self, ids: Tensor) -> Iterator[tuple["Bucket", Tensor]]:
        """Every bucket held here, with the positions of its ids."""
        bucket_of = self._bucket_of(ids)
        for bucket in self.own_buckets:
            yield bucket, (bucket_of == bucket.number).nonzero().squeeze(1)


class Bucket:
    """Admits ids to the rows of one bucket, as TorchRec's MCHManagedCollisionModule does, by the same eviction policies.

    What differs is what a resumed run needs: every id since the last admission is kept (TorchRec keeps as many as fit into a
    buffer of the first batch's size), admission is due at multiples of `eviction_interval` (not that many steps after a start), and a
    row that is given to an id for the first time keeps its initial values.
    """

    def __init__(self, whole: BucketedCollisions, number: int) -> None:
        first, self.number, self.zch = number * whole.bucket_rows - whole.start, number, whole.zch
        # views of this bucket's part of the table's state
        self.state = {name: getattr(whole, name)[first : first + whole.bucket_rows] for name in STATE}
        self.last_row = (number + 1) * whole.bucket_rows - 1
        self.policy = POLICIES[self.zch.eviction]()
        kept = [info.metadata_name for info in self.policy.metadata_info if info.is_mch_metadata]
        self.metadata = {name: self.state[name] for name in kept}
        # (2, n) each: ids since the last admission, and their step, counted from 1
        self.noted: list[Tensor] = []
        self.changed: list[Tensor] = []  # rows that went to another id and have not been reported by `evict`
        self.evictions = 0  # ids that lost their row, over all starts of the run

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each id is in the state, and whether it is there."""
        raw_ids = self.state["raw_ids"]
        found = torch.searchsorted(raw_ids[:-1], ids)
        return found, raw_ids[found] == ids

    def admit(self, step: int) -> None:
        """Give noted ids rows after training step `step`, counted from 1."""
        raw_ids, slots = self.state["raw_ids"], self.state["slots"]
        ids, steps = self.history()
        unique, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        history = self.policy.coalesce_history_metadata(step, {"last_access_iter": steps}, counts, inverse)
        by_count = torch.argsort(counts, descending=True, stable=True)
        wanted = unique[by_count]
        found, known = self.find(wanted)
        evicted, admitted = self.policy.update_metadata_and_generate_eviction_scores(
            step, len(raw_ids), by_count, counts[by_count], known, found[known], self.metadata, history
        )
        self.changed.append(slots[evicted[raw_ids[evicted] != FREE]])
        self.evictions += len(self.changed[-1])
        raw_ids[evicted] = wanted[~known][admitted]
        ascending = torch.argsort(raw_ids, stable=True)
        for tensor in (raw_ids, slots, *self.metadata.values()):
            tensor.copy_(tensor[ascending])
        self.noted.clear()

    def history(self) -> Tensor:
        """Return (2, n) int64: the ids since the last admission and the step of each, for a checkpoint."""
        return torch.cat([self.state["slots"].new_empty(2, 0), *self.noted], dim=1)

    def load_history(self, history: Tensor) -> None:
        """Take up what `history` gave."""
        self.noted = [history.to(self.state["slots"].device)]


class ShardedCollisions(ShardedManagedCollisionEmbeddingBagCollection):
    """TorchRec's sharded collection, in which the values of a row that changes its id depend on seed, table and row alone.

    TorchRec draws them from torch's generator, so that they would depend on the world size.
    """

    seed: int
    std: float
    fresh: dict[str, Tensor]  # table -> (CHUNK_ROWS, D) to draw from

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        for table, rows in evictions_per_table.items():
            if rows is None or not len(rows):
                continue
            kernel, index = self._table_to_tbe_and_index[table]
            weights = kernel.split_embedding_weights()[int(index)]
            if table not in self.fresh:  # with what the first rows of a table of this name and seed start
                values = table_rows(self.seed, f"{table}/fresh", 0, CHUNK_ROWS, weights.shape[1], self.std)
                self.fresh[table] = next(values)[1].to(weights)
            with torch.no_grad():
                offset = self._managed_collision_collection._table_to_offset[table]
                weights[rows] = self.fresh[table][(rows + offset) % CHUNK_ROWS]
                states = kernel.split_optimizer_states()  # of plain SGD, an empty list
                for state in states[int(index)] if states else ():
                    state[rows] = 0


class CollisionSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """Makes ShardedCollisions; `std` is the standard deviation of the values of rows that change their id."""

    def __init__(self, rows: EmbeddingBagCollectionSharder, seed: int = 0, std: float = 0.0) -> None:
        self.rows, self.ids = rows, ManagedCollisionCollectionSharder()
        super().__init__(rows, self.ids)
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
        sharded = ShardedCollisions(module, params, self.rows, self.ids, env, device or torch.device("cpu"))
        sharded.seed, sharded.std, sharded.fresh = self.seed, self.std, {}
        return sharded


def collisions_of(model: nn.Module) -> list[BucketedCollisions]:
    """This rank's part of the managed collision of each table; empty for most models."""
    return [module for module in model.modules() if isinstance(module, BucketedCollisions)]
