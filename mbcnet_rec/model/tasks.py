"""Several labels: the loss as a sum over tasks, each of the rows that have its label, and the parts of dense arches that end in tasks.

Shapes: B batch, T tasks, K branches. A model of several labels returns fused logits (B, T) and branch logits (K, B, T); labels are (B, T),
NaN where a row has none.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mbcnet_rec.model.kinds import ModelOutput
from mbcnet_rec.model.layers import MLP, Logit, Regularisation, without_autocast
from mbcnet_rec.model.losses import at_least_float32, weighted_bce
from mbcnet_rec.model.objective import LossArch, Outputs, warm

Targets = Callable[[Tensor], Tensor]  # labels (B, labels) -> what each task learns (B, T)


class TaskLosses(LossArch):
    """L = sum_t w_t (BCE_t + alpha L_BCT,t) + beta L_MDR: Eq. 16 and 17 with the first two terms of each task.

    BCE_t and the co-teaching of task t are those of the rows that have its label: the mean is over these, so that a step equals one
    of a log that holds no other rows, and the others neither agree nor disagree. The latents are those of all tasks.

    Args:
        plain: the loss of one label, whose parts it takes over.
        tasks: name -> w_t; a task of weight 0 is scored, but not learned.
        targets: makes what the tasks learn of the labels; None: they are the labels.
    """

    def __init__(self, plain: LossArch, tasks: Mapping[str, float], targets: Targets | None) -> None:
        super().__init__(plain.coteaching, plain.differentiation, plain.transforms, plain.mean_over_ranks[0])
        self.tasks, self._targets = dict(tasks), (targets,)

    def forward(self, output: ModelOutput, labels: Tensor, weights: Tensor) -> tuple[Tensor, Outputs]:
        """Map a model's output, labels (B, labels) and weights (B,) to () loss and what to log: logits (B, T (1 + K)), task by task."""
        labels = labels if self._targets[0] is None else self._targets[0](labels)
        terms: dict[str, Tensor] = {}
        with without_autocast(labels.device.type):
            parts = torch.cat([output.fused_logits.unsqueeze(0), output.branch_logits])
            logits = at_least_float32(parts).permute(2, 0, 1)  # (T, 1 + K, B)
            known = labels.isfinite()
            own = self._weights(known, weights)
            targets = labels.masked_fill(~known, 0.0)
            bce, coteaching = weights.new_zeros(()), weights.new_zeros(())
            for place, (task, weight) in enumerate(self.tasks.items()):
                if weight:
                    of_task = targets[:, place], own[:, place]
                    terms[f"bce/{task}"] = weighted_bce(logits[place], *of_task).sum()
                    terms[f"coteaching_loss/{task}"] = self.coteaching_loss(logits[place, 1:], *of_task)
                    bce = bce + weight * terms[f"bce/{task}"]
                    coteaching = coteaching + weight * terms[f"coteaching_loss/{task}"]
            matrices = None if self.transforms is None else self.transforms()
            differentiation = self.differentiation_loss(output.latents, matrices, weights)
            loss = bce + warm(self.coteaching, self.step) * coteaching
            loss = loss + warm(self.differentiation, self.step) * differentiation
            norms, distance = self.measured(output.latents, matrices, weights)
        if self.training:
            self.step.add_(1)
        whole = {"loss": loss, "bce": bce, "coteaching_loss": coteaching, "differentiation_loss": differentiation}
        detached = {name: term.detach() for name, term in (whole | terms).items()}
        return loss, Outputs(logits.detach().flatten(0, 1).t(), labels, weights, detached, distance, norms)

    def _weights(self, known: Tensor, weights: Tensor) -> Tensor:
        """Each row's weight in each task (B, T): 0 without its label, and so much more with it that a mean over B is one over those rows."""
        real = (weights > 0).unsqueeze(1)
        counts = torch.cat([real, known & real], dim=1).to(weights.dtype).sum(0)
        counts = self.mean_over_ranks[0](counts)
        share = counts[1:] / counts[0]
        return torch.where(known, weights.unsqueeze(1) / torch.where(share > 0, share, 1.0), 0.0)


class Tower(nn.Sequential):
    """logit = w MLP(h) + b of one task: (B, n) -> (B,)."""

    def __init__(self, in_features: int, hidden: Sequence[int], regularisation: Regularisation) -> None:
        super().__init__(MLP(in_features, hidden, regularisation), Logit((in_features, *hidden)[-1]))


class Towers(nn.ModuleList):
    """A tower for each task, each with an input of its own: T times (B, n) -> (B, T), or (B,) of a single one."""

    def __init__(self, num_tasks: int, in_features: int, hidden: Sequence[int], config: Regularisation) -> None:
        super().__init__(Tower(in_features, hidden, config) for _ in range(num_tasks))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map one input for each task to the logits."""
        found = [tower(x) for tower, x in zip(self, inputs, strict=True)]
        return torch.stack(found, dim=-1) if len(found) > 1 else found[0]


class Gate(nn.Module):
    """sum_e g_e expert_e, g = softmax(G MLP(x) + c): (B, n), (B, E, m) -> (B, m)."""

    def __init__(self, in_features: int, num_experts: int, hidden: Sequence[int], config: Regularisation) -> None:
        super().__init__()
        width = (in_features, *hidden)[-1]
        self.scores = nn.Sequential(MLP(in_features, hidden, config), nn.Linear(width, num_experts))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Mix the experts."""
        return (torch.softmax(self.scores(x), dim=1).unsqueeze(2) * experts).sum(1)
