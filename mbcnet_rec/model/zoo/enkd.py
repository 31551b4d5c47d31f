"""Distillation of several trained teachers into a student DNN, in the spirit of EnKD (Zhu et al., CIKM 2020).

MBCnet's paper, our source, says of EnKD no more than that it distils an ensemble into a light student. Which teachers there are, the gate
that weighs them row by row and the loss are our reading. The teachers' logits come from outside, as the last T columns of a training
batch's dense features; who trains and runs the teachers is not the model's business.

Shapes: B batch, T teachers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from data.schema.bounds import bounded
from mbcnet_rec.model.kinds import Model, ModelKind, ModelOutput
from mbcnet_rec.model.layers import without_autocast
from mbcnet_rec.model.losses import MeanOverRanks, at_least_float32, identity, row_mean, weighted_bce
from mbcnet_rec.model.objective import Objective, Outputs, Rows
from mbcnet_rec.model.zoo.dnn import DNNArch, DNNConfig, as_deep

TEACHERS = ("dcnv2", "crossnet", "wide_deep")  # ours; other baselines of the paper's Table 3


@dataclass(frozen=True)
class EnKDConfig(DNNConfig):
    """The student and its distillation.

    Attributes:
        hidden, batch_norm, dropout: of the student, a DNN.
        temperature: tau, divides teachers' and student's logits in the soft-label term.
        soft_weight: of the soft-label term.
        teachers: kinds of models that are trained first.
    """

    temperature: float = bounded(2.0, above=0)
    soft_weight: float = bounded(1.0, at_least=0)
    teachers: tuple[str, ...] = TEACHERS

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        if not self.teachers or "enkd" in self.teachers or len(set(self.teachers)) != len(self.teachers):
            raise InputError(
                f"teachers = {list(self.teachers)}: wanted one or more other kinds of models, none twice; change the list"
            )


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
    """
    student, teachers = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    gates = at_least_float32(gates)
    q, p = student / temperature, torch.sigmoid(teachers / temperature)  # (B,), (T, B)
    soft = (gates.detach() * (p * F.softplus(-q) + (1.0 - p) * F.softplus(q))).sum(0)  # (B,)
    mixture = weighted_bce((gates * teachers).sum(0), labels, weights)
    return weighted_bce(student, labels, weights) + soft_weight * row_mean(soft, weights) + mixture


class DistillationObjective(Objective):
    """Batch -> (loss, Outputs) of a student: in training its dense features end with the teachers' T logits, which it does not read."""

    def __init__(self, model: Model, config: EnKDConfig, mean_over_ranks: MeanOverRanks = identity) -> None:
        super().__init__(model)
        self.losses = DistillationArch(config)

    def forward(self, batch: Rows) -> tuple[Tensor, Outputs]:
        """Compute the loss of one batch."""
        output = self.model(batch.dense_features, batch.sparse_features, batch.weighted_features)
        return self.losses(output, batch.labels, batch.weights, batch.dense_features)


class DistillationArch(nn.Module):
    """`distillation_loss` in training, plain BCE in evaluation, where no teacher is at hand."""

    def __init__(self, config: EnKDConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = TeacherGate(len(config.teachers))

    def forward(
        self, output: ModelOutput, labels: Tensor, weights: Tensor, dense_features: Tensor
    ) -> tuple[Tensor, Outputs]:
        """Map a student's outputs (B,), and in training (B, D + T) dense features, to () loss and what to log."""
        with without_autocast(labels.device.type):
            student = at_least_float32(output.fused_logits)
            bce = weighted_bce(student, labels, weights)
            loss = bce
            if self.training:
                teachers = dense_features[:, -len(self.config.teachers) :].t()
                loss = distillation_loss(
                    student,
                    teachers,
                    labels,
                    temperature=self.config.temperature,
                    gates=self.gate(teachers),
                    soft_weight=self.config.soft_weight,
                    weights=weights,
                )
        nothing = bce.new_zeros(())
        terms = {"loss": loss, "bce": bce, "coteaching_loss": nothing, "differentiation_loss": nothing}
        detached = {name: term.detach() for name, term in (terms | {"distillation_loss": loss - bce}).items()}
        unmeasured = bce.new_empty(0)
        return loss, Outputs(student.detach().unsqueeze(1), labels, weights, detached, unmeasured, unmeasured)


MODEL = ModelKind("enkd", EnKDConfig, DNNArch, objective=DistillationObjective, widths=as_deep)
