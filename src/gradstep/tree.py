"""Trees of arrays: nested mappings and sequences flattened to dotted names."""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from gradstep.errors import ArgumentTypeError, DuplicateNameError

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
            f"{what} is a module ({type(tree).__name__}); pass model.trainable_parameters() instead"
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
