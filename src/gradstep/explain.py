"""What an optimizer computes, printed as formulas and as LLVM IR."""

from collections import Counter
from collections.abc import Mapping

from gradstep.errors import ArgumentTypeError, DtypeError
from gradstep.optimizer import Optimizer
from gradstep.program.compiler import module_ir
from gradstep.program.formats import BYTES, FLOATS, QUANTUM, Format, compute_dtype, scales_of
from gradstep.program.formulas import spell
from gradstep.program.graph import Kind, Reading, Symbol
from gradstep.program.program import Program, Sweep, is_input, place_of


def explain(opt: Optimizer, *, ndim: int = 2, dtype: str = "float32", ir: bool = True) -> None:
    """Print the programs of each rule in `opt`: formulas, what is read and written, and the LLVM IR.

    A rule has more than one where a mapping removes a term for some parameters; each then says for which globs. A prime
    marks new values: `m'` is what `m` becomes. Of an `Accumulate` it is the step that ends a round, which adds the
    gradient `g` to the sum `g.sum`.

    Args:
        opt: any optimizer.
        ndim: the number of dimensions of the parameters in question; some rules depend on it.
        dtype: their dtype and that of their gradients: "float32", "float64", "bfloat16" or "float16".
        ir: whether to print the IR as well.

    Raises:
        ArgumentTypeError: `opt` is no optimizer.
        DtypeError: the dtype is not one that parameters have.

    Example:
        >>> import gradstep as gs
        >>> gs.explain(gs.Lion(1e-4, weight_decay=0.1), ir=False)
        Lion, float32, 2 dimensions: 1 sweep, 20 bytes per element
          once per step, in float64, then rounded to float32:
            s1 = 1 - beta1
            s2 = 1 - beta2
            s3 = 1 - learning_rate * weight_decay
          sweep 1 reads w g m, writes w m:
            m' = beta2 * m + s2 * g
            w' = w * s3 - learning_rate * sign(beta1 * m + s1 * g)
    """
    from gradstep.accumulate import Accumulate

    if not isinstance(opt, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentTypeError(f"explain takes an optimizer, got {opt!r}")
    if dtype not in FLOATS:
        raise DtypeError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    reading = Reading.SCALED if opt.clip_norm is not None else Reading.PLAIN
    if isinstance(opt, Accumulate) and opt.every > 1:
        reading = Reading.SUMMED
    leaves = opt._leaves()  # pyright: ignore[reportPrivateUsage]
    texts = [
        _explain(program, leaf.storage.formats(program.slots, dtype, dtype), uses, ndim, ir)
        for leaf in leaves
        for program, uses in _programs(leaf.programs(ndim, reading))
    ]
    print("\n\n".join(texts))


def _programs(variants: list[tuple[dict[str, list[str]], Program]]) -> list[tuple[Program, list[str]]]:
    """Each program once, with the globs that lead to it where globs make a difference."""
    found: dict[int, tuple[Program, list[str]]] = {}
    for globs, program in variants:
        telling = [name for name in globs if any(others[name] != globs[name] for others, _ in variants)]
        use = " and ".join(f"{name} from {', '.join(map(repr, globs[name]))}" for name in telling)
        found.setdefault(id(program), (program, []))[1].append(use)
    return list(found.values())


def _explain(program: Program, formats: Mapping[str, Format], uses: list[str], ndim: int, ir: bool) -> str:
    text, dtype = _Text(program), compute_dtype(formats["w"].dtype)
    lines = [_headline(program, formats, ndim), *(f"  for parameters with {use}" for use in uses if use)]
    lines += [*_storage(program, formats), *text.scalars(dtype)]
    for number, sweep in enumerate(program.sweeps):
        lines += [*text.sweep(sweep, number), *text.after(number)]
    if ir:
        from gradstep.program.between import emit_after
        from gradstep.program.kernel import emit

        for number, sweep in enumerate(program.sweeps):
            lines += ["", f"; sweep {number + 1}", module_ir(emit(program, sweep, dtype, formats).ir)]
            after = emit_after(program, number, dtype, formats)
            lines += ["", f"; after sweep {number + 1}", module_ir(after.ir)] if after else []
    return "\n".join(lines)


def _headline(program: Program, formats: Mapping[str, Format], ndim: int) -> str:
    dtype, sweeps, size = formats["w"].dtype, len(program.sweeps), bytes_per_element(program, formats)
    return (
        f"{program.name}, {dtype}, {ndim} dimension{'s' * (ndim != 1)}: {sweeps} sweep{'s' * (sweeps != 1)}, "
        f"{size:.4g} bytes per element"
    )


def bytes_per_element(program: Program, formats: Mapping[str, Format]) -> float:
    """Bytes that all sweeps together read and write for each element."""
    places = [place_of(source) for sweep in program.sweeps for source in _arrays(sweep)]
    places += [store.place for sweep in program.sweeps for store in sweep.stores]
    return sum(_size(place, formats.get(place, Format(compute_dtype(formats["w"].dtype)))) for place in places)


def _size(place: str, kept: Format) -> float:
    """Bytes that an array has for each element."""
    parts = kept.parts(place).items()
    return sum(BYTES[dtype] / (QUANTUM if part == scales_of(place) else 1) for part, dtype in parts)


def _storage(program: Program, formats: Mapping[str, Format]) -> list[str]:
    """How arrays are kept that differ from the computation's dtype, and which are rounded at random."""
    compute = compute_dtype(formats["w"].dtype)
    kept = [f"{slot} in {formats[slot].dtype}" for slot in program.slots if formats[slot].dtype != compute]
    kept += ["w with a copy in float32"] if formats["w"].master else []
    random = [place for place in ("w", *program.slots) if formats[place].stochastic]
    lines = [f"  computed in {compute}"] if formats["w"].dtype != compute else []
    lines += [f"  keeps {', '.join(kept)}"] if kept else []
    return lines + ([f"  rounds {' '.join(random)} at random"] if random else [])


def _arrays(sweep: Sweep) -> list[Symbol]:
    return [source for source in sweep.inputs if source.kind is Kind.FULL]


class _Text:
    """The formulas of a program, with names for what is used more than once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._names: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._new = {value.index: f"{place}'" for place, value in program.outputs.items() if not is_input(value)}
        self._new |= {value.index: f"{slot}'" for slot, value in program.small_outputs.items()}

    def scalars(self, dtype: str) -> list[str]:
        """The expressions of the host; a bare hyperparameter keeps its own name."""
        lines: list[str] = []
        for symbol in self._program.scalars.outputs:
            if symbol.op != "hyperparameter":
                lines.append(f"    {self._name(symbol, 's')} = {spell(symbol)}")
        return [f"  once per step, in float64, then rounded to {dtype}:", *lines] if lines else []

    def sweep(self, sweep: Sweep, number: int) -> list[str]:
        """What a pass over the elements reads, sums and writes."""
        stored = {store.value.index: store.place for store in sweep.stores}
        reads = " ".join(self._names.get(source.index, place_of(source)) for source in _arrays(sweep))
        writes = " ".join(place if place in self._program.outputs else "scratch" for place in stored.values())
        lines = [f"  sweep {number + 1} reads {reads}" + (f", writes {writes}:" if writes else ":")]
        uses = Counter(arg.index for symbol in sweep.body for arg in symbol.args)
        uses.update(root.index for root in sweep.roots)
        for symbol in sweep.body:
            self._names.pop(symbol.index, None)  # computed anew in each sweep
            if symbol.index in self._new:
                lines.append(self._line(symbol, self._new[symbol.index]))
            elif symbol.index in stored:
                lines.append(self._line(symbol, f"{stored[symbol.index].partition(':')[0]}_input"))
            elif uses[symbol.index] > 1:
                lines.append(self._line(symbol, self._fresh("x")))
        for store in sweep.stores:  # what is an array already, or goes to two places
            named = self._names.get(store.value.index)
            if store.place in self._program.outputs and named != f"{store.place}'":
                lines.append(f"    {store.place}' = {spell(store.value, self._names)}")
        for reduction in sweep.reductions:
            lines.append(self._line(reduction, self._fresh(reduction.op)))
        return lines

    def after(self, number: int) -> list[str]:
        """What happens between this sweep and the next: matrix operations, and small values that are kept."""
        lines: list[str] = []
        for symbol in self._program.matrices[number]:
            lines.append(self._line(symbol, self._fresh("matrix"), " on the array library"))
        for symbol in self._program.symbols:
            small = is_input(symbol) and symbol.kind not in (Kind.FULL, Kind.HOST)
            known = self._program.levels[symbol.index] <= number + 1
            if small and known and symbol.index in self._new and symbol.index not in self._names:
                lines.append(self._line(symbol, self._new[symbol.index]))
        return ["  then:", *lines] if lines else []

    def _line(self, symbol: Symbol, name: str, note: str = "") -> str:
        line = f"    {name} = {spell(symbol, self._names)}{note}"
        self._names[symbol.index] = name
        return line

    def _name(self, symbol: Symbol, stem: str) -> str:
        self._names[symbol.index] = self._fresh(stem)
        return self._names[symbol.index]

    def _fresh(self, stem: str) -> str:
        self._counts[stem] += 1
        return f"{stem}{self._counts[stem]}"
