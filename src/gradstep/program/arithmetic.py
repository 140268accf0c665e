"""IEEE arithmetic for what runs between kernels, whatever mode the calling thread is in."""

import ctypes
import functools
from typing import Any

from gradstep.program.compiler import arithmetic_ir, load_function


class IeeeArithmetic:
    """Within this context the thread keeps denormal numbers, as kernels do; on leaving, its mode is restored."""

    def __enter__(self) -> None:
        enter, self._leave = _switches()
        self._mode = enter()

    def __exit__(self, *_: object) -> None:
        self._leave(self._mode)


@functools.cache
def _switches() -> tuple[Any, Any]:
    # PYFUNCTYPE: too short to be worth releasing the GIL.
    ir = arithmetic_ir()
    enter = ctypes.PYFUNCTYPE(ctypes.c_int64)(load_function("enter_ieee", ir))
    return enter, ctypes.PYFUNCTYPE(None, ctypes.c_int64)(load_function("leave_ieee", ir))
