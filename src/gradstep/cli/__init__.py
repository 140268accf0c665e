"""The command line: `main` is the console script `gradstep`."""

import sys

from gradstep.cli.complaint import Complaint, require


def main() -> None:
    """Run the command line. What it needs is imported only here: `import gradstep` needs none of it."""
    try:
        require("The command line", "cli", "typer")
    except Complaint as complaint:
        print(f"error: {complaint}", file=sys.stderr)
        sys.exit(2)
    from gradstep.cli.app import run

    sys.exit(run())
