"""What a command says, in place of a traceback, when it cannot go on."""

import difflib
import importlib.util
import traceback
from collections.abc import Collection
from pathlib import Path

OUR_PACKAGE = Path(__file__).resolve().parents[1]


class Complaint(Exception):  # noqa: N818 (it is caught once, by the command, and printed)
    """One readable message for the person at the terminal; the command ends with exit code 2."""


def unknown(option: str, given: str, known: Collection[str], choices: str) -> Complaint:
    """The complaint that an option names something that there is not, with the nearest that there is."""
    near = difflib.get_close_matches(given.lower(), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return Complaint(f"{option}: there is no {given!r}.{hint} Choose from {choices}")


def needs_extra(what: str, extra: str, package: str) -> Complaint:
    """The complaint that a package of an optional extra is not installed."""
    return Complaint(f'{what} needs the package {package}, which is not installed: pip install "gradstep[{extra}]"')


def require(what: str, extra: str, *packages: str) -> None:
    """Complain about the first of these packages that is not installed; none is imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise needs_extra(what, extra, package)


def raised(what: str, error: BaseException, folder: Path | None) -> Complaint:
    """The complaint that a person's own code raised, with the part of the traceback that is theirs.

    Args:
        what: what was being done, the beginning of the message.
        error: the exception.
        folder: where their code lies; without one only the exception itself is shown.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if folder is not None and _is_theirs(Path(frame.filename), folder)
    ]
    lines = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    return Complaint(f"{what} raised {type(error).__name__}:\n{''.join(lines).rstrip()}")


def _is_theirs(file: Path, folder: Path) -> bool:
    file = file.resolve()
    return file.is_relative_to(folder) and not file.is_relative_to(OUR_PACKAGE) and "site-packages" not in file.parts
