"""A CUDA device on torch's CPU build: tensors on it are fake, those of the host are real, and what waits for the device is counted.

A tensor of the device carries the values that the host would find if it asked: every operator that a CPU has runs on them too. What only
CUDA has (FBGEMM's table kernels) gives zeros. So host code runs as on a GPU, and a wrong device, shape or dtype is an error.
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
# operators whose result has a size, or is a number, that only the device knows
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "_unique2",
    "is_nonzero",
    "unique_consecutive",
    "bincount",
)
# those whose result is the host's
ANSWERS = ("_local_scalar_dense", "equal", "allclose", "is_nonzero", "_to_copy", "copy_")


def install() -> None:
    """Let torch.cuda of this process, which has the guard and is given up afterwards, answer as if there were a GPU."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device="cuda") is made on the host, then moved
    torch.autograd.set_multithreading_enabled(False)  # a mode is its thread's own
    torch.cuda._initialized = True
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda *args: True
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(total_memory=80 * 2**30)
    torch._C._cuda_memoryStats = lambda device: {}
    torch.cuda.Stream = torch.cuda.Event = FakeStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: FakeStream()


class FakeStream(torch.Stream):
    """A stream and an event on which nothing is ever unfinished."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls, stream_id=0, device_index=0, device_type=1)  # 1: cuda

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *others: Any) -> None: ...

    wait_event = record = record_event = wait = synchronize = wait_stream


class NeverThere(FakeTensorMode):
    """It asks torch.cuda whether there is a device to make constants on, and must not believe the answer."""

    avoid_device_init = True  # pyright: ignore[reportAssignmentType]


class FakeGPU(TorchDispatchMode):
    """Operators on tensors of the device, or that make them.

    Attributes:
        waits: (operator, the innermost line of ours, file:function) -> how often the host waited.
        pageable: our line -> bytes copied to the device from memory that is not locked.
        calls: operator -> how often it ran on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = NeverThere(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.pageable: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        name = func._schema.name.partition("::")[2]
        if not made_there and not any(isinstance(each, FakeTensor) for each in leaves):
            return self._of_host(name, func, args, kwargs)
        self.calls[name] += 1
        self._count_pageable(name, args)
        on_host = {
            key: torch.device("cpu") if key == "device" and value is not None else tree_map(values_of, value)
            for key, value in kwargs.items()
        }
        if (waits := waits_of(name, args, device)) is not None:
            self.waits[waits, own_line()] += 1
            out = func(*tree_map(values_of, args), **on_host)
            return out if name in ANSWERS else tree_map(self._moved, out)
        if func.namespace == "fbgemm" and "_codegen_" in name:  # a table's kernel: it has no fake one
            return tree_map(self._moved, on_a_cpu(func, tree_map(values_of, args), on_host))
        with self._fake:
            out = func(*args, **kwargs)
        try:
            values = func(*tree_map(values_of, args), **on_host)
        except NotImplementedError:
            return out
        given = {id(each) for each in leaves}
        for each, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(each, FakeTensor) and id(each) not in given:
                each.values_on_host = value
        return out

    def _of_host(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator of the host, where memory is locked in name only."""
        if name == "is_pinned":
            return pinned(args[0])
        if name == "_pin_memory":
            func, args, kwargs, pins = torch.ops.aten.clone.default, args[:1], {}, True
        else:
            pins = kwargs.get("pin_memory")
            kwargs = kwargs | {"pin_memory": False} if pins else kwargs
        out = func(*args, **kwargs)
        if pins:
            out.untyped_storage().in_locked_memory = True
        return out

    def _count_pageable(self, name: str, args: Any) -> None:
        """Count what is copied to the device from memory that is not locked: the host waits for such a copy."""
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if isinstance(source, torch.Tensor) and not isinstance(source, FakeTensor) and not pinned(source):
            self.pageable[own_line()] += source.nbytes

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with self._fake:
            moved = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
        moved.values_on_host = value
        return moved


def pinned(tensor: torch.Tensor) -> bool:
    """Whether a tensor of the host lies in memory that is locked in name."""
    return getattr(tensor.untyped_storage(), "in_locked_memory", False)


def values_of(value: Any) -> Any:
    """What the host would read of a tensor of the device; anything else as it is."""
    if not isinstance(value, FakeTensor):
        return value
    if not hasattr(value, "values_on_host"):
        with torch._C._DisableTorchDispatch():
            value.values_on_host = torch.zeros(value.shape, dtype=value.dtype)
    return value.values_on_host


def on_a_cpu(kernel: Any, args: Any, kwargs: Any) -> Any:
    """FBGEMM's CPU kernel of the same name, which finds rows and optimizer state in its arguments for the host only."""
    given = dict(zip([each.name for each in kernel._schema.arguments], args, strict=False)) | kwargs
    for name in given:
        if name == "host_weights" or name.endswith("_host"):
            places = [name.replace("host", place) for place in ("dev", "uvm")]
            given[name] = next((given[each] for each in places if given[each].numel()), given[name])
    return kernel(**given)


def waits_of(name: str, args: Any, device: Any) -> str | None:
    """What makes the host wait for the device in this operator, or None."""
    if name in WAITS:
        return name
    if name == "index" and any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]):
        return "index by bool"
    source = args[1] if name == "copy_" else args[0] if args else None
    to = args[0].device.type if name == "copy_" else device and torch.device(device).type
    if name in ("copy_", "_to_copy") and to == "cpu" and isinstance(source, FakeTensor):
        return "copy to the host"
    return None


def own_line() -> str:
    """The innermost function of the project, or of a library where none of ours is, as file:function."""
    frames = [each for each in traceback.extract_stack() if "/tests/" not in each.filename]
    ours = [each for each in frames if each.filename.startswith(str(ROOT)) and "site-packages" not in each.filename]
    last = (ours or frames)[-1]
    name = Path(last.filename)
    return f"{name.relative_to(ROOT) if ours else name.name}:{last.name}"
