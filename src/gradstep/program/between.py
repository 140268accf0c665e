"""LLVM IR for what lies between two sweeps: values of tensors, matrices, rows and columns, from the sums of the sweeps.

A chunk is one tensor, and its length the number of matrices that the tensor is a stack of.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from gradstep.program.access import Access, Operand, sum_operand
from gradstep.program.blocks import LANES
from gradstep.program.formats import Format
from gradstep.program.frame import Frame, KernelSource
from gradstep.program.graph import Kind, Symbol, reachable
from gradstep.program.program import Program, ends_a_sweep, place_of, small_inputs
from gradstep.program.values import Values, splat, vector

POSITION = {Kind.ROW: "%rows.at", Kind.COLUMN: "%columns.at"}
LENGTH = {Kind.ROW: "%height", Kind.COLUMN: "%width"}


def emit_after(program: Program, level: int, dtype: str, formats: Mapping[str, Format]) -> KernelSource | None:
    """The kernel after a sweep; None where there is nothing to do.

    It adds up sums of columns and computes what the next sweep reads; after the last one it writes the slots of rows
    and columns.
    """
    if level == len(program.sweeps) - 1:
        kept = program.small_outputs
        return _BetweenEmitter(program, dtype, kept, {}, [], formats).source() if kept else None
    columns = [sums for sums in program.sweeps[level].reductions if sums.kind is Kind.COLUMN]
    wanted = {place_of(source): source for source in small_inputs(program.sweeps[level + 1])}
    return _BetweenEmitter(program, dtype, {}, wanted, columns, formats).source() if wanted or columns else None


class _BetweenEmitter(Frame):
    """Computes values in stages: each ends where a mean over rows or columns must be known.

    Slots are written in the last stage only, when nothing reads them any more.
    """

    def __init__(
        self, program: Program, dtype: str, kept: Mapping[str, Symbol], wanted: Mapping[str, Symbol],
        columns: Sequence[Symbol], formats: Mapping[str, Format],
    ) -> None:  # fmt: skip
        super().__init__(program, dtype, [LANES, 1])
        self.kept, self.wanted, self.columns = kept, wanted, columns
        self.needed = reachable([*kept.values(), *wanted.values()], _is_given)
        self.stages = _stages(self.needed)
        slots = {s.attribute: formats[s.attribute] for s in self.needed if s.op == "array"}
        slots |= {place: formats[place] for place in kept}
        self.sums = [s for s in self.needed if ends_a_sweep(s)]
        operands = [Operand(place, symbol.kind, dtype) for place, symbol in wanted.items()]
        operands += [sum_operand(s) for s in dict.fromkeys([*self.sums, *columns])]
        self.arrays = Access(self.code, dtype, LANES, slots, list(kept), operands, factored=True)

    @property
    def lane_sums(self) -> dict[int, int]:
        """See `Frame.lane_sums`."""
        return {symbol.index: 1 for symbol in self.needed if _is_mean(symbol)}

    def chunk(self) -> None:
        """See `Frame.chunk`."""
        code = self.code
        self.load_scalars(self.needed)
        self.arrays.begin_chunk()
        self.load_dimensions()
        for symbol in self.needed:
            if symbol.kind is Kind.WHOLE and ends_a_sweep(symbol):
                self.know(symbol, self._statistic(symbol))
        self._compute(Kind.WHOLE, 0)
        self._store_single(Kind.WHOLE, "0")
        if not self.program.factored:
            code.do("br label %chunk.end")
            return
        code.do("br label %matrix")
        code.label("matrix")
        code.do("%lead = phi i64 [ 0, %chunk ], [ %lead.next, %matrix.end ]")
        code.do("%rows.at = mul i64 %lead, %height")
        code.do("%columns.at = mul i64 %lead, %width")
        code.do(f"%sums.at = mul i64 {code.let('mul i64 %lead, %blocks')}, %width")
        for reduction in self.columns:
            self._add_blocks(reduction)
        for stage in range(max(self.stages.values(), default=0) + 1):
            self._compute(Kind.LEAD, stage)
            self._mean_over(Kind.ROW, stage)
            self._mean_over(Kind.COLUMN, stage)
        self._store_single(Kind.LEAD, "%lead")
        for kind in (Kind.ROW, Kind.COLUMN):
            if any(symbol.kind is kind for symbol in (*self.kept.values(), *self.wanted.values())):
                self.loop(f"{kind.name}.", "0", LENGTH[kind], partial(self._store, kind))
        code.do("br label %matrix.end")
        code.label("matrix.end")
        code.do("%lead.next = add i64 %lead, 1")
        more = code.let("icmp slt i64 %lead.next, %length")
        code.do(f"br i1 {more}, label %matrix, label %chunk.end")

    def _statistic(self, symbol: Symbol) -> str:
        """A statistic of the tensor from its total, in float64 and then rounded."""
        code = self.code
        value = code.let(f"load double, ptr {self.arrays.address(sum_operand(symbol).place, '0', sums=True)}")
        if symbol.op != "norm":
            size = code.let(f"mul i64 {code.let('mul i64 %length, %height')}, %width")
            value = code.let(f"fdiv double {value}, {code.let(f'sitofp i64 {size} to double')}")
        if symbol.op != "mean":
            value = code.call("llvm.sqrt.f64", "double", value)
        return self.narrow(value, 1)

    def _compute(self, kind: Kind, stage: int) -> None:
        """All values of a kind that are known once for many elements, from this stage on."""
        for symbol in self.needed:
            known = symbol.index in self.known[1]
            if symbol.kind is kind and self.stages[symbol.index] == stage and not symbol.boolean and not known:
                self.know(symbol, Values(self.code, self.dtype, 1, self.known[1])[symbol])

    def _add_blocks(self, reduction: Symbol) -> None:
        """Add the sums of all blocks of rows to those of the first."""
        code, name = self.code, f"blocks{reduction.index}"
        place = sum_operand(reduction).place
        before = f"%{name}.before"
        code.do(f"br label %{name}.enter")
        code.label(f"{name}.enter")
        code.do(f"br label %{name}")
        code.label(name)
        code.do(f"{before} = phi i64 [ 0, %{name}.enter ], [ {before}.next, %{name}.next ]")
        code.do(f"{before}.next = add i64 {before}, 1")
        more = code.let(f"icmp slt i64 {before}.next, %blocks")
        code.do(f"br i1 {more}, label %{name}.begin, label %{name}.end")
        code.label(f"{name}.begin")
        skip = code.let(f"mul i64 {before}.next, %width")

        def add(index: str, lanes: int, _: str) -> None:
            kind, first = vector("double", lanes), code.let(f"add i64 %sums.at, {index}")
            target = self.arrays.address(place, first, sums=True)
            source = self.arrays.address(place, code.let(f"add i64 {first}, {skip}"), sums=True)
            terms = [code.let(f"load {kind}, ptr {at}, align 8") for at in (target, source)]
            code.do(f"store {kind} {code.let(f'fadd {kind} {terms[0]}, {terms[1]}')}, ptr {target}, align 8")

        self.loop(f"{name}.", "0", "%width", add)
        code.do(f"br label %{name}.next")
        code.label(f"{name}.next")
        code.do(f"br label %{name}")
        code.label(f"{name}.end")

    def _mean_over(self, kind: Kind, stage: int) -> None:
        """Means over all rows, or over all columns, that end this stage."""
        means = [s for s in self.needed if _is_mean(s) and s.args[0].kind is kind]
        means = [s for s in means if self.stages[s.index] == stage + 1]
        if not means:
            return
        code = self.code
        self.clear_lanes(means)

        def add(index: str, lanes: int, lane: str) -> None:
            values, wide = self._values(kind, index, lanes), vector("double", lanes)
            for symbol in means:
                term = self.widen(values[symbol.args[0]], lanes)
                place = code.let(f"getelementptr double, ptr %lanes{symbol.index}, i64 {lane}")
                total = code.let(f"fadd {wide} {code.let(f'load {wide}, ptr {place}, align 8')}, {term}")
                code.do(f"store {wide} {total}, ptr {place}, align 8")

        self.loop(f"mean{stage}.{kind.name}.", "0", LENGTH[kind], add)
        for symbol in means:
            length = code.let(f"sitofp i64 {LENGTH[kind]} to double")
            mean = code.let(f"fdiv double {self.halve(self.lanes_of(symbol))}, {length}")
            self.know(symbol, self.narrow(mean, 1))

    def _values(self, kind: Kind, index: str, lanes: int) -> Values:
        """The values at a row or column, or at several in a row."""
        code, known = self.code, dict(self.known[lanes])
        at = code.let(f"add i64 {POSITION[kind]}, {index}")
        for symbol in self.needed:
            if symbol.kind is kind and symbol.op == "array":
                known[symbol.index] = self.arrays.load(symbol.attribute, at, lanes)
            elif symbol.kind is kind and ends_a_sweep(symbol):
                place = at if kind is Kind.ROW else code.let(f"add i64 %sums.at, {index}")
                address = self.arrays.address(sum_operand(symbol).place, place, sums=True)
                total = code.let(f"load {vector('double', lanes)}, ptr {address}, align 8")
                along = LENGTH[Kind.COLUMN if kind is Kind.ROW else Kind.ROW]
                length = splat(code, "double", code.let(f"sitofp i64 {along} to double"), lanes)
                mean = code.let(f"fdiv {vector('double', lanes)} {total}, {length}")
                known[symbol.index] = self.narrow(mean, lanes)
        return Values(code, self.dtype, lanes, known)

    def _store(self, kind: Kind, index: str, lanes: int, _: str) -> None:
        """Write the values of a row or column, or of several in a row, to slots and to where the next sweep reads."""
        values = self._values(kind, index, lanes)
        at = self.code.let(f"add i64 {POSITION[kind]}, {index}")
        kept = [(place, values[symbol]) for place, symbol in self.kept.items() if symbol.kind is kind]
        self._put_wanted(kind, values, at, lanes)
        for place, value in kept:
            self.arrays.store(place, at, value, lanes)

    def _store_single(self, kind: Kind, at: str) -> None:
        """The same for a value of the tensor or of a matrix."""
        self._put_wanted(kind, Values(self.code, self.dtype, 1, self.known[1]), at, 1)

    def _put_wanted(self, kind: Kind, values: Values, at: str, lanes: int) -> None:
        for place, symbol in self.wanted.items():
            if symbol.kind is kind:
                address = self.arrays.address(place, at)
                self.code.do(f"store {values.type} {values.number(symbol)}, ptr {address}, align 4")


def _is_mean(symbol: Symbol) -> bool:
    """Whether the value needs all rows or columns of a matrix."""
    return symbol.op == "mean" and symbol.args[0].kind in (Kind.ROW, Kind.COLUMN)


def _is_given(symbol: Symbol) -> bool:
    """Whether a value is a scalar, or comes from sums that sweeps have left."""
    return symbol.kind is Kind.HOST or ends_a_sweep(symbol)


def _stages(symbols: Sequence[Symbol]) -> dict[int, int]:
    """How many means over rows or columns must be known, one after another, before each value is."""
    stages: dict[int, int] = {}
    for symbol in symbols:
        before = max((stages.get(arg.index, 0) for arg in symbol.args), default=0)
        stages[symbol.index] = before + _is_mean(symbol)
    return stages
