"""The function around a kernel: it grabs chunks of tensors until none is left.

The function takes one pointer to a job, 64-bit fields: chunks, their count, how many of them to grab at once, the
shared counter, addresses (operand by tensor), the number of tensors, each tensor's row of scalars, the scalars
(float64), dimensions, each tensor's key, and the shift of the step's noise. A chunk is three integers: tensor, first
and length.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gradstep.program.access import Access, Operand, sum_operand
from gradstep.program.blocks import LANES
from gradstep.program.graph import Kind, Symbol
from gradstep.program.program import Program
from gradstep.program.values import TYPES, Code, splat, vector

FIELDS = ("chunks", "count", "grain", "next", "addresses", "tensors", "rows", "scalars", "dimensions", "keys", "shift")


class KernelSource(NamedTuple):
    """The IR of a kernel, and the operands in the order of their addresses."""

    ir: str
    operands: tuple[Operand, ...]


class Frame(ABC):
    """What all kernels share: the loop over chunks, loops over elements, and the values that stay the same in them.

    Args:
        program: the program that the kernel is a part of.
        dtype: the compute dtype.
        steps: how many elements the loops take at once, from many to one.
    """

    arrays: Access

    def __init__(self, program: Program, dtype: str, steps: Sequence[int]) -> None:
        self.program, self.dtype, self.steps, self.code = program, dtype, steps, Code()
        self.known: dict[int, dict[int, str]] = {lanes: {} for lanes in steps}

    @property
    @abstractmethod
    def lane_sums(self) -> dict[int, int]:
        """The reductions that are summed in lanes, by index, and how many times `LANES` of them each needs."""

    @abstractmethod
    def chunk(self) -> None:
        """Emit what is done with the chunk of `%tensor`, `%first` and `%length`; it ends at `%chunk.end`."""

    def source(self) -> KernelSource:
        """The kernel."""
        return KernelSource(self._function(), tuple(self.arrays.operands))

    def _function(self) -> str:
        code = self.code
        fields = [code.let(f"getelementptr i64, ptr %job, i64 {i}") for i in range(len(FIELDS))]
        kinds = {"count": "i64", "grain": "i64", "tensors": "i64", "shift": "i64"}
        for name, place in zip(FIELDS, fields, strict=True):
            code.do(f"%{name} = load {kinds.get(name, 'ptr')}, ptr {place}")
        for index, times in self.lane_sums.items():
            code.do(f"%lanes{index} = alloca [{times * LANES} x double], align 64")
        self.arrays.declare()
        code.do("%mode = call i64 @ieee_mode()")
        code.do("br label %grab")
        code.label("grab")
        code.do("%run = atomicrmw add ptr %next, i64 %grain monotonic")
        code.do("%some = icmp slt i64 %run, %count")
        code.do("br i1 %some, label %begin, label %exit")
        code.label("begin")
        code.do("%run.wanted = add i64 %run, %grain")
        code.do("%run.whole = icmp slt i64 %run.wanted, %count")
        code.do("%run.end = select i1 %run.whole, i64 %run.wanted, i64 %count")
        code.do("br label %chunk")
        code.label("chunk")
        code.do("%k = phi i64 [ %run, %begin ], [ %k.next, %chunk.end ]")
        record = code.let("mul i64 %k, 3")
        for offset, name in enumerate(("tensor", "first", "length")):
            place = code.let(f"add i64 {record}, {offset}")
            code.do(f"%{name} = load i64, ptr {code.let(f'getelementptr i64, ptr %chunks, i64 {place}')}")
        self.chunk()
        code.label("chunk.end")
        code.do("%k.next = add i64 %k, 1")
        code.do("%more = icmp slt i64 %k.next, %run.end")
        code.do("br i1 %more, label %chunk, label %grab")
        code.label("exit")
        code.do("call void @restore_mode(i64 %mode)")
        code.do("ret void")
        body = "\n".join(code.lines)
        declarations = "\n".join(sorted(code.declarations))
        return f"{declarations}\n\ndefine void @sweep(ptr noalias %job) {{\n{body}\n}}\n"

    def load_dimensions(self) -> None:
        """The tensor's `%height`, `%width`, and `%blocks` of rows in a matrix."""
        code = self.code
        for offset, name in enumerate(("height", "width", "blocks")):
            place = code.let(f"add i64 {code.let('mul i64 %tensor, 3')}, {offset}")
            code.do(f"%{name} = load i64, ptr {code.let(f'getelementptr i64, ptr %dimensions, i64 {place}')}")

    def load_scalars(self, sources: Iterable[Symbol]) -> None:
        """The tensor's scalars among these symbols, rounded to the compute dtype."""
        code, places = self.code, self.program.scalar_places
        used = [source for source in sources if source.kind is Kind.HOST and source.op != "constant"]
        if not used:
            return
        row = code.let(f"load i64, ptr {code.let('getelementptr i64, ptr %rows, i64 %tensor')}")
        start = code.let(f"mul i64 {row}, {len(places)}")
        for source in used:
            place = code.let(f"add i64 {start}, {places[source.index]}")
            value = code.let(f"load double, ptr {code.let(f'getelementptr double, ptr %scalars, i64 {place}')}")
            self.know(source, self.narrow(value, 1))

    def widen(self, value: str, lanes: int) -> str:
        """Numbers of the compute dtype in float64."""
        if self.dtype == "float64":
            return value
        return self.code.let(f"fpext {vector(TYPES[self.dtype], lanes)} {value} to {vector('double', lanes)}")

    def narrow(self, value: str, lanes: int) -> str:
        """The inverse, rounded to nearest."""
        if self.dtype == "float64":
            return value
        return self.code.let(f"fptrunc {vector('double', lanes)} {value} to {vector(TYPES[self.dtype], lanes)}")

    def know(self, source: Symbol, value: str) -> None:
        """From here on the symbol has this value, the same in all elements."""
        for lanes, known in self.known.items():
            known[source.index] = splat(self.code, TYPES[self.dtype], value, lanes)

    def loop(self, prefix: str, start: str, end: str, body: Callable[[str, int, str], None]) -> None:
        """Loop over elements `start` to `end` in vectors, then in shorter ones.

        `body` emits what is done for the elements from an index on, given their number and the lane of the first.
        """
        code, first, rest = self.code, start, ""
        names = [f"{prefix}by{lanes}" for lanes in self.steps]
        code.do(f"br label %{names[0]}.enter")
        for name, following, lanes in zip(names, [*names[1:], f"{prefix}done"], self.steps, strict=True):
            code.label(f"{name}.enter")
            whole = code.let(f"and i64 {code.let(f'sub i64 {end}, {first}')}, {-lanes}")
            past = code.let(f"add i64 {first}, {whole}")
            after = f"{following}.enter" if following in names else f"{following}.elements"
            some = code.let(f"icmp slt i64 {first}, {past}")
            code.do(f"br i1 {some}, label %{name}.elements, label %{after}")
            code.label(f"{name}.elements")
            i = f"%{name}.i"
            code.do(f"{i} = phi i64 [ {first}, %{name}.enter ], [ {i}.next, %{name}.elements ]")
            body(i, lanes, code.let(f"sub i64 {i}, {rest}") if rest else "0")
            code.do(f"{i}.next = add i64 {i}, {lanes}")
            more = code.let(f"icmp slt i64 {i}.next, {past}")
            code.do(f"br i1 {more}, label %{name}.elements, label %{after}")
            first = past
            rest = rest or past
        code.label(f"{prefix}done.elements")

    def clear_lanes(self, reductions: Iterable[Symbol]) -> None:
        """Begin sums in lanes."""
        for reduction in reductions:
            kind = f"<{self.lane_sums[reduction.index] * LANES} x double>"
            self.code.do(f"store {kind} zeroinitializer, ptr %lanes{reduction.index}, align 64")

    def lanes_of(self, reduction: Symbol, number: int = 0) -> str:
        """The lanes with that number."""
        place = self.code.let(f"getelementptr double, ptr %lanes{reduction.index}, i64 {number * LANES}")
        return self.code.let(f"load <{LANES} x double>, ptr {place}, align 64")

    def halve(self, lanes: str) -> str:
        """The sum of lanes: those of the upper half are added to those of the lower one, until one is left."""
        length = LANES
        while length > 1:
            length //= 2
            kind = f"<{2 * length} x double>"
            low, high = (
                self.code.let(
                    f"shufflevector {kind} {lanes}, {kind} poison, "
                    f"<{length} x i32> <{', '.join(f'i32 {first + lane}' for lane in range(length))}>"
                )
                for first in (0, length)
            )
            lanes = self.code.let(f"fadd <{length} x double> {low}, {high}")
        return self.code.let(f"extractelement <1 x double> {lanes}, i64 0")

    def put(self, reduction: Symbol, index: str, value: str) -> None:
        """Leave a sum behind."""
        place = self.arrays.address(sum_operand(reduction).place, index, sums=True)
        self.code.do(f"store double {value}, ptr {place}, align 8")
