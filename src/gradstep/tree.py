"""Trees of arrays: nested mappings and sequences flattened to dotted names."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from gradstep.errors import ArgumentTypeError, DuplicateNameError, ReadOnlyError
from gradstep.outline import Outline, outline_of

Tree: TypeAlias = "Mapping[str, object] | Mapping[int, object] | list[object] | tuple[object, ...]"


GRADS_OF_MODULE = "{name: p.grad for name, p in model.named_parameters()}"


def flatten(tree: object, what: str) -> dict[str, object]:
    """Name every leaf of `tree` by its path, joined with dots; `None` leaves are left out.

    Raises:
        ArgumentTypeError: `tree` is not a mapping or sequence, or a key is neither a string nor an integer.
        DuplicateNameError: two paths give one name.
    """
    reject_module(tree, what)
    if not isinstance(tree, (Mapping, list, tuple)):
        raise ArgumentTypeError(
            f"{what} must be a mapping from name to array, or a nested dict, list or tuple of them; "
            f"got {type(tree).__name__}"
            + (": dict(…) makes one of named_parameters()" if hasattr(tree, "send") else "")
        )
    named: dict[str, object] = {}
    paths: dict[str, tuple[object, ...]] = {}
    _collect(cast("Tree", tree), (), what, named, paths)
    return named


def named_arrays(tree: object, what: str) -> Mapping[str, Any]:
    """`flatten`, without a copy for the common case: a flat dict from string to array."""
    flat = cast("dict[str, Any]", tree)
    if type(flat) is dict:
        kinds: set[Any] = set(map(type, flat.values()))
        if set(map(type, flat)) <= {str} and not any(_is_nested(kind) for kind in kinds):
            return flat
    return flatten(tree, what)


class Namer:
    """`named_arrays` for trees that come again and again: one of the last one's shape has its names.

    Args:
        what: what the trees are called in errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._outline: Outline | None = None

    def __call__(self, tree: object) -> Mapping[str, Any]:
        """The arrays by name."""
        if self._outline is not None and (named := self._outline.named(tree)) is not None:
            return named
        named = named_arrays(tree, self._what)
        self._outline = None if named is tree else outline_of(tree, named)
        return named


def _is_nested(kind: Any) -> bool:
    return kind is type(None) or issubclass(kind, (Mapping, list, tuple)) or hasattr(kind, "named_parameters")


def reject_module(tree: object, what: str) -> None:
    """Refuse a framework's module, which looks like a tree of parameters but is none."""
    if callable(getattr(tree, "named_parameters", None)):
        raise ArgumentTypeError(
            f"{what} is a module ({type(tree).__name__}); pass its arrays by name: "
            + ("dict(model.named_parameters())" if what != "grads" else GRADS_OF_MODULE)
        )
    if callable(getattr(tree, "trainable_parameters", None)):
        raise ArgumentTypeError(
            f"{what} is a module ({type(tree).__name__}), whose arrays a step cannot replace; write "
            "model.update(opt.apply_gradients(grads, model.trainable_parameters())), or use gradstep.mlx"
        )


def _collect(
    tree: Tree,
    path: tuple[object, ...],
    what: str,
    named: dict[str, object],
    paths: dict[str, tuple[object, ...]],
) -> None:
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in entries:
        if not isinstance(cast("object", key), (str, int)) or isinstance(key, bool):
            raise ArgumentTypeError(f"{what}{_spell(path)}: keys must be strings or integers, got {key!r}")
        here = (*path, key)
        if value is None:
            continue
        if isinstance(value, (Mapping, list, tuple)):
            _collect(cast("Tree", value), here, what, named, paths)
            continue
        reject_module(value, f"{what}{_spell(here)}")
        if isinstance(value, (bool, int, float, complex)):
            raise ArgumentTypeError(
                f"{what}{_spell(here)} is a plain number ({value!r}), not an array; "
                "wrap it, or the list that it is in: np.array(..., dtype=np.float32)"
            )
        name = ".".join(map(str, here))
        if name in named:
            raise DuplicateNameError(
                f"{what}: two entries are both named {name!r}: {what}{_spell(paths[name])} "
                f"and {what}{_spell(here)}; rename one of them"
            )
        named[name], paths[name] = value, here


def _spell(path: tuple[object, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path) or " (the top)"


def entries_of(tree: object, names: Sequence[str]) -> list[tuple[Any, Any]]:
    """For each named leaf of `tree`, the container and key under which it can be replaced.

    Raises:
        ReadOnlyError: a container that holds one of them cannot be written: a tuple, or a read-only mapping.
    """
    if named_arrays(tree, "params") is tree:
        return [(tree, name) for name in names]
    found: dict[str, tuple[Any, Any]] = {}
    _find_entries(cast("Tree", tree), (), found)
    entries = [found[name] for name in names]
    for container, key in entries:
        if type(container) not in (dict, list):
            _try_to_write(container, key)
    return entries


def _find_entries(tree: Tree, path: tuple[object, ...], found: dict[str, tuple[Any, Any]]) -> None:
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, (Mapping, list, tuple)):
            _find_entries(cast("Tree", value), (*path, key), found)
        elif value is not None:
            found[".".join(map(str, (*path, key)))] = (tree, key)


def _try_to_write(container: Any, key: object) -> None:
    try:
        container[key] = container[key]
    except Exception as error:
        raise ReadOnlyError(
            f"params: the entry {key!r} of a {type(container).__name__} cannot be replaced, and arrays of this library "
            "cannot be written in place; use dicts and lists"
        ) from error


def name_of_path(path: Sequence[object]) -> str:
    """The name of a leaf by its path as JAX gives it."""
    return ".".join(map(_spell_key, path))


def _spell_key(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
