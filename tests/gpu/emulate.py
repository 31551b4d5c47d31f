"""The numbers of the stub's device: what its kernels would have written, a CPU computes over the same memory.

An operator on the device's tensors runs first as it is, with all of torch's and FBGEMM's host code up to the launch of a kernel that does
nothing; then a CPU's operator of the same name writes the result where the kernel would have. So shapes, dtypes, devices and arguments are
checked by the CUDA code, and values are a CPU's.
"""

import ctypes
import os
import re
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from fake_gpu import on_a_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# what goes between processes is done by the stub of NCCL itself
PASSED = ("c10d", "_c10d_functional", "profiler", "prim", "inductor")
# memory and its shape alone
SHAPES = re.compile(
    r"aten::(empty\w*|new_empty\w*|set_|resize_\w*|_resize_output_|record_stream|_pin_memory|is_pinned)$"
)
# CUDA's own code would read from the device how large the result is, which no kernel has written
SIZED = re.compile(
    r"aten::(_local_scalar_dense|nonzero|masked_select|masked_scatter_|equal|is_nonzero|_unique2|unique_dim|unique_consecutive|bincount|"
    r"repeat_interleave|linalg_matrix_exp|_assert_async)$"
)
INDEXED = re.compile(r"aten::_?(index|index_put|index_put_impl|unsafe_index)_?$")
DENSE_FORWARD = re.compile(r"fbgemm::dense_embedding_codegen_forward_(un)?weighted_cuda$")
DENSE_BACKWARD = re.compile(r"fbgemm::(split|dense)_embedding_backward_codegen_(dense_)?(un)?weighted_exact_cuda$")
# nothing is written for these: the cache of a table, behind which rows are read, and a gradient of the ids' weights, which are data
UNUSED = re.compile(
    r"fbgemm::((lru_|lfu_|lxu_|linearize_|get_unique_|direct_mapped_)\w+|dense_embedding_codegen_grad_indice_weights_cuda)$"
)
STUB = ctypes.CDLL(os.environ["STUB_LIBRARY"])
NAN_BYTES = 0xFF


def host(value: Any) -> Any:
    """A CPU's tensor over the memory of the device's; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty(value.shape, dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    over = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(over, value.storage_offset(), value.size(), value.stride())


def moved(value: Any) -> Any:
    """A copy on the device of a CPU's result."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    host(copy).copy_(value)
    return copy


class Emulated(TorchDispatchMode):
    """Operators on tensors of the device, or that make them, have a CPU's numbers."""

    captured: list[Callable[[], None]] | None = None  # what a graph that is being captured replays

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, schema = func._schema.name, func._schema
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        there = made_there or any(
            isinstance(each, torch.Tensor) and each.is_cuda for each in tree_leaves((args, kwargs))
        )
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in schema.arguments)
        views = any(each.alias_info is not None for each in schema.returns)
        if not there or func.namespace in PASSED or SHAPES.match(name) or UNUSED.match(name) or (views and not writes):
            return func(*args, **kwargs)
        if SIZED.match(name) or (INDEXED.match(name) and any(is_mask(each) for each in args[1])):
            if Emulated.captured is not None:
                raise RuntimeError(f"{name}: the host waits for the device while a graph is captured")
            out = func(*on_host(args), **on_host(kwargs))
            return args[0] if writes else tree_map(moved, out)
        if func.namespace == "fbgemm":
            return self._of_fbgemm(func, name, args, kwargs, writes)
        out = func(*args, **kwargs)
        fill(out, lambda: func(*on_host(args), **on_host(kwargs)), name)
        return out

    def _of_fbgemm(self, func: Any, name: str, args: Any, kwargs: Any, writes: bool) -> Any:
        """Table kernels by FBGEMM's own for a CPU, which take other arguments, or written out here; the rest as any operator.

        FBGEMM's code may read from the device what a kernel would have written there: it reads 0.
        """
        STUB.stub_fill(0)
        try:
            real = func(*args, **kwargs)
        finally:
            STUB.stub_fill(NAN_BYTES)
        given = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | kwargs
        if DENSE_FORWARD.match(name):
            fill(real, lambda: pooled(on_host(given)), name)
        elif DENSE_BACKWARD.match(name):
            fill(real, lambda: gradient_of_rows(on_host(given)), name)
        elif "_codegen_" in name:
            fill(real, lambda: on_a_cpu(func, on_host(args), on_host(kwargs)), name)
        else:
            result = func(*on_host(args), **on_host(kwargs))
            if not writes and [each.shape for each in tensors(real)] != [each.shape for each in tensors(result)]:
                return tree_map(moved, result)  # its size is a number that the device had to compute
            fill(real, lambda: func(*on_host(args), **on_host(kwargs)), name, result)
        return real


