"""Gradients and slots of arrays that never change, checked against their parameter."""

from collections.abc import Container, Mapping
from typing import Any

from gradstep.arrays.library import Form, FunctionalLibrary, owner
from gradstep.arrays.stored import Stored
from gradstep.errors import (
    AliasedParametersError,
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    ShapeError,
    TracingError,
)
from gradstep.program.formats import EXPECTED, FLOATS, Format
from gradstep.program.graph import Kind
from gradstep.program.program import Program
from gradstep.step.match import REMEDY, check_stored
from gradstep.step.storage import parts_of


def describe_floats(library: FunctionalLibrary, array: Any, what: str) -> Form:
    """The form of an array of real numbers."""
    form = library.describe(array, what)
    if form.dtype not in FLOATS:
        raise DtypeError(f"{what} has dtype {form.dtype}; {EXPECTED}")
    return form


def make_slots(
    library: FunctionalLibrary,
    name: str,
    form: Form,
    program: Program,
    formats: Mapping[str, Format],
    slots: Mapping[str, Any],
) -> dict[str, Any]:
    """The arrays of the state that the program keeps: those there are, checked, and zeros for the others."""
    found: dict[str, Any] = {}
    for part in parts_of(program, formats, form.shape):
        fresh = Form(part.shape, part.dtype, form.place if part.kind is Kind.FULL else None)
        there = slots.get(part.name)
        if there is None:
            found[part.name] = library.zeros(fresh)
        elif isinstance(there, Stored):
            check_stored(name, part.name, there, part.shape, part.dtype)
            found[part.name] = there.in_place_of(library, fresh)
        else:
            _check_slot(library, name, part.name, there, Form(part.shape, part.dtype, form.place))
            found[part.name] = there
    return found


def _check_slot(library: FunctionalLibrary, name: str, slot: str, array: Any, wanted: Form) -> None:
    what, remedy = f"state[{name!r}][{slot!r}]", REMEDY
    if owner(array) is not library:
        raise ArgumentTypeError(
            f"{what} is a {type(array).__module__}.{type(array).__name__}, but the parameter now belongs to "
            f"{library.name}; {remedy}"
        )
    form = library.describe(array, what)
    here, there = library.devices(form), library.devices(wanted)
    if here and there and here != there:
        raise DeviceError(f"{what} is on {here}, but params[{name!r}] now is on {there}; {remedy}")
    if form.shape != wanted.shape:
        raise ShapeError(f"{what} has shape {form.shape}, but params[{name!r}] now needs {wanted.shape}; {remedy}")
    if form.dtype != wanted.dtype:
        raise DtypeError(f"{what} has dtype {form.dtype}, but params[{name!r}] now needs {wanted.dtype}; {remedy}")


def check_devices(library: FunctionalLibrary, forms: Mapping[str, Form]) -> None:
    """Raise for parameters on different devices: one function updates all of them."""
    first: tuple[str, object] | None = None
    for name, form in forms.items():
        devices = library.devices(form)
        if not devices:
            continue
        first = first or (name, devices)
        if devices != first[1]:
            raise DeviceError(
                f"params[{first[0]!r}] is on {first[1]}, but params[{name!r}] is on {devices}; one step takes "
                "parameters on the same devices: bring them together, or use an optimizer for each"
            )


def check_gradient(library: FunctionalLibrary, name: str, gradient: Any, wanted: Form) -> None:
    """Raise if a gradient does not go with its parameter."""
    form = describe_floats(library, gradient, f"grads[{name!r}]")
    if form.shape != wanted.shape:
        raise ShapeError(f"grads[{name!r}] has shape {form.shape}, but params[{name!r}] has {wanted.shape}")
    here, there = library.devices(form), library.devices(wanted)
    if here and there and here != there:
        raise DeviceError(
            f"grads[{name!r}] is on {here}, but params[{name!r}] is on {there}; bring them together first"
        )


def refuse_tracing(library: FunctionalLibrary, arrays: list[Any]) -> None:
    """Raise `TracingError` for arrays inside of a transformation."""
    if library.is_tracing(arrays):
        raise tracing_error(library)


def tracing_error(library: FunctionalLibrary) -> TracingError:
    """What is said about a step inside of a transformation."""
    return TracingError(
        f"these arrays stand for values inside a transformation of {library.name}, where the step counter would be "
        f"frozen; step outside of it, or use gradstep.{library.adapter} inside"
    )


def refuse_shared(named: Mapping[str, Any], written: Container[str]) -> None:
    """Raise `AliasedParametersError` for one array under two names, of which one is written."""
    first: dict[int, str] = {}
    for name, array in named.items():
        other = first.setdefault(id(array), name)
        if other != name and (name in written or other in written):
            raise AliasedParametersError(
                f"params[{other!r}] and params[{name!r}] are one array, which a step would part; pass shared arrays "
                "once, under one name, with the sum of the gradients"
            )
