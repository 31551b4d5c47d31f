"""What is to be planned: tables, constraints, machines and workload."""

from collections.abc import Callable
from dataclasses import dataclass

from data.errors import InputError
from data.schema import Schema
from sharding.cost.estimate import Room, gib
from sharding.plan.cluster import GIB, Cluster, default_cluster, read_cluster
from sharding.plan.constraints import CARRIED, ShardingConfig
from sharding.plan.placement import DenseCost, Plan

Progress = Callable[[int, float], None]  # (proposals so far, best milliseconds)


@dataclass(frozen=True)
class Task:
    """What is to be planned."""

    schema: Schema
    config: ShardingConfig
    cluster: Cluster
    batch_size_per_rank: int
    optimizer: str = "rowwise_adagrad"  # of the tables
    dense: DenseCost = DenseCost()  # the rest of the model, whose memory is set aside

    def empty_plan(self) -> Plan:
        """The plan without its tables."""
        cluster = self.cluster
        return Plan(
            world_size=cluster.world_size,
            local_world_size=cluster.devices_per_host,
            device=cluster.device,
            schema=self.schema.fingerprint(),
            tables={},
            batch_size_per_rank=self.batch_size_per_rank,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            **{key: getattr(self.config, key) for key in CARRIED},
            cluster=str(cluster),
            cluster_fingerprint=cluster.fingerprint(),
            dense=self.dense,
        )

    def room(self) -> Room:
        """Bytes of one rank that tables and their activations may fill; InputError if the dense part and the reserve leave nothing."""
        on_gpu, kept = self.cluster.device == "cuda", 1 - self.config.storage_reserve
        hbm = int(kept * (self.config.hbm_gib * GIB or self.cluster.hbm_bytes)) if on_gpu else 0
        ddr = int(kept * (self.config.ddr_gib * GIB or self.cluster.ddr_bytes))
        used = self.dense.memory_bytes(self.batch_size_per_rank)
        left = Room(hbm - used, ddr) if on_gpu else Room(0, ddr - used)
        if left.ddr <= 0 or (on_gpu and left.hbm <= 0):
            memory, size = ("HBM", hbm) if on_gpu else ("DDR", ddr)
            raise InputError(
                f"{self.cluster}: the dense part takes {gib(used)} at {self.batch_size_per_rank:,} rows a rank, more than the "
                f"{gib(size)} of {memory} that a rank may fill; lower --batch-size"
            )
        return left


def cluster_of(config: ShardingConfig, world_size: int, local_world_size: int, device: str) -> Cluster:
    """The cluster a run is on: what its config names, in the run's size, else the device's default; InputError if the devices differ."""
    if not config.cluster:
        return default_cluster(world_size, local_world_size, device)
    cluster = read_cluster(config.cluster).resized(max(1, world_size // local_world_size), local_world_size)
    if cluster.device != device:
        raise InputError(
            f"sharding.cluster = {config.cluster!r}: its device is {cluster.device!r}, but this run computes on {device!r}; "
            "name another cluster, or leave it empty"
        )
    return cluster
