"""Adam on whole tensors: for the dense part, and for tables that every rank holds whole, over the memory that they share.

TorchRec keeps the rows of a group of replicated tables in one tensor with one gradient, and gives out a parameter a table: a view
that looks its gradient up at each use. Adam works element by element, so it can update the one tensor; only its state is
given out by table, as views, which is what checkpoints read and write.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class WholeAdam(torch.optim.Adam):
    """torch's fused Adam without what it does in Python around it, on parameters some of which may be views of one tensor.

    Fused Adam makes one pass over parameters and moments, on a CPU 5 times as fast as one operation after another. Parameters that
    TorchRec cut from one tensor are recognised, and updated as one where they cover it. Options are lr, eps, weight_decay and
    decoupled_weight_decay; torch.optim.Adam's others keep their defaults.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self.buckets = [buckets_of(group["params"]) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; those of parts are forgotten where they are used."""
        for bucket in chain.from_iterable(self.buckets):
            for whole in bucket.tensors:  # torch's own would look up the gradient of every part
                whole.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None
        for group, buckets in zip(self.param_groups, self.buckets, strict=True):
            for bucket in buckets:
                if not bucket.exp_avgs:
                    self.state.update(bucket.make_state())
                bucket.update(group)


class Bucket:
    """Tensors of one device and dtype that one call of fused Adam updates, with their moments and step counts.

    `wholes` gives each tensor and the parameters that it is made of; itself alone where it is not cut.
    """

    def __init__(self, wholes: Sequence[tuple[Tensor, list[nn.Parameter]]]) -> None:
        self.tensors = [whole for whole, _ in wholes]
        self.parts = [parts for _, parts in wholes]
        self.exp_avgs: list[Tensor] = []  # moments of each tensor; none before the first step
        self.exp_avg_sqs: list[Tensor] = []
        # steps that each tensor has made, float32
        self.counts = torch.zeros(len(wholes), device=self.tensors[0].device)
        self.each_count = self.counts.unbind()

    def make_state(self) -> dict[Any, dict[str, Tensor]]:
        """Make the moments, and cut them for the parameters: parameter -> its state, as torch's Adam names it."""
        self.exp_avgs = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.exp_avg_sqs = [torch.zeros_like(tensor) for tensor in self.tensors]
        state: dict[Any, dict[str, Tensor]] = {}
        each = zip(self.tensors, self.parts, self.exp_avgs, self.exp_avg_sqs, self.each_count, strict=True)
        for whole, parts, exp_avg, exp_avg_sq, count in each:
            for part in parts:
                cut = {"exp_avg": cut_as(part, whole, exp_avg), "exp_avg_sq": cut_as(part, whole, exp_avg_sq)}
                state[part] = {"step": count} | cut
        return state

    def update(self, group: Mapping[str, Any]) -> None:
        """Make a step with the rates of a group of parameters, for those tensors that have a gradient."""
        grads = map(gradient_of, self.tensors, self.parts)
        found = {place: grad for place, grad in enumerate(grads) if grad is not None}
        if not found:
            return
        if len(found) == len(self.tensors):
            self.counts += 1  # of all at once
        else:
            for place in found:
                self.each_count[place].add_(1)

        def own(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensors[place] for place in found]

        beta1, beta2 = group["betas"]
        fused_adam = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        fused_adam(
            own(self.tensors), list(found.values()), own(self.exp_avgs), own(self.exp_avg_sqs), [], own(self.each_count),
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip


def buckets_of(params: list[nn.Parameter]) -> list[Bucket]:
    """Sort the tensors that parameters were cut from by device and dtype."""
    alike: dict[Any, list[tuple[Tensor, list[nn.Parameter]]]] = {}
    for whole, parts in wholes_of(params):
        alike.setdefault((whole.device, whole.dtype), []).append((whole, parts))
    return [Bucket(wholes) for wholes in alike.values()]


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
    """The gradient of a tensor: its own, or that which was given to its parts, as TorchRec does to make state; they lose it."""
    if whole.grad is not None or parts[0] is whole:
        return whole.grad
    grads = [part.grad for part in parts]
    if any(grad is None for grad in grads):
        return None
    for part in parts:
        part.grad = None
    ordered = sorted(zip(parts, grads, strict=True), key=lambda pair: pair[0].storage_offset())
    return torch.cat([grad.reshape(-1) for _, grad in ordered])  # type: ignore[union-attr]


def cut_as(part: nn.Parameter, whole: Tensor, moment: Tensor) -> Tensor:
    """The view of a moment, contiguous and of the shape of `whole`, that `part` is of `whole`."""
    return moment.as_strided(part.shape, part.stride(), part.storage_offset() - whole.storage_offset())
