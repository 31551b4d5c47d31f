"""EnKD (Zhu et al., CIKM 2020): several trained teachers, a gate that weighs them row by row, a student DNN.

The teachers' logits come from outside; who trains and runs the teachers is not the model's business.

Shapes: B batch, T teachers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from mbcnet_rec.model.baselines import DNNConfig
from mbcnet_rec.model.losses import at_least_float32, check_at_least_zero, weighted_bce


@dataclass(frozen=True)
class EnKDConfig(DNNConfig):
    """The student and its distillation.

    Attributes:
        hidden, batch_norm, dropout: of the student, a DNN.
        temperature: tau, divides teachers' and student's logits in the soft-label term.
        soft_weight: of the soft-label term.
    """

    temperature: float = 2.0
    soft_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        check_at_least_zero(soft_weight=self.soft_weight)
        if not self.temperature > 0:
            raise InputError(f"temperature = {self.temperature}: wanted a number above 0; raise it")


class TeacherGate(nn.Module):
    """g = softmax(G z + c) over the teachers, z their logits on a row; uniform at first."""

    def __init__(self, num_teachers: int) -> None:
        super().__init__()
        self.scores = nn.Linear(num_teachers, num_teachers)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)

    def forward(self, teacher_logits: Tensor) -> Tensor:
        """Map (T, B) to (T, B); columns sum to 1."""
        return torch.softmax(self.scores(teacher_logits.t()), dim=1).t()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    gates: Tensor,
    soft_weight: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Teach a student by labels and by teachers, and the gate by labels.

        L = BCE(z_s, y) + lambda mean_b sum_t SG(g_t) CE(sigmoid(z_t / tau), sigmoid(z_s / tau))
          + BCE(sum_t g_t z_t, y)

    CE(p, q) = -p log q - (1 - p) log(1 - q). The last term is our reading of how a gate over teachers is
    learned: driven by the soft-label term it would favour the teacher that the student already resembles, so
    there its gradient is stopped, and it learns to mix the teachers well instead. Teachers get no gradient.

    Args:
        student_logits: (B,).
        teacher_logits: (T, B).
        labels: (B,) of 0 and 1.
        temperature: tau.
        gates: (T, B), of a TeacherGate; columns sum to 1.
        soft_weight: lambda.
        weights: (B,) row weights of every mean.

    Returns:
        () loss in float32 or float64.
    """
    student, teachers = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    gates = at_least_float32(gates)
    q, p = student / temperature, torch.sigmoid(teachers / temperature)  # (B,), (T, B)
    soft = (gates.detach() * (p * F.softplus(-q) + (1.0 - p) * F.softplus(q))).sum(0)  # (B,)
    soft_label = (soft if weights is None else soft * weights).mean()
    mixture = weighted_bce((gates * teachers).sum(0), labels, weights)
    return weighted_bce(student, labels, weights) + soft_weight * soft_label + mixture
