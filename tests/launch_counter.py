"""Counts what code would do on a CUDA card, without a card.

Tensors on the card are torch's fake tensors: they have a shape, a dtype and a device, but no values. Tensors
on the CPU are real. A `Counter` sees every operation, and counts:

- Launches: one for each operation that is neither a view nor an allocation. Operations of the project
  (`clsp_fast::...`) are executed on fake tensors, so what counts are the operations and the Triton kernels
  inside them. Some operations of torch launch more than one kernel (a sort, an accumulating index_put, one on
  a long list of tensors). They count as one.
- Bytes: each tensor that an operation reads, and each that it writes. An expanded tensor counts with the size
  of its memory. A Triton kernel counts each of its tensors once.
- Copies: the bytes of copies between host and card. A copy blocks the host unless it is non-blocking, the
  memory on the host is page-locked and without gaps, and the dtype stays the same. Otherwise torch makes
  another copy on the host first, which is not page-locked.
- Synchronisations: operations whose result the host waits for, such as `item()`, and waits for a stream or
  for the card.
- Event waits: waits of the host for an event. They count apart, because the GPU may have more work after the
  event.

Import this module before torch, in a child process: it adds a CUDA device to torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter as Counts
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_device import load_guard

_TESTS = Path(__file__).parent
_PACKAGE = Path(importlib.util.find_spec("clsp_fast").origin).parent

load_guard()

import torch  # noqa: E402
import torch.utils.checkpoint  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

FAKE = FakeTensorMode(allow_non_fake_inputs=False)
CARD = torch.device("cuda", 0)
# Operations that launch nothing, beside views.
_FREE = {
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::set_",
}


def caller() -> str:
    """The line of the project that runs now, as "file:line", with the two lines that led to it."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and len(lines) < 3:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_TESTS) and path != Path(__file__):
            lines.append(f"tests/{path.relative_to(_TESTS)}:{frame.f_lineno}")
        elif path.is_relative_to(_PACKAGE) or path.parts[-3:-1] == ("clsp_fast", "kernels"):
            at = -3 if path.parent.name == "kernels" else len(_PACKAGE.parts) - 1
            lines.append(f"{'/'.join(path.parts[at:])}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "autograd"


def has_no_gaps(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one piece of memory, in any order of its dimensions."""
    sizes = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    elements = 1
    for stride, size in sizes:
        if stride != elements:
            return False
        elements *= size
    return True


def _bytes(tensor: Tensor) -> int:
    if tensor.numel() and 0 in tensor.stride():
        return tensor.untyped_storage().nbytes()
    return tensor.numel() * tensor.element_size()


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries. torch's function takes several times longer."""
    tensors = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _tensors(*value)
        elif isinstance(value, dict):
            tensors += _tensors(*value.values())
    return tensors


@dataclass
class Figures:
    """What one part of the counted work does.

    Attributes:
        launches: launches by operation or kernel.
        bytes: bytes that they read and write.
        copied: bytes of copies between host and card.
        syncs: lines at which the host waits for the card -> how often.
        event_waits: lines at which the host waits for an event -> how often.
        blocking: lines with a copy that blocks the host -> how often.
        mismatches: lines that mix CPU tensors with tensors on the card -> how often.
    """

    launches: Counts[str] = field(default_factory=Counts)
    bytes: int = 0
    copied: int = 0
    syncs: Counts[str] = field(default_factory=Counts)
    event_waits: Counts[str] = field(default_factory=Counts)
    blocking: Counts[str] = field(default_factory=Counts)
    mismatches: Counts[str] = field(default_factory=Counts)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; `launches` is the total."""
        return vars(self) | {"launches": self.launches.total()}


class Counter(TorchDispatchMode):
    """Runs operations on fake CUDA tensors and real CPU tensors, and counts them. See the module's docstring.

    Attributes:
        parts: the figures of each part of the counted work.
        now: the figures of the part that runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Begins to count from zero."""
        self.now = Figures()
        self.parts = {"rest": self.now}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in this context counts for the part `name`."""
        before, self.now = self.now, self.parts.setdefault(name, Figures())
        try:
            yield
        finally:
            self.now = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return func(*args)
        kwargs = dict(kwargs or {})
        tensors = _tensors(args, kwargs)
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        device = kwargs.get("device")
        to_card = device is not None and torch.device(device).type == "cuda"
        name = func._schema.name
        if not fakes and not to_card:
            return func(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            self.now.syncs[f"{caller()}: item"] += 1
            return _guess(args[0])
        if name == "aten::_to_copy" and fakes and device is not None and not to_card:
            return self._copy_to_host(args[0], kwargs)
        if name == "aten::copy_" and fakes and not isinstance(args[0], FakeTensor):
            direct = args[0].is_pinned() and has_no_gaps(args[0]) and args[2:] == (True,)
            args[0].copy_(self._copy_to_host(args[1], {"non_blocking": direct}))
            return args[0]
        if name.startswith("clsp_fast::"):
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if len(fakes) < len(tensors):
            args, kwargs = self._onto_card(name, args, kwargs)
        if name == "aten::nonzero":
            self.now.syncs[f"{caller()}: nonzero"] += 1
            with FAKE:
                return args[0].new_empty(max(1, args[0].numel() // 2), args[0].ndim, dtype=torch.int64)
        kwargs.pop("pin_memory", None)
        with FAKE:
            result = func(*args, **kwargs)
        for output in _tensors(result):
            output._made_by = name
        if not func.is_view and name not in _FREE and not name.startswith("prim::"):
            self._launch(name, func, args, kwargs, result)
        return result

    def _launch(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.now.launches[name] += 1
        read = {id(x): x for x in _tensors(args, kwargs)}
        written = {id(x): x for x in _tensors(result)}
        schema = func._schema.arguments
        for argument, value in zip(schema, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {id(x): x for x in _tensors(value)}
        self.now.bytes += sum(_bytes(x) for x in (*read.values(), *written.values()))

    def launch_kernel(self, kernel: Any, tensors: list[Tensor]) -> None:
        """Counts a launch of a Triton kernel."""
        self.now.launches[kernel.__name__] += 1
        self.now.bytes += sum(_bytes(x) for x in {id(x): x for x in tensors}.values())

    def _copy_to_host(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A host tensor with guessed values. torch copies without blocking into page-locked memory."""
        self.now.copied += _bytes(source)
        if not kwargs.get("non_blocking"):
            self.now.syncs[f"{caller()}: copy to the host"] += 1
        dtype = kwargs.get("dtype") or source.dtype
        return torch.full(tuple(source.shape), _guess(source), dtype=dtype)

    def _onto_card(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replaces real tensors by fake ones. Counts copies, and tensors that a card would refuse."""
        real = [x for x in _tensors(args, kwargs) if not isinstance(x, FakeTensor)]
        is_copy = name in ("aten::_to_copy", "aten::copy_")
        if is_copy:
            (source,) = real
            self.now.copied += _bytes(source)
            dtype = kwargs.get("dtype") or (args[0].dtype if name == "aten::copy_" else source.dtype)
            reasons = {
                "a copy that is not non_blocking": not (kwargs.get("non_blocking") or args[2:] == (True,)),
                "memory is not page-locked": not source.is_pinned(),
                "memory has gaps": not has_no_gaps(source),
                "a copy to another dtype": dtype != source.dtype,
            }
            for reason in [text for text, holds in reasons.items() if holds][:1]:
                self.now.blocking[f"{caller()}: {reason}, {tuple(source.shape)}"] += 1
        elif large := [x for x in real if x.ndim > 0]:
            shape = tuple(large[0].shape)
            if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
                self.now.blocking[f"{caller()}: an index of shape {shape} on the CPU"] += 1
            else:
                self.now.mismatches[
                    f"{caller()}: {name} of the card and of a CPU tensor of shape {shape}"
                ] += 1

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
                return x
            with FAKE:
                device = "cpu" if is_copy or x.ndim == 0 else CARD
                return torch.empty(tuple(x.shape), dtype=x.dtype, device=device)

        return tree_map(convert, (args, kwargs))


def _guess(tensor: Tensor) -> bool | int | float:
    """The value of a fake tensor that lets the code go on: checks for anything wrong find nothing."""
    if tensor.dtype == torch.bool:
        return getattr(tensor, "_made_by", "") != "aten::any"
    return 0.0 if tensor.is_floating_point() else 1


class _Event:
    """An event of the fake card. Only the host's waits for it do something: they are counted."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def record(self, *_: Any) -> None:
        """Nothing is recorded."""

    def synchronize(self) -> None:
        """Counts a wait for an event."""
        self._counter.now.event_waits[f"{caller()}: event"] += 1


class _Stream:
    """A stream of the fake card. Only the host's waits for it do something: they are counted."""

    def __init__(self, counter: Counter) -> None:
        self._counter, self.device = counter, CARD

    def wait_event(self, event: _Event) -> None:
        """The card waits, not the host."""

    def wait_stream(self, stream: _Stream) -> None:
        """The card waits, not the host."""

    def synchronize(self) -> None:
        """Counts a synchronisation."""
        self._counter.now.syncs[f"{caller()}: synchronize"] += 1


@contextlib.contextmanager
def card(counter: Counter) -> Iterator[Counter]:
    """In this context torch and triton believe that there is a card, and `counter` counts."""

    def run_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        descriptors = [x.base for x in (*args, *kwargs.values()) if hasattr(x, "base")]
        counter.launch_kernel(kernel.fn, [*_tensors(args, kwargs), *descriptors])

    @contextlib.contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    properties = SimpleNamespace(
        multi_processor_count=132,
        total_memory=80 * 2**30,
        major=9,
        minor=0,
        name="fake",
        L2_cache_size=50 * 2**20,
    )
    changes: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "_is_in_bad_fork": lambda: False,
            "current_device": lambda: 0,
            "current_stream": lambda *_: _Stream(counter),
            "device": nothing,
            "device_count": lambda: 1,
            "Event": lambda **_: _Event(counter),
            "get_device_capability": lambda *_: (9, 0),
            "get_device_name": lambda *_: "fake",
            "get_device_properties": lambda *_: properties,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "is_initialized": lambda: True,
            "manual_seed_all": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "set_device": lambda *_: None,
            "stream": nothing,
            "synchronize": lambda *_: _Stream(counter).synchronize(),
            "Stream": lambda *_: _Stream(counter),
        },
        torch.random: {"_seed_custom_device": lambda *_: None, "fork_rng": nothing},
        torch.utils.checkpoint: {
            "get_device_states": lambda *_: ([], []),
            "set_device_states": lambda *_, **__: None,
        },
        triton.runtime.jit.JITFunction: {"run": run_kernel},
        FakeTensor: {
            "data_ptr": lambda _: 0,
            "record_stream": lambda *_: None,
            "tolist": lambda x: x.cpu().tolist(),
        },
    }
    with contextlib.ExitStack() as stack:
        for owner, attributes in changes.items():
            for name, value in attributes.items():
                before = owner.__dict__.get(name, stack)
                stack.callback(delattr, owner, name) if before is stack else stack.callback(
                    setattr, owner, name, before
                )
                setattr(owner, name, value)
        yield stack.enter_context(counter)


def fake_model(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Moves a model from the meta device to the card. Call it inside `card`."""

    def move(x: Tensor) -> Tensor:
        return torch.empty(tuple(x.shape), dtype=dtype if x.is_floating_point() else x.dtype, device=CARD)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(move(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)
    return model
