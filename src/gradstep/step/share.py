"""What one optimizer takes in a step for arrays that never change."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from gradstep.arrays.library import FunctionalLibrary
from gradstep.step.forms import describe_floats, make_slots
from gradstep.step.intake import Intake
from gradstep.step.leaf import Leaf

Slots: TypeAlias = dict[str, Any]
"""The arrays of one parameter's state, by name."""


class FunctionalShare:
    """The gradients that one optimizer takes in this step, and the slots that they need."""

    def __init__(
        self, leaf: Leaf, names: list[str], library: FunctionalLibrary, params: Mapping[str, Any], intake: Intake
    ) -> None:
        self.leaf, self.names, self.rows = leaf, names, leaf.reserve(names)
        self.forms = {name: describe_floats(library, params[name], f"params[{name!r}]") for name in names}
        self.readings = {name: intake.reading(name) for name in names}
        self.programs = {
            name: leaf.program(name, len(form.shape), self.readings[name]) for name, form in self.forms.items()
        }
        self.formats = {
            name: leaf.storage.formats(self.programs[name].slots, form.dtype, form.dtype)
            for name, form in self.forms.items()
        }
        self._made = {
            name: make_slots(
                library, name, self.forms[name], self.programs[name], self.formats[name], leaf.slots_of(name)
            )
            for name in names
        }

    @property
    def published(self) -> bool:
        """Whether the slots are the optimizer's already."""
        return not self._made

    def slots(self) -> list[Slots]:
        """The slots of each parameter as they are now."""
        return [self._made[name] if self._made else self.leaf.slots_of(name) for name in self.names]

    def adopt(self, slots: Sequence[Slots]) -> None:
        """Let the optimizer adopt what a step has made."""
        self._made = {}
        self.leaf.adopt_slots(dict(zip(self.names, slots, strict=True)))
