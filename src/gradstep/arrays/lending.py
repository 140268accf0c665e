"""Whether a lender does what is asked of it, tried out on two arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gradstep.arrays.library import Lender


def succeeds(trial: Callable[[], bool]) -> bool:
    """What a trial says; an error is a no that may be asked again."""
    try:
        return trial()
    except Exception:  # inside of a transformation, or where the library gives no addresses
        return False


def lends(lender: Lender, arrays: list[Any]) -> bool:
    """Whether a new array lies where the old one did, is a copy where that is held, and shows what is written there.

    Args:
        lender: who is tried out.
        arrays: two of the same elements, which nobody else holds.
    """
    _, before = lender.locate(arrays)
    held = np.asarray(arrays[1])
    elements = held.copy()
    arrays[:] = lender.renew(arrays)
    new, after = lender.locate(arrays)
    for array, address in zip(new, after, strict=True):
        lender.view(array, address).values[:] = 7
    written = all(bool((np.asarray(array) == 7).all()) for array in new)
    return written and after[0] == before[0] and bool((held == elements).all())