def fill(out: Any, compute: Callable[[], Any], name: str, result: Any = None) -> None:
    """Write what a CPU computes, or has computed, into what the device was to have written: now, or at each replay of a graph being captured."""

    def write(values: Any) -> None:
        for mine, theirs in zip(tensors(out), tensors(values), strict=True):
            if not theirs.numel():  # a CPU's batch norm keeps no statistics of an evaluation
                continue
            if mine.shape != theirs.shape:
                raise RuntimeError(f"{name}: {tuple(mine.shape)} on the device, {tuple(theirs.shape)} on a CPU")
            host(mine).copy_(theirs)

    if Emulated.captured is None:
        write(compute() if result is None else result)
    else:
        Emulated.captured.append(lambda: write(compute()))


def tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def on_host(values: Any) -> Any:
    """The same arguments for a CPU."""
    if isinstance(values, dict):
        values = {
            key: torch.device("cpu") if key == "device" and value is not None else value
            for key, value in values.items()
            if key not in ("pin_memory", "generator")
        }
    return tree_map(host, values)


def is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def slots_of(given: dict[str, Any]) -> Any:
    """For each feature of a lookup without a fused optimizer: its columns, and the rows' elements, segments and shares of its ids."""
    columns, offsets = given["D_offsets"].tolist(), given["offsets"].long()
    batch = (len(offsets) - 1) // (len(columns) - 1)
    for feature, (first, last) in enumerate(pairwise(columns)):
        own = offsets[feature * batch : (feature + 1) * batch + 1]
        lengths, ids = own.diff(), given["indices"][own[0] : own[-1]].long()
        segments = torch.repeat_interleave(torch.arange(batch), lengths)
        shares = torch.ones(len(ids))
        if given["pooling_mode"] == 1:  # mean
            shares = shares / lengths[segments]
        if given.get("indice_weights") is not None:
            shares = shares * given["indice_weights"][own[0] : own[-1]]
        elements = given["weights_offsets"][feature] + ids[:, None] * (last - first) + torch.arange(last - first)
        yield slice(first, last), elements, segments, shares[:, None]


def pooled(given: dict[str, Any]) -> torch.Tensor:
    """(B, columns of all features): the forward pass of FBGEMM's tables without a fused optimizer."""
    weights, columns = given["dev_weights"].flatten(), given["D_offsets"].tolist()
    batch = (len(given["offsets"]) - 1) // (len(columns) - 1)
    out = torch.zeros(batch, columns[-1])
    for place, elements, segments, shares in slots_of(given):
        out[:, place].index_add_(0, segments, weights[elements].float() * shares)
    return out


def gradient_of_rows(given: dict[str, Any]) -> torch.Tensor:
    """Its backward pass: the gradient of all rows."""
    weights = given["dev_weights"]
    gradient = torch.zeros(weights.numel())
    for place, elements, segments, shares in slots_of(given):
        values = given["grad_output"][:, place].float()[segments] * shares
        gradient.index_add_(0, elements.flatten(), values.flatten())
    return gradient.view(weights.shape).to(weights.dtype)


class Graph(torch.cuda.CUDAGraph):
    """A CUDA graph whose replay computes what was launched while it was captured; the capture itself writes nothing."""

    captures: ClassVar[int] = 0

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        super().capture_begin(*args, **kwargs)
        self.calls = Emulated.captured = []
        Graph.captures += 1

    def capture_end(self) -> None:
        Emulated.captured = None
        super().capture_end()

    def replay(self) -> None:
        super().replay()
        with torch.no_grad():
            for call in self.calls:
                call()


def install() -> None:
    """Emulate in every thread of this process that is started from now on, autograd's excepted: backward passes run in their caller's."""
    run = threading.Thread.run

    def emulated(thread: threading.Thread) -> None:
        with Emulated():
            run(thread)

    threading.Thread.run = emulated  # type: ignore[method-assign]
    torch.autograd.set_multithreading_enabled(False)
    torch.backends.cudnn.enabled = False  # its kernels have no name on a CPU
    torch.cuda.CUDAGraph = Graph  # type: ignore[misc]
