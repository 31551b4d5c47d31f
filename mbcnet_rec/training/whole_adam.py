"""Adam on whole tensors: for the dense part, and for tables that every rank holds whole, over the memory that they share.

TorchRec keeps the rows of a group of replicated tables in one tensor with one gradient, and gives out a parameter a table: a view
that looks its gradient up at each use. Adam is the same number by number, so it can move the one tensor; only its state is
given out by table, as views, which is what checkpoints read and write.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class WholeAdam(torch.optim.Adam):
    """torch's fused Adam with less of Python around it, on parameters some of which may be views of one tensor.

    fused: one pass over parameters and moments, on a CPU 5 times as fast as one operation after another.

    Args:
        params: of nn.Parameter; those that TorchRec cut from one tensor are found by themselves, and move as one where they cover it.
        options: lr, eps, weight_decay and decoupled_weight_decay of torch.optim.Adam; its other options keep their defaults.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self._moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._wholes = [wholes_of(group["params"]) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for param in group["params"]:  # torch's own would look every gradient up first
                param.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every tensor that has a gradient."""
        assert closure is None
        for group, wholes in zip(self.param_groups, self._wholes, strict=True):
            moving = [
                (whole, grad, *self._moments_of(whole, parts))
                for whole, parts in wholes
                if (grad := gradient_of(whole, parts)) is not None
            ]
            if moving:
                tensors, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*moving, strict=True))
                beta1, beta2 = group["betas"]
                said = {key: group[key] for key in ("lr", "eps", "weight_decay", "decoupled_weight_decay")}
                adam(
                    tensors, grads, exp_avgs, exp_avg_sqs, [], steps,
                    beta1=beta1, beta2=beta2, fused=True, amsgrad=False, maximize=False, **said,
                )  # fmt: skip

    def _moments_of(self, whole: Tensor, parts: list[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        """Both moments and the number of steps, made at the first call and given out to the parts."""
        if id(whole) not in self._moments:
            exp_avg, exp_avg_sq = torch.zeros_like(whole), torch.zeros_like(whole)
            step = torch.zeros((), dtype=torch.float32, device=whole.device)
            self._moments[id(whole)] = exp_avg, exp_avg_sq, step
            for part in parts:
                cut = {"exp_avg": cut_as(part, whole, exp_avg), "exp_avg_sq": cut_as(part, whole, exp_avg_sq)}
                self.state[part] = {"step": step} | cut
        return self._moments[id(whole)]


def wholes_of(params: list[nn.Parameter]) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """Tensors and the parameters that were cut from each; a parameter that was not, or not with all others, stands for itself."""
    by_whole: dict[int, tuple[Tensor, list[nn.Parameter]]] = {}
    for param in params:
        whole = getattr(param, "_original_tensor", param)
        by_whole.setdefault(id(whole), (whole, []))[1].append(param)
    wholes: list[tuple[Tensor, list[nn.Parameter]]] = []
    for whole, parts in by_whole.values():
        covered = sum(part.numel() for part in parts) == whole.numel()
        wholes += [(whole, parts)] if covered else [(part, [part]) for part in parts]
    return wholes


def gradient_of(whole: Tensor, parts: list[nn.Parameter]) -> Tensor | None:
    """The gradient of a tensor: its own, or that which was given to its parts, as TorchRec does to make state."""
    if whole.grad is not None or parts[0] is whole:
        return whole.grad
    grads = [part.grad for part in parts]
    if any(grad is None for grad in grads):
        return None
    ordered = sorted(zip(parts, grads, strict=True), key=lambda pair: pair[0].storage_offset())
    return torch.cat([grad.reshape(-1) for _, grad in ordered])  # type: ignore[union-attr]


def cut_as(part: nn.Parameter, whole: Tensor, moment: Tensor) -> Tensor:
    """The view of a moment, contiguous and of the shape of `whole`, that `part` is of `whole`."""
    return moment.as_strided(part.shape, part.stride(), part.storage_offset() - whole.storage_offset())
