"""JAX arrays. This module is imported only where the caller has imported jax."""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Literal, cast

import numpy as np

from gradstep.arrays.library import Choice, Form, Lender
from gradstep.arrays.memory import bits_dtype
from gradstep.errors import DtypeError
from gradstep.program.formats import BYTES, EXPECTED
from gradstep.program.newton_schulz import Iteration, orthogonalized

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")


class Jax:
    """Arrays of JAX: a step runs under `jax.jit` and gives new arrays, placed and sharded like the old ones."""

    name = "JAX"
    in_place: Literal[False] = False
    adapter = "optax"

    @property
    def lender(self) -> Lender:
        """See `FunctionalLibrary.lender`."""
        return _lender()

    @property
    def choose(self) -> Choice:
        """See `FunctionalLibrary.choose`."""
        return cast("Choice", jax.lax.cond)

    def call(self, name: str, *args: Any) -> Any:
        """See `Operations.call`."""
        result = getattr(jnp, name)(*args)
        return result + 0.0 if name == "sign" else result  # sign(-0.0) is +0

    def mean(self, x: Any, axis: int | None) -> Any:
        """See `Operations.mean`."""
        length = x.size if axis is None else x.shape[axis]
        return (_sum(x, axis) / max(length, 1)).astype(x.dtype)

    def rms(self, x: Any) -> Any:
        """See `Operations.rms`."""
        return jnp.sqrt(_sum(x * x, None) / max(x.size, 1)).astype(x.dtype)

    def norm(self, x: Any) -> Any:
        """See `Operations.norm`."""
        return jnp.sqrt(_sum(x * x, None)).astype(x.dtype)

    def orthogonalize(self, x: Any, iteration: Iteration) -> Any:
        """See `Operations.orthogonalize`. Products are formed in the dtype that is asked for, on every device."""
        with jax.default_matmul_precision("highest"):
            return orthogonalized(self, x, iteration)

    def value_and_grad(self, function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
        """See `Operations.value_and_grad`."""
        return cast("Callable[..., tuple[Any, Any]]", jax.value_and_grad(function))

    def describe(self, array: Any, what: str) -> Form:
        """See `FunctionalLibrary.describe`."""
        dtype = str(array.dtype)
        if dtype not in BYTES:
            raise DtypeError(f"{what} has dtype {dtype}; {EXPECTED}: .astype('float32') converts it")
        return Form(tuple(array.shape), dtype, self.place_of(array))

    def place_of(self, array: Any) -> object:
        """See `FunctionalLibrary.place_of`. An array that has not been put anywhere goes where it is needed."""
        return array.sharding if array.committed else None

    def is_tracing(self, arrays: list[Any]) -> bool:
        """See `FunctionalLibrary.is_tracing`."""
        return any(isinstance(array, jax.core.Tracer) for array in arrays)

    def marks(self, arrays: list[Any]) -> list[Any]:
        """See `FunctionalLibrary.marks`. Tracers have types of their own."""
        try:
            return [*map(type, arrays), *map(_form, arrays)]
        except AttributeError:  # in a version of JAX without layouts, and of tracers
            return [(type(a), getattr(a, "aval", None), getattr(a, "sharding", None)) for a in arrays]

    def devices(self, form: Form) -> object:
        """See `FunctionalLibrary.devices`."""
        return form.place and cast("Any", form.place).device_set

    def zeros(self, form: Form) -> Any:
        """See `FunctionalLibrary.zeros`."""
        return jnp.zeros(form.shape, form.dtype, device=form.place)

    def table(self, values: np.ndarray[Any, Any], dtype: str) -> Any:
        """See `FunctionalLibrary.table`. A NumPy array: its device is decided by those that it meets."""
        with np.errstate(all="ignore"):
            return values.astype(dtype)

    def number(self, value: float, dtype: str) -> Any:
        """See `FunctionalLibrary.number`."""
        return np.dtype(dtype).type(value)

    def cast(self, x: Any, dtype: str) -> Any:
        """See `FunctionalLibrary.cast`."""
        return x.astype(dtype)

    def words(self, values: np.ndarray[Any, Any]) -> Any:
        """See `FunctionalLibrary.words`."""
        return values

    def bits(self, x: Any) -> Any:
        """See `FunctionalLibrary.bits`."""
        return jax.lax.bitcast_convert_type(x, jnp.uint32)

    def floats(self, x: Any) -> Any:
        """See `FunctionalLibrary.floats`."""
        return jax.lax.bitcast_convert_type(x, jnp.float32)

    def word(self, value: int) -> Any:
        """See `FunctionalLibrary.word`."""
        return np.uint32(value)

    def real(self, value: float) -> Any:
        """See `FunctionalLibrary.real`."""
        return np.float32(value)

    def count(self, length: int) -> Any:
        """See `FunctionalLibrary.count`."""
        return jnp.arange(length, dtype=jnp.uint32)

    def pad(self, x: Any, extra: int) -> Any:
        """See `FunctionalLibrary.pad`."""
        return jnp.pad(x, ((0, 0), (0, extra)))

    def apart(self, x: Any) -> Any:
        """See `FunctionalLibrary.apart`. XLA decides by itself."""
        return x

    def largest(self, x: Any) -> Any:
        """See `FunctionalLibrary.largest`."""
        return jnp.max(jnp.abs(x), initial=0)

    def total(self, x: Any) -> Any:
        """See `FunctionalLibrary.total`."""
        return _sum(x, None)

    def stack(self, values: list[Any]) -> Any:
        """See `FunctionalLibrary.stack`."""
        return jnp.stack(values)

    def keep_place(self, x: Any, form: Form) -> Any:
        """See `FunctionalLibrary.keep_place`."""
        devices: Any = self.devices(form)
        return jax.lax.with_sharding_constraint(x, form.place) if devices and len(devices) > 1 else x

    def compile(self, function: Callable[..., Any], donated: Sequence[int] = ()) -> Callable[..., Any]:
        """See `FunctionalLibrary.compile`."""
        return cast("Callable[..., Any]", jax.jit(function, donate_argnums=tuple(donated)))

    def read(self, x: Any) -> Any:
        """See `FunctionalLibrary.read`."""
        return np.asarray(x)

    def as_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """See `FunctionalLibrary.as_numpy`."""
        values = np.asarray(jax.device_get(array))
        return values.view(bits_dtype(str(array.dtype)))

    def from_bits(self, bits: np.ndarray[Any, Any], form: Form) -> Any:
        """See `FunctionalLibrary.from_bits`."""
        values = bits.view(jnp.dtype(form.dtype))
        return jnp.array(values) if form.place is None else jax.device_put(values, form.place, may_alias=False)


@cache
def _lender() -> Lender:
    from gradstep.arrays.jax_lending import JaxLender

    return JaxLender()


_form = attrgetter("aval", "sharding", "_pjrt_layout")


def _sum(x: Any, axis: int | None) -> Any:
    dtype = "float64" if jax.config.jax_enable_x64 else x.dtype
    return jnp.sum(x, axis=axis, dtype=dtype, keepdims=axis is not None)


JAX = Jax()
