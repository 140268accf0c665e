"""The commands and their options; what each command does lives in a room of its own."""

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

import gradstep
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
    """Gradient-descent optimizers: one fused step on NumPy arrays and PyTorch tensors."""


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
