"""What is trained on the stubbed GPU and on a CPU: every choice of a config that decides what runs there, and what is left out of it, and why.

No torch: tests/test_gpu_stub_cases.py compares this list with what a config may say.
"""

from dataclasses import dataclass

KINDS = (
    "mbcnet",
    "dnn",
    "crossnet",
    "wide_deep",
    "dcnv2",
    "mmoe",
    "enkd",
    "finalmlp",
    "deepfm",
    "fm",
    "efgc",
    "shared_bottom",
    "ple",
)
EXACT, HALF, COARSE = 1e-5, 2e-3, 1e-1
DNN = "model.kind=dnn"
# a CPU's run goes without what only a GPU has, and is not profiled
GPU_ONLY = ("sharding.compute_kernels", "sharding.prefetch", "sharding.replicas", "train.profile", "train.cuda_graph")
BOTH = (1, 2)
# of every run: 10 steps, whose 5th and 10th end with a line of the log
SMALL = (
    'model.enkd.teachers=["dcnv2"]', "model.enkd.hidden=[8]", "model.wide_deep.hidden=[8]", "model.dcnv2.hidden=[8]", "train.eval_every=5",
    "train.max_steps=10", "train.timeout_seconds=60",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A training, and what is done with it, on a number of ranks."""

    name: str
    settings: tuple[str, ...]
    ranks: int
    within: float = EXACT  # largest relative difference from the CPU's run, of any number of the log
    then: tuple[str, ...] = ()  # resume, evaluate, predict, export, profile, graphs
    data: str = "small"  # or unbounded: fields of encoding zch
    refused: str = ""  # words with which the run must be refused

    @property
    def on_cpu(self) -> tuple[str, ...]:
        """The settings of the run to compare with. gloo sends no bf16, for which TorchRec takes fp16, where small gradients are 0: fp32 then."""
        both = (each for each in self.settings if not each.startswith(GPU_ONLY))
        return tuple(each for each in both if not each.endswith("ward_precision=bf16"))


def on_both(name: str, *settings: str, **more: object) -> list[Case]:
    return [Case(f"{name}, {ranks} rank{'s' * (ranks > 1)}", settings, ranks, **more) for ranks in BOTH]  # type: ignore[arg-type]


def all_cases() -> list[Case]:
    """Every case, in the order in which they run."""
    cases: list[Case] = []
    for kind in KINDS:
        cases += on_both(f"model {kind}", f"model.kind={kind}")
    five = (
        "model.kind=mbcnet",
        'model.mbcnet.branches=["efgc","cross","deep","fm","wide"]',
        "model.mbcnet.fusion=gated",
    )
    cases += on_both("mbcnet of five branches", *five)
    # in training one stream, in evaluations one more for each branch
    graphs = "train.cuda_graph=true"
    cases += on_both("CUDA graphs of five branches", *five, graphs, then=("graphs",))
    # biases before a batch norm have a gradient of rounding alone, of which Adam makes steps that the running statistics follow late
    cases += on_both("mbcnet with batch norm", "model.kind=mbcnet", "model.mbcnet.batch_norm=true", within=HALF)
    cases += on_both(
        "CUDA graphs with batch norm",
        "model.kind=mbcnet",
        "model.mbcnet.batch_norm=true",
        graphs,
        within=HALF,
        then=("graphs",),
    )
    cases += on_both("mbcnet, a slice for each branch", "model.kind=mbcnet", "model.mbcnet.embeddings=per_branch")
    orthogonal = (
        "model.kind=mbcnet", "model.mbcnet.differentiation.parametrization=orthogonal", "model.mbcnet.coteaching.threshold=base_rate",
    )  # fmt: skip
    cases += on_both("mbcnet, orthogonal by construction", *orthogonal)
    cases += on_both("CUDA graphs of orthogonal transforms", *orthogonal, graphs, then=("graphs",))
    for name in ("rowwise_adagrad", "adagrad", "sgd"):
        cases += on_both(f"optimizer {name}", DNN, f"optim.embedding.name={name}")
    replicated = 'sharding.sharding_types=["data_parallel"]'
    cases += on_both("optimizer adam", DNN, "optim.embedding.name=adam", replicated)
    cases += on_both("sharding data_parallel", DNN, replicated)
    for kind in ("table_wise", "row_wise", "table_row_wise"):
        cases += on_both(f"sharding {kind}", DNN, f'sharding.sharding_types=["{kind}"]')
    for ranks, names in ((1, "[0]"), (2, "[0,1]")):
        column_wise = (
            'sharding.tables.user.sharding_types=["column_wise"]',
            f"sharding.tables.user.ranks={names}",
            "optim.embedding.name=adagrad",
        )
        cases.append(Case(f"sharding column_wise, {ranks} ranks", (DNN, *column_wise), ranks))
    for kernel in ("fused", "fused_uvm", "fused_uvm_caching"):
        cases += on_both(f"kernel {kernel}", DNN, f'sharding.compute_kernels=["{kernel}"]')
    cached = 'sharding.compute_kernels=["fused_uvm_caching"]'
    cases += on_both("kernel dense", DNN, replicated, 'sharding.compute_kernels=["dense"]')
    cases += on_both("prefetch", DNN, cached, "sharding.prefetch=true")
    cases += on_both("rows in fp16", DNN, "sharding.data_type=fp16", within=HALF)
    cases += on_both("rows in bf16", DNN, "sharding.data_type=bf16", refused="FBGEMM has no kernels for bf16 rows")
    for forward, backward in (("fp16", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "bf16")):
        sent = (
            f"sharding.forward_precision={forward}",
            f"sharding.backward_precision={backward}",
            'sharding.sharding_types=["table_wise","row_wise"]',
        )
        within = COARSE if "bf16" in (forward, backward) else HALF
        cases.append(Case(f"sent in {forward} and {backward}, 2 ranks", (DNN, *sent), 2, within))
    cases += on_both("autocast bf16", DNN, "train.autocast=bf16", within=COARSE)
    cases += on_both("fields of encoding zch", DNN, data="unbounded")
    cases += on_both("zch without momentum", DNN, "optim.embedding.name=sgd", data="unbounded")
    # each copy of the tables learns from half of the rows, and both are averaged: not what one copy learns
    cases.append(Case("two replicas, 2 ranks", (DNN, "sharding.replicas=2"), 2, within=0.5))
    cases += on_both("clipped gradients", DNN, "train.max_grad_norm=0.05")
    cases += on_both("stopped off a line of the log and resumed", DNN, then=("resume",))
    cases += on_both(
        "the same of mbcnet with cached rows", "model.kind=mbcnet", cached, "sharding.prefetch=true", then=("resume",)
    )
    cases += on_both("evaluate, predict and export", "model.kind=mbcnet", then=("evaluate", "predict", "export"))
    cases += on_both("profile", DNN, "train.profile=2", then=("profile",))
    return cases


LEFT_OUT = {
    "sharding grid_shard and table_column_wise": "a plan cannot ask for them: with mean pooling TorchRec divides grid shards wrongly",
    "table_row_wise over several hosts": "all ranks run on one host",
    "precisions between ranks on one rank": "nothing is sent",
    "hits of the caches of fused_uvm_caching": "rows are read behind the cache, which no kernel fills",
    "several streams at once": "what is launched on any stream is done at once; a wait that CUDA refuses in a capture is refused",
    "dropout": "a CPU's kernel draws other numbers",
    "torch.compile": "it writes kernels of its own, which a CPU cannot repeat",
    "lost ranks": "the stub of NCCL has no network that could fail",
}
