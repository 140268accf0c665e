"""LLVM IR for a whole sweep: a function that grabs chunks of tensors until none is left.

The function takes one pointer to a job, 64-bit fields: chunks, their count, how many of them to grab at once, the
shared counter, addresses (operand by tensor), the number of tensors, each tensor's row of scalars, the scalars
(float64), dimensions, each tensor's key, and the shift of the step's noise. A chunk is three integers: tensor, first
and length, in elements (flat) or in blocks of `ROWS` rows (factored).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from gradstep.program.access import Access, Operand, sum_operand
from gradstep.program.blocks import BLOCK, LANES
from gradstep.program.formats import QUANTUM, Format
from gradstep.program.graph import Kind, Symbol
from gradstep.program.program import Program, Sweep, dense_places, place_of, small_inputs
from gradstep.program.values import TYPES, Code, Values, splat, vector

ROWS = 64
FIELDS = ("chunks", "count", "grain", "next", "addresses", "tensors", "rows", "scalars", "dimensions", "keys", "shift")


class KernelSource(NamedTuple):
    """The IR of one sweep for given dtypes, and the operands in the order of their addresses."""

    ir: str
    operands: tuple[Operand, ...]


def emit(program: Program, sweep: Sweep, dtype: str, formats: Mapping[str, Format]) -> KernelSource:
    """The kernel of `sweep` in the compute dtype; `formats` tells how dense arrays are stored that differ from it."""
    emitter = _Emitter(program, sweep, dtype, formats)
    return KernelSource(emitter.function(), tuple(emitter.arrays.operands))


class _Emitter:
    def __init__(self, program: Program, sweep: Sweep, dtype: str, formats: Mapping[str, Format]) -> None:
        self.program, self.sweep, self.dtype, self.formats, self.code = program, sweep, dtype, formats, Code()
        # Reductions are defined on LANES lanes; without any, eight doubles keep the registers from spilling.
        self.lanes = LANES if self.sweep.reductions or self.dtype == "float32" else LANES // 2
        small = [Operand(place_of(source), source.kind, self.dtype) for source in small_inputs(self.sweep)]
        sums = [sum_operand(reduction) for reduction in self.sweep.reductions]
        self.arrays = Access(
            self.code, self.dtype, self.lanes,
            {place: self.formats.get(place, Format(self.dtype)) for place in dense_places([self.sweep])},
            [store.place for store in self.sweep.stores], [*small, *sums], factored=self.program.factored,
        )  # fmt: skip
        self.known: dict[int, dict[int, str]] = {1: {}, self.lanes: {}}
        self.totals = [r for r in self.sweep.reductions if r.kind is Kind.WHOLE]
        self.row_sums = [r for r in self.sweep.reductions if r.kind is Kind.ROW]
        self.column_sums = [r for r in self.sweep.reductions if r.kind is Kind.COLUMN]

    def function(self) -> str:
        code = self.code
        fields = [code.let(f"getelementptr i64, ptr %job, i64 {i}") for i in range(len(FIELDS))]
        kinds = {"count": "i64", "grain": "i64", "tensors": "i64", "shift": "i64"}
        for name, place in zip(FIELDS, fields, strict=True):
            code.do(f"%{name} = load {kinds.get(name, 'ptr')}, ptr {place}")
        for reduction in self.sweep.reductions:
            code.do(f"%lanes{reduction.index} = alloca [{LANES} x double], align 64")
            code.do(f"%total{reduction.index} = alloca double")
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
        self._chunk()
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

    def _chunk(self) -> None:
        code = self.code
        record = code.let("mul i64 %k, 3")
        for offset, name in enumerate(("tensor", "first", "length")):
            place = code.let(f"add i64 {record}, {offset}")
            code.do(f"%{name} = load i64, ptr {code.let(f'getelementptr i64, ptr %chunks, i64 {place}')}")
        self._load_scalars()
        self.arrays.begin_chunk()
        self._load_small(Kind.WHOLE, "0")
        if self.program.factored:
            self._matrix()
        else:
            end = code.let("add i64 %first, %length")
            self.arrays.measure_leaps(end)
            self._clear_lanes()
            quantum = code.let(f"lshr i64 %first, {QUANTUM.bit_length() - 1}")
            self._elements("", "%first", end, {}, quantum)
            block = code.let(f"lshr i64 %first, {BLOCK.bit_length() - 1}")
            for reduction in self.totals:
                self._put(reduction, block, self._fold(reduction))
            code.do("br label %chunk.end")

    def _matrix(self) -> None:
        """Loop over blocks of rows, then rows; a block lies within one matrix of the stack."""
        code = self.code
        for offset, name in enumerate(("height", "width", "blocks")):
            place = code.let(f"add i64 {code.let('mul i64 %tensor, 3')}, {offset}")
            code.do(f"%{name} = load i64, ptr {code.let(f'getelementptr i64, ptr %dimensions, i64 {place}')}")
        code.do("%end = add i64 %first, %length")
        code.do("br label %block")
        code.label("block")
        code.do("%b = phi i64 [ %first, %chunk ], [ %b.next, %block.end ]")
        code.do("%lead = udiv i64 %b, %blocks")
        part = code.let(f"mul i64 {code.let('urem i64 %b, %blocks')}, {ROWS}")
        code.do(f"%rows.left = sub i64 %height, {part}")
        fewer = code.let(f"icmp slt i64 %rows.left, {ROWS}")
        code.do(f"%rows.here = select i1 {fewer}, i64 %rows.left, i64 {ROWS}")
        code.do(f"%row.first = add i64 {code.let('mul i64 %lead, %height')}, {part}")
        code.do("%row.end = add i64 %row.first, %rows.here")
        code.do("%columns.at = mul i64 %lead, %width")
        code.do("%sums.at = mul i64 %b, %width")
        code.do(f"%quanta = udiv i64 {code.let(f'add i64 %width, {QUANTUM - 1}')}, {QUANTUM}")
        self._load_small(Kind.LEAD, "%lead")
        for reduction in self.totals:
            code.do(f"store double 0.0, ptr %total{reduction.index}")
        for reduction in self.column_sums:
            start = self.arrays.address(sum_operand(reduction).place, "%sums.at", sums=True)
            size = code.let("mul i64 %width, 8")
            code.declarations.add("declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)")
            code.do(f"call void @llvm.memset.p0.i64(ptr {start}, i8 0, i64 {size}, i1 false)")
        code.do("br label %row")
        code.label("row")
        code.do("%r = phi i64 [ %row.first, %block ], [ %r.next, %row.done ]")
        self._load_small(Kind.ROW, "%r")
        start = code.let("mul i64 %r, %width")
        end = code.let(f"add i64 {start}, %width")
        to_column = code.let(f"sub i64 %columns.at, {start}")
        to_sum = code.let(f"sub i64 %sums.at, {start}")
        self._clear_lanes()
        quantum = code.let("mul i64 %r, %quanta")  # blocks of codes begin anew at each row
        self._elements("row.", start, end, {Kind.COLUMN: to_column, Kind.FULL: to_sum}, quantum)
        for reduction in self.row_sums:
            self._put(reduction, "%r", self._fold(reduction))
        for reduction in self.totals:
            old = code.let(f"load double, ptr %total{reduction.index}")
            new = code.let(f"fadd double {old}, {self._fold(reduction)}")
            code.do(f"store double {new}, ptr %total{reduction.index}")
        code.do("br label %row.done")
        code.label("row.done")
        code.do("%r.next = add i64 %r, 1")
        more = code.let("icmp slt i64 %r.next, %row.end")
        code.do(f"br i1 {more}, label %row, label %block.end")
        code.label("block.end")
        for reduction in self.totals:
            self._put(reduction, "%b", code.let(f"load double, ptr %total{reduction.index}"))
        code.do("%b.next = add i64 %b, 1")
        more = code.let("icmp slt i64 %b.next, %end")
        code.do(f"br i1 {more}, label %block, label %chunk.end")

    def _elements(self, prefix: str, start: str, end: str, shifts: Mapping[Kind, str], quantum: str) -> None:
        """Loop over elements `start` to `end`, in blocks where there are codes; `quantum` is the number of the first.

        `shifts` leads from an element's index to that of its column's values, and of its column's sums.
        """
        if not self.arrays.coded:
            self._loop(prefix, start, end, partial(self._position, shifts))
            return
        code = self.code
        code.do(f"br label %{prefix}quanta")
        code.label(f"{prefix}quanta")
        code.do(f"br label %{prefix}quantum")
        code.label(f"{prefix}quantum")
        first = f"%{prefix}q"
        code.do(f"{first} = phi i64 [ {start}, %{prefix}quanta ], [ {first}.next, %{prefix}quantum.end ]")
        code.do(f"{first}.next = add i64 {first}, {QUANTUM}")
        whole = code.let(f"icmp slt i64 {first}.next, {end}")
        last = code.let(f"select i1 {whole}, i64 {first}.next, i64 {end}")
        passed = code.let(f"lshr i64 {code.let(f'sub i64 {first}, {start}')}, {QUANTUM.bit_length() - 1}")
        at = code.let(f"add i64 {quantum}, {passed}")
        self.arrays.begin_quantum(first, at)
        self._loop(prefix, first, last, partial(self._position, shifts))
        inverses = self.arrays.end_quantum(at)
        if inverses:
            self._loop(f"{prefix}encode.", first, last, lambda i, lanes, _: self.arrays.encode(inverses, i, lanes))
        code.do(f"br label %{prefix}quantum.end")
        code.label(f"{prefix}quantum.end")
        code.do(f"br i1 {whole}, label %{prefix}quantum, label %{prefix}quanta.end")
        code.label(f"{prefix}quanta.end")

    def _loop(self, prefix: str, start: str, end: str, body: Callable[[str, int, str], None]) -> None:
        """Loop over elements `start` to `end` in vectors, then one by one."""
        code, lanes = self.code, self.lanes
        code.do(f"br label %{prefix}enter")
        code.label(f"{prefix}enter")
        length = code.let(f"sub i64 {end}, {start}")
        whole = code.let(f"and i64 {length}, {-lanes}")
        middle = code.let(f"add i64 {start}, {whole}")
        some = code.let(f"icmp sgt i64 {whole}, 0")
        code.do(f"br i1 {some}, label %{prefix}vector, label %{prefix}rest")
        code.label(f"{prefix}vector")
        i = f"%{prefix}i"
        code.do(f"{i} = phi i64 [ {start}, %{prefix}enter ], [ {i}.next, %{prefix}vector ]")
        body(i, lanes, "0")
        code.do(f"{i}.next = add i64 {i}, {lanes}")
        more = code.let(f"icmp slt i64 {i}.next, {middle}")
        code.do(f"br i1 {more}, label %{prefix}vector, label %{prefix}rest")
        code.label(f"{prefix}rest")
        some = code.let(f"icmp slt i64 {middle}, {end}")
        code.do(f"br i1 {some}, label %{prefix}single, label %{prefix}done.elements")
        code.label(f"{prefix}single")
        j = f"%{prefix}j"
        code.do(f"{j} = phi i64 [ {middle}, %{prefix}rest ], [ {j}.next, %{prefix}single ]")
        body(j, 1, code.let(f"sub i64 {j}, {middle}"))
        code.do(f"{j}.next = add i64 {j}, 1")
        more = code.let(f"icmp slt i64 {j}.next, {end}")
        code.do(f"br i1 {more}, label %{prefix}single, label %{prefix}done.elements")
        code.label(f"{prefix}done.elements")

    def _position(self, shifts: Mapping[Kind, str], index: str, lanes: int, lane: str) -> None:
        """Load, compute, sum and store at one position; all loads come before all stores."""
        code = self.code
        known = dict(self.known[lanes])
        for source in self.sweep.inputs:
            if source.kind is Kind.FULL:
                if lanes > 1:
                    self.arrays.prefetch(place_of(source), index, lanes)
                known[source.index] = self.arrays.load(place_of(source), index, lanes)
            elif source.kind is Kind.COLUMN:
                at = code.let(f"add i64 {index}, {shifts[source.kind]}")
                known[source.index] = self.arrays.read(place_of(source), at, lanes)
        values = Values(code, self.dtype, lanes, known)
        for symbol in self.sweep.body:
            _ = values[symbol]
        for reduction in self.sweep.reductions:
            term = self._term(reduction, values[reduction.args[0]], lanes)
            if reduction.kind is Kind.COLUMN:
                at = code.let(f"add i64 {index}, {shifts[Kind.FULL]}")
                place = self.arrays.address(sum_operand(reduction).place, at, sums=True)
            else:
                place = code.let(f"getelementptr double, ptr %lanes{reduction.index}, i64 {lane}")
            kind = vector("double", lanes)
            old = code.let(f"load {kind}, ptr {place}, align 8")
            code.do(f"store {kind} {code.let(f'fadd {kind} {old}, {term}')}, ptr {place}, align 8")
        for store in self.sweep.stores:
            self.arrays.store(store.place, index, values[store.value], lanes)

    def _term(self, reduction: Symbol, value: str, lanes: int) -> str:
        """What an element adds to the sum, in float64."""
        kind = vector("double", lanes)
        if self.dtype != "float64":
            value = self.code.let(f"fpext {vector(TYPES[self.dtype], lanes)} {value} to {kind}")
        return value if reduction.op == "mean" else self.code.let(f"fmul {kind} {value}, {value}")

    def _clear_lanes(self) -> None:
        for reduction in (*self.totals, *self.row_sums):
            self.code.do(f"store <{LANES} x double> zeroinitializer, ptr %lanes{reduction.index}, align 64")

    def _fold(self, reduction: Symbol) -> str:
        """The lanes added in order."""
        kind = f"<{LANES} x double>"
        lanes = self.code.let(f"load {kind}, ptr %lanes{reduction.index}, align 64")
        total = self.code.let(f"extractelement {kind} {lanes}, i64 0")
        for lane in range(1, LANES):
            value = self.code.let(f"extractelement {kind} {lanes}, i64 {lane}")
            total = self.code.let(f"fadd double {total}, {value}")
        return total

    def _put(self, reduction: Symbol, index: str, value: str) -> None:
        place = self.arrays.address(sum_operand(reduction).place, index, sums=True)
        self.code.do(f"store double {value}, ptr {place}, align 8")

    def _load_scalars(self) -> None:
        code, places = self.code, self.program.scalar_places
        used = [source for source in self.sweep.inputs if source.kind is Kind.HOST and source.op != "constant"]
        if not used:
            return
        row = code.let(f"load i64, ptr {code.let('getelementptr i64, ptr %rows, i64 %tensor')}")
        start = code.let(f"mul i64 {row}, {len(places)}")
        for source in used:
            place = code.let(f"add i64 {start}, {places[source.index]}")
            value = code.let(f"load double, ptr {code.let(f'getelementptr double, ptr %scalars, i64 {place}')}")
            if self.dtype != "float64":
                value = code.let(f"fptrunc double {value} to {TYPES[self.dtype]}")
            self._know(source, value)

    def _load_small(self, kind: Kind, index: str) -> None:
        for source in small_inputs(self.sweep):
            if source.kind is kind:
                self._know(source, self.arrays.read(place_of(source), index, 1))

    def _know(self, source: Symbol, value: str) -> None:
        for lanes, known in self.known.items():
            known[source.index] = splat(self.code, TYPES[self.dtype], value, lanes)
