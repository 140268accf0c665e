"""What the optimizer asks of an array library: one small interface, and how a library is recognised."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from gradstep.arrays.memory import Bits, Integers, Memory
from gradstep.errors import ArgumentTypeError
from gradstep.program.newton_schulz import Iteration

if TYPE_CHECKING:
    from gradstep.program.threads import Team

Found: TypeAlias = Literal[0, 1, 2]
OTHER: Found = 0  # something else than addresses differs
STAYED: Found = 1  # every array lies where one lay at the last look
MOVED: Found = 2


class Watch(Protocol):
    """The types and layouts of the arrays of a plan."""

    addresses: Integers
    """Where the arrays lay at the last look; worthless after `OTHER`."""

    def locate(self, arrays: list[Any]) -> Found:
        """Compare arrays with those of the plan, and note their addresses."""
        ...


def found(watch: Watch, addresses: Sequence[int]) -> Found:
    """Note these addresses, for watches that find them in Python."""
    now = np.array(addresses, np.int64)
    stayed = np.array_equal(now, watch.addresses)
    watch.addresses = now
    return STAYED if stayed else MOVED


class Operations(Protocol):
    """What a rule may do with arrays of one library; the operators + - * / and comparisons are the arrays' own."""

    name: str

    def call(self, name: str, *args: Any) -> Any:
        """An elementwise function of `gradstep.ops`, of arrays and numbers."""
        ...

    def mean(self, x: Any, axis: int | None) -> Any:
        """The mean over everything, or over one axis, which stays with length 1."""
        ...

    def rms(self, x: Any) -> Any:
        """The root of the mean square."""
        ...

    def norm(self, x: Any) -> Any:
        """The Euclidean norm."""
        ...

    def orthogonalize(self, x: Any, iteration: Iteration) -> Any:
        """A matrix orthogonalized by Newton-Schulz iterations."""
        ...

    def value_and_grad(self, function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
        """See `gradstep.value_and_grad`."""
        ...


class MemoryLibrary(Operations, Protocol):
    """A library whose arrays are written where they lie."""

    in_place: Literal[True]
    team: "Team | None"
    """The library's own threads, where kernels can run on them."""
    multiplies_bfloat16: bool
    """Whether it has matrix products in bfloat16."""

    def describe(self, array: Any, what: str) -> Memory:
        """Where the array lies; an error that begins with `what` for one that cannot take part."""
        ...

    def watch(self, arrays: list[Any]) -> Watch:
        """Remember the layouts of arrays that have been described."""
        ...

    def zeros(self, shape: Sequence[int], order: Sequence[int], dtype: str) -> Any:
        """A new array whose axes, from slow to fast, are `order`."""
        ...

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """The same memory as a NumPy array; floats of 16 bits as their bits."""
        ...

    def from_bits(self, bits: np.ndarray[Any, Any], dtype: str) -> Any:
        """The reverse of `as_numpy`: the same memory as an array of the library."""
        ...

    def wrote(self, arrays: list[Any]) -> None:
        """Take note that these arrays have been written."""
        ...


class Located(NamedTuple):
    """Arrays in C order, and where they lie; any number for those without elements."""

    arrays: list[Any]
    addresses: list[int]


class Lender(Protocol):
    """Who gives up the memory of arrays for new ones."""

    asks_holders: bool
    """Whether memory can be had only when nobody holds the old arrays any more."""

    def can_lend(self, written: list[Any], read: list[Any]) -> bool:
        """Whether the memory of `written` can be had, and `read` be read where it lies."""
        ...

    def locate(self, arrays: list[Any]) -> Located:
        """Where the arrays lie, or copies of those that are not laid out plainly, when they have been computed."""
        ...

    def view(self, array: Any, address: int) -> Bits:
        """The memory of an array that lies there, which the view does not keep alive."""
        ...

    def renew(self, arrays: list[Any]) -> list[Any]:
        """New arrays with the same elements; the old ones may become invalid.

        `locate` then finds the new ones where nobody else has a share in the memory, and if the lender `asks_holders`,
        where the old ones lay unless somebody still holds these.
        """
        ...


Choice: TypeAlias = Callable[[Any, Callable[[], Any], Callable[[], Any]], Any]
"""What the first of two functions gives where a condition holds, else what the second does."""


class Form(NamedTuple):
    """What must agree between an array that never changes, its gradient and its slots."""

    shape: tuple[int, ...]
    dtype: str
    place: object


class FunctionalLibrary(Operations, Protocol):
    """A library whose arrays never change: a step makes new ones, in one compiled function."""

    in_place: Literal[False]
    adapter: str
    """The module of gradstep that works inside of transformations."""

    @property
    def lender(self) -> Lender | None:
        """Gives up the memory of arrays; None where that cannot be had."""
        ...

    @property
    def choose(self) -> Choice | None:
        """Chooses between two functions within a compiled one; None where both of them would be computed."""
        ...

    def describe(self, array: Any, what: str) -> Form:
        """The array's form; an error that begins with `what` for one that cannot take part."""
        ...

    def place_of(self, array: Any) -> object:
        """Where the array lies, as its form says."""
        ...

    def is_tracing(self, arrays: list[Any]) -> bool:
        """Whether arrays stand for values inside a transformation, wherever that can be noticed."""
        ...

    def marks(self, arrays: list[Any]) -> list[Any]:
        """Equal for arrays that one compiled function takes, and that are no stand-ins as in `is_tracing`."""
        ...

    def devices(self, form: Form) -> object:
        """Where the array lies, comparable and readable; None for wherever it is needed."""
        ...

    def zeros(self, form: Form) -> Any:
        """A new array."""
        ...

    def table(self, values: np.ndarray[Any, Any], dtype: str) -> Any:
        """Float64 scalars as an array of `dtype`."""
        ...

    def number(self, value: float, dtype: str) -> Any:
        """A constant, exact in `dtype`."""
        ...

    def cast(self, x: Any, dtype: str) -> Any:
        """The array in another dtype."""
        ...

    def words(self, values: np.ndarray[Any, Any]) -> Any:
        """A table of 32-bit words as an array."""
        ...

    def bits(self, x: Any) -> Any:
        """See `WordOperations.bits`."""
        ...

    def floats(self, x: Any) -> Any:
        """See `WordOperations.floats`."""
        ...

    def word(self, value: int) -> Any:
        """See `WordOperations.word`."""
        ...

    def real(self, value: float) -> Any:
        """See `WordOperations.real`."""
        ...

    def count(self, length: int) -> Any:
        """See `WordOperations.count`."""
        ...

    def pad(self, x: Any, extra: int) -> Any:
        """See `WordOperations.pad`."""
        ...

    def apart(self, x: Any) -> Any:
        """Within a compiled function: `x`, computed by itself and not within the loops that read it."""
        ...

    def largest(self, x: Any) -> Any:
        """The largest absolute value, NaN if there is one; 0 for an empty array."""
        ...

    def total(self, x: Any) -> Any:
        """The sum of all elements."""
        ...

    def stack(self, values: list[Any]) -> Any:
        """Values without dimensions as one array."""
        ...

    def keep_place(self, x: Any, form: Form) -> Any:
        """Within a compiled function: `x`, laid out over devices as `form` says."""
        ...

    def compile(self, function: Callable[..., Any], donated: Sequence[int] = ()) -> Callable[..., Any]:
        """The function compiled once per forms of its arguments, trees of arrays; donated ones lend their memory."""
        ...

    def read(self, x: Any) -> Any:
        """The value as a NumPy array; waits until it has been computed."""
        ...

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """The elements as a NumPy array that must not be written; floats of 16 bits as their bits."""
        ...

    def from_bits(self, bits: np.ndarray[Any, Any], form: Form) -> Any:
        """A new array with these elements, where `form` says."""
        ...


Library: TypeAlias = MemoryLibrary | FunctionalLibrary


def recognise(**trees: Mapping[str, object]) -> Library:
    """The one library that owns all arrays of the trees; no library is imported that the caller has not.

    Raises:
        ArgumentTypeError: the arrays belong to different libraries, or an entry is no array.
    """
    found: dict[type, Library] = {}
    first: tuple[str, Library] | None = None
    for tree, named in trees.items():
        for name, value in named.items():
            if type(value) in found:
                continue
            what = f"{tree}[{name!r}]"
            library = owner(value)
            if library is None or _is_number(value):
                raise ArgumentTypeError(f"{what} is {_came(value)}; expected an array of NumPy, PyTorch, JAX or MLX")
            found[type(value)] = library
            first = first or (what, library)
            if library is not first[1]:
                raise ArgumentTypeError(
                    f"{first[0]} belongs to {first[1].name}, but {what} to {library.name}; "
                    "one call takes arrays of one library"
                )
    return first[1] if first else numpy_library()


def owner(value: object) -> Library | None:
    """The library of an array, by the modules that have been imported; None for what is no array."""
    if isinstance(value, (np.ndarray, np.generic)):
        return numpy_library()
    torch, jax, mlx = map(sys.modules.get, ("torch", "jax", "mlx.core"))
    if torch is not None and isinstance(value, torch.Tensor):
        from gradstep.arrays.torch import TORCH

        return TORCH
    if jax is not None and isinstance(value, jax.Array):
        from gradstep.arrays.jax import JAX

        return JAX
    if mlx is not None and isinstance(value, mlx.array):
        from gradstep.arrays.mlx import MLX

        return MLX
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float, complex, np.generic))


def _came(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    remedy = ""
    if _is_number(value):
        remedy = ", a plain number, not an array: wrap it in np.array(..., dtype=np.float32)"
    return f"a {kind}{remedy}"


def is_masked(array: object) -> bool:
    """Whether an array of NumPy has a mask. None has before `numpy.ma` is imported, which takes a while."""
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(array, masked.MaskedArray)


def numpy_library() -> MemoryLibrary:
    """The library of NumPy, imported for the first array."""
    from gradstep.arrays.numpy import NUMPY

    return NUMPY
