"""Who races: every family with its usual rate, and the rules that a person brings along."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import gradstep as gs
from gradstep.cli.complaint import Complaint, raised, unknown
from gradstep.cli.race.loading import load

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
USUAL_FOR_A_RULE = 1e-3
WHAT_TO_NAME = "Name a class made by @gs.rule, or a function from a learning rate to an optimizer"


class Optimizer(Protocol):
    """What a race asks of an optimizer."""

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Slots by the name of their parameter."""
        ...

    def apply_gradients(self, grads: Any, params: Any) -> Any:
        """Take one step in place."""
        ...


@dataclass(frozen=True)
class Entrant:
    """An optimizer family: how it is built at a learning rate, and the rate around which it is tried."""

    name: str
    usual: float
    build: Callable[[float], Optimizer]
    spec: str  # how `--optimizers` names it
    note: str = ""  # what a reader of the ranking must know

    def rates(self, chosen: Sequence[float] | None) -> list[float]:
        """The rates to try, ascending: the chosen ones, or the usual one times each factor."""
        return list(chosen) if chosen else [float(f"{self.usual * factor:.6g}") for factor in FACTORS]


class Matrices:
    """The filter that gives Muon what it can orthogonalize."""

    def __call__(self, name: str, parameter: Any) -> bool:
        """Whether the parameter has two dimensions or more."""
        return len(parameter.shape) >= 2

    def __repr__(self) -> str:
        return "matrices"


def _muon(rate: float) -> Optimizer:
    # Muon's weight decay is part of the gradient, and orthogonalizing raises it to the size of a full step
    # once the gradient is small: on a short race it would decide the result alone.
    rest = gs.AdamW(float(f"{rate / 20:.6g}"), bias_correction=True)
    return gs.MultiOptimizer([gs.Muon(rate, weight_decay=0.0), rest], [Matrices()])


def _plain(name: str, usual: float, build: Callable[[float], Optimizer]) -> Entrant:
    return Entrant(name, usual, build, spec=name.lower())


# The usual rates are first guesses: the defaults of papers and frameworks, or the middle of the range in use.
# Lion's paper advises a third to a tenth of AdamW's; Muon's 0.02 goes with 0.001 for the AdamW beside it.
FAMILIES = (
    _plain("SGD", 3e-2, lambda rate: gs.SGD(rate, momentum=0.9)),
    _plain("RMSprop", 1e-3, lambda rate: gs.RMSprop(rate)),
    _plain("Adagrad", 3e-2, lambda rate: gs.Adagrad(rate)),
    _plain("AdaDelta", 1.0, lambda rate: gs.AdaDelta(rate)),
    _plain("Adam", 1e-3, lambda rate: gs.Adam(rate, bias_correction=True)),
    _plain("AdamW", 1e-3, lambda rate: gs.AdamW(rate, bias_correction=True)),
    _plain("Adamax", 5e-3, lambda rate: gs.Adamax(rate)),
    _plain("Lion", 3e-4, lambda rate: gs.Lion(rate)),
    _plain("Adafactor", 1e-2, lambda rate: gs.Adafactor(rate)),
    Entrant(
        "Muon+AdamW",
        2e-2,
        _muon,
        spec="muon",
        note="Muon+AdamW: Muon at this rate for matrices, AdamW at 1/20 of it for the rest",
    ),
)


def choose(names: str | None) -> list[Entrant]:
    """The entrants that `--optimizers` names, in its order; all families when it is not given."""
    if names is None:
        return list(FAMILIES)
    known = {key: family for family in FAMILIES for key in (family.spec, family.name.lower())}
    chosen: dict[str, Entrant] = {}
    for spec in filter(None, (part.strip() for part in names.split(","))):
        if ".py" in spec:
            entrant = _own(spec)
        elif (entrant := known.get(spec.lower())) is None:
            raise unknown("--optimizers", spec, known, f"{_family_names()}, or file.py:Name")
        if entrant.name in chosen and chosen[entrant.name].spec != entrant.spec:
            entrant = replace(entrant, name=spec)
        chosen[entrant.name] = entrant
    if not chosen:
        raise Complaint(f"--optimizers names nobody; choose from {_family_names()}, or file.py:Name")
    return list(chosen.values())


def read_rates(text: str | None) -> list[float] | None:
    """The learning rates that `--rates` lists, ascending and each once; none when it is not given."""
    if text is None:
        return None
    rates: set[float] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise Complaint(f"--rates: {part!r} is no learning rate; write positive numbers: --rates 1e-3,3e-3,1e-2")
        rates.add(rate)
    if not rates:
        raise Complaint("--rates is empty; write positive numbers: --rates 1e-3,3e-3,1e-2")
    return sorted(rates)


def try_entrants(
    entrants: Sequence[Entrant], rates: Sequence[float] | None, make_params: Callable[[], Any], grads: Any
) -> None:
    """Build every entrant at every rate and let it take one step: what fails, fails before the race."""
    for entrant in entrants:
        try:
            built = [entrant.build(rate) for rate in entrant.rates(rates)]
            first = built[0]
            if not callable(getattr(first, "apply_gradients", None)) or not hasattr(first, "state"):
                raise Complaint(
                    f"{entrant.spec} gave a {type(first).__name__}, which is no optimizer: it has no "
                    f"apply_gradients and state. {WHAT_TO_NAME}"
                )
            first.apply_gradients(grads, make_params())
        except Complaint:
            raise
        except gs.GradstepError as error:
            raise Complaint(f"{entrant.name} cannot race: {error}") from None
        except Exception as error:
            raise raised(f"{entrant.name}({entrant.rates(rates)[0]:g})", error, None) from None


def _own(spec: str) -> Entrant:
    build, _ = load(spec, default="rule")
    if not callable(build):
        raise Complaint(f"{spec} is a {type(build).__name__}, which builds no optimizer. {WHAT_TO_NAME}")
    name = getattr(build, "__name__", spec)
    return Entrant(name, _usual(build), cast("Callable[[float], Optimizer]", build), spec)


def _usual(build: Callable[..., object]) -> float:
    """The default of the rule's learning rate, or else 0.001."""
    try:
        parameters = inspect.signature(getattr(build, "rule", build)).parameters
    except (TypeError, ValueError):
        return USUAL_FOR_A_RULE
    rate = parameters["learning_rate"].default if "learning_rate" in parameters else None
    return float(rate) if isinstance(rate, (int, float)) and rate > 0 else USUAL_FOR_A_RULE


def _family_names() -> str:
    return ", ".join(family.spec for family in FAMILIES)
