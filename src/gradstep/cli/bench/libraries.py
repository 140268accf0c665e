"""The array libraries: how each makes arrays, waits until they are there, and takes a number of threads."""

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import gradstep as gs
from gradstep.program.threads import pool


class Library:
    """An array library; NumPy itself where nothing else is said."""

    name: ClassVar[str] = "numpy"
    waits: ClassVar[bool] = False  # whether a step returns before its arrays are there
    options: ClassVar[dict[str, bool]] = {}  # for ours

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def copy(self, array: NDArray[np.float32]) -> Any:
        """A new array with these values."""
        return array.astype(importlib.import_module("ml_dtypes").bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def wait(self, arrays: Iterable[Any]) -> None:
        """Return when these arrays are there."""

    def forget(self) -> None:
        """Drop what was compiled for other cases."""

    def threads(self, count: int) -> str:
        """Take this many threads, if the library lets itself be told; returns how many it uses."""
        return str(count)


class Torch(Library):
    """PyTorch, on the CPU."""

    name = "torch"

    def copy(self, array: NDArray[np.float32]) -> Any:
        torch: Any = importlib.import_module("torch")
        return torch.from_numpy(array).to(getattr(torch, self.dtype), copy=True)

    def forget(self) -> None:
        # Otherwise the limit on compiling the same function again is soon reached, and peers go on without.
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()

    def threads(self, count: int) -> str:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(count)
        return str(torch.get_num_threads())


class Jax(Library):
    """JAX, on its default device."""

    name = "jax"
    waits = True
    options: ClassVar[dict[str, bool]] = {"donate": True}

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        if dtype == "float64":
            jax: Any = importlib.import_module("jax")
            jax.config.update("jax_enable_x64", True)

    def copy(self, array: NDArray[np.float32]) -> Any:
        jnp: Any = importlib.import_module("jax.numpy")
        return jnp.array(array, self.dtype)

    def wait(self, arrays: Iterable[Any]) -> None:
        jax: Any = importlib.import_module("jax")
        jax.block_until_ready(list(arrays))

    def threads(self, count: int) -> str:
        jax: Any = importlib.import_module("jax")
        return f"as it chooses, on {jax.default_backend()}"


class Mlx(Library):
    """MLX, on its default device."""

    name = "mlx"
    waits = True
    options: ClassVar[dict[str, bool]] = {"donate": True}

    def copy(self, array: NDArray[np.float32]) -> Any:
        mx: Any = importlib.import_module("mlx.core")
        made = mx.array(array).astype(getattr(mx, self.dtype))
        mx.eval(made)
        return made

    def wait(self, arrays: Iterable[Any]) -> None:
        mx: Any = importlib.import_module("mlx.core")
        mx.eval(list(arrays))

    def threads(self, count: int) -> str:
        mx: Any = importlib.import_module("mlx.core")
        return f"as it chooses, on {mx.default_device().type.name}"


LIBRARIES: dict[str, Callable[[str], Library]] = {kind.name: kind for kind in (Library, Torch, Jax, Mlx)}


def set_threads(libraries: Iterable[Library], asked: int | None) -> dict[str, str]:
    """Give everyone the same number of threads, as far as they let themselves be told; returns what each uses."""
    count = pool.threads if asked is None else asked
    gs.set_num_threads(count)
    return {"gradstep": str(count), **{lib.name: lib.threads(count) for lib in libraries if lib.name != "numpy"}}
