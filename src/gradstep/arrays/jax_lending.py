"""Memory of JAX on the CPU that an array gives up, so that new arrays can be written there before anybody sees them."""

import importlib
from functools import cache
from operator import is_
from typing import Any

from gradstep.arrays.lending import lends, succeeds
from gradstep.arrays.library import Located
from gradstep.arrays.memory import Bits, bits_at

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")


class JaxLender:
    """Renews arrays by a compiled function that does nothing and to which they are donated.

    JAX waits for whoever still reads the old arrays, and copies where memory is shared with somebody else, such as a
    view of NumPy. So the new arrays' memory is theirs alone.
    """

    asks_holders = False

    def __init__(self) -> None:
        self._renew: Any = jax.jit(_same, donate_argnums=0)

    def can_lend(self, written: list[Any], read: list[Any]) -> bool:
        """See `Lender.can_lend`."""
        if not written or jax.config.jax_disable_jit or not all(map(_lies_plainly, [*written, *read])):
            return False
        return all(array.sharding == written[0].sharding for array in written) and works()

    def locate(self, arrays: list[Any]) -> Located:
        """See `Lender.locate`. All of them lie plainly, or nothing is lent."""
        jax.block_until_ready(arrays)
        return Located(arrays, [array.unsafe_buffer_pointer() for array in arrays])

    def view(self, array: Any, address: int) -> Bits:
        """See `Lender.view`."""
        return bits_at(address, array.shape, str(array.dtype))

    def renew(self, arrays: list[Any]) -> list[Any]:
        """See `Lender.renew`."""
        (device,) = arrays[0].sharding.device_set
        with jax.default_device(device):  # where arrays that have been put nowhere stay
            new: list[Any] = self._renew(arrays)
            if any(map(is_, new, arrays)):  # under `jax.disable_jit`
                new = [jnp.copy(array) for array in arrays]
        return new


def _same(arrays: list[Any]) -> list[Any]:
    return arrays


def _lies_plainly(array: Any) -> bool:
    """Whether the array has elements in C order in the memory of this process, all of them in one place."""
    if not isinstance(array.sharding, jax.sharding.SingleDeviceSharding):
        return False
    (device,) = array.sharding.device_set
    layout = getattr(getattr(array, "format", None), "layout", None)
    order = getattr(layout, "major_to_minor", None)
    return device.platform == "cpu" and order == tuple(range(array.ndim)) and hasattr(array, "_pjrt_layout")


def works() -> bool:
    """Whether this version of JAX keeps memory in place, and arrays show what is written there; tried out once."""
    return succeeds(_works)


@cache
def _works() -> bool:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        old, held = (jnp.arange(1024, dtype=jnp.float32) for _ in range(2))
    return lends(JaxLender(), [old, held]) and old.is_deleted()
