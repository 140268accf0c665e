"""`gradstep inspect`."""

from pathlib import Path

from gradstep.cli.checkpoint.contents import contents_of
from gradstep.cli.checkpoint.inspection_screen import show, show_verification
from gradstep.cli.checkpoint.opening import opened
from gradstep.cli.checkpoint.plain import inspection
from gradstep.cli.checkpoint.screen import console, on_terminal, print_json
from gradstep.cli.checkpoint.verification import verified


def run_inspect(path: Path, *, verify: bool, as_json: bool, everything: bool) -> int:
    """Show what a checkpoint holds; returns the exit code, 1 where tensors are damaged."""
    with opened(path) as file:
        contents = contents_of(file)
        verification = verified(file) if verify else None
        document = inspection(contents, verification)
    if as_json:
        print_json(document)
    else:
        screen = console()
        show(contents, screen, everything=everything or not on_terminal(), repeated=not on_terminal())
        if verification is not None:
            show_verification(verification, screen)
    return 1 if verification is not None and verification.damaged else 0
