"""Objects from a person's own files, written `file.py:object`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from gradstep.cli.complaint import Complaint, raised

_modules: dict[Path, ModuleType] = {}


def load(spec: str, default: str) -> tuple[object, Path]:
    """The object that `spec` names, `default` when it names only a file, and the file's folder."""
    path, name = _split(spec, default)
    if not path.is_file():
        raise Complaint(f"{spec}: there is no file {path} (looked in {Path.cwd()})")
    module = _execute(path.resolve())
    try:
        return getattr(module, name), path.resolve().parent
    except AttributeError:
        own = sorted(public for public in vars(module) if not public.startswith("_"))
        raise Complaint(
            f"{spec}: {path} defines no {name!r}; write {path}:NAME with one of its names: {', '.join(own) or 'none'}"
        ) from None


def _split(spec: str, default: str) -> tuple[Path, str]:
    file, _, name = spec.rpartition(":")
    if not file or spec.endswith(".py"):  # "task.py" alone; a drive letter is no separator
        return Path(spec), default
    return Path(file), name


def _execute(file: Path) -> ModuleType:
    if file in _modules:
        return _modules[file]
    spec = importlib.util.spec_from_file_location(f"gradstep_race_{file.stem}_{len(_modules)}", file)
    if spec is None or spec.loader is None:
        raise Complaint(f"{file} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise Complaint(
            f"{file} ended the program while being imported (exit code {error.code}); "
            'put what it runs under if __name__ == "__main__":'
        ) from None
    except Exception as error:
        raise raised(f"Importing {file}", error, file.parent) from None
    _modules[file] = module
    return module
