"""Shared bottom (Caruana, 1997): one network under a tower for each label. Shapes: B batch, N flattened width of all fields, T tasks."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, each_label, logits_only
from mbcnet_rec.model.layers import MLP, Regularisation
from mbcnet_rec.model.tasks import Towers


@dataclass(frozen=True)
class SharedBottomConfig(Regularisation):
    """Widths of the shared network, `bottom`, and of each task's `tower`."""

    bottom: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)
    tower: tuple[int, ...] = bounded((128, 64), at_least=1)


class SharedBottomArch(nn.Module):
    """logit_t = w_t tower_t(MLP(e)) + b_t."""

    def __init__(self, config: SharedBottomConfig, layout: InputLayout) -> None:
        super().__init__()
        self.bottom = MLP(layout.width(), config.bottom, config)
        self.towers = Towers(layout.num_tasks, config.bottom[-1], config.tower, config)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        return logits_only(self.towers([self.bottom(features[ALL])] * len(self.towers)))


MODEL = ModelKind("shared_bottom", SharedBottomConfig, SharedBottomArch, tasks=each_label)
