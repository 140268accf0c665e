"""The command line: `main` is the console script `gradstep`."""

import sys

from gradstep.cli.complaint import needs_extra


def main() -> None:
    """Run the command line. What it needs is imported only here: `import gradstep` needs none of it."""
    try:
        from gradstep.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gradstep"):
            raise
        print(f"error: {needs_extra('The command line', 'race', error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
