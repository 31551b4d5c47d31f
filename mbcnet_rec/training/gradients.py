"""How the gradient is spread over branches: a diagnostic of the dense part after backward."""

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mbcnet_rec.model.kinds import dense_arch_of


def branch_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Branch -> its own parameters, without the shared top and the tables; empty for a model without branches."""
    branches = getattr(dense_arch_of(model), "branches", nn.ModuleDict())
    return {name: list(branch.parameters()) for name, branch in branches.items()}


def gradient_shares(branches: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """Share of each branch in the sum of the branches' gradient norms: s_k = ||g_k|| / sum_j ||g_j||; 0 where all are 0.

    Gradients are those after the average over ranks, so shares are equal on all ranks; a clip by the total norm leaves them.
    """
    norms = {
        name: get_total_norm([each.grad for each in parameters if each.grad is not None], foreach=True)
        for name, parameters in branches.items()
        if any(each.grad is not None for each in parameters)
    }
    if not norms:
        return {}
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}
