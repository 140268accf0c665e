"""LLVM IR that reads and writes the arrays of a sweep, in whatever format each is stored."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from gradstep.program.formats import BYTES, NARROW, QUANTUM, Format, codes_of, master_of, scales_of
from gradstep.program.graph import Kind, Symbol
from gradstep.program.narrow import decode, encode, narrow, scale_of, widen
from gradstep.program.noise import GOLDEN, emit_mix, emit_noise, name_key, signed
from gradstep.program.values import TYPES, Code, splat, vector

AHEAD = 256  # bytes; more works against the processor's own prefetching, which stops at the end of a page
LINE = 64


class Operand(NamedTuple):
    """An array of the sweep: dense, small, the scales of codes, or the sums that a reduction leaves behind."""

    place: str
    kind: Kind
    dtype: str
    sums: bool = False


def sum_operand(reduction: Symbol) -> Operand:
    """Where a kernel leaves the partial sums of a reduction: per block, per row, or per block and column."""
    return Operand(f"{reduction.op}:{reduction.index}", reduction.kind, "float64", sums=True)


class Access:
    """The arrays of a sweep.

    Args:
        code: the function under construction.
        dtype: the compute dtype.
        lanes: how many elements a vector has.
        formats: how each dense array is stored.
        written: the dense arrays that the sweep writes.
        others: the further operands: small values and sums.
        factored: whether the sweep goes through matrices, row by row.
    """

    def __init__(
        self,
        code: Code,
        dtype: str,
        lanes: int,
        formats: Mapping[str, Format],
        written: Collection[str],
        others: Sequence[Operand],
        *,
        factored: bool,
    ) -> None:
        self.code, self.dtype, self.lanes, self.formats, self.factored = code, dtype, lanes, formats, factored
        dense = [_operand(place, *part) for place, kept in formats.items() for part in kept.parts(place).items()]
        self.operands = [*dense, *others]
        self.places = {(operand.place, operand.sums): number for number, operand in enumerate(self.operands)}
        self.coded = [place for place, kept in formats.items() if kept.coded]
        self.encoded = [place for place in self.coded if place in written]
        self._rounded = [place for place in written if formats[place].stochastic]
        self._bases: list[str] = []
        self._leaps: dict[int, str] = {}
        self._chunk_end = ""
        self._keys: dict[str, tuple[str, str]] = {}
        self._scales: dict[str, str] = {}
        self._quantum_start = ""

    def declare(self) -> None:
        """Where the new values of a block wait to be encoded, and their largest magnitude is gathered."""
        for place in self.encoded:
            number = self.coded.index(place)
            self.code.do(f"%new{number} = alloca [{QUANTUM} x float], align 64")
            self.code.do(f"%largest{number} = alloca <{self.lanes} x i32>, align 64")
            self.code.do(f"%largest.rest{number} = alloca i32")

    # A chunk

    def begin_chunk(self) -> None:
        """Find where the operands of `%tensor` begin, and what their noise does."""
        self._load_keys()
        self._bases = [self._base(number, "%tensor") for number in range(len(self.operands))]

    def _base(self, number: int, tensor: str) -> str:
        """Where an operand of a tensor begins."""
        code = self.code
        place = code.let(f"add i64 {code.let(f'mul i64 %tensors, {number}')}, {tensor}")
        return code.let(f"load ptr, ptr {code.let(f'getelementptr ptr, ptr %addresses, i64 {place}')}")

    def measure_leaps(self, end: str) -> None:
        """For each dense operand, how far it is from the end of this chunk to the beginning of the next one."""
        code, self._chunk_end = self.code, end
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
                self._leaps[number] = code.let(f"sub i64 {code.let(f'ptrtoint ptr {to} to i64')}, {here}")

    def _load_keys(self) -> None:
        """What the noise of each array that is rounded at random begins with, for this tensor and step."""
        code = self.code
        if not self._rounded:
            return
        key = code.let(f"load i64, ptr {code.let('getelementptr i64, ptr %keys, i64 %tensor')}")
        far = code.let(f"mul i64 {code.let('lshr i64 %first, 32')}, {GOLDEN}")
        for place in self._rounded:
            mixed = emit_mix(code, code.let(f"xor i64 {key}, {signed(name_key(place))}"))
            low = code.let(f"trunc i64 {mixed} to i32")
            high = code.let(f"trunc i64 {code.let(f'lshr i64 {mixed}, 32')} to i32")
            if not self.factored:  # a chunk lies between two multiples of 2**32
                high = code.let(f"add i32 {high}, {code.let(f'trunc i64 {far} to i32')}")
            self._keys[place] = low, high

    # An element, or a vector of them

    def prefetch(self, place: str, index: str, lanes: int) -> None:
        """Fetch what the loop will read soon, beyond the end of a chunk the beginning of the next one."""
        code = self.code
        code.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        for part, dtype in self.formats[place].parts(place).items():
            number, size = self.places[part, False], BYTES[dtype]
            if self.operands[number].kind is not Kind.FULL:
                continue
            start = self._address(number, index)
            if number in self._leaps:
                ahead = code.let(f"add i64 {index}, {AHEAD // size}")
                over = code.let(f"icmp sge i64 {ahead}, {self._chunk_end}")
                leap = code.let(f"select i1 {over}, i64 {self._leaps[number]}, i64 0")
                start = code.let(f"getelementptr i8, ptr {start}, i64 {leap}")
            for line in range(0, size * lanes, LINE):
                at = code.let(f"getelementptr i8, ptr {start}, i64 {AHEAD + line}")
                code.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)")

    def load(self, place: str, index: str, lanes: int) -> str:
        """The value of an array at a position, in the compute dtype."""
        kept = self.formats[place]
        if kept.coded:
            codes = self.read(codes_of(place), index, lanes)
            value = decode(self.code, kept, codes, self._scales[place], lanes)
            return self._convert(value, "float32", self.dtype, lanes)
        stored = self.read(place, index, lanes)
        if not kept.master:
            return self._from_stored(stored, kept.dtype, lanes)
        # A parameter that somebody else has written no longer is what its copy rounds to; then it counts itself.
        master = self.read(master_of(place), index, lanes)
        same = self.code.let(f"icmp eq {vector('i16', lanes)} {narrow(self.code, kept, master, None, lanes)}, {stored}")
        widened = widen(self.code, kept.dtype, stored, lanes)
        return self.code.let(
            f"select {vector('i1', lanes)} {same}, {vector('float', lanes)} {master}, "
            f"{vector('float', lanes)} {widened}"
        )

    def store(self, place: str, index: str, value: str, lanes: int) -> None:
        """Write a value of the compute dtype; codes wait until their block is complete."""
        kept = self.formats[place]
        if kept.coded:
            self._put_off(place, index, self._convert(value, self.dtype, "float32", lanes), lanes)
            return
        if kept.master:
            self._write(master_of(place), index, value, lanes)
        noise = self._noise(place, index, lanes) if kept.stochastic else None
        self._write(place, index, self._to_stored(value, kept, noise, lanes), lanes)

    def read(self, part: str, index: str, lanes: int) -> str:
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

    def _to_stored(self, value: str, kept: Format, noise: str | None, lanes: int) -> str:
        if kept.dtype in NARROW:
            return narrow(self.code, kept, self._convert(value, self.dtype, "float32", lanes), noise, lanes)
        return self._convert(value, self.dtype, kept.dtype, lanes)

    def _convert(self, value: str, source: str, target: str, lanes: int) -> str:
        if source == target:
            return value
        word = "fptrunc" if BYTES[source] > BYTES[target] else "fpext"
        return self.code.let(f"{word} {vector(TYPES[source], lanes)} {value} to {vector(TYPES[target], lanes)}")

    def address(self, operand: str, index: str, *, sums: bool = False) -> str:
        """Where an element of an operand lies."""
        return self._address(self.places[operand, sums], index)

    def _address(self, number: int, index: str) -> str:
        element = TYPES[self.operands[number].dtype]
        return self.code.let(f"getelementptr {element}, ptr {self._bases[number]}, i64 {index}")

    def _noise(self, place: str, index: str, lanes: int) -> str:
        """Random words for elements from `index` on."""
        code, (low, high) = self.code, self._keys[place]
        words = vector("i32", lanes)
        low, high = splat(code, "i32", low, lanes), splat(code, "i32", high, lanes)
        if lanes > 1:
            steps = ", ".join(f"i32 {lane}" for lane in range(lanes))
            low = code.let(f"add {words} {low}, <{steps}>")
        if self.factored:  # rows may lie across a multiple of 2**32
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

    # A block of codes

    def begin_quantum(self, start: str, at: str) -> None:
        """Load the scales of the block number `at`, and forget the largest magnitudes of the one before."""
        self._quantum_start = start
        for place in self.coded:
            address = self.address(scales_of(place), at)
            self._scales[place] = self.code.let(f"load float, ptr {address}, align 1")
        for place in self.encoded:
            number = self.coded.index(place)
            self.code.do(f"store <{self.lanes} x i32> zeroinitializer, ptr %largest{number}, align 64")
            self.code.do(f"store i32 0, ptr %largest.rest{number}")

    def end_quantum(self, at: str) -> dict[str, str]:
        """Store the scales of a block now that its largest magnitudes are known; one over each is returned."""
        inverses: dict[str, str] = {}
        for place in self.encoded:
            scale, inverses[place] = scale_of(self.code, self._largest(self.coded.index(place)))
            self.code.do(f"store float {scale}, ptr {self.address(scales_of(place), at)}, align 1")
        return inverses

    def encode(self, inverses: Mapping[str, str], index: str, lanes: int) -> None:
        """Turn new values of the block into codes."""
        for place in self.encoded:
            value = self.code.let(f"load {vector('float', lanes)}, ptr {self._new(place, index)}, align 4")
            noise = self._noise(place, index, lanes)
            codes = encode(self.code, self.formats[place], value, inverses[place], noise, lanes)
            self.code.do(f"store {vector('i8', lanes)} {codes}, ptr {self.address(codes_of(place), index)}, align 1")

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

    def _new(self, place: str, index: str) -> str:
        """Where the block's new values wait to be encoded."""
        offset = self.code.let(f"sub i64 {index}, {self._quantum_start}")
        return self.code.let(f"getelementptr float, ptr %new{self.coded.index(place)}, i64 {offset}")

    def _largest(self, number: int) -> str:
        """The bits of the largest magnitude of the block."""
        code, kind = self.code, f"<{self.lanes} x i32>"
        name = f"llvm.vector.reduce.umax.v{self.lanes}i32"
        code.declarations.add(f"declare i32 @{name}({kind})")
        lanes = code.let(f"load {kind}, ptr %largest{number}, align 64")
        most = code.let(f"call i32 @{name}({kind} {lanes})")
        rest = code.let(f"load i32, ptr %largest.rest{number}")
        return code.let(f"select i1 {code.let(f'icmp ugt i32 {most}, {rest}')}, i32 {most}, i32 {rest}")


def _operand(place: str, part: str, dtype: str) -> Operand:
    return Operand(part, Kind.LEAD if part == scales_of(place) else Kind.FULL, dtype)
