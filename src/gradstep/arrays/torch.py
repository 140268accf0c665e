"""PyTorch tensors on the CPU. This module is imported only where the caller has imported torch."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np

from gradstep.arrays.exchange import Exchange, ExchangeWatch, describing_function
from gradstep.arrays.library import MOVED, OTHER, STAYED, Found, found
from gradstep.arrays.memory import Memory
from gradstep.arrays.numpy import NUMPY
from gradstep.arrays.torch_offsets import find_offsets
from gradstep.arrays.torch_threads import find_team
from gradstep.errors import ArgumentTypeError, DeviceError, DtypeError, RuleError, TracingError
from gradstep.program.formats import BYTES, EXPECTED
from gradstep.program.newton_schulz import Iteration, newton_schulz
from gradstep.program.threads import Team

torch: Any = importlib.import_module("torch")
_Tensor: Any = torch.Tensor
NARROW = (torch.bfloat16, torch.float16)
DLPACK_CODES = {torch.uint8: 1, torch.bfloat16: 4}  # all others are floats, 2


class Torch:
    """Tensors of PyTorch, written where they lie, with their version counters advanced."""

    name = "PyTorch"
    in_place: Literal[True] = True
    team: Team | None = find_team()
    multiplies_bfloat16 = True

    def call(self, name: str, *args: Any) -> Any:
        """See `Operations.call`."""
        like = next((arg for arg in args if isinstance(arg, _Tensor) and arg.is_floating_point()), None)
        if like is None:
            raise RuleError(f"{name} takes tensors of a floating dtype, got {', '.join(str(arg) for arg in args)}")
        tensors = [arg if isinstance(arg, _Tensor) else like.new_tensor(arg) for arg in args]
        result = getattr(torch, name)(*tensors)
        return (
            torch.where(tensors[0].isnan(), tensors[0], result) if name == "sign" else result
        )  # torch: sign(NaN) is 0

    def mean(self, x: Any, axis: int | None) -> Any:
        """See `Operations.mean`."""
        if _has_memory(x):
            return x.new_tensor(NUMPY.mean(x.detach().numpy(), axis))
        sums = x.sum(dtype=torch.float64) if axis is None else x.sum(axis, keepdim=True, dtype=torch.float64)
        return (sums / max(x.numel() if axis is None else x.shape[axis], 1)).to(x.dtype)

    def rms(self, x: Any) -> Any:
        """See `Operations.rms`."""
        if _has_memory(x):
            return x.new_tensor(NUMPY.rms(x.detach().numpy()))
        return (x.double().square().sum() / max(x.numel(), 1)).sqrt().to(x.dtype)

    def norm(self, x: Any) -> Any:
        """See `Operations.norm`."""
        if _has_memory(x):
            return x.new_tensor(NUMPY.norm(x.detach().numpy()))
        return x.double().square().sum().sqrt().to(x.dtype)

    def orthogonalize(self, x: Any, iteration: Iteration) -> Any:
        """See `Operations.orthogonalize`."""
        return newton_schulz(x.clone(), iteration)

    def value_and_grad(self, function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
        """See `Operations.value_and_grad`."""
        transformed: Any = torch.func.grad_and_value(function)

        def with_gradients(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            with torch.no_grad():  # of the gradients themselves; what `function` computes is differentiated
                grads, value = transformed(*args, **kwargs)
            return value, grads

        return with_gradients

    def describe(self, array: Any, what: str) -> Memory:
        """See `MemoryLibrary.describe`."""
        if array.layout is not torch.strided:
            raise ArgumentTypeError(f"{what} is a sparse tensor ({array.layout}); pass a dense one: .to_dense()")
        if array.device.type != "cpu":
            raise DeviceError(f"{what} is on {array.device}; gradstep steps on the CPU: move it with .cpu()")
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype not in BYTES:
            raise DtypeError(f"{what} has dtype {array.dtype}; {EXPECTED}: convert it with .float()")
        if array.is_neg() or array.is_conj():
            raise ArgumentTypeError(f"{what} is a lazily negated view; materialise it with .resolve_neg()")
        if hasattr(array, "device_mesh"):
            raise ArgumentTypeError(
                f"{what} is a DTensor, a shard of a tensor on several processes; gs.Sharded(opt, group) steps these, "
                "with the process group of all ranks that share the model: torch.distributed.group.WORLD"
            )
        if hasattr(array, "fake_mode"):
            raise TracingError(_without_memory(what, array))
        try:
            address = array.data_ptr()
        except RuntimeError as error:
            raise TracingError(_without_memory(what, array)) from error
        if address == 0 and array.numel():
            raise TracingError(_without_memory(what, array))
        itemsize = BYTES[dtype]
        return Memory(address, tuple(array.shape), tuple(stride * itemsize for stride in array.stride()), dtype)

    def watch(self, arrays: list[Any]) -> "ExchangeWatch | Watched":
        """See `MemoryLibrary.watch`."""
        exchange = _exchange()
        return ExchangeWatch(exchange, arrays, DLPACK_CODES, _any_negated) if exchange else Watched(arrays)

    def zeros(self, shape: Sequence[int], order: Sequence[int], dtype: str) -> Any:
        """See `MemoryLibrary.zeros`."""
        tensor = torch.zeros([shape[axis] for axis in order], dtype=getattr(torch, dtype), device="cpu")
        return tensor.permute(*np.argsort(order).tolist()) if len(order) else tensor

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """See `MemoryLibrary.as_numpy`."""
        tensor = array.detach()
        return cast("np.ndarray[Any, Any]", (tensor.view(torch.uint16) if tensor.dtype in NARROW else tensor).numpy())

    def from_bits(self, bits: np.ndarray[Any, Any], dtype: str) -> Any:
        """See `MemoryLibrary.from_bits`."""
        return torch.from_numpy(bits).view(getattr(torch, dtype))

    def wrote(self, arrays: list[Any]) -> None:
        """Advance the version counters, so that autograd notices; inference tensors have none."""
        try:
            torch.autograd.graph.increment_version(arrays)
        except (RuntimeError, TypeError):  # one is an inference tensor, or this torch takes one at a time
            for array in arrays:
                with contextlib.suppress(RuntimeError):
                    torch.autograd.graph.increment_version(array)


class Watched:
    """See `Watch`: through the methods of tensors, one by one."""

    def __init__(self, arrays: list[Any]) -> None:
        self._layouts = _layouts(arrays)
        self.addresses = np.zeros(len(arrays), np.int64)

    def locate(self, arrays: list[Any]) -> Found:
        """See `Watch.locate`."""
        return found(self, [array.data_ptr() for array in arrays]) if _layouts(arrays) == self._layouts else OTHER


@functools.cache
def _exchange() -> Exchange | None:
    """What the exchange table and the offsets are worth is found out with tensors that the slow way knows."""
    describe = describing_function(_Tensor)
    if describe is None:
        return None
    probe = torch.zeros((2, 3), device="cpu").t()
    for exchange in (Exchange(describe, find_offsets()), Exchange(describe, None)):
        watch = ExchangeWatch(exchange, [probe], DLPACK_CODES, _any_negated)
        seen = [watch.locate([tensor]) for tensor in (probe, probe, torch._neg_view(probe))]
        if seen == [MOVED, STAYED, OTHER] and watch.addresses.tolist() == [probe.data_ptr()]:
            return exchange
    return None


def _layouts(arrays: list[Any]) -> tuple[object, ...]:
    types: list[Any] = list(map(type, arrays))
    if not all(issubclass(kind, _Tensor) for kind in set(types)):
        return (types,)
    return (
        types,
        [array.shape for array in arrays],
        [array.dtype for array in arrays],
        [array.layout is torch.strided and array.stride() for array in arrays],
        [array.is_cpu for array in arrays],
        _any_negated(arrays),
    )


def _has_memory(x: Any) -> bool:
    """Whether NumPy can see the tensor's elements."""
    return x.is_cpu and x.dtype in (torch.float32, torch.float64)


def _any_negated(arrays: list[Any]) -> bool:
    is_neg: Callable[[Any], bool] = _Tensor.is_neg
    return any(map(is_neg, arrays))


def _without_memory(what: str, array: Any) -> str:
    return (
        f"{what} ({type(array).__name__}) has no memory of its own: it stands for a value inside a transformation "
        "such as torch.func or torch.compile; step outside of it"
    )


TORCH = Torch()
