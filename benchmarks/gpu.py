"""MBCnet at the paper's size on one GPU, unattended in under 8 minutes: rate, share of peak, lookup bandwidth, gaps, compiled step, memory.

    python benchmarks/gpu.py [--quick] [--json] [--device cuda] [--batch 8192] [--max-rows 1_000_000]

bf16 autocast, random batches of the 192 fields that lie on the device: input is measured elsewhere (input.py). Without a GPU the same
code runs on the CPU at a small size, so that it is known to run, and `not_measured` lists what that cannot tell.

samples_per_second       of a whole step: lookup, dense part, backward with the tables' update, dense optimizer
share_of_peak            its matrix FLOPs against the data sheet's dense bf16 rate of this GPU; null where the GPU is unknown
share_of_product         the same against this machine's own square bf16 product
lookup_bandwidth_share   bytes of the looked-up rows over the forward lookup's time, against a large copy on the same device
launch_gap_share         share of the time from the first kernel or copy of three steps to their last in which none runs
streams_speedup          the graph of an evaluation's dense part with its branches on CUDA streams against one after the other
grouped_product_speedup  EFGC's groups, forwards and backwards, with those of equal widths in one product a layer against one by one
cuda_graph_speedup       the step with train.cuda_graph against without; null with the reason where it fails
compiled_speedup         the step with torch.compile on the dense part against without; null with the reason where it fails
peak_memory_bytes        that the allocator handed out
not_measured             names of figures, each with its reason
"""

import faulthandler
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_size import (
    MBCNET,
    cut_schema,
    looked_up_floats,
    matrix_flops,
    objective_of,
    random_batch,
    run_config,
    training_step,
)
from side_by_side import print_figures, timing_parser_of

from data.stream import Batch
from mbcnet_rec.build import build
from mbcnet_rec.runtime.process import joined_process
from mbcnet_rec.training.cuda_graph import replay_dense_arch

# Dense bf16 peak in TFLOP/s by the data sheets, by a part of the name that CUDA reports
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}
LIMIT_SECONDS = 460  # of the whole run: the process ends then, whatever it waits for
COMPILED_BY, QUICKLY_BY = 390.0, 40.0  # seconds after the start at which the compiled step is given up; with --quick
AGAIN_SECONDS = 5.0
NEEDS_GPU = {
    "share_of_peak": "a CPU has no data-sheet rate here",
    "launch_gap_share": "nothing is launched on a CPU",
    "streams_speedup": "a CPU has no streams",
    "grouped_product_speedup": "on a CPU each group has its own product",
    "cuda_graph_speedup": "nothing is launched on a CPU",
    "compiled_speedup": "on a CPU compiling was seen not to pay; it takes longer than this run",
    "peak_memory_bytes": "torch counts a GPU's allocations only",
}


