"""What a model, a branch and a loss are to everybody else: one object, which the file that defines it exports.

The files of zoo/ and mbcnet.py export ours; a package of yours does it by an entry point, a file of yours by `plugins` (docs/add_a_model.md).
Shapes: B batch, K branches, d latent width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from mbcnet_rec.model.input_layout import ALL, InputLayout

if TYPE_CHECKING:  # torchrec takes seconds to import, and reading a config needs none of it
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from mbcnet_rec.model.sparse_arch import SparseArch

GROUPS = "@groups"  # read by a branch: every group of the schema


class ModelOutput(NamedTuple):
    """What every model returns. K = 0 for models without branches."""

    latents: Tensor  # (K, B, d)
    branch_logits: Tensor  # (K, B), or (K, B, T) of T tasks
    fused_logits: Tensor  # (B,) or (B, T), the prediction that serves


def logits_only(logits: Tensor) -> ModelOutput:
    """Wrap (B,) or (B, T) logits as the output of a model without branches."""
    rows = logits.shape[0]  # len() would fix the batch size of an exported graph
    return ModelOutput(logits.new_empty(0, rows, 0), logits.new_empty(0, *logits.shape), logits)


def each_label(labels: Sequence[str]) -> dict[str, float]:
    """Tasks of a model with one output for each label."""
    return dict.fromkeys(labels, 1.0)


def reads_no_wide(config: Any) -> bool:
    """Whether a model reads wide weights: most do not."""
    return False


@dataclass(frozen=True)
class ModelKind:
    """A model that `model.kind` can name.

    Attributes:
        name: what model.kind says, and the name of its TOML table.
        config: a frozen dataclass whose fields all have defaults: the table. `branches` in it names the model's branches in the order of its
            outputs, `coteaching` and `differentiation` their cooperation, `embeddings` and the method `streams` the slices of rows that parts
            read, `teachers` the kinds that are trained first.
        arch: (config, layout) -> the dense arch: features -> ModelOutput. One with branches keeps them in the nn.ModuleDict `branches`, and
            the width of a latent in `latent_dim`; with `serve` it can serve some of them.
        title: in tables of studies, unless the paper has one for it.
        reads_wide: whether a model of this config reads one weight per id and field, of tables of their own.
        wide_crosses: whether the schema's crosses go to the wide part alone.
        objective: (model, config, mean_over_ranks) -> its training objective; None: BCE, with the cooperation losses of its branches.
        widths: MBCnet's config -> values that a config which says nothing of this model takes, as the paper does.
        tasks: names of several labels -> names of the tasks in the order of the logits, with their weights in the loss; a method `targets`
            of the arch makes what they learn where it is not the labels. None: the model has one logit.
    """

    name: str
    config: type
    arch: Callable[[Any, InputLayout], nn.Module]
    title: str = ""
    reads_wide: Callable[[Any], bool] = reads_no_wide
    wide_crosses: bool = False
    objective: Callable[..., nn.Module] | None = None
    widths: Callable[[Any], Mapping[str, Any]] | None = None
    tasks: Callable[[Sequence[str]], dict[str, float]] | None = None


@dataclass(frozen=True)
class BranchKind:
    """A branch that `model.mbcnet.branches` can name.

    Attributes:
        name: what it is called there, and the name of its TOML table in that of the model.
        build: (config of all branches, layout) -> features -> (B, branch_dim).
        config: a frozen dataclass whose fields all have defaults: the table; None: it has no settings.
        reads: ALL, GROUPS or WIDE: the tensors that it gets.
    """

    name: str
    build: Callable[[Any, InputLayout], nn.Module]
    config: type | None = None
    reads: str = ALL


@dataclass(frozen=True)
class LossKind:
    """A term that a table [model.losses.NAME] adds to the objective and to the log.

    Attributes:
        name: of its table, and of its key in metrics.jsonl.
        config: a frozen dataclass whose fields all have defaults: the table, the term's weight among them.
        term: (config, ModelOutput, labels (B,), weights (B,), mean_over_ranks) -> (), times its weight. Rows of weight 0 do not exist.
    """

    name: str
    config: type
    term: Callable[[Any, ModelOutput, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


class Model(nn.Module):
    """Tables, and a dense arch (features -> ModelOutput) on top of them."""

    def __init__(
        self, sparse_arch: "SparseArch", dense_arch: nn.Module, tasks: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.tasks = dict(tasks or {})  # of several labels: name -> weight in the loss, in the order of the logits
        self.sparse_arch = sparse_arch
        self.dense_arch = dense_arch

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Of the dense arch, in the order of its outputs."""
        return tuple(getattr(self.dense_arch, "branches", ()))

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: "KeyedJaggedTensor",
        weighted_features: "KeyedJaggedTensor | None" = None,
    ) -> ModelOutput:
        """Map a batch to latents, branch logits and the fused logit."""
        return self.dense_arch(self.sparse_arch(dense_features, sparse_features, weighted_features))


def dense_arch_of(module: nn.Module) -> Any:
    """The dense arch of the model inside of a module."""
    return next(each.dense_arch for each in module.modules() if isinstance(each, Model))
