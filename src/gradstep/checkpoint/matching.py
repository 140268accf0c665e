"""The tree of optimizers that a checkpoint describes, matched with the one that it is loaded into."""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from gradstep.accumulate import Accumulate
from gradstep.checkpoint.differences import Difference, different, missing, unexpected
from gradstep.checkpoint.nodes import AccumulateNode, DiLoCoNode, MultiNode, Node, RuleNode
from gradstep.checkpoint.snapshot import encode_storage, is_ours
from gradstep.checkpoint.values import Decoder, Functions
from gradstep.distributed.diloco import DiLoCo
from gradstep.multi import MultiOptimizer
from gradstep.optimizer import Optimizer
from gradstep.options import Options
from gradstep.rules.base import RuleOptimizer
from gradstep.settings import Settings
from gradstep.step.leaf import Leaf, rule_arguments
from gradstep.storage_options import STORAGE_DEFAULTS
from gradstep.wrapper import Wrapper

Whose: TypeAlias = Literal["file", "mine"]

OPTIONS = ("clip_norm", "nonfinite", "frozen")  # `donate` changes no number and is decided by who loads


@dataclass(frozen=True)
class RuleMatch:
    """An optimizer with a rule, what the checkpoint has for it, and the hyperparameters that it gets: `whose`."""

    leaf: Leaf
    node: RuleNode
    settings: Settings
    whose: Whose


@dataclass
class Matching:
    """Everything that the two trees have in common, and everything in which they differ.

    Attributes:
        rules: the optimizers with rules that are on both sides.
        outer: the outer steps of a `DiLoCo` on both sides; None if there are none.
        round: the micro-batches of an `Accumulate` on both sides; None if there are none, or they cannot go on.
        differences: what is on one side only, or different.
        changes: what sets counters, options and the rest that is no state.
        frozen: the globs that the outermost optimizer will have.
    """

    rules: list[RuleMatch] = field(default_factory=list[RuleMatch])
    round: AccumulateNode | None = None
    outer: DiLoCoNode | None = None
    differences: list[Difference] = field(default_factory=list[Difference])
    changes: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])
    frozen: Sequence[str] = ()


def match_trees(
    here: Optimizer, mine: Node, there: Node, whose: Whose, functions: Functions, what: str
) -> Matching:  # fmt: skip
    """Match two trees; nothing is changed.

    Args:
        here: the optimizer.
        mine: what a checkpoint of it would say.
        there: what the checkpoint says.
        whose: whose hyperparameters count.
        functions: those that the checkpoint only names.
        what: what the checkpoint is called in errors.

    Raises:
        ConfigurationError: the checkpoint names functions that nobody has.
        GradstepError: it has hyperparameters or options that cannot be.
    """
    matcher = _Matcher(whose, Decoder(functions))
    matcher.found.frozen = here.frozen
    matcher.match("opt", here, mine, there)
    matcher.decoder.refuse_lacking(what, ', or keep your own hyperparameters: hyperparameters="mine"')
    return matcher.found


