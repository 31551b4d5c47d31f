"""Parts of a dense arch that do not depend on each other, at the same time on a GPU. Shapes: B batch, n parts, w width."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def side_by_side(device: torch.device, *parts: Callable[[], Tensor]) -> list[Tensor]:
    """Call each part; in a CUDA graph without gradients on CUDA streams of their own, for which the caller's waits. They read its tensors only.

    Elsewhere one follows the other: launched one by one, streams were seen to cost an evaluation on an H200 a fifth of its rate.
    """
    plain = device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling() or len(parts) == 1
    if plain or not torch.cuda.is_current_stream_capturing():
        return [part() for part in parts]
    current, results = torch.cuda.current_stream(device), []
    own = [_stream(device, place) for place in range(len(parts))]
    try:
        for part, stream in zip(parts, own, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(part())
    finally:  # after an error too, since what the parts read may be freed then
        for stream in own:
            current.wait_stream(stream)
    for result in results:
        result.record_stream(current)  # or its own could reuse the memory before it is read
    return results


@cache  # the allocator keeps memory for each CUDA stream: a new one at each call would have none
def _stream(device: torch.device, place: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def grouped_product(mlps: Sequence[Any], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Map n tensors (B, w) through n MLPs of equal widths, each layer one batched product: n tensors (B, hidden[-1]). Not for batch norm."""
    if len(mlps) == 1:
        return [mlps[0](inputs[0])]
    x = torch.stack(list(inputs))  # (n, B, w)
    for layers in zip(*mlps, strict=True):
        if isinstance(layers[0], nn.Linear):
            weights, biases = torch.stack([each.weight for each in layers]), torch.stack([each.bias for each in layers])
            x = torch.baddbmm(biases.unsqueeze(1), x, weights.transpose(1, 2))
        else:
            x = layers[0](x)  # ReLU and dropout: element by element
    return x.unbind()