def main() -> int:
    parser = timing_parser_of(__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch", type=int, help="default 8192 on a GPU, 256 on a CPU")
    parser.add_argument(
        "--max-rows", type=int, help="of a table; default 1,000,000 on a GPU (--quick: 100,000), 1,000 on a CPU"
    )
    parser.add_argument("--steps", type=int, help="timed; default 50 on a GPU, 3 on a CPU or with --quick")
    args = parser.parse_args()
    begun = time.perf_counter()
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    torch.set_num_threads(args.threads)
    print(
        "prediction (one H200): 85.8 MFLOP a sample; matrix products alone would allow 9.2 M samples a second, HugeCTR's MLPerf rate is worth\n"
        "2.4 M; many small kernels between them leave gaps of a third of the step, so 1.0 to 1.5 M; lookup at 0.5 to 0.8 of the copy's bandwidth"
    )
    figures: dict[str, Any] = {"not_measured": {}}
    with joined_process(args.device) as process:
        device, on_gpu = process.device, process.device.type == "cuda"
        batch_size = args.batch or (8192 if on_gpu else 256)
        steps = args.steps or (50 if on_gpu and not args.quick else 3)
        rows_of_a_table = (100_000 if args.quick else 1_000_000) if on_gpu else 1_000
        schema = cut_schema(args.max_rows or rows_of_a_table, "paper" if on_gpu else "demo")
        config = run_config(Path(), MBCNET, batch_size)
        built = build(replace(config, train=replace(config.train, device=device.type)), schema, process)
        batch = random_batch(schema, batch_size).to(device)
        step = training_step(built, batch, autocast=True)
        step_seconds = seconds_of(step, steps, device)
        dense, losses = objective_of(built).model.dense_arch, objective_of(built).losses
        rows = batch_size * len(dense.branches)
        flops = matrix_flops(dense, batch_size) + matrix_flops(dense.top, rows - batch_size)
        flops += 4 * matrix_flops(losses, batch_size)
        rate = product_rate(device)
        figures |= {"samples_per_second": batch_size / step_seconds, "step_seconds": step_seconds}
        figures |= {"mflop_per_sample": flops / batch_size / 1e6, "product_tflops": rate / 1e12}
        figures["share_of_product"] = flops / step_seconds / rate
        figures |= lookup_figures(objective_of(built).model.sparse_arch, batch, steps, device)
        if on_gpu:
            figures |= gpu_figures(step, step_seconds, flops, device)
            figures |= dense_figures(objective_of(built).model, batch, steps)
            figures |= graph_figures(built, step, steps, device)
            figures |= compiled_figures(
                built, batch, step_seconds, steps, begun + (QUICKLY_BY if args.quick else COMPILED_BY)
            )
        else:
            figures |= dict.fromkeys(NEEDS_GPU)
            figures["not_measured"] |= NEEDS_GPU
        figures["device"] = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        figures |= {"batch": batch_size, "fields": len(schema.features), "torch": torch.__version__}
        figures["seconds"] = time.perf_counter() - begun
    faulthandler.cancel_dump_traceback_later()
    for name, reason in figures["not_measured"].items():
        print(f"  not measured: {name}: {reason}")
    print_figures(figures, args.json)
    return 0


def seconds_of(case: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median seconds of a case, its kernels included, after three that warm up."""
    times = []
    for _ in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        case()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device) -> float:
    """FLOP/s of a square bf16 product on this device."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "lr")
    return 2.0 * size**3 / seconds_of(lambda: left @ right, 10, device)


def lookup_figures(tables: Any, batch: Batch, repeats: int, device: torch.device) -> dict[str, float]:
    """The forward lookup of the plain tables against a large copy."""

    def look_up() -> None:
        with torch.no_grad():
            tables.ebc(batch.sparse_features).values()

    pooled = tables.ebc(batch.sparse_features)
    floats = looked_up_floats(pooled, batch.sparse_features)
    moved = 4.0 * (floats + pooled.values().numel())  # rows are read, pooled rows written
    source = torch.ones((2**30 if device.type == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.nbytes / seconds_of(lambda: target.copy_(source), 10, device)
    bandwidth = moved / seconds_of(look_up, repeats, device)
    return {"lookup_bandwidth_share": bandwidth / copied, "copy_gb_per_second": copied / 1e9}


def gpu_figures(step: Callable[[], object], step_seconds: float, flops: float, device: torch.device) -> dict[str, Any]:
    """What only a GPU can tell: share of peak, gaps between kernels, memory."""
    name = torch.cuda.get_device_name(device)
    peak = next((tflops for part, tflops in PEAKS.items() if part in name), None)
    torch.cuda.reset_peak_memory_stats(device)
    # the host's own events would slow it down, and a user's annotation would cover the gaps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return {
        "share_of_peak": None if peak is None else flops / step_seconds / (1e12 * peak),
        "launch_gap_share": gap_share(spans),
        "kernels_per_step": len(spans) / 3,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
    }


def gap_share(spans: list[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end that no (start, end) covers; None without any. Spans may overlap."""
    busy, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    whole = last - min(spans)[0] if spans else 0.0
    return 1 - busy / whole if whole > 0 else None


def dense_figures(model: Any, batch: Batch, repeats: int) -> dict[str, float]:
    """Ways to keep a GPU busy with the dense part, each beside the same without."""
    arch, device = model.dense_arch, batch.labels.device
    with torch.no_grad():
        features = model.sparse_arch(batch.dense_features, batch.sparse_features, batch.weighted_features)
    crossing = arch.branches["efgc"].crossing
    inputs = [features[group] for group in arch.branches["efgc"].groups]

    def seconds(case: Callable[[], object]) -> float:
        def with_autocast() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                case()

        return seconds_of(with_autocast, repeats, device)

    together = seconds(lambda: torch.cat(crossing(inputs), dim=1).sum().backward())
    alone = [partial(mlp, each) for mlp, each in zip(crossing.mlps, inputs, strict=True)]
    one_by_one = seconds(lambda: torch.cat([mlp() for mlp in alone], dim=1).sum().backward())
    return {"grouped_product_speedup": one_by_one / together} | stream_figures(arch, features, repeats, device)


def stream_figures(arch: Any, features: Any, repeats: int, device: torch.device) -> dict[str, float]:
    """The graph of an evaluation's dense part on CUDA streams, and with one part after the other, which gradients that nobody wants make."""
    seconds = {}
    arch.requires_grad_(False)
    for streams in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.set_grad_enabled(not streams), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            arch(features)
            with torch.cuda.graph(graph):
                kept = arch(features)
        seconds[streams] = seconds_of(graph.replay, repeats, device)
        del kept
    arch.requires_grad_(True).zero_grad()
    return {"streams_speedup": seconds[False] / seconds[True]}


def graph_figures(built: Any, step: Callable[[], object], repeats: int, device: torch.device) -> dict[str, Any]:
    """The step with the dense part as CUDA graphs, beside the same without."""
    arch = objective_of(built).model.dense_arch
    plain = seconds_of(step, repeats, device)
    try:
        replay_dense_arch(built.model)
        return {"cuda_graph_speedup": plain / seconds_of(step, repeats, device)}
    except Exception as error:  # no GPU has run it yet: any failure is a result here
        return {"cuda_graph_speedup": None, "not_captured": in_short(error)}
    finally:
        arch.__dict__.pop("forward", None)


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def compiled_figures(built: Any, batch: Batch, plain_seconds: float, steps: int, deadline: float) -> dict[str, Any]:
    """The dense part compiled with static shapes; whatever stops that is told, and the run continues."""
    try:
        with time_limit(deadline - time.perf_counter()):
            objective_of(built).model.dense_arch.compile(dynamic=False)
            seconds = seconds_of(training_step(built, batch, autocast=True), steps, batch.labels.device)
    except Exception as error:  # any failure of a compiler is a result here
        return {"compiled_speedup": None, "not_compiled": in_short(error)}
    rate = len(batch.labels) / seconds
    return {"compiled_speedup": plain_seconds / seconds, "compiled_samples_per_second": rate}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs longer, and again, since a compiler may take it for a failure of its own."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done when its time was over, after {max(0.0, seconds):.1f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds), AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