class _Matcher:
    def __init__(self, whose: Whose, decoder: Decoder) -> None:
        self._whose: Whose = whose
        self.decoder, self.found = decoder, Matching()

    def match(self, where: str, here: Optimizer, mine: Node, there: Node, *, outermost: bool = True) -> None:
        """Match two optimizers and all below."""
        if isinstance(mine, DiLoCoNode) or isinstance(there, DiLoCoNode):
            self._match_outer(where, here, mine, there)
            return
        if isinstance(here, Wrapper) and not isinstance(here, Accumulate):  # it leaves no trace in a checkpoint
            here = here.optimizer
        if isinstance(mine, AccumulateNode) or isinstance(there, AccumulateNode):
            self._match_rounds(where, here, mine, there)
        elif isinstance(here, MultiOptimizer) and isinstance(mine, MultiNode) and isinstance(there, MultiNode):
            self._match_options(here, there.options, outermost)
            self._match_routes(where, here, mine, there)
        elif isinstance(here, RuleOptimizer) and isinstance(there, RuleNode):
            self._match_options(here, there.options, outermost)
            self._match_rules(where, here, there)
        else:
            self._differ(where, title_of(there), title_of(mine))

    def _differ(self, where: str, file: str, here: str) -> None:
        self.found.differences.append(different(where, file, here))

    def _match_rounds(self, where: str, here: Optimizer, mine: Node, there: Node) -> None:
        own = mine if isinstance(mine, AccumulateNode) else None
        other = there if isinstance(there, AccumulateNode) else None
        if own is not None and other is not None and own.every == other.every:
            self.found.round = other
        elif self._whose == "file" or own is None or other is None or other.micro_step:
            named = [None if one is None else f"Accumulate(every={one.every})" for one in (other, own)]
            self._differ(where, named[0] or "no Accumulate", named[1] or "no Accumulate")
        inner = here.optimizer if isinstance(here, Accumulate) else here
        self.match(where, inner, own.optimizer if own else mine, other.optimizer if other else there)

    def _match_outer(self, where: str, here: Optimizer, mine: Node, there: Node) -> None:
        own = mine if isinstance(mine, DiLoCoNode) else None
        other = there if isinstance(there, DiLoCoNode) else None
        named = [one and f"DiLoCo(every={one.every}, wire={one.wire!r})" for one in (other, own)]
        if own and other and (self._whose == "mine" or named[0] == named[1]):
            self.found.outer = other
        else:
            self._differ(where, named[0] or "no DiLoCo", named[1] or "no DiLoCo")
        inner = here.optimizer if isinstance(here, DiLoCo) else here
        self.match(where, inner, own.optimizer if own else mine, other.optimizer if other else there)

    def _match_options(self, here: Optimizer, options: Mapping[str, Any], outermost: bool) -> None:
        given = {name: options[name] for name in OPTIONS if name in options} if self._whose == "file" else {}
        checked = Options(given)
        if outermost and "frozen" in given:
            self.found.frozen = checked.frozen
        self.found.changes += [lambda name=name: setattr(here, name, getattr(checked, name)) for name in given]

    def _match_routes(self, where: str, here: MultiOptimizer, mine: MultiNode, there: MultiNode) -> None:
        self.found.changes.append(lambda: here._go_on_from(there.step))  # everybody, also who is not there
        own, other = by_route(mine), by_route(there)
        for route, place in own.items():
            child, (_, node) = here.optimizers[place], mine.routes[place]
            if route in other:
                _, counterpart = there.routes[other[route]]
                self.match(f"{where}[{route}]", child, node, counterpart, outermost=False)
            else:
                self.found.differences.append(missing(f"{where}[{route}]", title_of(node)))
        for route, place in other.items():
            if route not in own:
                self.found.differences.append(unexpected(f"{where}[{route}]", title_of(there.routes[place][1])))

    def _match_rules(self, where: str, here: RuleOptimizer, there: RuleNode) -> None:
        family, leaf = type(here), here._leaf
        slots = rule_arguments(family.rule)[0]
        anybody = there.family is None
        if not anybody and (there.family, there.ours) != (family.__name__, is_ours(family)):
            self._differ(where, title_of(there), _spell(family.__name__, ours=is_ours(family)))
            return
        if not (set(there.slots) <= set(slots) if anybody else there.slots == slots):
            self._differ(f"{where}'s slots", ", ".join(there.slots) or "none", ", ".join(slots) or "none")
            return
        for option, value in there.storage.items():
            own = encode_storage(getattr(leaf.storage.options, option)) if option in STORAGE_DEFAULTS else None
            if own != value:
                self._differ(f"{where}.{option}", repr(value), repr(own))
        whose = self._whose if there.hyperparameters else "mine"  # a bridge may not know any
        self.found.rules.append(RuleMatch(leaf, there, self._settings(where, leaf, there), whose))

    def _settings(self, where: str, leaf: Leaf, there: RuleNode) -> Settings:
        own = leaf.settings
        if self._whose == "mine":
            return own.restored(own.given, {}, there.step)
        known = {name: data for name, data in there.hyperparameters.items() if name in own.given}
        for name in there.hyperparameters.keys() - known.keys():
            self.found.differences.append(unexpected(f"{where}.{name}", repr(there.hyperparameters[name])))
        for name in own.given.keys() - known.keys() if there.family is not None else ():
            self.found.differences.append(missing(f"{where}.{name}", repr(own.given[name])))
        decoded = {name: self.decoder.decode(f"{where}.{name}", data, own.given[name]) for name, data in known.items()}
        settings = own.restored({**own.given, **decoded}, there.resolved, there.step)
        leaf.check_together(settings)
        return settings


def by_route(node: MultiNode) -> dict[str, int]:
    """The place of each child by its route: its filter, with a number where several have the same."""
    places: dict[str, int] = {}
    for place, (accepts, _) in enumerate(node.routes):
        stem, number = "the rest" if accepts is None else accepts["name"], 1
        stem = repr(stem) if accepts is not None and accepts["kind"] == "glob" else stem
        route = stem
        while route in places:
            number += 1
            route = f"{stem} #{number}"
        places[route] = place
    return places


def title_of(node: Node) -> str:
    """What an optimizer is called in messages."""
    if isinstance(node, RuleNode):
        return _spell(node.family or "any rule", ours=node.ours)
    return {MultiNode: "MultiOptimizer", AccumulateNode: "Accumulate", DiLoCoNode: "DiLoCo"}[type(node)]


def _spell(family: str, *, ours: bool) -> str:
    return family if ours else f"{family} (a rule of your own)"
