"""Encoded rows -> the batches of one rank, as TorchRec takes them."""

from data.stream.batch import Batch
from data.stream.parquet_stream import ParquetStream

__all__ = ["Batch", "ParquetStream"]
