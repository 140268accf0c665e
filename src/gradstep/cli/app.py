"""The commands and their options; what each command does lives in a room of its own."""

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

import gradstep
from gradstep.cli.bench import QUICK_ROUNDS, QUICK_SIZES, ROUNDS, SIZES
from gradstep.cli.complaint import Complaint, require
from gradstep.cli.race import SEEDS, STEPS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def run() -> int:
    """Run the command that the arguments name and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "µ" gets "?", not a traceback
    try:
        app(prog_name="gradstep")
    except Complaint as complaint:
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(complaint), err=True)
        return 2
    return 0


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gradstep {gradstep.__version__}")
        raise typer.Exit


@app.callback()
def gradstep_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Compare optimizers on a problem, time their steps, and look into the checkpoints that they save."""


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A checkpoint, as opt.save writes it, or its index.", show_default=False),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and check every SHA-256; exit with 1 if any is wrong.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show each parameter, however many there are.")] = False,
) -> None:
    """Show what a checkpoint holds: optimizers, schedules, parameters, slots and bytes.

    Below a schedule stands its curve; the mark divides the steps that were taken from those to come.

    Exit codes: 0; 1 if --verify finds damaged tensors; 2 if the file is no checkpoint that can be read.
    """
    require("gradstep inspect", "cli", "rich")
    from gradstep.cli.checkpoint.inspecting import run_inspect

    raise typer.Exit(run_inspect(file, verify=verify, as_json=as_json, everything=everything))


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show each difference, however many there are.")] = False,
) -> None:
    """Show what changed from one checkpoint to another, and by how much.

    Tensors with equal hashes are not read; the others are compared in float64, and NaN equals NaN.

    Exit codes: 0 if nothing differs; 1 if something does; 2 if a file is no checkpoint that can be read.
    """
    require("gradstep diff", "cli", "rich")
    from gradstep.cli.checkpoint.diffing import run_diff

    raise typer.Exit(run_diff(a, b, as_json=as_json, everything=everything))


@app.command()
def merge(
    index: Annotated[
        Path,
        typer.Argument(
            metavar="INDEX", help="A checkpoint that a Sharded optimizer has saved; its shards lie beside it."
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to be written; it must not exist.")],
) -> None:
    """Make one file of a checkpoint that several processes have saved.

    One tensor at a time is in memory, and every byte is checked by its SHA-256. Loading needs no merging: opt.load and
    gs.load read both forms.

    Exit codes: 0; 2 if the checkpoint cannot be read or the file not be written.
    """
    require("gradstep merge", "cli", "rich")
    from gradstep.cli.checkpoint.merging import run_merge

    raise typer.Exit(run_merge(index, file))


@app.command()
def race(
    task: Annotated[
        str, typer.Argument(help="What to train: digits (built in), or your own as file.py:object.")
    ] = "digits",
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Who races: names in any case, or rules of your own as file.py:Name (default: all ten).",
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,...",
            help="Learning rates for everyone (default: 0.1 to 10 times each optimizer's usual rate).",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each pair of optimizer and rate runs.")] = SEEDS,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = STEPS,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where race.json and race.png go.")] = Path(),
) -> None:
    """Find out which optimizer, at which learning rate, suits a problem.

    A task of your own is an object with init(seed) -> params, loss_and_grads(params, step, rng) -> (loss, grads)
    and, if it likes, evaluate(params) -> {name: value}; params are arrays by name, NumPy's or PyTorch's.

    The results are a table, race.json and race.png. Ctrl-C ends the race early and keeps what is finished.
    """
    require("gradstep race", "race", "rich", "matplotlib")
    from gradstep.cli.race.command import Options, run_race

    raise typer.Exit(run_race(Options(task, optimizers, rates, seeds, steps, output)))


@app.command()
def bench(
    family: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Optimizers, in any case: AdamW,Lion (default: all ten)."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="SIZE,...", help=f"Numbers of elements, up to 1e8 (default: {SIZES})."),
    ] = None,
    tensors: Annotated[int, typer.Option(min=1, help="Into how many equal tensors a size is split.")] = 1,
    library: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="numpy, torch, jax, mlx (default: numpy, and torch if installed)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    clip: Annotated[bool, typer.Option("--clip", help="Clip the gradients by their norm within the step.")] = False,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Against whom: torch-fused, torch-foreach, torch-default, torch-compile, bitsandbytes, torchao-8bit, "
            "pytorch-optimizer, deepspeed, optax, mlx, or none (default: all that are installed but torch-compile).",
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure torch.compile as well.")] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help=f"How often all take their turn (default: {ROUNDS}).", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each side (default: one per core).")] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where bench.json and bench.png go.")] = Path(),
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Sizes {QUICK_SIZES} and {QUICK_ROUNDS} rounds, unless given.")
    ] = False,
) -> None:
    """Measure how fast a step is on this machine.

    Our step takes turns, in one process, with the limit, a pass over the same
    memory that computes next to nothing, and with other packages' optimizers.
    Everyone has equal arrays of their own, and other gradients in each step.

    The results are a table, bench.json and bench.png. Ctrl-C ends early and
    keeps what is finished.
    """
    require("gradstep bench", "bench", "rich", "matplotlib")
    from gradstep.cli.bench.choosing import Options
    from gradstep.cli.bench.command import run_bench

    sizes = sizes if sizes is not None else QUICK_SIZES if quick else SIZES
    rounds = rounds if rounds is not None else QUICK_ROUNDS if quick else ROUNDS
    raise typer.Exit(
        run_bench(Options(family, sizes, tensors, library, dtype, clip, peers, compiled, rounds, threads, output))
    )
