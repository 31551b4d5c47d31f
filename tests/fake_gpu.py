"""A CUDA device on torch's CPU build: tensors on it are fake, those of the host are real, and what waits for the device is counted.

A tensor of the device carries the values that the host would find if it asked: every operator that a CPU has runs on them too. What only
CUDA has (FBGEMM's table kernels) gives zeros. So host code runs as on a GPU, and a wrong device, shape or dtype is an error; so is an operator
that reads what another stream writes without a wait between them. A graph's operators run again at each replay, on the values of then.
"""

import contextlib
import itertools
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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
    torch.cuda.stream = on_stream
    STREAMS.append(FakeStream())
    torch.cuda.current_stream = lambda device=None: STREAMS[-1]
    torch.cuda.default_stream = lambda device=None: STREAMS[0]
    torch.cuda.CUDAGraph = FakeGraph
    torch.cuda.graph_pool_handle = lambda: (0, 1)
    torch.cuda.synchronize = FakeStream.synchronize_all
    torch.cuda.empty_cache = torch._C._host_emptyCache = lambda *args: None
    torch.cuda.is_current_stream_capturing = lambda: FakeGraph.recording is not None
    # numbers of the device are drawn by the host
    torch.cuda.get_rng_state = lambda device="cuda": torch.empty(0)
    torch.cuda.set_rng_state = lambda state, device="cuda": None


STREAMS: list[Any] = []  # the default one, and those of the contexts entered since


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    STREAMS.append(stream or STREAMS[-1])
    try:
        yield
    finally:
        STREAMS.pop()


class FakeStream(torch.Stream):
    """A stream, or an event. `seen`: number of a stream -> its operators that are done before what comes next here."""

    numbers = itertools.count()
    everyone: ClassVar[list[Any]] = []

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls, stream_id=0, device_index=0, device_type=1)  # 1: cuda

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.number, self.seen = next(self.numbers), Counter()
        self.everyone.append(self)

    def wait_stream(self, other: Any) -> None:
        self.seen |= other.seen  # the greater of both

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Any:
        event = FakeStream() if event is None else event
        event.seen = Counter(self.seen)
        return event

    def record(self, stream: Any = None) -> None:
        (stream or STREAMS[-1]).record_event(self)

    def wait(self, stream: Any = None) -> None:
        (stream or STREAMS[-1]).wait_stream(self)

    def synchronize(self) -> None: ...

    @classmethod
    def synchronize_all(cls, *args: Any) -> None:
        for one in cls.everyone:
            STREAMS[0].wait_stream(one)
        for one in cls.everyone:
            one.wait_stream(STREAMS[0])


class FakeGraph:
    """A graph of the operators that run while it is captured, which leave no trace then."""

    recording: "FakeGraph | None" = None
    made_so_far: ClassVar[list["FakeGraph"]] = []

    def __init__(self) -> None:
        self.made_so_far.append(self)
        self.calls: list[Any] = []
        self.outside: dict[int, Any] = {}  # values before the capture of what it writes to
        self.made: set[int] = set()  # storages that it makes
        self.replays = 0

    def capture_begin(self, *pool: Any, capture_error_mode: str, check_input_liveness: bool) -> None:
        assert capture_error_mode == "thread_local", "another thread may lock memory"
        self.random, FakeGraph.recording = torch.get_rng_state(), self

    def capture_end(self) -> None:
        FakeGraph.recording = None
        torch.set_rng_state(self.random)
        for values, before in self.outside.values():
            values.copy_(before)
        for *_, out in self.calls:  # whoever reads it before a replay finds no numbers
            for value in map(values_of, leaves_of(out)):
                if storage_of(value) in self.made and value.is_floating_point():
                    value.fill_(float("nan"))

    def before(self, func: Any, args: Any) -> None:
        for value in map(values_of, written(func, args)):
            if storage_of(value) not in self.made:
                self.outside.setdefault(storage_of(value), (value, value.clone()))

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = {storage_of(values_of(each)) for each in leaves_of((args, kwargs)) if isinstance(each, FakeTensor)}
        self.made |= {storage_of(values_of(each)) for each in leaves_of(out)} - given - {0}
        self.calls.append((func, args, kwargs, out))

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            values = func(*mapped(values_of, args), **kwargs)
            for old, new in zip(map(values_of, leaves_of(out)), leaves_of(values), strict=True):
                if isinstance(new, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def leaves_of(value: Any) -> list[Any]:
    """What is in tuples, lists and dicts: torch's own pytree knows more containers, and takes a fifth of the time of all cases."""
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in leaves_of(each)]
    return leaves_of(list(value.values())) if isinstance(value, dict) else [value]


