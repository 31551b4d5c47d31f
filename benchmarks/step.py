"""One training step of MBCnet at the paper's size: what it costs by part, against each part's own roof.

    python benchmarks/step.py [--quick] [--json] [--only steps losses trainer] [--threads N] [--clock cpu]

192 fields, 2,780 dims, seven groups of 800 dims together, tables cut to --max-rows rows; the project's own build: sharded tables with
fused rowwise Adagrad, Adam for the dense part. Every case is measured in turns with all others; ratios are medians over rounds.

gemm_share                FLOPs of the step's matrices / its time / the machine's own rate of torch.mm, 2048 x 2048 x 2048, same threads
gemm_share_of_faster      the same against the faster of torch.mm (MKL) and oneDNN, which the model's layers use on a CPU
products_share            the same of a step's own matrix products run again one after the other, on the same tensors, and nothing else
calls_share               step of 8 rows and layers 8 wide, which has the same calls and nothing to compute / step
roof_share                the same of these products, of these calls and of the bytes that the parts below cannot save, at the rate of a pass in
                          place: what a step would reach whose every other operation costs nothing
bf16_speedup              float32 step / step under bf16 autocast
bf16_loss_difference      relative difference of the mean loss over the last tenth of --loss-steps steps, float32 against bf16; no row is seen twice
float32_loss_difference   the same between two float32 runs whose dense weights differ by 1e-6 of themselves at first
cooperation_overhead      step / step of cross and deep branch alone without cooperation losses - 1
grouped_speedup           EFGC's groups by a loop of independent MLPs of torch's own layers / as the model runs them
per_branch_flops          FLOPs of a forward pass where each branch reads a slice of every row / where branches read whole rows
per_branch_step           step of the one / step of the other
cpu_fast_path_speedup     float32 step with train.cpu_fast_path off / on
non_model_share           share of the real trainer's time outside forward, backward and optimizer: input, metrics, log, checkpoint
"""

