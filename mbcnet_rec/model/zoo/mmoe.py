"""MMoE (Ma et al., 2018), the paper's MMOE+. Shapes: B batch, N flattened width of all fields, E experts, T tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, each_label, logits_only
from mbcnet_rec.model.layers import MLP, Logit, Regularisation
from mbcnet_rec.model.side_by_side import side_by_side
from mbcnet_rec.model.tasks import Gate, Towers
from mbcnet_rec.model.zoo.dnn import as_deep


@dataclass(frozen=True)
class MMoEConfig(Regularisation):
    """Gated experts with a gate and a tower for each label; with those of a single one, the paper's MMOE+.

    Attributes:
        num_experts: E.
        expert, gate, tower: widths of each expert, of a gate before its softmax layer, and of a tower.
    """

    num_experts: int = bounded(4, at_least=1)
    expert: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)
    gate: tuple[int, ...] = bounded((128, 64), at_least=1)
    tower: tuple[int, ...] = bounded((128, 64), at_least=1)


class MMoEArch(nn.Module):
    """logit_t = w_t tower_t(sum_e g_te(e) expert_e(e)) + b_t, g_t = softmax(G_t gate_t(e) + c_t) (Ma et al., 2018, Eq. 5 to 7)."""

    def __init__(self, config: MMoEConfig, layout: InputLayout) -> None:
        super().__init__()
        width = layout.width()
        self.experts = nn.ModuleList(MLP(width, config.expert, config) for _ in range(config.num_experts))
        if layout.num_tasks > 1:
            gates = (Gate(width, config.num_experts, config.gate, config) for _ in layout.tasks)
            self.gates = nn.ModuleList(gates)
            self.towers = Towers(layout.num_tasks, config.expert[-1], config.tower, config)
            return
        gate_width = (width, *config.gate)[-1]
        self.gate = nn.Sequential(MLP(width, config.gate, config), nn.Linear(gate_width, config.num_experts))
        self.tower = MLP(config.expert[-1], config.tower, config)
        self.logit = Logit((config.expert[-1], *config.tower)[-1])

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        x = features[ALL]
        if hasattr(self, "towers"):
            of_experts = side_by_side(x.device, *(partial(expert, x) for expert in self.experts))
            mixed = torch.stack(of_experts, dim=1)  # (B, E, width)
            return logits_only(self.towers([gate(x, mixed) for gate in self.gates]))
        # (B, E) and E times (B, width)
        gates, *experts = side_by_side(
            x.device, lambda: torch.softmax(self.gate(x), dim=1), *(partial(expert, x) for expert in self.experts)
        )
        mixed = (gates.unsqueeze(2) * torch.stack(experts, dim=1)).sum(1)
        return logits_only(self.logit(self.tower(mixed)))


MODEL = ModelKind(
    "mmoe", MMoEConfig, MMoEArch, tasks=each_label,
    widths=lambda ours: {"expert": as_deep(ours)["hidden"], "gate": ours.top, "tower": ours.top, "dropout": ours.dropout},
)  # fmt: skip