def mapped(function: Any, value: Any) -> Any:
    """The same containers with what a function makes of what is in them."""
    if isinstance(value, tuple | list):
        made = [mapped(function, each) for each in value]
        return made if isinstance(value, list) else tuple(made)
    return {key: mapped(function, each) for key, each in value.items()} if isinstance(value, dict) else function(value)


def storage_of(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else 0


def written(func: Any, args: Any) -> list[Any]:
    """The arguments that an operator writes to."""
    named = zip(func._schema.arguments, args, strict=False)
    found = [arg for each, arg in named if each.alias_info is not None and each.alias_info.is_write]
    if func._schema.name == "aten::native_batch_norm":  # its schema does not tell
        found += args[3:5]
    return leaves_of(found)


class NeverThere(FakeTensorMode):
    """It asks torch.cuda whether there is a device to make constants on, and must not believe the answer."""

    avoid_device_init = True  # pyright: ignore[reportAssignmentType]


class FakeGPU(TorchDispatchMode):
    """Operators on tensors of the device, or that make them.

    Attributes:
        waits: (operator, the innermost line of ours, file:function) -> how often the host waited.
        pageable: our line -> bytes copied to the device from memory that is not locked.
        calls: operator -> how often it ran on the device.
        races: operator -> how often it read what another stream may still have been writing.
        kept: how often memory was kept for another stream.
        streams: numbers of the streams that ran something.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = NeverThere(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.pageable: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.races: Counter[str] = Counter()
        self.kept = 0
        self.streams: set[int] = set()
        self._writers: dict[
            int, tuple[int, int]
        ] = {}  # storage -> stream and number of the operator that wrote to it last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # the device of a tensor, for which torch asks more often than for all else
            return func(*args)
        leaves = leaves_of((args, kwargs))
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        name = func._schema.name.partition("::")[2]
        if not made_there and not any(isinstance(each, FakeTensor) for each in leaves):
            return self._of_host(name, func, args, kwargs)
        if name == "record_stream":
            self.kept += 1
            return None
        self.calls[name] += 1
        self._count_pageable(name, args)
        on_host = {
            key: torch.device("cpu") if key == "device" and value is not None else mapped(values_of, value)
            for key, value in kwargs.items()
        }
        if (waits := waits_of(name, args, device)) is not None:
            self.waits[waits, own_line()] += 1
            out = func(*mapped(values_of, args), **on_host)
            return out if name in ANSWERS else mapped(self._moved, out)
        if func.namespace == "fbgemm" and "_codegen_" in name:  # a table's kernel: it has no fake one
            return mapped(self._moved, on_a_cpu(func, mapped(values_of, args), on_host))
        with self._fake:
            out = func(*args, **kwargs)
        graph = FakeGraph.recording
        if graph is not None:
            graph.before(func, args)
        try:
            values = func(*mapped(values_of, args), **on_host)
        except NotImplementedError:
            return out
        given = {id(each) for each in leaves}
        for each, value in zip(leaves_of(out), leaves_of(values), strict=True):
            if isinstance(each, FakeTensor) and id(each) not in given:
                each.values_on_host = value
        if graph is not None:
            graph.after(func, args, on_host, out)
        self._order(name, func, args, out)
        return out

    def _order(self, name: str, func: Any, args: Any, out: Any) -> None:
        """Note what an operator writes on the current stream, and whether what it reads is there by then."""
        stream = STREAMS[-1]
        self.streams.add(stream.number)
        stream.seen[stream.number] += 1
        given = {storage_of(values_of(each)) for each in leaves_of(args) if isinstance(each, FakeTensor)}
        for storage in given & self._writers.keys():
            writer, place = self._writers[storage]
            if stream.seen[writer] < place:
                self.races[name] += 1
        made = {storage_of(values_of(each)) for each in leaves_of(out)} - given
        for storage in made | {storage_of(values_of(each)) for each in written(func, args)}:
            if storage:  # 0: without memory
                self._writers[storage] = stream.number, stream.seen[stream.number]

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
