"""LLVM IR for a whole sweep: a function that grabs chunks of tensors until none is left.

The function takes one pointer to a job, 64-bit fields: chunks, their count, how many of them to grab at once, the
shared counter, addresses (operand by tensor), the number of tensors, each tensor's row of scalars, the scalars
(float64), dimensions. A chunk is three integers: tensor, first and length, in elements (flat) or in blocks of `ROWS`
rows (factored).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gradstep.program.blocks import BLOCK, LANES
from gradstep.program.graph import Kind, Symbol
from gradstep.program.program import Program, Sweep, dense_places, place_of, small_inputs
from gradstep.program.values import BYTES, TYPES, Code, Values, splat, vector

ROWS = 64
AHEAD = 2048  # bytes; without prefetching, every page of 4 KiB begins with a wait
LINE = 64
FIELDS = ("chunks", "count", "grain", "next", "addresses", "tensors", "rows", "scalars", "dimensions")


@dataclass(frozen=True)
class Operand:
    """An array of the sweep: dense, small, or the sums that a reduction leaves behind."""

    place: str
    kind: Kind
    dtype: str
    sums: bool = False


@dataclass(frozen=True)
class KernelSource:
    """The IR of one sweep for given dtypes, and the operands in the order of their addresses."""

    ir: str
    operands: tuple[Operand, ...]


def emit(program: Program, sweep: Sweep, dtype: str, storage: Mapping[str, str]) -> KernelSource:
    """The kernel of `sweep` in the compute dtype; `storage` gives the dtype of each dense array where it differs."""
    emitter = _Emitter(program, sweep, dtype, storage)
    return KernelSource(emitter.function(), tuple(emitter.operands))


def sum_operand(reduction: Symbol) -> Operand:
    """Where a kernel leaves the partial sums of a reduction: per block, per row, or per block and column."""
    return Operand(f"{reduction.op}:{reduction.index}", reduction.kind, "float64", sums=True)


@dataclass
class _Emitter:
    program: Program
    sweep: Sweep
    dtype: str
    storage: Mapping[str, str]
    code: Code = field(default_factory=Code)

    def __post_init__(self) -> None:
        self.operands = [
            *(Operand(p, Kind.FULL, self.storage.get(p, self.dtype)) for p in dense_places([self.sweep])),
            *(Operand(place_of(source), source.kind, self.dtype) for source in small_inputs(self.sweep)),
            *(sum_operand(reduction) for reduction in self.sweep.reductions),
        ]
        self.places = {(operand.place, operand.sums): number for number, operand in enumerate(self.operands)}
        # Reductions are defined on LANES lanes; without any, eight doubles keep the registers from spilling.
        self.lanes = LANES if self.sweep.reductions or self.dtype == "float32" else LANES // 2
        self.known: dict[int, dict[int, str]] = {1: {}, self.lanes: {}}
        self.bases: list[str] = []
        self.leaps: dict[int, str] = {}
        self.chunk_end = ""
        self.totals = [r for r in self.sweep.reductions if r.kind is Kind.WHOLE]
        self.row_sums = [r for r in self.sweep.reductions if r.kind is Kind.ROW]
        self.column_sums = [r for r in self.sweep.reductions if r.kind is Kind.COLUMN]

    def function(self) -> str:
        code = self.code
        fields = [code.let(f"getelementptr i64, ptr %job, i64 {i}") for i in range(len(FIELDS))]
        kinds = {"count": "i64", "grain": "i64", "tensors": "i64"}
        for name, place in zip(FIELDS, fields, strict=True):
            code.do(f"%{name} = load {kinds.get(name, 'ptr')}, ptr {place}")
        for reduction in self.sweep.reductions:
            code.do(f"%lanes{reduction.index} = alloca [{LANES} x double], align 64")
            code.do(f"%total{reduction.index} = alloca double")
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
        self.bases = [self._base(number, "%tensor") for number in range(len(self.operands))]
        self._load_small(Kind.WHOLE, "0")
        if self.program.factored:
            self._matrix()
        else:
            end = code.let("add i64 %first, %length")
            self._measure_leaps(end)
            self._clear_lanes()
            self._elements("", "%first", end, {})
            block = code.let(f"lshr i64 %first, {BLOCK.bit_length() - 1}")
            for reduction in self.totals:
                self._put(reduction, block, self._fold(reduction))
            code.do("br label %chunk.end")

    def _base(self, number: int, tensor: str) -> str:
        """Where an operand of a tensor begins."""
        code = self.code
        place = code.let(f"add i64 {code.let(f'mul i64 %tensors, {number}')}, {tensor}")
        return code.let(f"load ptr, ptr {code.let(f'getelementptr ptr, ptr %addresses, i64 {place}')}")

    def _measure_leaps(self, end: str) -> None:
        """For each dense operand, how far it is from the end of this chunk to the beginning of the next one."""
        code, self.chunk_end = self.code, end
        following = code.let("add i64 %k, 1")
        last = code.let(f"icmp eq i64 {following}, %count")
        record = code.let(f"mul i64 {code.let(f'select i1 {last}, i64 %k, i64 {following}')}, 3")
        place = code.let(f"getelementptr i64, ptr %chunks, i64 {record}")
        tensor = code.let(f"load i64, ptr {place}")
        first = code.let(f"load i64, ptr {code.let(f'getelementptr i64, ptr {place}, i64 1')}")
        for number, operand in enumerate(self.operands):
            if operand.kind is Kind.FULL and not operand.sums:
                element = TYPES[operand.dtype]
                to = code.let(f"getelementptr {element}, ptr {self._base(number, tensor)}, i64 {first}")
                here = code.let(f"ptrtoint ptr {self._address(number, end)} to i64")
                self.leaps[number] = code.let(f"sub i64 {code.let(f'ptrtoint ptr {to} to i64')}, {here}")

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
        self._load_small(Kind.LEAD, "%lead")
        for reduction in self.totals:
            code.do(f"store double 0.0, ptr %total{reduction.index}")
        for reduction in self.column_sums:
            start = self._address(self.places[sum_operand(reduction).place, True], "%sums.at")
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
        self._elements("row.", start, end, {Kind.COLUMN: to_column, Kind.FULL: to_sum})
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

    def _elements(self, prefix: str, start: str, end: str, shifts: Mapping[Kind, str]) -> None:
        """Loop over elements `start` to `end` in vectors, then one by one.

        `shifts` leads from an element's index to that of its column's values, and of its column's sums.
        """
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
        self._position(i, lanes, "0", shifts)
        code.do(f"{i}.next = add i64 {i}, {lanes}")
        more = code.let(f"icmp slt i64 {i}.next, {middle}")
        code.do(f"br i1 {more}, label %{prefix}vector, label %{prefix}rest")
        code.label(f"{prefix}rest")
        some = code.let(f"icmp slt i64 {middle}, {end}")
        code.do(f"br i1 {some}, label %{prefix}single, label %{prefix}done.elements")
        code.label(f"{prefix}single")
        j = f"%{prefix}j"
        code.do(f"{j} = phi i64 [ {middle}, %{prefix}rest ], [ {j}.next, %{prefix}single ]")
        self._position(j, 1, code.let(f"sub i64 {j}, {middle}"), shifts)
        code.do(f"{j}.next = add i64 {j}, 1")
        more = code.let(f"icmp slt i64 {j}.next, {end}")
        code.do(f"br i1 {more}, label %{prefix}single, label %{prefix}done.elements")
        code.label(f"{prefix}done.elements")

    def _position(self, index: str, lanes: int, lane: str, shifts: Mapping[Kind, str]) -> None:
        """Load, compute, sum and store at one position; all loads come before all stores."""
        code = self.code
        known = dict(self.known[lanes])
        for source in self.sweep.inputs:
            if source.kind is Kind.FULL:
                if lanes > 1:
                    self._prefetch(place_of(source), index, lanes)
                known[source.index] = self._load(place_of(source), index, lanes)
            elif source.kind is Kind.COLUMN:
                known[source.index] = self._load(
                    place_of(source), code.let(f"add i64 {index}, {shifts[source.kind]}"), lanes
                )
        values = Values(code, self.dtype, lanes, known)
        for symbol in self.sweep.body:
            _ = values[symbol]
        for reduction in self.sweep.reductions:
            term = self._term(reduction, values[reduction.args[0]], lanes)
            if reduction.kind is Kind.COLUMN:
                at = code.let(f"add i64 {index}, {shifts[Kind.FULL]}")
                place = self._address(self.places[sum_operand(reduction).place, True], at)
            else:
                place = code.let(f"getelementptr double, ptr %lanes{reduction.index}, i64 {lane}")
            kind = vector("double", lanes)
            old = code.let(f"load {kind}, ptr {place}, align 8")
            code.do(f"store {kind} {code.let(f'fadd {kind} {old}, {term}')}, ptr {place}, align 8")
        for store in self.sweep.stores:
            self._store(store.place, index, values[store.value], lanes)

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
        place = self._address(self.places[sum_operand(reduction).place, True], index)
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
                self._know(source, self._load(place_of(source), index, 1))

    def _know(self, source: Symbol, value: str) -> None:
        for lanes, known in self.known.items():
            known[source.index] = splat(self.code, TYPES[self.dtype], value, lanes)

    def _address(self, number: int, index: str) -> str:
        element = TYPES[self.operands[number].dtype]
        return self.code.let(f"getelementptr {element}, ptr {self.bases[number]}, i64 {index}")

    def _prefetch(self, place: str, index: str, lanes: int) -> None:
        """Fetch what the loop will read soon, beyond the end of a chunk the beginning of the next one."""
        number, code = self.places[place, False], self.code
        size = BYTES[self.operands[number].dtype]
        code.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        start = self._address(number, index)
        if number in self.leaps:
            ahead = code.let(f"add i64 {index}, {AHEAD // size}")
            over = code.let(f"icmp sge i64 {ahead}, {self.chunk_end}")
            leap = code.let(f"select i1 {over}, i64 {self.leaps[number]}, i64 0")
            start = code.let(f"getelementptr i8, ptr {start}, i64 {leap}")
        for line in range(0, size * lanes, LINE):
            at = code.let(f"getelementptr i8, ptr {start}, i64 {AHEAD + line}")
            code.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)")

    def _load(self, place: str, index: str, lanes: int) -> str:
        number = self.places[place, False]
        stored = self.operands[number].dtype
        kind = vector(TYPES[stored], lanes)
        # Arrays of the user may lie at any address: align 1 costs nothing where the hardware can.
        value = self.code.let(f"load {kind}, ptr {self._address(number, index)}, align 1")
        return self._convert(value, stored, self.dtype, lanes)

    def _store(self, place: str, index: str, value: str, lanes: int) -> None:
        number = self.places[place, False]
        stored = self.operands[number].dtype
        value = self._convert(value, self.dtype, stored, lanes)
        self.code.do(f"store {vector(TYPES[stored], lanes)} {value}, ptr {self._address(number, index)}, align 1")

    def _convert(self, value: str, source: str, target: str, lanes: int) -> str:
        if source == target:
            return value
        word = "fptrunc" if BYTES[source] > BYTES[target] else "fpext"
        return self.code.let(f"{word} {vector(TYPES[source], lanes)} {value} to {vector(TYPES[target], lanes)}")
