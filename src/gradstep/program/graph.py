"""Symbols: what a rule computes with while it is traced, and the graph that it leaves behind."""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum, IntEnum
from typing import Any, NoReturn

from gradstep.errors import RuleError
from gradstep.program.newton_schulz import Iteration


class Kind(IntEnum):
    """How far a value extends over a parameter's elements."""

    HOST = 0  # one float64 per step, known before any array is read
    WHOLE = 1  # one per tensor
    LEAD = 2  # one per matrix of a stack, shape (..., 1, 1)
    ROW = 3  # one per row, shape (..., rows, 1)
    COLUMN = 4  # one per column, shape (..., 1, columns)
    FULL = 5  # one per element


class Reading(Enum):
    """How a program comes by its gradient: the formula that stands for `g` in the rule."""

    PLAIN = "g"
    SCALED = "g * grad_scale"
    WEIGHED = "g * g.scale * grad_scale"  # a micro-batch with a factor of its own
    SUMMED = "(g.sum + g * g.scale) * grad_scale"  # the same, with those before it


def broadcast(kinds: Iterable[Kind]) -> Kind:
    """The kind of an elementwise result."""
    joined = set(kinds)
    return Kind.FULL if {Kind.ROW, Kind.COLUMN} <= joined else max(joined)


REDUCTIONS = ("mean", "rms", "norm")
COMPARISONS = {"<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal", "==": "equal", "!=": "not_equal"}


