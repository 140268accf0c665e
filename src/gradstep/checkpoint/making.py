"""An optimizer made new, as a checkpoint describes it."""
# pyright: reportPrivateUsage=false

from collections.abc import Mapping
from typing import Any

import gradstep
from gradstep.accumulate import Accumulate
from gradstep.checkpoint.nodes import AccumulateNode, DiLoCoNode, MultiNode, Node, RuleNode
from gradstep.checkpoint.values import Decoder, Functions
from gradstep.errors import CheckpointError, ConfigurationError
from gradstep.multi import MultiOptimizer
from gradstep.optimizer import Optimizer
from gradstep.options import DEFAULTS, Options
from gradstep.rules.base import RuleOptimizer
from gradstep.step.storage import StorageOptions
from gradstep.storage_options import STORAGE_DEFAULTS

Rules = Mapping[str, type[RuleOptimizer]]


def make(node: Node, rules: Rules, functions: Functions, what: str) -> Optimizer:
    """A new optimizer without state. No schedule is called.

    Raises:
        ConfigurationError: the checkpoint names rules or functions that are not given.
        GradstepError: it has hyperparameters or options that cannot be.
    """
    decoder = Decoder(functions)
    made = _Maker(rules, decoder, what).make("opt", node)
    decoder.refuse_lacking(what)
    return made


class _Maker:
    def __init__(self, rules: Rules, decoder: Decoder, what: str) -> None:
        self._rules, self._decoder, self._what = rules, decoder, what

    def make(self, where: str, node: Node) -> Optimizer:
        """The optimizer and all below."""
        if isinstance(node, AccumulateNode):
            return Accumulate(self.make(where, node.optimizer), every=node.every)
        if isinstance(node, DiLoCoNode):
            raise ConfigurationError(
                f"{self._what}: {where} is a DiLoCo, which needs the other ranks: make it with its group, and load "
                "into it: opt.load(path, params)"
            )
        if isinstance(node, MultiNode):
            children = [self.make(f"{where}.optimizers[{i}]", child) for i, (_, child) in enumerate(node.routes)]
            filters = [self._filter(f"{where}'s filters[{i}]", accepts) for i, (accepts, _) in enumerate(node.routes)]
            return MultiOptimizer(children, filters[:-1], **_options(node.options))
        return self._make_rule(where, node)

    def _filter(self, where: str, accepts: Any) -> Any:
        if accepts is None:
            return None
        return accepts["name"] if accepts["kind"] == "glob" else self._decoder.decode(where, accepts)

    def _make_rule(self, where: str, node: RuleNode) -> RuleOptimizer:
        family = self._family(where, node)
        names = list(family._fields)
        if set(node.hyperparameters) != set(names) or node.storage.keys() - STORAGE_DEFAULTS.keys():
            raise CheckpointError(
                f"{self._what}: {where} is a {node.family} with {', '.join(node.hyperparameters)}; here it has "
                f"{', '.join(names)}"
            )
        given = {name: self._decoder.decode(f"{where}.{name}", node.hyperparameters[name]) for name in names}
        settings = family._blank_settings().restored(given, node.resolved, node.step)
        return family._from_parts(settings, StorageOptions(**node.storage), _options(node.options))

    def _family(self, where: str, node: RuleNode) -> type[RuleOptimizer]:
        name = str(node.family)
        family: Any = getattr(gradstep, name, None) if node.ours else self._rules.get(name)
        if isinstance(family, type) and issubclass(family, RuleOptimizer):
            return family
        if node.ours:
            raise CheckpointError(f"{self._what}: {where} is a {name}, which this version of gradstep does not have")
        raise ConfigurationError(
            f"{self._what}: {where} is a {name}, a rule of your own, which a checkpoint cannot hold; pass the class: "
            f"rules=[{name}]"
        )


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as arguments, checked."""
    options = Options(given)
    return {name: getattr(options, name) for name in DEFAULTS}
