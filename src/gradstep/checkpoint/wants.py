"""What given parameters need of a checkpoint: which arrays, and where and how these are to lie."""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradstep.arrays.library import Form, FunctionalLibrary, Library, MemoryLibrary, recognise
from gradstep.arrays.memory import Memory, axis_order
from gradstep.arrays.region import Region, Span, Where
from gradstep.arrays.stored import Stored, dtype_of
from gradstep.checkpoint.matching import RuleMatch
from gradstep.checkpoint.tensors import Shape
from gradstep.optimizer import Optimizer
from gradstep.options import thawed
from gradstep.program.formats import FLOATS, QUANTUM, compute_dtype
from gradstep.program.graph import Kind
from gradstep.program.program import Program
from gradstep.step.forms import describe_floats
from gradstep.step.match import check_parameter, walking_order
from gradstep.step.storage import Part, parts_of


@dataclass(frozen=True)
class WantInMemory:
    """The needs of a parameter in memory: its arrays, and the order of axes of those that have its shape.

    `memory` is what is here of the parameter; `parts` are the arrays of the whole one.
    """

    library: MemoryLibrary
    memory: Memory
    program: Program
    parts: Mapping[str, Part]
    walked: Sequence[int]
    sum_shape: Shape

    def land(self, slot: str, stored: Stored) -> Any:
        """A loaded array of its state as one of the library."""
        alike = self.parts[slot].kind is Kind.FULL and stored.shape == self.memory.shape
        return stored.in_memory(self.library, self.walked if alike else range(len(stored.shape)))

    @property
    def is_coded(self) -> bool:
        """Whether elements of its state are codes of 8 bits."""
        return any(part.kind is Kind.LEAD for part in self.parts.values())

    def part_of(self, slot: str, elements: Where) -> Where:
        """Where a part of the parameter lies in an array of its state."""
        if self.parts[slot].kind is Kind.FULL:
            return elements
        span = elements.where if isinstance(elements, Region) else elements
        assert isinstance(span, Span), "codes go by the order of elements"
        return Span(span.start // QUANTUM, -(-span.stop // QUANTUM))

    def land_part(self, stored: Stored) -> Any:
        """Elements of an array of its state, flat, as an array of the library."""
        return stored.in_memory(self.library, range(1))

    def land_sum(self, stored: Stored) -> Any:
        """A loaded sum as an array of the library."""
        return stored.in_memory(self.library, axis_order(self.memory))


@dataclass(frozen=True)
class WantAnew:
    """The needs of a parameter that never changes: its arrays, and the place of those that have its shape."""

    library: FunctionalLibrary
    parts: Mapping[str, Part]
    place: object
    sum_shape: Shape

    def land(self, slot: str, stored: Stored) -> Any:
        """See `WantInMemory.land`."""
        place = self.place if self.parts[slot].kind is Kind.FULL else None
        return stored.in_place_of(self.library, Form(stored.shape, stored.dtype, place))

    def land_sum(self, stored: Stored) -> Any:
        """See `WantInMemory.land_sum`."""
        return stored.in_place_of(self.library, Form(stored.shape, stored.dtype, self.place))


Want = WantInMemory | WantAnew
Wants = Mapping[str, Want]


def wants_of(
    optimizer: Optimizer, rules: Sequence[RuleMatch], frozen: Sequence[str], like: Mapping[str, Any],
    here: Callable[[Any], Any] = lambda array: array,
) -> list[Wants]:  # fmt: skip
    """What these parameters need of each optimizer with a rule, in the order of `rules`.

    `here` gives what this process has of one.

    Arrays of integers need nothing: they are a model's counters, which come along with its parameters.

    Raises:
        GradstepError: a parameter cannot be trained.
    """
    named = {name: array for name, array in like.items() if dtype_of(array) in FLOATS}
    library, moving = recognise(like=named), thawed(named, frozen)
    routes = {id(leaf): names for leaf, names in optimizer._route(named, remember=False)}
    return [
        {
            name: _want(library, rule, name, named[name], here)
            for name in routes.get(id(rule.leaf), ())
            if name in moving or name in rule.node.state  # what was frozen later has state
        }
        for rule in rules
    ]


def _want(library: Library, rule: RuleMatch, name: str, parameter: Any, here: Callable[[Any], Any]) -> Want:
    if library.in_place is True:
        form = memory = check_parameter(library, name, here(parameter))
    else:
        form, memory = describe_floats(library, parameter, f"params[{name!r}]"), None
    shape = tuple(map(int, parameter.shape))
    program = rule.leaf.program_for(rule.leaf.settings_in(rule.settings, name), len(shape))
    formats = rule.leaf.storage.formats(program.slots, form.dtype, form.dtype)
    parts = {part.name: part for part in parts_of(program, formats, shape)}
    total = Shape(compute_dtype(form.dtype), shape)
    if library.in_place is True and memory is not None:
        return WantInMemory(library, memory, program, parts, walking_order(memory, program, formats), total)
    assert library.in_place is False
    return WantAnew(library, parts, library.place_of(parameter), total)