class Symbol:
    """A value of the traced rule: an operation on other symbols."""

    __slots__ = ("args", "attribute", "boolean", "index", "kind", "op", "trace")

    def __init__(
        self, trace: "Trace", op: str, args: tuple["Symbol", ...], attribute: Any, kind: Kind, boolean: bool
    ) -> None:
        self.trace, self.op, self.args, self.attribute = trace, op, args, attribute
        self.kind, self.boolean, self.index = kind, boolean, len(trace.symbols)

    @property
    def ndim(self) -> int:
        """The number of dimensions, a plain integer: a rule may branch on it."""
        self._needs_array("ndim")
        return self.trace.ndim

    @property
    def shape(self) -> tuple["Symbol", ...]:
        """The lengths of the dimensions, as scalars of the step."""
        self._needs_array("shape")
        return tuple(self.trace.add("dimension", (), axis, Kind.HOST) for axis in range(-self.trace.ndim, 0))

    def _needs_array(self, name: str) -> None:
        if self.kind is not Kind.FULL:
            raise RuleError(f"only whole arrays have .{name}, not {self!r}")

    def __add__(self, other: object) -> "Symbol":
        return self.trace.call("add", self, other)

    def __radd__(self, other: object) -> "Symbol":
        return self.trace.call("add", other, self)

    def __sub__(self, other: object) -> "Symbol":
        return self.trace.call("subtract", self, other)

    def __rsub__(self, other: object) -> "Symbol":
        return self.trace.call("subtract", other, self)

    def __mul__(self, other: object) -> "Symbol":
        return self.trace.call("multiply", self, other)

    def __rmul__(self, other: object) -> "Symbol":
        return self.trace.call("multiply", other, self)

    def __truediv__(self, other: object) -> "Symbol":
        return self.trace.call("divide", self, other)

    def __rtruediv__(self, other: object) -> "Symbol":
        return self.trace.call("divide", other, self)

    def __pow__(self, other: object) -> "Symbol":
        return self.trace.call("power", self, other)

    def __rpow__(self, other: object) -> "Symbol":
        return self.trace.call("power", other, self)

    def __neg__(self) -> "Symbol":
        return self.trace.call("negative", self)

    def __pos__(self) -> "Symbol":
        return self

    def __abs__(self) -> "Symbol":
        return self.trace.call("abs", self)

    def __lt__(self, other: object) -> "Symbol":
        return self.trace.call("less", self, other)

    def __le__(self, other: object) -> "Symbol":
        return self.trace.call("less_equal", self, other)

    def __gt__(self, other: object) -> "Symbol":
        return self.trace.call("greater", self, other)

    def __ge__(self, other: object) -> "Symbol":
        return self.trace.call("greater_equal", self, other)

    def __eq__(self, other: object) -> "Symbol":  # type: ignore[override]
        return self.trace.call("equal", self, other)

    def __ne__(self, other: object) -> "Symbol":  # type: ignore[override]
        return self.trace.call("not_equal", self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        if self.op == "hyperparameter" and self.attribute in self.trace.removable:
            return True
        raise RuleError(
            f"a rule cannot branch on {self!r}, which has no value while the rule is traced; "
            "write where(condition, x, y), or declare the hyperparameter static"
        )

    def _no_number(self, *_: object) -> NoReturn:
        raise RuleError(
            f"{self!r} has no value while the rule is traced and cannot become a number; "
            "use gradstep's sqrt, exp, log, … instead of math's, where(…) instead of int() or float(), "
            "or declare the hyperparameter static"
        )

    __float__ = __int__ = __index__ = __complex__ = __round__ = __trunc__ = _no_number

    def _no_numpy(self, *_: object, **__: object) -> NoReturn:
        raise RuleError(
            f"NumPy and other array libraries cannot take {self!r}; "
            "use gradstep's functions (sqrt, abs, sign, where, …), the operators + - * / and plain floats"
        )

    __array__ = __array_ufunc__ = __array_function__ = _no_numpy

    @classmethod
    def __torch_function__(cls, function: object, *_: object, **__: object) -> NoReturn:
        raise RuleError(
            f"torch's {getattr(function, '__name__', function)} cannot take a symbol; use gradstep's functions "
            "(sqrt, abs, sign, where, …), the operators + - * / and plain floats"
        )

    def _no_operation(self, *_: object) -> NoReturn:
        raise RuleError(
            f"a rule may use + - * /, comparisons and gradstep's functions on {self!r}; "
            "items, iteration, matrix products, %, //, & and | are not among them"
        )

    __getitem__ = __iter__ = __len__ = __contains__ = __matmul__ = __rmatmul__ = _no_operation
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _no_operation
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _no_operation

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuleError(
            f"symbols have no .{name}; a rule may use + - * /, comparisons, .ndim, .shape and gradstep's functions"
        )

    def __repr__(self) -> str:
        from gradstep.program.formulas import spell

        text = spell(self)
        return f"<symbol {text if len(text) < 100 else f'{text[:97]}…'}>"


class Trace:
    """One tracing of a rule: makes symbols, and makes equal ones only once."""

    def __init__(self, ndim: int, removable: Iterable[str] = ()) -> None:
        self.ndim = ndim
        self.removable = frozenset(removable)
        self.symbols: list[Symbol] = []
        self._known: dict[tuple[Any, ...], Symbol] = {}

    def array(self, name: str, kind: Kind = Kind.FULL) -> Symbol:
        """The parameter, its gradient or a slot."""
        return self.add("array", (), name, kind)

    def hyperparameter(self, name: str) -> Symbol:
        """A scalar that is known on the host once per step."""
        return self.add("hyperparameter", (), name, Kind.HOST)

    def call(self, op: str, *args: object) -> Symbol:
        """An elementwise operation."""
        lifted = tuple(self._lift(arg) for arg in args)
        values = lifted[1:] if op == "where" else lifted
        if op == "where" and not lifted[0].boolean:
            raise RuleError(f"where(condition, x, y) takes a comparison first, got {lifted[0]!r}")
        if any(value.boolean for value in values):
            raise RuleError("a comparison may only be the condition of where(condition, x, y)")
        kind = broadcast(arg.kind for arg in lifted)
        if op == "power" and kind is not Kind.HOST:
            raise RuleError(
                f"powers of arrays are not exact everywhere; write x * x, or gs.sqrt(x), instead of {lifted[0]!r} ** n"
            )
        return self.add(op, lifted, None, kind, boolean=op in COMPARISONS.values())

    def mean(self, x: Symbol, axis: int | None) -> Symbol:
        """The mean over everything or over one of the last two axes."""
        if axis is None:
            return self.whole("mean", x)
        if self.ndim < 2:
            raise RuleError(f"mean(x, axis={axis}) needs two dimensions; ask w.ndim >= 2 first")
        kinds = {
            (Kind.FULL, -1): Kind.ROW,
            (Kind.FULL, -2): Kind.COLUMN,
            (Kind.ROW, -2): Kind.LEAD,
            (Kind.COLUMN, -1): Kind.LEAD,
        }
        if (x.kind, axis) not in kinds:
            raise RuleError(f"mean(x, axis={axis}) of {x!r}: that axis has been reduced already")
        return self.add("mean", (x,), axis, kinds[x.kind, axis])

    def whole(self, op: str, x: Symbol) -> Symbol:
        """A statistic of the whole tensor."""
        if x.kind is not Kind.FULL or x.boolean:
            raise RuleError(f"{op}(x) takes an array of the parameter's shape, got {x!r}")
        return self.add(op, (x,), None, Kind.WHOLE)

    def orthogonalize(self, x: Symbol, iteration: Iteration) -> Symbol:
        """The orthogonalized matrix of `x`."""
        if x.kind is not Kind.FULL or x.boolean or self.ndim < 2:
            raise RuleError(f"orthogonalize(x) takes an array of at least two dimensions, got {x!r}; ask w.ndim first")
        return self.add("orthogonalize", (x,), iteration, Kind.FULL)

    def add(self, op: str, args: tuple[Symbol, ...], attribute: Any, kind: Kind, *, boolean: bool = False) -> Symbol:
        """The symbol of this operation, new or known."""
        spelled = repr(attribute)  # tells 0.0 from -0.0 and 1 from 1.0
        key = (op, tuple(arg.index for arg in args), spelled, kind)
        if key not in self._known:
            symbol = Symbol(self, op, args, attribute, kind, boolean)
            self.symbols.append(symbol)
            self._known[key] = symbol
        return self._known[key]

    def _lift(self, value: object) -> Symbol:
        if isinstance(value, Symbol):
            if value.trace is not self:
                raise RuleError("a symbol has been kept from an earlier tracing; a rule must be a pure function")
            return value
        if isinstance(value, bool):
            return self.add("constant", (), value, Kind.HOST, boolean=True)
        if type(value) in (int, float):
            return self.add("constant", (), value, Kind.HOST)
        raise RuleError(
            f"a rule may combine symbols with plain floats and integers, got {value!r} ({type(value).__name__})"
        )


def trace(
    rule: Callable[..., object],
    slots: Mapping[str, Kind],
    *,
    name: str,
    ndim: int,
    arguments: Callable[[Trace], Mapping[str, object]],
    removable: Iterable[str] = (),
    reading: Reading = Reading.PLAIN,
) -> dict[str, Symbol]:
    """Call `rule` on symbols; return the new value of `w` and of every slot that is kept."""
    this = Trace(ndim, removable)
    w, g = this.array("w"), read_gradient(this, reading)
    if reading is not Reading.PLAIN:
        g = g * this.hyperparameter("grad_scale")
    old = {slot: this.array(slot, kind) for slot, kind in slots.items()}
    try:
        result = rule(w, g, *old.values(), **arguments(this))
    except RuleError as error:
        raise RuleError(f"{name}: {error}").with_traceback(error.__traceback__) from None
    values: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)  # pyright: ignore[reportUnknownVariableType]
    expected = ("w", *slots)
    if len(values) != len(expected):
        raise RuleError(f"{name} must return {', '.join(expected)}; it returned {len(values)} values")
    new: dict[str, Symbol] = {}
    for place, value, kind in zip(expected, values, (Kind.FULL, *slots.values()), strict=True):
        if value is None and place != "w":
            continue
        if not isinstance(value, Symbol) or value.boolean or value.kind is not kind:
            raise RuleError(
                f"{name} must return {place} with the shape of the old {place}; it returned {value!r}"
                + (" for it, which has another shape" if isinstance(value, Symbol) else " for it")
            )
        new[place] = value
    _refuse_dropped_slots(name, old, new)
    return new


def read_gradient(trace: Trace, reading: Reading) -> Symbol:
    """The gradient as it is read, before `grad_scale`."""
    g = trace.array("g")
    if reading in (Reading.WEIGHED, Reading.SUMMED):
        g = g * trace.hyperparameter("g.scale")
    return trace.array("g.sum") + g if reading is Reading.SUMMED else g


def _refuse_dropped_slots(name: str, old: Mapping[str, Symbol], new: Mapping[str, Symbol]) -> None:
    dropped = {old[slot] for slot in old if slot not in new}
    for symbol in reachable(new.values()):
        if symbol in dropped:
            raise RuleError(f"{name} reads the slot {symbol.attribute} but returns None for it")


def reachable(roots: Iterable[Symbol], ends: Callable[[Symbol], bool] = lambda _: False) -> list[Symbol]:
    """Every symbol that the roots depend on, each after its arguments; those of symbols that are ends are left out."""
    seen: dict[int, Symbol] = {}
    stack = list(roots)
    while stack:
        symbol = stack.pop()
        if symbol.index not in seen:
            seen[symbol.index] = symbol
            if not ends(symbol):
                stack.extend(symbol.args)
    return [seen[index] for index in sorted(seen)]