import contextlib
import copy
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_size import (
    MBCNET,
    PER_BRANCH,
    PREDICTED_FLOPS,
    PREDICTED_PER_BRANCH,
    PREDICTED_SHARED,
    TWO_BRANCHES,
    cut_schema,
    looked_up_floats,
    matrix_flops,
    objective_of,
    random_batch,
    read_batches,
    run_config,
    training_step,
    written_log,
)
from side_by_side import (
    Clock,
    large_copy,
    one_dnn_product,
    print_figures,
    ratio,
    square_product,
    take_turns,
    timing_parser_of,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedTensor

from data.schema import Schema
from data.stream import Batch
from mbcnet_rec.build import build
from mbcnet_rec.dense_cost import dense_cost
from mbcnet_rec.model.branches import DeepConfig, EFGCConfig
from mbcnet_rec.model.input_layout import ALL
from mbcnet_rec.model.layers import CrossConfig
from mbcnet_rec.model.mbcnet import MBCNetConfig
from mbcnet_rec.plugins import model_config
from mbcnet_rec.run_training import run_training
from mbcnet_rec.runtime.process import Process, joined_process
from mbcnet_rec.training.built import Built
from sharding.plan.constraints import ShardingConfig

LOSS_BATCH = 256
FEW = 8  # rows, and widths of layers: nothing to compute
NARROW = model_config(
    mbcnet=MBCNetConfig(
        efgc=EFGCConfig((FEW,) * 2), deep=DeepConfig((FEW,) * 5), branch_dim=FEW, top=(FEW,) * 3, cross=CrossConfig(low_rank=1)
    )
)  # fmt: skip
LOG_EVERY, CHECKPOINT_EVERY = 20, 100  # steps; one checkpoint in 100 steps is more than a real run makes


def main() -> int:
    parser = timing_parser_of(__doc__)
    parser.add_argument("--batch", type=int, help="default 1024, quick 256")
    parser.add_argument("--max-rows", type=int, default=10_000, help="of a table")
    parser.add_argument("--seconds", type=float, help="of measuring in turns; default 120, quick 4")
    parser.add_argument("--loss-steps", type=int, help="default 500, quick 5; of 256 rows")
    parser.add_argument("--trainer-steps", type=int, help="default 200, quick 25; of --batch rows")
    parser.add_argument("--scale", choices=["paper", "demo"], default="paper", help="demo: 684 dims")
    parts = ["steps", "losses", "trainer"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure")
    args = parser.parse_args()
    args.batch = args.batch or (256 if args.quick else 1024)
    seconds = args.seconds or (4 if args.quick else 120)
    loss_steps = args.loss_steps or (5 if args.quick else 500)
    trainer_steps = args.trainer_steps or (25 if args.quick else 200)
    figures: dict[str, Any] = {}
    torch.set_num_threads(args.threads)
    print(
        f"prediction: {PREDICTED_FLOPS / 1e6:.1f} MFLOP a sample, {PREDICTED_FLOPS * args.batch / 1e9:.1f} GFLOP a step of {args.batch}; "
        "matrix products are nearly all of it, so gemm_share 0.8;\nbf16 at twice the rate of float32 or more, so bf16_speedup near 2; "
        "EFGC, one more pass of the top and differentiation are 24.5 % more FLOPs, so cooperation_overhead 0.25 to 0.32;\n"
        f"slices of rows: {PREDICTED_PER_BRANCH / 1e6:.1f} instead of {PREDICTED_SHARED / 1e6:.1f} M multiply-adds forward, so per_branch_flops "
        f"{PREDICTED_PER_BRANCH / PREDICTED_SHARED:.2f}, and per_branch_step 0.75 to 0.80: tables, regroup and losses stay as they are"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = max(8 * args.batch, (trainer_steps + 1) * args.batch if args.quick else 64 * args.batch)
        if "losses" in args.only:
            rows = max(rows, loss_steps * LOSS_BATCH)
        schema = written_log(folder / "log", cut_schema(args.max_rows, args.scale), rows)
        with joined_process("cpu") as process:
            batch = read_batches(folder / "log", schema, args.batch)[0]
            if "steps" in args.only:
                run = partial(run_config, folder / "log", batch_size=args.batch)
                made = {
                    "step": build(run(MBCNET), schema, process),
                    "two": build(run(TWO_BRANCHES), schema, process),
                    "slices": build(run(PER_BRANCH), schema, process),
                    "slow": build(run(MBCNET, cpu_fast_path=False), schema, process),
                    "calls": build(run(NARROW), schema, process),
                }
                shared, slices = (
                    dense_cost(model, schema, ShardingConfig()).forward_flops for model in (MBCNET, PER_BRANCH)
                )
                print(f"counted: {slices / 2e6:.2f} instead of {shared / 2e6:.2f} M multiply-adds forward")
                figures |= {"per_branch_flops": slices / shared}
                figures |= measure_steps(made, batch, random_batch(schema, FEW), seconds, args.clock)
            if "losses" in args.only:
                figures |= compare_losses(folder / "log", schema, process, loss_steps)
        if "trainer" in args.only:
            figures |= measure_trainer(folder, args.batch, trainer_steps)
    figures |= {"batch": args.batch, "threads": args.threads, "clock": args.clock}
    print_figures(figures, args.json)
    return 0


def measure_steps(made: dict[str, Built], batch: Batch, few: Batch, seconds: float, clock: Clock) -> dict[str, Any]:
    """Time whole steps of models and the parts of the first in turns; print the table of parts."""
    size = len(batch.labels)
    product, product_flops = square_product()
    other_product = one_dnn_product()
    copying, copy_bytes = large_copy()
    in_place = torch.ones(int(copy_bytes) // 8)
    parts, loop = part_cases(made["step"], batch)
    with Products() as products:
        training_step(made["step"], batch)()
    cases: dict[str, Callable[[], object]] = {
        "product": product,
        "oneDNN product": other_product or product,
        "copy": copying,
        "pass in place": lambda: in_place.mul_(1.0),
        "products alone": products.again,
        "bf16": training_step(made["step"], batch, autocast=True),
        "loop over groups": loop,
        **{name: training_step(built, batch) for name, built in made.items()},
        "calls": training_step(made["calls"], few),
        **{name: case for name, (case, _, _) in parts.items()},
    }
    times = take_turns(cases, seconds, clock)
    flops = sum(part_flops for _, part_flops, _ in parts.values())
    rate, bandwidth = product_flops / min(times["product"]), copy_bytes / min(times["copy"])
    faster = min(("product", "oneDNN product"), key=lambda name: statistics.median(times[name]))
    print_parts(times, parts, rate, bandwidth)
    share = flops / product_flops
    passes = sum(size for _, _, size in parts.values()) / (in_place.nbytes * 2)
    walls = (times[name] for name in ("products alone", "pass in place", "calls"))
    least = [a + passes * b + c for a, b, c in zip(*walls, strict=True)]
    return {
        "gemm_share": share * ratio(times["product"], times["step"]),
        "gemm_share_of_faster": share * ratio(times[faster], times["step"]),
        "products_share": share * ratio(times[faster], times["products alone"]),
        "calls_share": ratio(times["calls"], times["step"]),
        "roof_share": share * ratio(times[faster], least),
        "bf16_speedup": ratio(times["step"], times["bf16"]),
        "cooperation_overhead": ratio(times["step"], times["two"]) - 1,
        "per_branch_step": ratio(times["slices"], times["step"]),
        "cpu_fast_path_speedup": ratio(times["slow"], times["step"]),
        "grouped_speedup": ratio(times["loop over groups"], times["EFGC groups"]),
        "mflop_per_sample": flops / size / 1e6,
        "product_gflops": rate / 1e9,
        "one_dnn_gflops": product_flops / min(times["oneDNN product"]) / 1e9 if other_product else None,
        "copy_gb_per_second": bandwidth / 1e9,
        "step_seconds": min(times["step"]),
        "samples_per_second": size / min(times["step"]),
        "rounds": len(times["step"]),
    }


class Products(TorchDispatchMode):
    """Notes the matrix products of what runs inside, and their operands, to run them again."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in self.NAMES:
            self.calls.append(partial(op, *args, **(kwargs or {})))
        return op(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self) -> None:
        """Run all of them; what they make is let go."""
        for call in self.calls:
            call()


Part = tuple[Callable[[], object], float, float]  # case, FLOPs of matrix products, bytes that cannot be saved


def part_cases(built: Built, batch: Batch) -> tuple[dict[str, Part], Callable[[], object]]:
    """Forward and backward of each part on its own, and EFGC's groups as a loop of independent MLPs."""
    objective = objective_of(built)
    tables = objective.model.sparse_arch
    # copies: torch's data parallelism watches the gradients of the originals
    dense, losses = copy.deepcopy(objective.model.dense_arch), copy.deepcopy(objective.losses)
    rows, regroup = batch.labels.shape[0], tables.regroup
    pooled = tables.pooled(batch.sparse_features, batch.weighted_features)
    pooled = [tensor.wait() if hasattr(tensor, "wait") else tensor for tensor in pooled]
    pooled = [
        KeyedTensor(each.keys(), each.length_per_key(), each.values().detach().requires_grad_()) for each in pooled
    ]
    features = {name: group.detach().requires_grad_() for name, group in regroup(pooled, batch.dense_features).items()}
    hidden = {name: branch(features).detach().requires_grad_() for name, branch in dense.branches.items()}
    output = dense(features)
    leaves = type(output)(*(tensor.detach().requires_grad_() for tensor in output))
    groups = [features[name] for name in dense.branches["efgc"].groups]

    def look_up() -> None:
        values = [each.values() for each in tables.pooled(batch.sparse_features, batch.weighted_features)]
        torch.autograd.backward(values, [torch.ones_like(value) for value in values])

    def top() -> None:
        stacked = torch.stack(list(hidden.values()))
        latents = dense.top(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
        logits = [layer(latent) for layer, latent in zip(dense.branch_logits, latents, strict=True)]
        backward(torch.stack([*logits, dense.fused_logit(dense.fusion(latents))]))

    alone = [plain_mlp(mlp) for mlp in dense.branches["efgc"].crossing.mlps]

    def loop() -> None:
        for mlp, group in zip(alone, groups, strict=True):
            mlp.zero_grad()
            backward(mlp(group))

    gradients = [torch.randn_like(parameter) for parameter in built.dense]

    def adam() -> None:
        for parameter, gradient in zip(built.dense, gradients, strict=True):
            parameter.grad = gradient
        built.optimizer.step()
        built.optimizer.zero_grad()

    wide = features[ALL].shape[1]
    floats = sum(group.shape[1] for group in features.values())
    parameters = sum(parameter.numel() for parameter in built.dense)
    num_branches, cross = len(dense.branches), dense.branches["cross"]
    efgc = dense.branches["efgc"]
    flops = partial(matrix_flops, rows=rows)
    deep, reduction = dense.branches["deep"], efgc.reduction
    top_flops = matrix_flops(dense.top, num_branches * rows) + flops(dense.branch_logits)
    # elementwise: x + x_0 * y reads 3 and writes 1 in forward, twice that in backward
    cross_bytes = 12.0 * 4 * rows * wide * len(cross.crossing.layers)
    parts: dict[str, Part] = {
        # rows are read, and in backward read and written; pooled rows are written, their gradients read
        "tables and their update": (
            look_up,
            0.0,
            20.0 * sum(map(looked_up_floats, pooled, (batch.sparse_features, batch.weighted_features))),
        ),
        "regroup": (lambda: backward(*regroup(pooled, batch.dense_features).values()), 0.0, 16.0 * rows * floats),
        "EFGC groups": (
            lambda: backward(*efgc.crossing(groups)),
            flops(efgc.crossing),
            layer_bytes(efgc.crossing, rows),
        ),
        "EFGC reduction": (
            on_fresh(reduction, rows, reduction[0].in_features),
            flops(reduction),
            layer_bytes(reduction, rows),
        ),
        "cross": (lambda: backward(cross(features)), flops(cross), cross_bytes),
        "deep": (lambda: backward(deep(features)), flops(deep), layer_bytes(deep, rows)),
        "shared top, logits": (top, top_flops, layer_bytes(dense.top, num_branches * rows)),
        # two products for each of the P matrices and each direction; the norms read their rows, and their gradient reads and writes them
        "losses": (
            lambda: losses(leaves, batch.labels, batch.weights)[0].backward(),
            4 * flops(losses),
            2.0 * 12 * num_branches * (num_branches - 1) * output.latents[0].numel(),
        ),
        # reads parameter, gradient and two moments, writes all but the gradient
        "dense Adam": (adam, 0.0, 7.0 * 4 * parameters),
    }
    fresh = partial(without_gradients, [*dense.parameters(), *losses.parameters()])
    return {name: (partial(fresh, part[0]), *part[1:]) for name, part in parts.items()}, partial(fresh, loop)


def layer_bytes(module: nn.Module, rows: int) -> float:
    """What the passes of dense layers beside products move: bias and ReLU read and write, ReLU's gradient reads two numbers and writes one."""
    return 20.0 * rows * sum(layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear))


def plain_mlp(mlp: nn.Sequential) -> nn.Sequential:
    """The same sizes in torch's own layers, as anybody would write one group's MLP."""
    linear = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    return nn.Sequential(
        *(each for layer in linear for each in (nn.Linear(layer.in_features, layer.out_features), nn.ReLU()))
    )


def without_gradients(parameters: list[nn.Parameter], case: Callable[[], object]) -> None:
    """Run a case as in a step, where no gradient is there to add to."""
    for parameter in parameters:
        parameter.grad = None
    case()


def backward(*outputs: Tensor) -> None:
    learned = [output for output in outputs if output.requires_grad]  # a group of dense fields alone is not
    torch.autograd.backward(learned, [torch.ones_like(output) for output in learned])


def on_fresh(module: nn.Module, rows: int, width: int) -> Callable[[], None]:
    """Forward and backward of a module on an input of its own."""
    x = torch.randn(rows, width, requires_grad=True)
    return lambda: backward(module(x))


def print_parts(times: dict[str, list[float]], parts: dict[str, Part], rate: float, bandwidth: float) -> None:
    """Each part's least time, share of the step, and how near it comes to its own wall."""
    step = min(times["step"])
    print(f"  machine: {rate / 1e9:.0f} GFLOP/s of one matrix product, {bandwidth / 1e9:.1f} GB/s of copying")
    print(f"  {'part':26}{'ms':>9}{'of step':>9}{'GFLOP':>8}{'MB':>8}{'of roof':>9}  roof")
    for name, (_, flops, size) in parts.items():
        seconds = min(times[name])
        walls = {"product": flops / rate, "copy": size / bandwidth}
        wall = max(walls, key=lambda key: walls[key])
        print(
            f"  {name:26}{1e3 * seconds:9.1f}{seconds / step:9.1%}{flops / 1e9:8.2f}{size / 1e6:8.0f}"
            f"{walls[wall] / seconds:9.1%}  {wall}"
        )
    together = sum(min(times[name]) for name in parts)
    print(
        f"  {'whole step':26}{1e3 * step:9.1f}{'':9}{sum(p[1] for p in parts.values()) / 1e9:8.2f}; its parts add up to {together / step:.1%}"
    )


def compare_losses(folder: Path, schema: Schema, process: Process, steps: int) -> dict[str, Any]:
    """Train the same model on the same batches in float32, under bf16 autocast, and in float32 from weights that are hardly others."""
    batches = read_batches(folder, schema, LOSS_BATCH)[:steps]
    tenth = max(1, len(batches) // 10)

    def means(autocast: bool = False, nudge: float = 0.0) -> float:
        built = build(run_config(folder, MBCNET, LOSS_BATCH), schema, process)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in built.dense:
                parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=draw))
        losses = [float(training_step(built, batch, autocast)()) for batch in batches]
        return statistics.mean(losses[-tenth:])

    plain = means()
    figures: dict[str, Any] = {"float32_loss": plain, "loss_steps": len(batches)}
    for name, other in (("bf16", means(autocast=True)), ("float32", means(nudge=1e-6))):
        figures[f"{name}_loss_difference"] = abs(other - plain) / plain
    return figures


class ModelClock:
    """Measures how long a trainer is inside the model: forward, backward, dense optimizer. Hooks only; the trainer knows nothing."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []  # of model work
        self.starts: list[float] = []  # of forward passes
        self._since = 0.0

    def __enter__(self) -> "ModelClock":
        adam, model = torch.optim.Adam, DistributedModelParallel
        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(partial(self._begin, model)),
            nn.modules.module.register_module_forward_hook(partial(self._end, model)),
            register_optimizer_step_pre_hook(partial(self._begin, adam)),
            register_optimizer_step_post_hook(partial(self._end, adam)),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, kind: type, watched: Any, *_: Any) -> None:
        if isinstance(watched, kind):
            self._since = time.perf_counter()
            if isinstance(watched, nn.Module):
                self.starts.append(self._since)

    def _end(self, kind: type, watched: Any, _: Any, output: Any) -> None:
        if isinstance(watched, kind):
            self._close()
            if isinstance(watched, nn.Module):
                output[0].register_hook(self._before_backward)

    def _before_backward(self, _: Tensor) -> None:
        self._since = time.perf_counter()
        torch.autograd.Variable._execution_engine.queue_callback(self._close)

    def _close(self) -> None:
        self.spans.append((self._since, time.perf_counter()))

    def outside_share(self, first: int) -> float:
        """Share of the time between the start of step `first` and that of the last one that was not model work."""
        begin, end = self.starts[first], self.starts[-1]
        inside = sum(stop - start for start, stop in self.spans if begin <= start < end)
        return 1 - inside / (end - begin)


def measure_trainer(folder: Path, batch: int, steps: int) -> dict[str, Any]:
    """Run the real trainer, all of it, and see how long it is not in the model."""
    config = run_config(
        folder / "log", MBCNET, batch, out=str(folder / "run"), epochs=1 + steps // 8, max_steps=steps + 1,
        eval_every=steps + 1, log_every=LOG_EVERY, checkpoint_every=CHECKPOINT_EVERY,
    )  # fmt: skip
    with ModelClock() as clock, contextlib.redirect_stdout(io.StringIO()):
        run_training(config)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    return {
        "non_model_share": clock.outside_share(first=5),
        "trainer_input_wait_share": sum(line["input_wait_share"] for line in trained) / len(trained),
        "trainer_steps": steps,
        "trainer_batch": batch,
    }


if __name__ == "__main__":
    sys.exit(main())
