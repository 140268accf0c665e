"""The arrays of a checkpoint compared with those that there are, or that given parameters need."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

from gradstep.arrays.stored import dtype_of
from gradstep.checkpoint.differences import Difference, different, missing, unexpected
from gradstep.checkpoint.matching import RuleMatch, Whose
from gradstep.checkpoint.nodes import Document, Held, rule_nodes
from gradstep.checkpoint.tensors import Shape, Tensors
from gradstep.checkpoint.wants import Want, Wants

Shapes = Mapping[str, Shape]


class Comparison:
    """Finds what fits, and notes what does not.

    Args:
        document: what the checkpoint says.
        tensors: its tensors.
    """

    def __init__(self, document: Document, tensors: Tensors) -> None:
        self._document, self._tensors = document, tensors
        self.names = names_of(document)
        self.differences: list[Difference] = []

    def state(self, rule: RuleMatch, wants: Wants | None) -> dict[str, Held]:
        """What fits of an optimizer's state: what `wants` needs or, without it, what the optimizer can have.

        The state of a parameter fits as a whole or not at all. Arrays that nobody needs are left out of it.
        """
        there = rule.node.state
        here: Mapping[str, Shapes]
        if wants is None:
            here = {name: _shapes(slots) for name, slots in rule.leaf.entries.items()}
        else:
            here = {name: _wanted(want) for name, want in wants.items()}
        for name, shapes in here.items():
            if name not in there and (self.names is not None and name not in self.names):
                self.differences.append(missing(f"state[{name!r}]", _listed(shapes)))
        fitting: dict[str, Held] = {}
        for name, held in there.items():
            shapes = {slot: self._tensors.shape(key) for slot, key in held.arrays.items()}
            if wants is not None and name not in wants:
                self.differences.append(unexpected(f"state[{name!r}]", _listed(shapes)))
                continue
            own = here.get(name, {})
            allowed = rule.leaf.storage.array_names() if wants is None else own.keys()
            if self._fits(f"state[{name!r}]", shapes, own, allowed, rule.whose):
                kept = {slot: key for slot, key in held.arrays.items() if slot in allowed}
                fitting[name] = Held(held.steps, kept)
        return fitting

    def _fits(self, where: str, there: Shapes, here: Shapes, allowed: Iterable[str], whose: Whose) -> bool:
        lacking = [missing(f"{where}[{slot!r}]", str(shape)) for slot, shape in here.items() if slot not in there]
        unlike = [
            different(f"{where}[{slot!r}]", str(there[slot]), str(here[slot]))
            for slot in there
            if slot in here and there[slot] != here[slot]
        ]
        foreign = [unexpected(f"{where}[{slot!r}]", str(there[slot])) for slot in there if slot not in allowed]
        if whose == "file" and not (lacking and foreign):
            # Hyperparameters were changed after the last step: the next one makes or drops a slot, as it would have.
            lacking, foreign = [], []
        self.differences += [*lacking, *unlike, *foreign]
        return not lacking and not unlike

    def sums(self, there: Mapping[str, str], wants: Wants | None, given: Container[str]) -> dict[str, str]:
        """The keys of the sums that fit, those of parameters among `given` that want nothing, being frozen, too."""
        fitting: dict[str, str] = {}
        for name, key in there.items():
            where, found = f"sums[{name!r}]", self._tensors.shape(key)
            want = None if wants is None else wants.get(name)
            if wants is not None and name not in given:
                self.differences.append(unexpected(where, str(found)))
            elif want is not None and want.sum_shape != found:
                self.differences.append(different(where, str(found), str(want.sum_shape)))
            else:
                fitting[name] = key
        return fitting

    def parameters(self, named: Mapping[str, Any]) -> dict[str, str]:
        """The keys of the parameters that fit these."""
        there, here = self._document.parameters, _shapes(named)
        if not there:
            none = "none, because they were not saved,"
            self.differences.append(Difference("missing", "params", none, f"{len(named)} arrays"))
            return {}
        found = {name: self._tensors.shape(key) for name, key in there.items()}
        self.differences += [missing(f"params[{n!r}]", str(shape)) for n, shape in here.items() if n not in there]
        self.differences += [unexpected(f"params[{n!r}]", str(shape)) for n, shape in found.items() if n not in here]
        both = [name for name in there if name in here]
        self.differences += [
            different(f"params[{name!r}]", str(found[name]), str(here[name]))
            for name in both
            if found[name] != here[name]
        ]
        return {name: there[name] for name in both if found[name] == here[name]}


def names_of(document: Document) -> frozenset[str] | None:
    """The parameters that a checkpoint knows; None if it was made before it could know any."""
    states = [leaf.state.keys() for leaf in rule_nodes(document.optimizer)]
    return frozenset(document.stateless).union(*states) or None


def _shapes(arrays: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: Shape(dtype_of(array), tuple(array.shape)) for name, array in arrays.items()}


def _wanted(want: Want) -> dict[str, Shape]:
    return {part.name: Shape(part.dtype, tuple(part.shape)) for part in want.parts.values()}


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{slot} {shape}" for slot, shape in shapes.items()) or "no slots"
