"""The dense arch as CUDA graphs: its kernels at one batch size, launched at once, forwards and backwards."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from data.errors import InputError
from mbcnet_rec.model.kinds import ModelOutput, dense_arch_of
from mbcnet_rec.model.layers import without_autocast


def replay_dense_arch(model: nn.Module) -> None:
    """Let the dense arch of a model on a GPU run as CUDA graphs from now on; parameters and their names stay.

    Raises:
        InputError: it has dropout.
    """
    arch = dense_arch_of(model)
    if any(isinstance(module, nn.Dropout) for module in arch.modules()):
        raise InputError(
            "train.cuda_graph = true: this model has dropout, and a graph that draws random numbers has not been shown to draw a plain step's; "
            "set the model's dropout to 0, or use --set train.cuda_graph=false"
        )
    arch.forward = Replayed(arch)


class Replayed:
    """A dense arch's forward pass, features -> ModelOutput, by CUDA graphs of training and of evaluation.

    They are captured at the second batch of each, when libraries have made their handles, and again where a batch is larger; a smaller one
    takes the plain path. Parameters and buffers are read where they were at the capture: optimizers and loads write into them.
    """

    def __init__(self, arch: nn.Module) -> None:
        self._arch, self._plain = arch, arch.forward
        self._captured: dict[tuple[bool, ...], Captured | None] = {}

    def __call__(self, features: Mapping[str, Tensor]) -> ModelOutput:
        """Map what the arch maps."""
        if torch.cuda.is_current_stream_capturing():
            return self._plain(features)
        first = next(iter(features.values()))
        mode = (self._arch.training, torch.is_grad_enabled(), torch.is_autocast_enabled(first.device.type))
        if mode not in self._captured:
            self._captured[mode] = None
            return self._plain(features)
        captured = self._captured[mode]
        if captured is None or len(first) > captured.rows:
            self._captured[mode] = None  # its memory first
            captured = self._captured[mode] = Captured(self._arch, features)
        if len(first) < captured.rows:
            return self._plain(features)
        return ModelOutput(*_Replay.apply(captured, *features.values(), *self._arch.parameters()))


class Captured:
    """Graphs of one batch size, and what they read and write: inputs and outputs, and gradients of both, those of parameters after inputs'."""

    def __init__(self, arch: nn.Module, features: Mapping[str, Tensor]) -> None:
        self.inputs = {key: each.detach().clone().requires_grad_(each.requires_grad) for key, each in features.items()}
        # not the parameters themselves: a kept loss, or DDP, may hold their nodes of autograd, which belong to a stream that no capture may wait for
        leaves = {name: each.detach().requires_grad_(each.requires_grad) for name, each in arch.named_parameters()}
        sources = [*self.inputs.values(), *leaves.values()]
        self.rows, kind = len(sources[0]), sources[0].device.type
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the thread that reads ahead may lock memory meanwhile
        capture = partial(torch.cuda.graph, pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # without a cache: each replay rounds the weights of then
        with torch.autocast(kind, dtype, enabled, cache_enabled=False), capture(self.forward):
            outputs = functional_call(arch, leaves, (self.inputs,))
        self.outputs = [each.detach() for each in outputs]
        self.output_grads = [torch.zeros_like(each) if each.requires_grad else None for each in outputs]
        if torch.is_grad_enabled():
            ends = [each for each in outputs if each.requires_grad]
            starts = [each for each in self.output_grads if each is not None]
            wanted = [each for each in sources if each.requires_grad]
            with without_autocast(kind), capture(self.backward):
                found = iter(torch.autograd.grad(ends, wanted, starts, allow_unused=True))
            self.input_grads = [next(found) if each.requires_grad else None for each in sources]


class _Replay(torch.autograd.Function):
    """One node of autograd for the whole arch. What is kept of it is copied: the next replay writes where this one did."""

    @staticmethod
    def forward(ctx: Any, captured: Captured, *sources: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(captured.inputs.values(), sources, strict=False):  # parameters are where they were
            own.copy_(given)
        captured.forward.replay()
        ctx.captured = captured
        ctx.set_materialize_grads(False)
        outputs = tuple(each.clone() for each in captured.outputs)
        pairs = zip(outputs, captured.output_grads, strict=True)
        ctx.mark_non_differentiable(*(each for each, grad in pairs if grad is None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for own, given in zip(ctx.captured.output_grads, grads, strict=True):
            if own is not None:
                own.zero_() if given is None else own.copy_(given)
        ctx.captured.backward.replay()
        return (None, *ctx.captured.input_grads)  # held here too, so autograd copies what it keeps
