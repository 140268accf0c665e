"""LLVM IR for a whole sweep: a function that grabs chunks of tensors until none is left.

The function takes one pointer to a job, 64-bit fields: chunks, their count, how many of them to grab at once, the
shared counter, addresses (operand by tensor), the number of tensors, each tensor's row of scalars, the scalars
(float64), dimensions, each tensor's key, and the shift of the step's noise. A chunk is three integers: tensor, first
and length, in elements (flat) or in blocks of `ROWS` rows (factored).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gradstep.program.blocks import BLOCK, LANES
from gradstep.program.formats import BYTES, NARROW, QUANTUM, Format, codes_of, master_of, scales_of
from gradstep.program.graph import Kind, Symbol
from gradstep.program.narrow import decode, encode, narrow, scale_of, widen
from gradstep.program.noise import GOLDEN, emit_mix, emit_noise, name_key, signed
from gradstep.program.program import Program, Sweep, dense_places, place_of, small_inputs
from gradstep.program.values import TYPES, Code, Values, splat, vector

ROWS = 64
AHEAD = 2048  # bytes; without prefetching, every page of 4 KiB begins with a wait
LINE = 64
FIELDS = ("chunks", "count", "grain", "next", "addresses", "tensors", "rows", "scalars", "dimensions", "keys", "shift")


@dataclass(frozen=True)
class Operand:
    """An array of the sweep: dense, small, the scales of codes, or the sums that a reduction leaves behind."""

    place: str
    kind: Kind
    dtype: str
    sums: bool = False


@dataclass(frozen=True)
class KernelSource:
    """The IR of one sweep for given dtypes, and the operands in the order of their addresses."""

    ir: str
    operands: tuple[Operand, ...]


def emit(program: Program, sweep: Sweep, dtype: str, formats: Mapping[str, Format]) -> KernelSource:
    """The kernel of `sweep` in the compute dtype; `formats` tells how dense arrays are stored that differ from it."""
    emitter = _Emitter(program, sweep, dtype, formats)
    return KernelSource(emitter.function(), tuple(emitter.operands))


def sum_operand(reduction: Symbol) -> Operand:
    """Where a kernel leaves the partial sums of a reduction: per block, per row, or per block and column."""
    return Operand(f"{reduction.op}:{reduction.index}", reduction.kind, "float64", sums=True)


@dataclass
class _Emitter:
    program: Program
    sweep: Sweep
    dtype: str
    formats: Mapping[str, Format]
    code: Code = field(default_factory=Code)

    def __post_init__(self) -> None:
        dense = dense_places([self.sweep])
        self.formats = {place: self.formats.get(place, Format(self.dtype)) for place in dense}
        self.operands = [
            *(self._operand(place, *part) for place in dense for part in self.formats[place].parts(place).items()),
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
        self.written = {store.place: self.formats[store.place] for store in self.sweep.stores}
        self.coded = [place for place, kept in self.formats.items() if kept.coded]
        self.encoded = [place for place in self.coded if place in self.written]
        self.rounded = [place for place, kept in self.written.items() if kept.dithered]
        self.keys: dict[str, tuple[str, str]] = {}
        self.scales: dict[str, str] = {}
        self.block_start = ""

    def _operand(self, place: str, part: str, dtype: str) -> Operand:
        return Operand(part, Kind.LEAD if part == scales_of(place) else Kind.FULL, dtype)

    def function(self) -> str:
        code = self.code
        fields = [code.let(f"getelementptr i64, ptr %job, i64 {i}") for i in range(len(FIELDS))]
        kinds = {"count": "i64", "grain": "i64", "tensors": "i64", "shift": "i64"}
        for name, place in zip(FIELDS, fields, strict=True):
            code.do(f"%{name} = load {kinds.get(name, 'ptr')}, ptr {place}")
        for reduction in self.sweep.reductions:
            code.do(f"%lanes{reduction.index} = alloca [{LANES} x double], align 64")
            code.do(f"%total{reduction.index} = alloca double")
        for place in self.encoded:
            number = self.coded.index(place)
            code.do(f"%new{number} = alloca [{QUANTUM} x float], align 64")
            code.do(f"%largest{number} = alloca <{self.lanes} x i32>, align 64")
            code.do(f"%largest.rest{number} = alloca i32")
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
        self._load_keys()
        self.bases = [self._base(number, "%tensor") for number in range(len(self.operands))]
        self._load_small(Kind.WHOLE, "0")
        if self.program.factored:
            self._matrix()
        else:
            end = code.let("add i64 %first, %length")
            self._measure_leaps(end)
            self._clear_lanes()
            quantum = code.let(f"lshr i64 %first, {QUANTUM.bit_length() - 1}")
            self._elements("", "%first", end, {}, quantum)
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
            if operand.kind is Kind.FULL and not operand.sums:  # scales are few
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
        code.do(f"%quanta = udiv i64 {code.let(f'add i64 %width, {QUANTUM - 1}')}, {QUANTUM}")
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
        if not self.coded:
            self._loop(prefix, start, end, lambda *at: self._position(*at, shifts))
            return
        code = self.code
        code.do(f"br label %{prefix}quanta")
        code.label(f"{prefix}quanta")
        code.do(f"br label %{prefix}quantum")
        code.label(f"{prefix}quantum")
        first = self.block_start = f"%{prefix}q"
        code.do(f"{first} = phi i64 [ {start}, %{prefix}quanta ], [ {first}.next, %{prefix}quantum.end ]")
        code.do(f"{first}.next = add i64 {first}, {QUANTUM}")
        whole = code.let(f"icmp slt i64 {first}.next, {end}")
        last = code.let(f"select i1 {whole}, i64 {first}.next, i64 {end}")
        passed = code.let(f"lshr i64 {code.let(f'sub i64 {first}, {start}')}, {QUANTUM.bit_length() - 1}")
        at = code.let(f"add i64 {quantum}, {passed}")
        self._begin_quantum(at)
        self._loop(prefix, first, last, lambda *at: self._position(*at, shifts))
        self._encode(prefix, first, last, at)
        code.do(f"br label %{prefix}quantum.end")
        code.label(f"{prefix}quantum.end")
        code.do(f"br i1 {whole}, label %{prefix}quantum, label %{prefix}quanta.end")
        code.label(f"{prefix}quanta.end")

    def _begin_quantum(self, at: str) -> None:
        """Load the scales of a block, and forget the largest magnitudes of the one before."""
        for place in self.coded:
            address = self._address(self.places[scales_of(place), False], at)
            self.scales[place] = self.code.let(f"load float, ptr {address}, align 1")
        for place in self.encoded:
            number = self.coded.index(place)
            self.code.do(f"store <{self.lanes} x i32> zeroinitializer, ptr %largest{number}, align 64")
            self.code.do(f"store i32 0, ptr %largest.rest{number}")

    def _encode(self, prefix: str, first: str, last: str, at: str) -> None:
        """Turn the new values of a block into codes, once its largest magnitudes are known."""
        inverses: dict[str, str] = {}
        for place in self.encoded:
            scale, inverses[place] = scale_of(self.code, self._largest(self.coded.index(place)))
            address = self._address(self.places[scales_of(place), False], at)
            self.code.do(f"store float {scale}, ptr {address}, align 1")

        def position(index: str, lanes: int, lane: str) -> None:
            for place in self.encoded:
                value = self.code.let(f"load {vector('float', lanes)}, ptr {self._new(place, index)}, align 4")
                noise = self._noise(place, index, lanes)
                codes = encode(self.code, self.formats[place], value, inverses[place], noise, lanes)
                target = self._address(self.places[codes_of(place), False], index)
                self.code.do(f"store {vector('i8', lanes)} {codes}, ptr {target}, align 1")

        if self.encoded:
            self._loop(f"{prefix}encode.", first, last, position)

    def _largest(self, number: int) -> str:
        """The bits of the largest magnitude of the block."""
        code, kind = self.code, f"<{self.lanes} x i32>"
        name = f"llvm.vector.reduce.umax.v{self.lanes}i32"
        code.declarations.add(f"declare i32 @{name}({kind})")
        lanes = code.let(f"load {kind}, ptr %largest{number}, align 64")
        most = code.let(f"call i32 @{name}({kind} {lanes})")
        rest = code.let(f"load i32, ptr %largest.rest{number}")
        return code.let(f"select i1 {code.let(f'icmp ugt i32 {most}, {rest}')}, i32 {most}, i32 {rest}")

    def _new(self, place: str, index: str) -> str:
        """Where the block's new values wait to be encoded."""
        offset = self.code.let(f"sub i64 {index}, {self.block_start}")
        return self.code.let(f"getelementptr float, ptr %new{self.coded.index(place)}, i64 {offset}")

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
                at = code.let(f"add i64 {index}, {shifts[source.kind]}")
                known[source.index] = self._read(place_of(source), at, lanes)
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

    def _load_keys(self) -> None:
        """What the noise of each array that is rounded at random begins with, for this tensor and step."""
        code = self.code
        if not self.rounded:
            return
        key = code.let(f"load i64, ptr {code.let('getelementptr i64, ptr %keys, i64 %tensor')}")
        far = code.let(f"mul i64 {code.let('lshr i64 %first, 32')}, {GOLDEN}")
        for place in self.rounded:
            mixed = emit_mix(code, code.let(f"xor i64 {key}, {signed(name_key(place))}"))
            low = code.let(f"trunc i64 {mixed} to i32")
            high = code.let(f"trunc i64 {code.let(f'lshr i64 {mixed}, 32')} to i32")
            if not self.program.factored:  # a chunk lies between two multiples of 2**32
                high = code.let(f"add i32 {high}, {code.let(f'trunc i64 {far} to i32')}")
            self.keys[place] = low, high

    def _noise(self, place: str, index: str, lanes: int) -> str | None:
        """Random words for elements from `index` on; None where rounding is to nearest."""
        if place not in self.keys:
            return None
        code, (low, high) = self.code, self.keys[place]
        words = vector("i32", lanes)
        low, high = splat(code, "i32", low, lanes), splat(code, "i32", high, lanes)
        if lanes > 1:
            steps = ", ".join(f"i32 {lane}" for lane in range(lanes))
            low = code.let(f"add {words} {low}, <{steps}>")
        if self.program.factored:  # rows may lie across a multiple of 2**32
            wide = vector("i64", lanes)
            at = splat(code, "i64", index, lanes)
            if lanes > 1:
                at = code.let(f"add {wide} {at}, <{', '.join(f'i64 {lane}' for lane in range(lanes))}>")
            far = code.let(f"lshr {wide} {at}, {splat(code, 'i64', '32', lanes)}")
            far = code.let(f"trunc {wide} {far} to {words}")
            high = code.let(f"add {words} {high}, {code.let(f'mul {words} {far}, {self._word(GOLDEN, lanes)}')}")
        near = splat(code, "i32", code.let(f"trunc i64 {index} to i32"), lanes)
        shift = splat(code, "i32", code.let("trunc i64 %shift to i32"), lanes)
        return emit_noise(code, code.let(f"add {words} {low}, {near}"), high, shift, lanes)

    def _word(self, value: int, lanes: int) -> str:
        return splat(self.code, "i32", str(value - (value >> 31 << 32)), lanes)

    def _load_small(self, kind: Kind, index: str) -> None:
        for source in small_inputs(self.sweep):
            if source.kind is kind:
                self._know(source, self._read(place_of(source), index, 1))

    def _know(self, source: Symbol, value: str) -> None:
        for lanes, known in self.known.items():
            known[source.index] = splat(self.code, TYPES[self.dtype], value, lanes)

    def _address(self, number: int, index: str) -> str:
        element = TYPES[self.operands[number].dtype]
        return self.code.let(f"getelementptr {element}, ptr {self.bases[number]}, i64 {index}")

    def _prefetch(self, place: str, index: str, lanes: int) -> None:
        """Fetch what the loop will read soon, beyond the end of a chunk the beginning of the next one."""
        code = self.code
        code.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        for part, dtype in self.formats[place].parts(place).items():
            number, size = self.places[part, False], BYTES[dtype]
            if self.operands[number].kind is not Kind.FULL:
                continue
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
        """The value of an array at a position, in the compute dtype."""
        kept = self.formats[place]
        if kept.coded:
            codes = self._read(codes_of(place), index, lanes)
            value = decode(self.code, kept, codes, self.scales[place], lanes)
            return self._convert(value, "float32", self.dtype, lanes)
        stored = self._read(place, index, lanes)
        if not kept.master:
            return self._from_stored(stored, kept.dtype, lanes)
        # A parameter that somebody else has written no longer is what its copy rounds to; then it counts itself.
        master = self._read(master_of(place), index, lanes)
        same = self.code.let(
            f"icmp eq {vector('i16', lanes)} {narrow(self.code, kept.dtype, master, None, lanes)}, {stored}"
        )
        widened = widen(self.code, kept.dtype, stored, lanes)
        return self.code.let(
            f"select {vector('i1', lanes)} {same}, {vector('float', lanes)} {master}, "
            f"{vector('float', lanes)} {widened}"
        )

    def _store(self, place: str, index: str, value: str, lanes: int) -> None:
        kept = self.formats[place]
        if kept.coded:
            self._put_off(place, index, self._convert(value, self.dtype, "float32", lanes), lanes)
            return
        if kept.master:
            self._write(master_of(place), index, value, lanes)
        noise = self._noise(place, index, lanes)
        self._write(place, index, self._to_stored(value, kept.dtype, noise, lanes), lanes)

    def _put_off(self, place: str, index: str, value: str, lanes: int) -> None:
        """Keep a new value until its block's largest magnitude is known."""
        code, number = self.code, self.coded.index(place)
        kind, words = vector("float", lanes), vector("i32", lanes)
        code.do(f"store {kind} {value}, ptr {self._new(place, index)}, align 4")
        mask = splat(code, "i32", str(0x7FFFFFFF), lanes)
        size = code.let(f"and {words} {code.let(f'bitcast {kind} {value} to {words}')}, {mask}")
        target = f"%largest{number}" if lanes > 1 else f"%largest.rest{number}"
        old = code.let(f"load {words}, ptr {target}")
        larger = code.let(f"icmp ugt {words} {size}, {old}")
        new = code.let(f"select {vector('i1', lanes)} {larger}, {words} {size}, {words} {old}")
        code.do(f"store {words} {new}, ptr {target}")

    def _read(self, part: str, index: str, lanes: int) -> str:
        """An array's elements as they are stored."""
        number = self.places[part, False]
        kind = vector(TYPES[self.operands[number].dtype], lanes)
        # Arrays of the user may lie at any address: align 1 costs nothing where the hardware can.
        return self.code.let(f"load {kind}, ptr {self._address(number, index)}, align 1")

    def _write(self, part: str, index: str, value: str, lanes: int) -> None:
        number = self.places[part, False]
        kind = vector(TYPES[self.operands[number].dtype], lanes)
        self.code.do(f"store {kind} {value}, ptr {self._address(number, index)}, align 1")

    def _from_stored(self, value: str, dtype: str, lanes: int) -> str:
        if dtype in NARROW:
            value, dtype = widen(self.code, dtype, value, lanes), "float32"
        return self._convert(value, dtype, self.dtype, lanes)

    def _to_stored(self, value: str, dtype: str, noise: str | None, lanes: int) -> str:
        if dtype in NARROW:
            return narrow(self.code, dtype, self._convert(value, self.dtype, "float32", lanes), noise, lanes)
        return self._convert(value, self.dtype, dtype, lanes)

    def _convert(self, value: str, source: str, target: str, lanes: int) -> str:
        if source == target:
            return value
        word = "fptrunc" if BYTES[source] > BYTES[target] else "fpext"
        return self.code.let(f"{word} {vector(TYPES[source], lanes)} {value} to {vector(TYPES[target], lanes)}")
