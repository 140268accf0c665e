"""What an optimizer computes, printed as formulas and as LLVM IR."""

from collections.abc import Iterator

from gradstep.optimizer import Leaf, Optimizer
from gradstep.program.compiler import module_ir
from gradstep.program.formulas import spell
from gradstep.program.graph import Kind, Symbol
from gradstep.program.kernel import emit
from gradstep.program.program import Program, Sweep, place_of
from gradstep.program.values import BYTES


def explain(opt: Optimizer, *, ndim: int = 2, dtype: str = "float32", ir: bool = True) -> None:
    """Print the program of each rule in `opt`: its formulas, what it reads and writes, and its LLVM IR.

    Args:
        opt: any optimizer.
        ndim: the number of dimensions of the parameters in question; some rules depend on it.
        dtype: their dtype, "float32" or "float64".
        ir: whether to print the IR as well.

    Example:
        >>> import gradstep as gs
        >>> gs.explain(gs.Lion(1e-4), ir=False)
        Lion, float32, 2 dimensions: 1 sweep, 20 bytes per element
        scalars, in float64 once per step, then rounded to float32:
          s0 = beta2
          s1 = 1 - beta2
          s2 = learning_rate
          s3 = beta1
          s4 = 1 - beta1
        sweep 1 reads w m g, writes w m:
          w = w - s2 * sign(s3 * m + s4 * g)
          m = s0 * m + s1 * g
    """
    print("\n\n".join(_explain(leaf, ndim, dtype, ir) for leaf in opt.leaves()))


def _explain(leaf: Leaf, ndim: int, dtype: str, ir: bool) -> str:
    program = leaf.program(ndim, clipped=opt_clips(leaf))
    lines = [_headline(program, ndim, dtype)]
    scalars = [f"  s{i} = {text}" for i, text in enumerate(program.scalars.spelled)]
    if scalars:
        lines += [f"scalars, in float64 once per step, then rounded to {dtype}:", *scalars]
    names = {symbol.index: f"s{place}" for symbol, place in _scalar_names(program)}
    for number, sweep in enumerate(program.sweeps):
        reads = [place_of(leaf) for leaf in sweep.leaves if leaf.kind is Kind.FULL]
        lines += _formulas(sweep, number, reads, names)
        lines += _between(program, number, names)
    if ir:
        for number, sweep in enumerate(program.sweeps):
            lines += ["", f"; sweep {number + 1}", module_ir(emit(program, sweep, dtype, {}).ir)]
    return "\n".join(lines)


def opt_clips(leaf: Leaf) -> bool:
    """Whether the gradients are clipped within the step."""
    return getattr(leaf, "clip_norm", None) is not None


def _headline(program: Program, ndim: int, dtype: str) -> str:
    moves = sum(
        len([leaf for leaf in sweep.leaves if leaf.kind is Kind.FULL]) + len(sweep.stores) for sweep in program.sweeps
    )
    sweeps = len(program.sweeps)
    return (
        f"{program.name}, {dtype}, {ndim} dimension{'s' * (ndim != 1)}: {sweeps} sweep{'s' * (sweeps != 1)}, "
        f"{moves * BYTES[dtype]} bytes per element"
    )


def _scalar_names(program: Program) -> Iterator[tuple[Symbol, int]]:
    yield from ((symbol, place) for place, symbol in enumerate(program.scalars.outputs))


def _formulas(sweep: Sweep, number: int, reads: list[str], names: dict[int, str]) -> list[str]:
    writes = " ".join(store.place for store in sweep.stores)
    lines = [f"sweep {number + 1} reads {' '.join(reads)}" + (f", writes {writes}:" if writes else ":")]
    known = dict(names)
    roots = [*((f"{r.op}_{r.index}", r) for r in sweep.reductions), *((s.place, s.value) for s in sweep.stores)]
    uses: dict[int, int] = {}
    for symbol in sweep.body:
        for arg in symbol.args:
            uses[arg.index] = uses.get(arg.index, 0) + 1
    for symbol in sweep.body:
        if uses.get(symbol.index, 0) > 1:
            lines.append(f"  x{symbol.index} = {spell(symbol, known)}")
            known[symbol.index] = f"x{symbol.index}"
    lines += [f"  {name} = {spell(value, known)}" for name, value in roots]
    names |= {r.index: f"{r.op}_{r.index}" for r in sweep.reductions}
    return lines


def _between(program: Program, number: int, names: dict[int, str]) -> list[str]:
    if number + 1 == len(program.sweeps):
        return [f"then {slot} = {spell(value, names)}" for slot, value in program.small_outputs.items()]
    lines: list[str] = []
    for symbol in program.matrices[number]:
        place = place_of(symbol)
        lines.append(f"then {place} = orthogonalize({place}, steps={symbol.attribute}), on the array library")
        names[symbol.index] = place
    return lines


