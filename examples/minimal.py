"""The whole way on one page: schema -> Parquet -> model -> plan -> DistributedModelParallel -> train pipeline.

    python examples/minimal.py                                                        one process
    torchrun --nproc-per-node 2 examples/minimal.py                                   tables sharded over two

`mbcnet train` does the same with checkpoints, evaluation, logs and errors that name the row. It takes seconds and prints the loss.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from data.reading.config import StreamOptions
from data.reading.files import resolve_files
from data.schema import load_schema
from data.stream import ParquetStream
from mbcnet_rec.model.branches import DeepConfig
from mbcnet_rec.model.input_layout import input_layout
from mbcnet_rec.model.mbcnet import MBCNet, MBCNetConfig
from mbcnet_rec.model.objective import Objective
from mbcnet_rec.model.sparse_arch import Lookup, SparseArch
from mbcnet_rec.runtime.process import joined_process, mean_over_ranks
from mbcnet_rec.training.config import EmbeddingOptimConfig, OptimConfig
from mbcnet_rec.training.optim import build_optimizer, fuse_table_optimizer
from sharding.bridge.collections import meta_collections
from sharding.bridge.sharder import sharders_of, to_sharding_plan
from sharding.plan.constraints import ShardingConfig
from sharding.search.candidates import Task, cluster_of
from sharding.search.planner import make_plan

SCHEMA = """
name = "minimal"
label = "click"
[fields]
user  = { kind = "categorical", num_embeddings = 100, embedding_dim = 16 }
item  = { kind = "categorical", num_embeddings = 50, embedding_dim = 16 }
tags  = { kind = "multi_valued", num_embeddings = 50, embedding_dim = 16, pooling = "mean" }
price = { kind = "numeric", transform = "log1p" }
[groups]
taste = ["user", "item", "tags"]
"""


def write_log(folder: Path, rows: int = 20_000) -> None:
    """Write a schema and a log in which a click depends on the pair of user and item."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 100, rows), rng.integers(0, 50, rows)
    click = rng.random(rows) < 1 / (1 + np.exp(-2 * np.sin(user) * (1 + np.cos(item))))
    tags = [rng.integers(0, 50, rng.integers(0, 4)).tolist() for _ in range(rows)]
    log = {"user": user, "item": item, "tags": tags, "price": rng.gamma(2.0, 10.0, rows), "click": click * 1}
    folder.mkdir(exist_ok=True)
    (folder / "schema.toml").write_text(SCHEMA)
    pq.write_table(pa.table(log), folder / "log.parquet", row_group_size=2_000, write_page_checksum=True)


def main(epochs: int = 5) -> float:
    """Train; return the mean loss of the last epoch."""
    folder = Path(tempfile.gettempdir()) / "mbcnet_minimal"
    with joined_process("auto") as process:
        if process.is_first:
            write_log(folder)
        dist.barrier()
        schema = load_schema(folder / "schema.toml")
        # 1. The stream: this rank's share of every global batch.
        options = StreamOptions(batch_size=256, order="shuffled")
        files = resolve_files([str(folder / "log.parquet")])
        stream = ParquetStream(files, schema, options, process.rank, process.world_size)
        # 2. The plan: where each table lives, made without a device.
        machine = (process.world_size, process.local_world_size, process.device.type)
        cluster = cluster_of(ShardingConfig(), *machine)
        plan = make_plan(Task(schema, ShardingConfig(), cluster, options.batch_size // process.world_size))
        replicated = {name for name, table in plan.tables.items() if table.sharding_type == "data_parallel"}
        # 3. The model: tables on the meta device, one regroup, three branches, a shared top.
        torch.manual_seed(0)
        tables = meta_collections(schema)
        lookups = [Lookup(each.name, rows, each.weighted, each.unbounded) for each, rows in tables.items()]
        config = MBCNetConfig(branch_dim=32, top=(32, 16), deep=DeepConfig(hidden=(64, 32)))
        layout = input_layout(schema)
        model = MBCNet(config, SparseArch(lookups, layout), layout)
        objective = Objective(model, config.coteaching, config.differentiation, mean_over_ranks)
        # 4. The tables' optimizer runs during backward; it is attached before the tables are sharded.
        optim = OptimConfig(dense_lr=2e-3, embedding=EmbeddingOptimConfig(lr=0.1))
        rows_of = [item for rows in tables.values() for item in rows.named_parameters()]
        fuse_table_optimizer((p for name, p in rows_of if name.split(".")[-2] not in replicated), optim.embedding)
        # 5. Sharding, to the letter of the plan; then Adam for the rest.
        paths: Any = {f"model.sparse_arch.{each.name}": rows for each, rows in tables.items()}
        sharded = DistributedModelParallel(
            objective, device=process.device, plan=to_sharding_plan(plan, paths), sharders=sharders_of(plan)
        )
        names = [name for name, _ in sharded.named_parameters() if "embedding_bags" in name]
        own = {name for name in names if name.split(".")[-2] in replicated}
        optimizer = build_optimizer(sharded, own, optim)
        # 6. The pipeline: copies and exchanges of the next batches beside this one's forward and backward.
        pipeline: Any = TrainPipelineSparseDist(sharded, optimizer, process.device, execute_all_batches=True)
        mean, batches = float("nan"), (batch for _ in range(epochs) for batch in stream)
        for epoch in range(epochs):
            steps = range(stream.steps_per_epoch)
            losses = [pipeline.progress(batches).terms["bce"] for _ in steps]
            mean = torch.stack(losses).mean().item()
            if process.is_first:
                print(
                    f"epoch {epoch}: log-loss, summed over the fused output and three branches, {mean:.4f}", flush=True
                )
        return mean


if __name__ == "__main__":
    main()
