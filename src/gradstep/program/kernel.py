"""LLVM IR for a whole sweep. Its chunks are counted in elements (flat) or in blocks of `ROWS` rows (factored)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from gradstep.program.access import Access, Operand, sum_operand
from gradstep.program.blocks import BLOCK, LANES
from gradstep.program.formats import QUANTUM, Format
from gradstep.program.frame import Frame, KernelSource
from gradstep.program.graph import Kind, Symbol
from gradstep.program.program import Program, Sweep, dense_places, place_of, small_inputs
from gradstep.program.values import Values, vector

ROWS = 64
GROUP = 4  # rows that are gone through together where there are sums: those of columns are loaded and stored once
SOON = 64  # elements after which the next rows are fetched
SHORT = 4  # elements at once at the end of a row


def emit(program: Program, sweep: Sweep, dtype: str, formats: Mapping[str, Format]) -> KernelSource:
    """The kernel of `sweep` in the compute dtype; `formats` tells how dense arrays are stored that differ from it."""
    return _SweepEmitter(program, sweep, dtype, formats).source()


class _Row(NamedTuple):
    """One of the rows that are gone through together.

    Attributes:
        offset: how many elements after the first row it begins.
        known: the values that are the same in all of it.
    """

    offset: str | None
    known: Mapping[int, Mapping[int, str]]


class _SweepEmitter(Frame):
    def __init__(self, program: Program, sweep: Sweep, dtype: str, formats: Mapping[str, Format]) -> None:
        dense = {place: formats.get(place, Format(dtype)) for place in dense_places([sweep])}
        # Reductions are defined on LANES lanes; without any, eight doubles keep the registers from spilling.
        self.lanes = LANES if sweep.reductions or dtype == "float32" else LANES // 2
        in_rows = program.factored and not any(kept.coded for kept in dense.values())
        super().__init__(program, dtype, [self.lanes, SHORT, 1] if in_rows else [self.lanes, 1])
        self.sweep = sweep
        small = [Operand(place_of(source), source.kind, dtype) for source in small_inputs(sweep)]
        sums = [sum_operand(reduction) for reduction in sweep.reductions]
        self.arrays = Access(
            self.code, dtype, self.lanes, dense,
            [store.place for store in sweep.stores], [*small, *sums], factored=program.factored,
        )  # fmt: skip
        self.totals = [r for r in sweep.reductions if r.kind is Kind.WHOLE]
        self.row_sums = [r for r in sweep.reductions if r.kind is Kind.ROW]
        self.column_sums = [r for r in sweep.reductions if r.kind is Kind.COLUMN]
        self.group = GROUP if in_rows and sweep.reductions else 1

    @property
    def lane_sums(self) -> dict[int, int]:
        """See `Frame.lane_sums`: each row of a group has lanes of its own."""
        return {reduction.index: self.group for reduction in (*self.totals, *self.row_sums)}

    def chunk(self) -> None:
        """See `Frame.chunk`."""
        code = self.code
        self.load_scalars(self.sweep.inputs)
        self.arrays.begin_chunk()
        self._load_small(Kind.WHOLE, "0")
        if self.program.factored:
            self._matrix()
            return
        end = code.let("add i64 %first, %length")
        self.arrays.measure_leaps(end)
        self.clear_lanes(self.totals)
        quantum = code.let(f"lshr i64 %first, {QUANTUM.bit_length() - 1}")
        self._elements("", "%first", end, [_Row(None, self.known)], {}, quantum)
        block = code.let(f"lshr i64 %first, {BLOCK.bit_length() - 1}")
        for reduction in self.totals:
            self.put(reduction, block, self._in_order(reduction))
        code.do("br label %chunk.end")

    def _matrix(self) -> None:
        """Loop over blocks of rows, then rows; a block lies within one matrix of the stack."""
        code = self.code
        self.load_dimensions()
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
        self.clear_lanes(self.totals)
        for reduction in self.column_sums:
            start = self.arrays.address(sum_operand(reduction).place, "%sums.at", sums=True)
            size = code.let("mul i64 %width, 8")
            code.declarations.add("declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)")
            code.do(f"call void @llvm.memset.p0.i64(ptr {start}, i8 0, i64 {size}, i1 false)")
        code.do("br label %rows1" if self.group == 1 else f"br label %rows{self.group}")
        entered, first = "block", "%row.first"
        for count in dict.fromkeys((self.group, 1)):
            self._rows(count, first, entered)
            entered, first = f"rows{count}.end", f"%r{count}"
            if count > 1:
                code.do("br label %rows1")
        for reduction in self.totals:
            self.put(reduction, "%b", self._halved(reduction, range(self.group)))
        code.do("br label %block.end")
        code.label("block.end")
        code.do("%b.next = add i64 %b, 1")
        more = code.let("icmp slt i64 %b.next, %end")
        code.do(f"br i1 {more}, label %block, label %chunk.end")

    def _rows(self, count: int, first: str, entered: str) -> None:
        """Loop over rows from `first` on, `count` at once, as long as there are so many."""
        code, name, r = self.code, f"rows{count}", f"%r{count}"
        code.label(name)
        code.do(f"{r} = phi i64 [ {first}, %{entered} ], [ {r}.next, %{name}.done ]")
        code.do(f"{r}.next = add i64 {r}, {count}")
        fit = code.let(f"icmp sle i64 {r}.next, %row.end")
        code.do(f"br i1 {fit}, label %{name}.begin, label %{name}.end")
        code.label(f"{name}.begin")
        start = code.let(f"mul i64 {r}, %width")
        end = code.let(f"add i64 {start}, %width")
        to_column = code.let(f"sub i64 %columns.at, {start}")
        to_sum = code.let(f"sub i64 %sums.at, {start}")
        rows: list[_Row] = []
        for number in range(count):
            self._load_small(Kind.ROW, code.let(f"add i64 {r}, {number}") if number else r)
            offset = code.let(f"mul i64 %width, {number}") if number else None
            rows.append(_Row(offset, {lanes: dict(known) for lanes, known in self.known.items()}))
        self.clear_lanes(self.row_sums)
        quantum = code.let(f"mul i64 {r}, %quanta")  # blocks of codes begin anew at each row
        self._elements(f"{name}.", start, end, rows, {Kind.COLUMN: to_column, Kind.FULL: to_sum}, quantum)
        for reduction in self.row_sums:
            for number in range(count):
                at = code.let(f"add i64 {r}, {number}")
                self.put(reduction, at, self._halved(reduction, [number]))
        code.do(f"br label %{name}.done")
        code.label(f"{name}.done")
        code.do(f"br label %{name}")
        code.label(f"{name}.end")

    def _elements(
        self, prefix: str, start: str, end: str, rows: Sequence[_Row], shifts: Mapping[Kind, str], quantum: str
    ) -> None:
        """Loop over elements `start` to `end`, in blocks where there are codes; `quantum` is the number of the first.

        `shifts` leads from an element's index to that of its column's values, and of its column's sums.
        """
        position = partial(self._position, rows, end, shifts)
        if not self.arrays.coded:
            self.loop(prefix, start, end, position)
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
        self.loop(prefix, first, last, position)
        inverses = self.arrays.end_quantum(at)
        if inverses:
            self.loop(f"{prefix}encode.", first, last, lambda i, lanes, _: self.arrays.encode(inverses, i, lanes))
        code.do(f"br label %{prefix}quantum.end")
        code.label(f"{prefix}quantum.end")
        code.do(f"br i1 {whole}, label %{prefix}quantum, label %{prefix}quanta.end")
        code.label(f"{prefix}quanta.end")

    def _position(
        self, rows: Sequence[_Row], end: str, shifts: Mapping[Kind, str], index: str, lanes: int, lane: str
    ) -> None:
        """Load, compute, sum and store at one position of each row; all loads come before all stores."""
        code = self.code
        columns: dict[int, str] = {}
        for source in self.sweep.inputs:
            if source.kind is Kind.COLUMN:
                at = code.let(f"add i64 {index}, {shifts[source.kind]}")
                columns[source.index] = self.arrays.read(place_of(source), at, lanes)
        places = [code.let(f"add i64 {index}, {row.offset}") if row.offset else index for row in rows]
        skip = self._skip(rows, end, index) if lanes == self.lanes else None
        values = [
            Values(code, self.dtype, lanes, {**row.known[lanes], **columns, **self._load(place, lanes, skip)})
            for row, place in zip(rows, places, strict=True)
        ]
        for symbol in self.sweep.body:
            for of_row in values:
                _ = of_row[symbol]
        for reduction in self.sweep.reductions:
            terms = [of_row[_summed(reduction)[0]] for of_row in values]
            if reduction.kind is Kind.COLUMN:
                at = code.let(f"add i64 {index}, {shifts[Kind.FULL]}")
                self._add(reduction, terms, self.arrays.address(sum_operand(reduction).place, at, sums=True), lanes)
                continue
            for number, term in enumerate(terms):
                at = code.let(f"add i64 {lane}, {number * LANES}") if number else lane
                place = code.let(f"getelementptr double, ptr %lanes{reduction.index}, i64 {at}")
                self._add(reduction, [term], place, lanes)
        for store in self.sweep.stores:
            for place, of_row in zip(places, values, strict=True):
                self.arrays.store(store.place, place, of_row[store.value], lanes)

    def _skip(self, rows: Sequence[_Row], end: str, index: str) -> str | None:
        """How far what will be read soon is away from where it would be if the next row were not read already."""
        if len(rows) == 1:
            return None
        code = self.code
        over = code.let(f"icmp sge i64 {code.let(f'add i64 {index}, {SOON}')}, {end}")
        return code.let(f"select i1 {over}, i64 {rows[-1].offset}, i64 0")

    def _load(self, index: str, lanes: int, skip: str | None) -> dict[int, str]:
        known: dict[int, str] = {}
        for source in self.sweep.inputs:
            if source.kind is Kind.FULL:
                if lanes == self.lanes:
                    at = self.code.let(f"add i64 {index}, {skip}") if skip else index
                    self.arrays.prefetch(place_of(source), at, lanes)
                known[source.index] = self.arrays.load(place_of(source), index, lanes)
        return known

    def _add(self, reduction: Symbol, terms: Sequence[str], place: str, lanes: int) -> None:
        """Add to the sums at `place` what elements contribute, in float64, one row after another."""
        code, kind = self.code, vector("double", lanes)
        total = code.let(f"load {kind}, ptr {place}, align 8")
        for term in terms:
            wide = self.widen(term, lanes)
            if not _summed(reduction)[1]:
                total = code.let(f"fadd {kind} {total}, {wide}")
            elif self.dtype == "float64":
                total = code.let(f"fadd {kind} {total}, {code.let(f'fmul {kind} {wide}, {wide}')}")
            else:  # the square of a float32 is exact in float64, so that it does not matter whether this is contracted
                name = f"llvm.fmuladd.v{lanes}f64" if lanes > 1 else "llvm.fmuladd.f64"
                total = code.call(name, kind, wide, wide, total)
        code.do(f"store {kind} {total}, ptr {place}, align 8")

    def _in_order(self, reduction: Symbol) -> str:
        """The lanes added in order, as sums over whole tensors are defined."""
        kind = f"<{LANES} x double>"
        lanes = self.lanes_of(reduction)
        total = self.code.let(f"extractelement {kind} {lanes}, i64 0")
        for lane in range(1, LANES):
            value = self.code.let(f"extractelement {kind} {lanes}, i64 {lane}")
            total = self.code.let(f"fadd double {total}, {value}")
        return total

    def _halved(self, reduction: Symbol, numbers: Sequence[int]) -> str:
        """The sum of the lanes with these numbers."""
        lanes = self.lanes_of(reduction, numbers[0])
        for number in numbers[1:]:
            lanes = self.code.let(f"fadd <{LANES} x double> {lanes}, {self.lanes_of(reduction, number)}")
        return self.halve(lanes)

    def _load_small(self, kind: Kind, index: str) -> None:
        for source in small_inputs(self.sweep):
            if source.kind is kind:
                self.know(source, self.arrays.read(place_of(source), index, 1))


def _summed(reduction: Symbol) -> tuple[Symbol, bool]:
    """What is added up, and whether it is squared first, in float64.

    Of whole tensors `mean(x * x)` is the mean of products that have been rounded, as it is on real arrays.
    """
    inner = reduction.args[0]
    if reduction.kind is not Kind.WHOLE and inner.op == "multiply" and inner.args[0] is inner.args[1]:
        return inner.args[0], True
    return inner, reduction.op != "mean"
