"""PLE (Tang et al., 2020): experts of each task and shared ones. Shapes: B batch, N flattened width of all fields, T tasks, E experts, n width."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.schema.bounds import bounded
from mbcnet_rec.model.input_layout import ALL, InputLayout
from mbcnet_rec.model.kinds import ModelKind, ModelOutput, each_label, logits_only
from mbcnet_rec.model.layers import MLP, Regularisation
from mbcnet_rec.model.tasks import Gate, Towers


@dataclass(frozen=True)
class PLEConfig(Regularisation):
    """Progressive layered extraction.

    Attributes:
        levels: extraction networks in a row; a single one is CGC.
        own_experts, shared_experts: of each task, and of all, in each level.
        expert, gate, tower: widths of each expert, of a gate before its softmax layer, and of a tower.
    """

    levels: int = bounded(1, at_least=1)
    own_experts: int = bounded(2, at_least=1)
    shared_experts: int = bounded(2, at_least=1)
    expert: tuple[int, ...] = bounded((512, 256, 128), at_least=1, min_length=1)
    gate: tuple[int, ...] = bounded((), at_least=1)
    tower: tuple[int, ...] = bounded((128, 64), at_least=1)


class Extraction(nn.Module):
    """g_t = sum of the experts of task t and the shared ones by a gate of its own (Tang et al., 2020, Eq. 1 to 5); then the shared ones by all."""

    def __init__(self, config: PLEConfig, width: int, num_tasks: int, *, is_last: bool) -> None:
        super().__init__()
        sizes = [config.own_experts] * num_tasks + [config.shared_experts]
        self.experts = nn.ModuleList(
            nn.ModuleList(MLP(width, config.expert, config) for _ in range(size)) for size in sizes
        )
        mixed = [config.own_experts + config.shared_experts] * num_tasks + ([] if is_last else [sum(sizes)])
        self.gates = nn.ModuleList(Gate(width, size, config.gate, config) for size in mixed)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Map the inputs of the tasks and of the shared experts, T + 1 times (B, n), to as many outputs, or T of the last level."""
        found = [
            torch.stack([expert(x) for expert in own.children()], dim=1)
            for own, x in zip(self.experts, inputs, strict=True)
        ]  # (B, E, n) each
        mixtures = [torch.cat([own, found[-1]], dim=1) for own in found[:-1]] + [torch.cat(found, dim=1)]
        return [gate(x, mixture) for gate, x, mixture in zip(self.gates, inputs, mixtures, strict=False)]


class PLEArch(nn.Module):
    """logit_t = w_t tower_t(g_t) + b_t, g_t what the last level extracts for task t."""

    def __init__(self, config: PLEConfig, layout: InputLayout) -> None:
        super().__init__()
        num_tasks = layout.num_tasks
        widths = [layout.width(), *[config.expert[-1]] * (config.levels - 1)]
        self.levels = nn.ModuleList(
            Extraction(config, width, num_tasks, is_last=level == config.levels - 1)
            for level, width in enumerate(widths)
        )
        self.towers = Towers(layout.num_tasks, config.expert[-1], config.tower, config)

    def forward(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map "all" (B, N) to the logits."""
        inputs = [features[ALL]] * (len(self.towers) + 1)
        for level in self.levels:
            inputs = level(inputs)
        return logits_only(self.towers(inputs))


MODEL = ModelKind("ple", PLEConfig, PLEArch, "PLE", tasks=each_label)
