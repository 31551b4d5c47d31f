"""What the dense part of a model costs a rank: memory and seconds, from four numbers."""

from dataclasses import dataclass

from data.schema.bounds import Bounded, bounded
from sharding.plan.cluster import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster

FLOAT_BYTES = 4
TRAINING_FLOPS = 3  # a backward pass costs two forward ones
COPIES = 5  # weight, gradient, all-reduce bucket, and Adam's two moments


@dataclass(frozen=True)
class DenseCost(Bounded):
    """The part of a model that is in no table."""

    parameters: int = bounded(0, at_least=0)  # fp32
    forward_flops: float = bounded(0.0, at_least=0)  # of one row's forward pass, 2 a multiply-add
    activation_bytes: float = bounded(0.0, at_least=0)  # of one row, kept from forward to backward
    input_columns: float = bounded(0.0, at_least=0)  # Parquet values decoded per row

    def weight_bytes(self) -> int:
        """Weights with everything an optimizer step keeps beside them."""
        return self.parameters * FLOAT_BYTES * COPIES

    def memory_bytes(self, batch_size: int) -> int:
        """Bytes on one rank."""
        return self.weight_bytes() + int(self.activation_bytes * batch_size)

    def step_seconds(self, batch_size: int, cluster: Cluster) -> float:
        """Forward, backward and optimizer: the larger of arithmetic and of moving weights and activations."""
        flops = TRAINING_FLOPS * self.forward_flops * batch_size
        arithmetic = flops / (1e12 * cluster.dense_tflops * cluster.dense_efficiency)
        moved = self.weight_bytes() + 2 * self.activation_bytes * batch_size
        return max(arithmetic, moved / (MEMORY_EFFICIENCY * cluster.memory_bytes_per_second))

    def all_reduce_seconds(self, cluster: Cluster) -> float:
        """Gradients over all ranks, ring, without overlap."""
        size = cluster.world_size
        sent = 2 * self.parameters * FLOAT_BYTES * (size - 1) / size
        link = cluster.network_gb_per_second if cluster.hosts > 1 else cluster.nvlink_gb_per_second
        return sent / (LINK_EFFICIENCY * 1e9 * link)

    def decode_seconds(self, batch_size: int, cluster: Cluster) -> float:
        """Parquet values of one rank's batch, over its share of the host's cores."""
        cores = max(1.0, cluster.cores / cluster.devices_per_host)
        return self.input_columns * batch_size / (cores * cluster.decode_values_per_second)
