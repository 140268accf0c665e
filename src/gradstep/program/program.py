"""A traced rule cut into sweeps: passes over the elements, with the small values computed between them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradstep.lazy import computed_once
from gradstep.program.graph import REDUCTIONS, Kind, Symbol, reachable
from gradstep.program.newton_schulz import ProductDtype
from gradstep.program.scalars import ScalarExpressions


class Store(NamedTuple):
    """One result of a sweep and the array that receives it: `w`, a slot, or scratch."""

    place: str
    value: Symbol


class Sweep:
    """One pass over all elements: what it sums, and what it writes."""

    def __init__(self, reductions: Sequence[Symbol], stores: Sequence[Store]) -> None:
        self.reductions, self.stores = tuple(reductions), tuple(stores)

    @computed_once
    def roots(self) -> list[Symbol]:
        """The values that the pass computes for every element."""
        return [reduction.args[0] for reduction in self.reductions] + [store.value for store in self.stores]

    @computed_once
    def body(self) -> list[Symbol]:
        """The operations on every element, each after its arguments."""
        return [symbol for symbol in self._visited if not is_input(symbol)]

    @computed_once
    def inputs(self) -> list[Symbol]:
        """The arrays and small values that the operations read, and scalars."""
        return [symbol for symbol in self._visited if is_input(symbol)]

    @computed_once
    def _visited(self) -> list[Symbol]:
        return reachable(self.roots, is_input)


def is_input(symbol: Symbol) -> bool:
    """Whether a sweep takes the value from memory or from the scalars instead of computing it."""
    return symbol.kind is not Kind.FULL or symbol.op in ("array", "orthogonalize")


def place_of(symbol: Symbol) -> str:
    """The name of the array that holds an input's value."""
    return symbol.attribute if symbol.op == "array" else f"{symbol.op}:{symbol.index}"


class Program:
    """A rule for one configuration and number of dimensions.

    `outputs` maps `w` and the kept slots to their new values; `slots` gives the kind of each kept slot.
    """

    def __init__(self, name: str, slots: Mapping[str, Kind], outputs: Mapping[str, Symbol]) -> None:
        self.name, self.slots, self.outputs = name, slots, outputs
        self.levels: dict[int, int] = {}
        for symbol in self.symbols:
            level = max((self.levels[arg.index] for arg in symbol.args), default=0)
            self.levels[symbol.index] = level + (ends_a_sweep(symbol))

    @computed_once
    def symbols(self) -> list[Symbol]:
        """Every operation that the outputs need, each after its arguments."""
        return reachable(self.outputs.values())

    @computed_once
    def sweeps(self) -> list[Sweep]:
        """The passes in order; only the last one writes `w` and slots."""
        last = max(self.levels[output.index] for output in self.outputs.values())
        return [self._sweep(level, final=level == last) for level in range(last + 1)]

    def _sweep(self, level: int, *, final: bool) -> Sweep:
        ending = [s for s in self.symbols if ends_a_sweep(s) and self.levels[s.args[0].index] == level]
        stores = [Store(place_of(s), s.args[0]) for s in ending if s.op == "orthogonalize"]
        if final:
            stores += [
                Store(place, value)
                for place, value in self.outputs.items()
                if value.kind is Kind.FULL and not is_unchanged(place, value)
            ]
        return Sweep([s for s in ending if s.op in REDUCTIONS], stores)

    @computed_once
    def scalars(self) -> ScalarExpressions:
        """The host's share: every scalar that an array operation takes, except literal numbers."""
        used = {
            arg.index: arg
            for symbol in self.symbols
            if symbol.kind is not Kind.HOST
            for arg in symbol.args
            if arg.kind is Kind.HOST and arg.op != "constant"
        }
        return ScalarExpressions(self.name, list(used.values()))

    @computed_once
    def scalar_places(self) -> dict[int, int]:
        """Where each scalar stands in the table: symbol index to column."""
        return {symbol.index: place for place, symbol in enumerate(self.scalars.outputs)}

    @computed_once
    def factored(self) -> bool:
        """Whether rows and columns matter, not only elements."""
        return any(Kind.LEAD <= symbol.kind <= Kind.COLUMN for symbol in self.symbols)

    @computed_once
    def ordered(self) -> bool:
        """Whether the order of the elements matters, so that arrays must be read in C order."""
        return any(ends_a_sweep(symbol) for symbol in self.symbols)

    @computed_once
    def matrices(self) -> list[list[Symbol]]:
        """For each sweep, the matrix operations that follow it."""
        following: list[list[Symbol]] = [[] for _ in self.sweeps]
        for symbol in self.symbols:
            if symbol.op == "orthogonalize":
                following[self.levels[symbol.args[0].index]].append(symbol)
        return following

    @computed_once
    def product_dtypes(self) -> set[ProductDtype]:
        """The dtypes in which matrix operations form their products; None is that of the computation."""
        return {symbol.attribute.dtype for following in self.matrices for symbol in following}

    @computed_once
    def small_outputs(self) -> dict[str, Symbol]:
        """The slots that hold row or column statistics."""
        return {place: value for place, value in self.outputs.items() if value.kind is not Kind.FULL}

    @property
    def key(self) -> Any:
        """Equal for programs that do the same: their graphs, spelled out."""
        return (
            tuple(self.slots.items()),
            tuple((place, value.index) for place, value in self.outputs.items()),
            tuple((s.index, s.op, tuple(arg.index for arg in s.args), repr(s.attribute)) for s in self.symbols),
        )


def ends_a_sweep(symbol: Symbol) -> bool:
    """Whether all elements must be seen before the value is known."""
    return symbol.op == "orthogonalize" or (symbol.op in REDUCTIONS and symbol.args[0].kind is Kind.FULL)


def is_unchanged(place: str, value: Symbol) -> bool:
    """Whether an output is simply its old value."""
    return value.op == "array" and value.attribute == place


def small_inputs(sweep: Sweep) -> Iterator[Symbol]:
    """The values of a sweep that are smaller than the parameter but no scalars."""
    for source in sweep.inputs:
        if source.kind not in (Kind.FULL, Kind.HOST):
            yield source


def dense_places(sweeps: Iterable[Sweep]) -> list[str]:
    """The full-size arrays that the sweeps read or write, in a stable order."""
    places: dict[str, None] = {}
    for sweep in sweeps:
        for source in sweep.inputs:
            if source.kind is Kind.FULL:
                places[place_of(source)] = None
        for store in sweep.stores:
            places[store.place] = None
    return list(places)
